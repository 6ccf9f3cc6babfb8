"""What a file is compressed with is told by its first bytes, and every way of writing such a file is read."""

import bz2
import gzip
import io
import lzma
import struct
import tarfile
import zipfile

import pytest
import zstandard

from lldfast.data.making import compression
from lldfast.data.making.compression import blocks
from lldfast.data.making.sources import Source
from lldfast.errors import CorruptError, InputError

LINES = b"".join(b'{"text": "document %d", "domain": "d"}\n' % i for i in range(2000))
A, B = LINES[:30_001], LINES[30_001:]


def zst(raw: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(raw)


def alone(raw: bytes) -> bytes:
    return lzma.compress(raw, lzma.FORMAT_ALONE)


SKIPPABLE = struct.pack("<II", 0x184D2A53, 5) + b"index"
WRITTEN = {
    "plain": LINES,
    "gzip": gzip.compress(LINES),
    "gzip members, padded": gzip.compress(A) + gzip.compress(b"") + gzip.compress(B) + bytes(512),
    "zstd": zst(LINES),
    "zstd, skippable first": SKIPPABLE + zst(A) + SKIPPABLE + zst(B) + SKIPPABLE,
    "bz2 streams": bz2.compress(A, 1) + bz2.compress(B),
    "xz streams, padded": lzma.compress(A) + bytes(8) + lzma.compress(B, check=lzma.CHECK_SHA256),
    "lzma": alone(LINES),
}


@pytest.mark.parametrize("way", WRITTEN)
@pytest.mark.parametrize("name", ["d", "d.jsonl", "D.JSON.GZ", "d.bin"])
def test_content_decides_not_the_name(tmp_path, way, name):
    (tmp_path / name).write_bytes(WRITTEN[way])
    assert b"".join(blocks(tmp_path / name)) == LINES
    found = [d.text for d in Source(str(tmp_path / name)).documents()]
    assert found == [f"document {i}" for i in range(2000)]


@pytest.mark.parametrize("suffix", ["gz", "GZIP", "zst", "zstd", "bz2", "xz", "lzma"])
def test_suffixes_of_a_folder(tmp_path, suffix):
    written = {"gz": "gzip", "gzip": "gzip", "zst": "zstd", "zstd": "zstd", "bz2": "bz2 streams", "xz": "xz streams, padded"}
    (tmp_path / "c" / "d").mkdir(parents=True)
    (tmp_path / "c" / "d" / f"part.json.{suffix}").write_bytes(WRITTEN[written.get(suffix.lower(), "lzma")])
    assert sum(d.text.startswith("document ") for d in Source(str(tmp_path / "c")).documents()) == 2000


@pytest.mark.parametrize("way", [way for way in WRITTEN if way != "plain"])
def test_truncated_and_damaged(tmp_path, way):
    raw = WRITTEN[way].rstrip(b"\0").removesuffix(SKIPPABLE)
    path = tmp_path / "d.jsonl.x"
    path.write_bytes(raw[:-9])
    with pytest.raises(CorruptError, match=r"d\.jsonl\.x is truncated: the compressed data ends early, after \d+ complete lines"):
        list(Source(str(path), on_error="skip").documents())  # a damaged file is never skipped
    middle = len(raw) // 2
    path.write_bytes(raw[:middle] + bytes(b ^ 0x5A for b in raw[middle : middle + 64]) + raw[middle + 64 :])
    with pytest.raises((CorruptError, InputError), match=r"d\.jsonl\.x"):
        list(Source(str(path)).documents())


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".bz2", ".xz", ".lzma"])
def test_a_name_that_promises_too_much(tmp_path, suffix):
    path = tmp_path / f"d.jsonl{suffix}"
    path.write_bytes(b"no compression here\n")
    with pytest.raises(CorruptError, match=rf"d\.jsonl\{suffix} is damaged after 0 complete lines"):
        Source(str(path))
    path.write_bytes(LINES)  # a server that decompressed it while it was fetched
    source = Source(str(path))
    assert sum(1 for _ in source.documents()) == 2000
    assert source.survey.notes() == [f"1 file is read as what the content says (not compressed, called {suffix}): {path}"]


def tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("d.jsonl"), io.BytesIO())
    return out.getvalue()


def zipped() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("d.jsonl", LINES)
    return out.getvalue()


@pytest.mark.parametrize(
    ("name", "raw", "what"),
    [
        ("d.jsonl.lz4", b"\x04\x22\x4d\x18\x64\x40\xa7", "compressed with lz4"),
        ("d.jsonl", b"\xff\x06\x00\x00sNaPpY\x00", "compressed with snappy"),
        ("d.jsonl.snappy", b"\x9a\x4f\x10\x00{ text", r"called \.snappy"),
        ("d.jsonl.Z", b"\x1f\x9d\x90", "compressed with compress"),
        ("d.zip", zipped(), "a zip archive"),
        ("d.jsonl", zipped(), "a zip archive"),
        ("d.tar", tar(), "a tar archive"),
        ("d.tar.gz", gzip.compress(tar()), "a tar archive"),
        ("d.tgz", gzip.compress(tar()), "a tar archive"),
        ("d.jsonl.zst", zst(tar()), "a tar archive"),
        ("d.7z", b"7z\xbc\xaf\x27\x1c\x00", "a 7z archive"),
        ("d.jsonl.gz", gzip.compress(gzip.compress(LINES)), "compressed twice"),
    ],
)
@pytest.mark.parametrize("folder", ["", "c/domain/"])
def test_what_is_not_read_is_refused_with_a_way_out(tmp_path, name, raw, what, folder):
    path = tmp_path / folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(raw)
    with pytest.raises(InputError, match=rf"{name} is {what}.*: (unpack|decompress) it"):
        Source(str(tmp_path / "c" if folder else path))


def test_little_expands_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(compression, "MOST_EXPANDED", 1 << 16)
    for way in (bz2.compress, lzma.compress, alone):
        (tmp_path / "z").write_bytes(way(bytes(1 << 20)))
        sizes = [len(block) for block in blocks(tmp_path / "z")]
        assert sum(sizes) == 1 << 20 and max(sizes) <= 1 << 16
