"""Documents with a domain label, streamed from files, folders and Hugging Face datasets in a fixed order.

Inputs: JSONL (plain, .gz, .zst), Parquet, a folder per domain (DIR/<domain>/**), a folder of labelled JSONL or Parquet
files, a folder of `datasets.save_to_disk`, a Hugging Face dataset (`hf:NAME`, a plain hub id, or `hf:./folder`), and
"builtin". Nothing is ever read whole except a single document: memory does not grow with the corpus.

Every document knows its place, so that an interrupted reader can go on from there.
"""

from __future__ import annotations

import difflib
import json
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lldfast.backends import require
from lldfast.errors import CorruptError, InputError, LLDError

LABEL_FIELDS = ("meta.pile_set_name", "domain")  # looked for, in this order, when no label field is given
JSON_SUFFIXES = (".jsonl", ".ndjson")
BLOCK = 1 << 16  # compressed bytes per step: bounds what one step can expand to


Place = tuple[int, int, int]


class Document(NamedTuple):
    text: str
    domain: str
    number: int  # among the documents of the source, from 0
    place: Place  # where reading goes on after it: input, lines or rows done in it, documents done


@dataclass(frozen=True)
class Input:
    """One file, dataset or generator of documents; `domain` is set where the folder, not a field, gives the label."""

    kind: str  # "jsonl", "parquet", "text", "disk", "hub" or "builtin"
    name: str
    domain: str | None = None

    def stamp(self) -> list[Any]:
        """Name, size and modification time: a resumed run must find its inputs as they were."""
        path = Path(self.name)
        if self.kind in ("jsonl", "parquet", "text") and path.exists():
            return [self.kind, self.name, path.stat().st_size, path.stat().st_mtime_ns]
        return [self.kind, self.name]


