"""What a file holds, told by its content: JSON lines, Parquet, plain text, or something that is not read (binary, archives).

A name settles only what content leaves open: a first line that is no JSON is a bad record of a file called .jsonl, else text.
"""

from __future__ import annotations

import csv
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lldfast.data.making.compression import RECOMPRESS, Name, blocks, compression_of, read_name, refused
from lldfast.data.making.records import BOM, has_field
from lldfast.errors import CorruptError

PARQUET_NAMES = (".parquet", ".pq")
JSON_LINES = (".jsonl", ".ndjson", ".jl", ".jsonlines")
TABLES = {".csv": ",", ".tsv": "\t"}
HEAD_BYTES = 1 << 16
MOST_LINES = 20  # of the head that are parsed
AS_LINES = "write one record a line, as `jq -c` does"

# Formats that hold records but are not read.
REFUSED = re.compile(
    rb"(?P<arrow>ARROW1\x00\x00|\xff\xff\xff\xff[\x00-\xff]{2}\x00\x00|FEA1\x00)|(?P<orc>ORC)|(?P<avro>Obj\x01)"
    rb"|(?P<utf16>\xff\xfe|\xfe\xff)"
)
REFUSED_AS = {
    "arrow": ("an Arrow or Feather file", "write it as Parquet"),
    "orc": ("an ORC file", "write it as Parquet"),
    "avro": ("an Avro file", "write it as Parquet or JSON lines"),
    "utf16": ("text in UTF-16", "write it as UTF-8"),
}
PARQUET = re.compile(rb"PAR1\x15")
# Beginnings of files that are no text. Most other such files have a NUL byte soon, which no text needs.
BINARY = re.compile(
    rb"%PDF-\d\.\d *[\r\n]|\x89(?:PNG|HDF)\r\n|\xff\xd8\xff|\x93NUMPY|\x80[\x02-\x05]|\x7fELF|\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"
    rb"|\xca\xfe\xba\xbe|[\xcf\xce]\xfa\xed\xfe"
)


@dataclass
class Kind:
    """What was found out about a file.

    Attributes:
        holds: "jsonl", "parquet", "text", "binary" or "empty".
        is_text: for people, what it is if it is taken as plain text or not read.
        n_objects: JSON lines: objects among the first lines.
        has_text: JSON lines: one of them has the text field.
        unexpected: for people, where the content is not what the name says; else "".
        refused: why it cannot be read, though it holds records or is an archive; else "".
        may_be_text: it is refused as records, which code and configuration may look like: a document where most files are text.
    """

    holds: str
    is_text: str = "plain text"
    n_objects: int = 0
    has_text: bool = False
    unexpected: str = ""
    refused: str = ""
    may_be_text: bool = False


def kind_of(path: Path, text_field: str) -> Kind:
    """What the first bytes of a file say that it holds; `refused` says it where that cannot be read.

    Raises:
        CorruptError: its first bytes cannot be decompressed, or its name says a compression that it does not have.
    """
    name = read_name(path)
    with open(path, "rb") as file:
        stored = file.read(HEAD_BYTES)
    if why := refused(stored):
        return Kind("text", refused=why)
    compression = compression_of(stored)
    head, complete = _head(path)
    if compression and (refused(head) or compression_of(head)):
        return Kind("text", refused=refused(head) or "compressed twice: decompress it once")
    if not stored:  # of no bytes at all, whatever it is called
        return Kind("parquet" if name.suffix == ".parquet" else "empty")
    kind = _kind_of(head, complete, name, text_field, compression, head[-4:] if complete else b"" if compression else _tail(path))
    if name.compression and compression is None and kind.holds != "parquet" and not kind.n_objects and not kind.refused:
        if name.compression == "unread":
            kind.refused = f"called {path.suffix}, a compression that is not read: {RECOMPRESS}"
            return kind
        raise CorruptError(f"{path} is damaged after 0 complete lines: its name says {name.compression}, its first bytes do not")
    if kind.holds == "parquet" and name.suffix in PARQUET_NAMES:  # pandas names the compression inside: .parquet.gzip
        return kind
    if name.compression and name.compression != compression and not kind.unexpected:
        kind.unexpected = f"{'compressed with ' + compression if compression else 'not compressed'}, called {path.suffix}"
    return kind


def _head(path: Path) -> tuple[bytes, bool]:
    """The first decompressed bytes, with the whole of a first line that may be a record; whether they are the whole file."""
    head = bytearray()
    try:
        for block in blocks(path):
            head += block
            if len(head) >= HEAD_BYTES and (b"\n" in head.lstrip() or head.removeprefix(BOM).lstrip()[:1] != b"{"):
                return bytes(head), False
    except (EOFError, ValueError) as error:
        if not head:
            ends = "is truncated: the compressed data ends early, after" if isinstance(error, EOFError) else "is damaged after"
            raise CorruptError(f"{path} {ends} 0 complete lines" + (f" ({error})" if str(error) else "")) from None
        return bytes(head), False  # what is wrong is told, with its place, when the file is read
    return bytes(head), True


