"""Bytes of a file, whatever it is compressed with: the first bytes say what that is, never the name.

A file may be made of several members or frames, one after the other (`cat a.gz b.gz`, pzstd, parallel xz), with zero bytes
between them as tapes and xz pad, and with zstd's skippable frames. Memory is bounded: what one step can expand to is limited.
"""

from __future__ import annotations

import bz2
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from lldfast.backends import require
from lldfast.data.making.contents import Content
from lldfast.errors import CorruptError, InputError

BLOCK = 1 << 16  # compressed bytes per step
MOST_EXPANDED = 1 << 24  # bytes that one call may give, where the library can be told

# The first bytes of what is read. bz2's go on with the magic number of its first block, or of its end: "BZh9" may begin a text.
READ = re.compile(
    rb"(?P<gzip>\x1f\x8b)|(?P<zstd>\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18)|(?P<bz2>BZh[1-9](?:1AY&SY|\x17rE8P\x90))"
    rb"|(?P<xz>\xfd7zXZ\x00)|(?P<lzma>\x5d\x00\x00[\x00-\xff]{2}(?:\xff{8}|[\x00-\xff]{5}\x00{3}))"
)
# And of what is not.
REFUSED = re.compile(
    rb"(?P<lz4>\x04\x22\x4d\x18|\x02\x21\x4c\x18|\x03\x21\x4c\x18)|(?P<snappy>\xff\x06\x00\x00sNaPpY)|(?P<lzop>\x89LZO\x00)"
    rb"|(?P<compress>\x1f\x9d)|(?P<zip>PK\x03\x04|PK\x05\x06)|(?P<sevenzip>7z\xbc\xaf\x27\x1c)|(?P<rar>Rar!\x1a\x07)"
    rb"|(?P<tar>[\x00-\xff]{257}ustar)"
)
ARCHIVES = {"zip": "a zip archive", "sevenzip": "a 7z archive", "rar": "a rar archive", "tar": "a tar archive"}
RECOMPRESS = "decompress it, or compress it with gzip or zstd"
# Names of these formats, some of which have no first bytes to be known by.
SUFFIXES = {
    **dict.fromkeys((".gz", ".gzip", ".tgz"), "gzip"),
    **dict.fromkeys((".zst", ".zstd", ".tzst"), "zstd"),
    **dict.fromkeys((".bz2", ".bz", ".tbz2"), "bz2"),
    **dict.fromkeys((".xz", ".txz"), "xz"),
    ".lzma": "lzma",
    **dict.fromkeys((".lz4", ".snappy", ".sz", ".lzo", ".br"), "unread"),
}


class Name(NamedTuple):
    """What a file's name says of it: `suffix` is lower case, without that of a compression ("" for none)."""

    suffix: str
    compression: str | None


def read_name(path: Path) -> Name:
    compression = SUFFIXES.get(path.suffix.lower())
    return Name((Path(path.stem) if compression else path).suffix.lower(), compression)


def refused(head: bytes) -> str | None:
    """What bytes that begin like this are, where they are an archive or compressed in a way that is not read; else None."""
    found = REFUSED.match(head)
    if found is None:
        return None
    name = str(found.lastgroup)
    if name in ARCHIVES:
        return f"{ARCHIVES[name]}, which is not read: unpack it and give the folder"
    return f"compressed with {name}, which is not read: {RECOMPRESS}"


def compression_of(head: bytes) -> str | None:
    found = READ.match(head)
    return found.lastgroup if found else None


def blocks(path: Path, content: Content | None = None) -> Iterator[bytes]:
    """The decompressed bytes of a file, in blocks; `content` hears the bytes as they are stored.

    Raises:
        InputError: the file is an archive, or compressed in a way that is not read.
        EOFError: it ends inside a frame.
        ValueError: it is damaged.
    """
    with open(path, "rb") as file:
        head = file.read(BLOCK)
        if why := refused(head):
            raise InputError(f"{path} is {why}")
        kind = compression_of(head)
        file.seek(0)
        stored = _stored(file, content)
        yield from stored if kind is None else _expanded(stored, kind)


def whole(path: Path, content: Content | None = None) -> bytes:
    """The decompressed bytes of a file.

    Raises:
        CorruptError: it is truncated or damaged.
    """
    try:
        return b"".join(blocks(path, content))
    except EOFError:
        raise CorruptError(f"{path} is truncated: the compressed data ends early") from None
    except InputError:
        raise
    except ValueError as error:
        raise CorruptError(f"{path} is damaged ({error})") from None


def _stored(file: IO[bytes], content: Content | None) -> Iterator[bytes]:
    while raw := file.read(BLOCK):
        if content is not None:
            content.update(raw)
        yield raw


def _expanded(stored: Iterator[bytes], kind: str) -> Iterator[bytes]:
    fresh, failed = _decompressor(kind)
    padded = kind in ("gzip", "xz")
    state, inside = fresh(), True
    for raw in stored:
        while raw:
            if state.eof:  # the next of several frames
                raw = raw.lstrip(b"\0") if padded else raw
                if not raw:
                    break
                state = fresh()
            try:
                if kind in ("gzip", "zstd"):
                    block = state.decompress(raw)
                    if block:
                        yield block
                else:  # these take all of `raw` and give what fits
                    yield state.decompress(raw, MOST_EXPANDED)
                    while not (state.eof or state.needs_input):
                        yield state.decompress(b"", MOST_EXPANDED)
            except failed as error:
                raise ValueError(str(error)) from None
            inside = not state.eof
            raw = state.unused_data if state.eof else b""
    if inside:
        raise EOFError


def _decompressor(kind: str) -> tuple[Callable[[], Any], type[Exception]]:
    """(what makes an object with `decompress`, `eof` and `unused_data`, the error it raises)."""
    if kind == "gzip":
        return lambda: zlib.decompressobj(wbits=31), zlib.error
    if kind == "bz2":
        return bz2.BZ2Decompressor, OSError
    if kind in ("xz", "lzma"):
        return lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ if kind == "xz" else lzma.FORMAT_ALONE), lzma.LZMAError
    zstandard = require("zstandard", "this input needs")
    return lambda: zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj(), zstandard.ZstdError