class Source:
    """All documents of several inputs.

    Args:
        inputs: "builtin", paths and dataset ids, read in this order (files of a folder in sorted order).
        text_field, domain_field: dotted paths into a record. With `domain_field=None` a folder of folders gives the
            labels; other inputs use the first of `LABEL_FIELDS` that their first record has.
        split, config: of Hugging Face datasets (default split: "train").
        domains, max_documents: keep only these domains; stop after so many kept documents.

    Attributes:
        inputs: the resolved `Input`s.
        empty: texts without any non-space character met so far, by domain; they are skipped.
        met: every domain name met so far, kept or not.

    Raises:
        InputError: an input that does not exist or holds nothing. While reading, errors name the file and line.
    """

    def __init__(
        self,
        inputs: str | Iterable[str],
        *,
        text_field: str = "text",
        domain_field: str | None = None,
        split: str | None = None,
        config: str | None = None,
        domains: Iterable[str] | None = None,
        max_documents: int | None = None,
    ) -> None:
        self.text_field, self.domain_field, self.split, self.config = text_field, domain_field, split or "train", config
        self.domains, self.max_documents = None if domains is None else set(domains), max_documents
        names = [inputs] if isinstance(inputs, str) else [str(item) for item in inputs]
        self.inputs = [item for name in names for item in _resolve(name, labelled=domain_field is not None)]
        if not self.inputs:
            raise InputError("no input given: name files, folders or datasets, or use the source builtin")
        self.empty: Counter[str] = Counter()
        self.met: set[str] = set()

    def documents(self, start: Place = (0, 0, 0)) -> Iterator[Document]:
        """Every non-empty document of the kept domains, in order, after the `place` of an earlier one.

        Raises:
            InputError: a missing or non-text field, invalid UTF-8 or JSON, an empty domain; names file and line.
            CorruptError: a truncated or damaged compressed or Parquet file; says how many records were read.
        """
        number = start[2]
        for file in range(start[0], len(self.inputs)):
            item = self.inputs[file]
            unit = "row" if item.kind in ("parquet", "disk", "hub") else "line"
            for record, text, domain in self._records(item, start[1] if file == start[0] else 0):
                if number == self.max_documents:
                    return
                where = f"{item.name}, {unit} {record}"
                _check_text(text, domain, where, self.text_field, self.domain_field)
                self.met.add(domain)
                if self.domains is not None and domain not in self.domains:
                    continue
                if text.strip():
                    yield Document(text, domain, number, (file, record, number + 1))
                    number += 1
                else:
                    self.empty[domain] += 1

    def where(self, place: Place) -> str:
        """The file and line, or row, of the document that has this place."""
        item = self.inputs[place[0]]
        return f"{item.name}, {'row' if item.kind in ('parquet', 'disk', 'hub') else 'line'} {place[1]}"

    def _records(self, item: Input, done: int) -> Iterator[tuple[int, Any, Any]]:
        if item.kind == "builtin":
            from lldfast.data.making import builtin

            for record, (text, domain) in enumerate(builtin.documents(), 1):
                if record > done:
                    yield record, text, domain
        elif item.kind == "text":
            if done < 1:
                yield 1, _read_text(Path(item.name)), item.domain
        elif item.kind == "jsonl":
            for record, row in _jsonl(Path(item.name), done):
                where = f"{item.name}, line {record}"
                yield record, self._text(row, where), item.domain or self._label(row, where)
        else:
            rows = self._parquet(item, done) if item.kind == "parquet" else self._dataset(item, done)
            for record, row in enumerate(rows, done + 1):
                where = f"{item.name}, row {record}"
                yield record, self._text(row, where), item.domain or self._label(row, where)

    def _text(self, row: Mapping[str, Any], where: str) -> Any:
        return _field(row, self.text_field, where, "text field")

    def _label(self, row: Mapping[str, Any], where: str) -> Any:
        if self.domain_field is None:
            known = _field_names(row)
            self.domain_field = next((name for name in LABEL_FIELDS if name in known), None)
            if self.domain_field is None:
                raise InputError(
                    f"{where}: no field {' or '.join(LABEL_FIELDS)} to take the domain from; give the domain field."
                    f" The fields are {_listed(known)}"
                )
        label = _field(row, self.domain_field, where, "domain field")
        return str(label) if isinstance(label, int) and not isinstance(label, bool) else label

    def _parquet(self, item: Input, done: int) -> Iterator[Mapping[str, Any]]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        read = 0
        try:
            with pq.ParquetFile(item.name) as file:
                names = file.schema_arrow.names
                wanted = [self.text_field] if item.domain else [self.text_field, self.domain_field]
                columns = sorted({f.split(".")[0] for f in wanted if f})
                # All columns where the label is still to be found, where a column's own name holds a dot (Parquet takes
                # that for nesting), and where a field is missing (the error lists what there is).
                if None in wanted or any(f in names and "." in f for f in wanted if f) or not set(columns) <= set(names):
                    columns = names
                for batch in file.iter_batches(batch_size=256, columns=columns):
                    if read + len(batch) > done:
                        yield from batch.slice(max(0, done - read)).to_pylist()
                    read += len(batch)
        except UnicodeDecodeError as error:
            raise InputError(f"{item.name}: invalid UTF-8 within rows {read + 1} to {read + 256} ({error.reason})") from None
        except (pa.ArrowException, OSError) as error:
            raise CorruptError(f"{item.name} cannot be read as Parquet after {read} rows ({error})") from error

    def _dataset(self, item: Input, done: int) -> Iterator[Mapping[str, Any]]:
        datasets = require("datasets", "this input needs")
        try:
            if item.kind == "disk":
                data = datasets.load_from_disk(item.name)
                if isinstance(data, Mapping):
                    if self.split not in data:
                        raise InputError(f"dataset {item.name} has no split {self.split!r}; it has {', '.join(data)}")
                    data = data[self.split]
            else:
                data = datasets.load_dataset(item.name, self.config, split=self.split, streaming=True)
            data = data.skip(done) if done else data
        except LLDError:
            raise
        except Exception as error:  # datasets, fsspec and the hub client raise many classes of their own
            which = f"config {self.config}, split {self.split}"
            hint = "; there is no file or folder of that name here either" if item.kind == "hub" else ""
            raise InputError(f"dataset {item.name} ({which}) cannot be opened: {error}{hint}") from error
        features = data.features or {}
        label = features.get(self.domain_field) if self.domain_field else None
        rows, read = iter(data), done
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:  # network and decoding errors of the dataset's own files
                raise InputError(f"dataset {item.name} failed after row {read}: {error}") from error
            read += 1
            if label is not None and hasattr(label, "int2str"):  # ClassLabel: the number's name
                row = {**row, self.domain_field: label.int2str(row[self.domain_field])}
            yield row


def _resolve(name: str, labelled: bool) -> list[Input]:
    if not name.strip():
        raise InputError("an input is empty: name a file, a folder or a dataset")  # Path("") is the current folder
    if name == "builtin":
        return [Input("builtin", name)]
    path = Path(name)
    if name.startswith("hf:"):
        return [Input("hub", name[3:])]
    if path.is_file():
        # A single .json is taken for JSON lines; in a folder per domain it is a document like any other.
        kind = "jsonl" if ".json" in path.suffixes[-2:] else _kind(path)
        if kind == "text":
            raise InputError(f"{name}: expected .jsonl (plain, .gz or .zst), .parquet, a folder or a dataset id")
        return [Input(kind, name)]
    if not path.exists():
        if path.suffix or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
            raise InputError(f"{name}: no such file or folder")
        return [Input("hub", name)]
    if (path / "prepare.json").exists() and (path / "shards").is_dir():
        raise InputError(f"{name} is a folder that prepare made: give what it was made from")
    if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        return [Input("disk", name)]
    if labelled or any(_kind(file) != "text" for file in _files(path, "*")):
        found = [Input(_kind(file), str(file)) for file in _files(path, "**/*") if _kind(file) != "text"]
        if not found:
            raise InputError(f"{name}: no JSONL or Parquet file in this folder (a folder per domain needs no domain field)")
        return found
    folders = sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))
    if not folders:
        raise InputError(f"{name}: neither data files nor a folder per domain in it")
    out = []
    for folder in folders:
        files = _files(folder, "**/*")
        if not files:
            raise InputError(f"{folder}: the folder of domain {folder.name!r} has no files")
        out += [Input(_kind(file), str(file), folder.name) for file in files]
    return out