def _tail(path: Path) -> bytes:
    """The last four bytes of a file."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 4))
        return file.read()


def _kind_of(head: bytes, complete: bool, name: Name, text_field: str, compression: str | None, tail: bytes) -> Kind:
    """`compression` is that of the stored bytes, `tail` the last four bytes, where they are known."""
    if PARQUET.match(head) or (name.suffix == ".parquet" and not head.lstrip().startswith(b"{")):
        unexpected = "" if name.suffix in (*PARQUET_NAMES, "") else f"Parquet, called {name.suffix}"
        compressed = "Parquet, compressed as a whole: decompress it" if compression else ""
        return Kind("parquet", "Parquet", unexpected=unexpected, refused=compressed)
    # An ORC file says so at both ends; a text may begin with these letters.
    if (other := REFUSED.match(head)) and (other.lastgroup != "orc" or tail.startswith(b"ORC")):
        what, way = REFUSED_AS[str(other.lastgroup)]
        return Kind("text", what, refused=f"{what}, which is not read: {way}")
    plain = head.removeprefix(BOM).lstrip()
    if not plain:
        return Kind("empty" if complete else "text")
    lines = [line for line in head.removeprefix(BOM).split(b"\n") if line.strip()]
    if not complete and len(lines) > 1:
        lines.pop()  # it may go on
    lines = lines[:MOST_LINES]
    objects = [found for line in lines if (found := _object(line)) is not None] if plain[:1] == b"{" or b"\n{" in head else []
    has_text = any(has_field(found, text_field) for found in objects)
    if objects and 2 * len(objects) >= len(lines):
        known = (*JSON_LINES, ".json", "")
        unexpected = "" if name.suffix in known else f"JSON lines, called {name.suffix}"
        return Kind("jsonl", "JSON lines", len(objects), has_text, unexpected)
    called_json = name.suffix in (*JSON_LINES, ".json")
    if plain[:1] in b"[{" and (first := _first_object(plain, text_field)) and (called_json or _is_json(plain, complete)):
        return Kind("text", first, refused=f"{first} with records in it, not JSON lines: {AS_LINES}", may_be_text=True)
    if name.suffix in JSON_LINES:
        return Kind("jsonl", "JSON lines", len(objects), has_text)
    if BINARY.match(head) or b"\0" in head[:HEAD_BYTES]:
        return Kind("binary", "binary")
    if (mark := TABLES.get(name.suffix)) and text_field in _columns(lines[0], mark):
        what = f"{name.suffix[1:].upper()} with a column {text_field!r}"
        way = "write it as JSON lines or Parquet"
        return Kind("text", what, refused=f"{what}, which is not read: {way}", may_be_text=True)
    return Kind("text", "JSON over several lines" if plain[:1] in b"[{" and name.suffix == ".json" else "plain text")


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _first_object(plain: bytes, text_field: str) -> str:
    """What JSON over several lines is, where its first object is a record with the text field; else ""."""
    text = plain.decode("utf-8", "ignore")
    array = text[0] == "["
    start = text[1:].lstrip() if array else text
    if not start.startswith("{"):
        return ""
    try:
        found, _ = json.JSONDecoder().raw_decode(start)
        has_text = isinstance(found, dict) and has_field(found, text_field)
    except RecursionError:
        return ""
    except ValueError:  # it goes on after the head, or is no JSON: then the field's name, where an object's first level begins
        key = re.escape(json.dumps(text_field.split(".")[0]))
        has_text = len(plain) >= HEAD_BYTES and re.search(rf"[{{,]\s*{key}\s*:", start) is not None
    return ("one JSON array" if array else "JSON objects over several lines") if has_text else ""


def _is_json(plain: bytes, complete: bool) -> bool:
    """Whether JSON over several lines is JSON to its end, or as far as the head shows: code may begin with a literal."""
    text = plain.decode("utf-8", "ignore")
    array, at = text[0] == "[", 0
    at += array
    while at < len(text):
        if text[at].isspace() or (array and text[at] == ","):
            at += 1
        elif array and text[at] == "]":
            return text[at + 1 :].lstrip()[:1] in ("", "[", "{")
        else:
            try:
                at = json.JSONDecoder().raw_decode(text, at)[1]
            except (ValueError, RecursionError):
                return not complete  # the head may end inside a value
    return not (array and complete)


def _columns(line: bytes, mark: str) -> list[str]:
    return next(csv.reader([line.decode("utf-8", "ignore")], delimiter=mark), [])