def _files(folder: Path, pattern: str) -> list[Path]:
    files = (file for file in folder.glob(pattern) if file.is_file())
    return sorted(file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts))


def _kind(path: Path) -> str:
    suffix = Path(path.stem).suffix if path.suffix in (".gz", ".zst") else path.suffix
    return "jsonl" if suffix in JSON_SUFFIXES else "parquet" if suffix == ".parquet" else "text"


def _jsonl(path: Path, done: int) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(line number, record) of every non-blank line after the first `done` lines, which are not even parsed."""
    for number, raw in enumerate(_lines(path), 1):
        if number <= done or not raw.strip():
            continue
        if number == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        try:
            row = json.loads(raw.decode())
        except UnicodeDecodeError as error:
            raise InputError(f"{path}, line {number}, byte {error.start + 1}: invalid UTF-8 ({error.reason})") from None
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {number}: not valid JSON ({error.msg} at character {error.pos + 1})") from None
        except RecursionError:
            raise InputError(f"{path}, line {number}: JSON nested too deeply") from None
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number}: expected a JSON object, got {type(row).__name__}")
        yield number, row


def _lines(path: Path) -> Iterator[bytes]:
    pending: list[bytes] = []  # pieces of a line that spans blocks; joined once, so long lines cost linear time
    count = 0
    try:
        for block in _blocks(path):
            head, *rest = block.split(b"\n")
            pending.append(head)
            if rest:
                count += 1
                yield b"".join(pending)
                count += len(rest) - 1
                yield from rest[:-1]
                pending = [rest[-1]]
    except EOFError:
        raise CorruptError(f"{path} is truncated: the compressed data ends early, after {count} complete lines") from None
    except ValueError as error:
        raise CorruptError(f"{path} is damaged after {count} complete lines ({error})") from None
    if last := b"".join(pending):
        yield last


def _blocks(path: Path) -> Iterator[bytes]:
    """Decompressed blocks. Raises EOFError when a compressed file ends inside a frame, ValueError when it is damaged."""
    if path.suffix == ".zst":
        zstandard = require("zstandard", "this input needs")
        failed: type[Exception] = zstandard.ZstdError

        def fresh() -> Any:
            return zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
    elif path.suffix == ".gz":
        failed = zlib.error

        def fresh() -> Any:
            return zlib.decompressobj(wbits=31)
    else:
        with open(path, "rb") as file:
            while block := file.read(BLOCK):
                yield block
        return
    state, inside = fresh(), False
    with open(path, "rb") as file:
        while raw := file.read(BLOCK):
            while raw:
                if state.eof:  # files made of several frames: the next one begins
                    state = fresh()
                try:
                    block = state.decompress(raw)
                except failed as error:
                    raise ValueError(str(error)) from None
                if block:
                    yield block
                inside = not state.eof
                raw = state.unused_data if state.eof else b""
    if inside:
        raise EOFError


def _read_text(path: Path) -> str:
    try:
        raw = b"".join(_blocks(path)).removeprefix(b"\xef\xbb\xbf")
    except EOFError:
        raise CorruptError(f"{path} is truncated: the compressed data ends early") from None
    except ValueError as error:
        raise CorruptError(f"{path} is damaged ({error})") from None
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}, line {line}, byte {error.start + 1} of the file: invalid UTF-8 ({error.reason})") from None


def _field(row: Mapping[str, Any], path: str, where: str, what: str) -> Any:
    if path in row:
        return row[path]
    value: Any = row
    for key in path.split("."):
        if not isinstance(value, Mapping) or key not in value:
            names = _field_names(row)
            raise InputError(f"{where}: no {what} {path!r}; the fields are {_listed(names)}.{did_you_mean(path, names)}")
        value = value[key]
    return value


def did_you_mean(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""


def _field_names(row: Mapping[str, Any], prefix: str = "") -> list[str]:
    names = []
    for key, value in row.items():
        names.append(f"{prefix}{key}")
        if isinstance(value, Mapping):
            names += _field_names(value, f"{prefix}{key}.")
    return names


def _listed(names: Iterable[str], most: int = 30) -> str:
    ordered = list(names)
    return ", ".join(ordered[:most]) + (f", and {len(ordered) - most} more" if len(ordered) > most else "")


def _check_text(text: Any, domain: Any, where: str, text_field: str, domain_field: str | None) -> None:
    if not isinstance(text, str):
        raise InputError(f"{where}: field {text_field!r} must be text, got {type(text).__name__}")
    if not isinstance(domain, str):
        raise InputError(f"{where}: field {domain_field!r} must be a domain name, got {type(domain).__name__}")
    if not domain.strip():
        raise InputError(f"{where}: the domain name is empty")
    if not domain.isprintable() and any(unicodedata.category(c) == "Cc" for c in domain):  # it goes to terminals and tables
        raise InputError(f"{where}: the domain name {domain!r:.100} has a control character")
    for what, value in (("text", text), ("domain name", domain)):
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                at = f"{error.reason} at character {error.start + 1}"
                raise InputError(f"{where}: the {what} is not valid Unicode ({at})") from None
