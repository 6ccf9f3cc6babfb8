"""Documents with a domain label, streamed from files, folders and Hugging Face datasets in a fixed order.

Inputs: JSON lines and Parquet files, a folder per domain (DIR/<domain>/**), a folder of labelled files, a folder of
`datasets.save_to_disk`, a Hugging Face dataset (`hf:NAME`, a plain hub id, or `hf:./folder`), and "builtin". What a file holds,
and how it is compressed, its content says (kinds.py, compression.py); what of a folder is read, folders.py. Nothing is ever read
whole except a single document: memory does not grow with the corpus.

Every document knows its place, so that an interrupted reader can go on from there.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lldfast.backends import require
from lldfast.data.making.compression import blocks, read_name, whole
from lldfast.data.making.contents import Content, Input
from lldfast.data.making.folders import Survey, files_of, one_file, printable
from lldfast.data.making.records import BOM, BadRecord, check_label, check_text, field_names, field_of, parse_line
from lldfast.data.making.rejects import Rejects
from lldfast.errors import CorruptError, InputError, LLDError, listed

SKIPPING = " (on_error skip, --on-error skip, leaves such records out)"
LABEL_FIELDS = ("meta.pile_set_name", "domain")  # looked for, in this order, when no label field is given


Place = tuple[int, int, int]


class Document(NamedTuple):
    text: str
    domain: str
    number: int  # among the documents of the source, from 0
    place: Place  # where reading goes on after it: input, lines or rows done in it, documents done


class Source:
    """All documents of several inputs.

    Args:
        inputs: "builtin", paths and dataset ids, read in this order (files of a folder in sorted order).
        text_field, domain_field: dotted paths into a record. With `domain_field=None` a folder of folders gives the
            labels; other inputs use the first of `LABEL_FIELDS` that their first record has.
        split, config: of Hugging Face datasets (default split: "train").
        domains, max_documents: keep only these domains; stop after so many kept documents.
        on_error: "stop" at a record that cannot be used, or "skip" it.

    Attributes:
        inputs: the resolved `Input`s.
        survey: the files that are not read, or are taken as plain text.
        empty: texts without any non-space character met in the last reading, by domain; they are skipped.
        rejects: records skipped in the last reading.
        met: every domain name met so far, kept or not.
        contents: input -> the bytes read of it and their hash, of the inputs that the last reading is done with.

    Raises:
        InputError: an input that does not exist or holds nothing. While reading, errors name the file and line.
        CorruptError: a compressed file that cannot be decompressed from its first byte on.
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
        on_error: Literal["stop", "skip"] = "stop",
    ) -> None:
        self.text_field, self.domain_field, self.split, self.config = text_field, domain_field, split or "train", config
        self.domains, self.max_documents = None if domains is None else set(domains), max_documents
        self.on_error = on_error
        self.survey = Survey()
        names = [inputs] if isinstance(inputs, str) else [str(item) for item in inputs]
        self.inputs = [item for name in names for item in self._resolve(name)]
        if not self.inputs:
            raise InputError("no input given: name files, folders or datasets, or use the source builtin")
        for item in self.inputs:
            if not item.name.isascii() and printable(item.name) != item.name:
                raise InputError(f"{printable(item.name)}: the name is not UTF-8, so it cannot be recorded: rename the file")
        self.empty: Counter[str] = Counter()
        self.rejects = Rejects()
        self.met: set[str] = set()
        self.contents: dict[int, Content] = {}

    def documents(self, start: Place = (0, 0, 0)) -> Iterator[Document]:
        """Every non-empty document of the kept domains, in order, after the `place` of an earlier one.

        Raises:
            InputError: a record that cannot be used, unless those are skipped; names file and line.
            CorruptError: a truncated or damaged compressed or Parquet file; says how many records were read.
        """
        self.empty, self.rejects, self.contents = Counter(), Rejects(), {}
        number = start[2]
        for file in range(start[0], len(self.inputs)):
            item, content = self.inputs[file], Content()
            for record, raw in self._records(item, start[1] if file == start[0] else 0, content):
                if number == self.max_documents:
                    self.contents[file] = content
                    return
                self.rejects.n_records += 1
                try:
                    text, domain = self._document(item, raw)
                except BadRecord as error:
                    place = f"{item.unit} {error.line or record}"
                    if self.on_error == "stop":
                        # Where the first record lacks a field, the fields were named wrongly: no record is to blame.
                        hint = "" if error.reason.startswith("no ") and not self.met else SKIPPING
                        raise InputError(f"{item.name}, {place}{error.at}: {error.detail}{hint}") from None
                    self.rejects.add(item.name, place, error.reason, error.detail)
                    continue
                self.met.add(domain)
                if self.domains is not None and domain not in self.domains:
                    continue
                if text.strip():
                    yield Document(text, domain, number, (file, record, number + 1))
                    number += 1
                else:
                    self.empty[domain] += 1
            self.contents[file] = content

    def where(self, place: Place) -> str:
        """The file and line, or row, of the document that has this place."""
        item = self.inputs[place[0]]
        return f"{item.name}, {item.unit} {place[1]}"

    def _resolve(self, name: str) -> list[Input]:
        if not name.strip():
            raise InputError("an input is empty: name a file, a folder or a dataset")  # Path("") is the current folder
        if name == "builtin":
            return [Input("builtin", name)]
        path = Path(name)
        if name.startswith("hf:"):
            return [Input("hub", name[3:])]
        if path.is_file():
            found = one_file(path, self.text_field, self.survey)
            return [Input(found.kind, name)]
        if not path.exists():
            if path.suffix or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
                raise InputError(f"{name}: no such file or folder")
            return [Input("hub", name)]
        if (path / "prepare.json").exists() and (path / "shards").is_dir():
            raise InputError(f"{name} is a folder that prepare made: give what it was made from")
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            return [Input("disk", name)]
        files = files_of(path, self.domain_field is not None, self.text_field, self.survey)
        return [Input(file.kind, str(file.path), file.domain) for file in files]

    def _records(self, item: Input, done: int, content: Content) -> Iterator[tuple[int, Any]]:
        """(number, what `_document` reads) of every record after the first `done`, which are not even parsed."""
        if item.kind == "jsonl":
            for record, line in enumerate(_lines(Path(item.name), content), 1):
                if record > done and line.strip():
                    yield record, line
            return
        if item.kind == "text":
            raw = whole(Path(item.name), content)
            if done < 1:
                yield 1, raw
            return
        if item.kind == "builtin":
            from lldfast.data.making import builtin

            rows: Iterator[Any] = itertools.islice(builtin.documents(), done, None)
        elif item.kind == "parquet":
            rows = self._parquet(item, done)
        else:
            rows = self._dataset(item, done)
        content.take(item.content(self.config))  # these are not read from their first byte to the last
        yield from enumerate(rows, done + 1)

    def _document(self, item: Input, raw: Any) -> tuple[str, str]:
        """(text, domain) of a record.

        Raises:
            BadRecord: it cannot be used.
        """
        if item.kind == "builtin":
            text, domain = raw
            return text, domain
        if item.kind == "text":
            assert item.domain is not None  # a text file is one of a domain's folder
            check_label(item.domain, None)
            return _text_of(raw), item.domain
        if isinstance(raw, BadRecord):
            raise raw
        row = parse_line(raw) if item.kind == "jsonl" else raw
        text = field_of(row, self.text_field, "text field")
        check_text(text, self.text_field)
        domain = item.domain or self._label(row, item)
        check_label(domain, self.domain_field)
        return text, domain

    def _label(self, row: Mapping[str, Any], item: Input) -> Any:
        if self.domain_field is None:
            known = field_names(row)
            self.domain_field = next((name for name in LABEL_FIELDS if name in known), None)
            if self.domain_field is None:
                raise BadRecord(
                    "no domain field",
                    f"no field {' or '.join(LABEL_FIELDS)} to take the domain from; give the domain field."
                    f" The fields are {listed(known, 30)}{self.survey.why_labelled(Path(item.name))}",
                )
        try:
            label = field_of(row, self.domain_field, "domain field")
        except BadRecord as error:
            error.detail += self.survey.why_labelled(Path(item.name))
            raise
        return str(label) if isinstance(label, int) and not isinstance(label, bool) else label

    def _parquet(self, item: Input, done: int) -> Iterator[Any]:
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
                        yield from _rows(batch.slice(max(0, done - read)))
                    read += len(batch)
        except (pa.ArrowException, OSError) as error:
            raise CorruptError(f"{item.name} cannot be read as Parquet after {read} rows ({error})") from error

    def _dataset(self, item: Input, done: int) -> Iterator[Mapping[str, Any]]:
        datasets = require("datasets", "this input needs")
        try:
            if item.kind == "disk":
                data = datasets.load_from_disk(item.name)
                if isinstance(data, Mapping):
                    if self.split not in data:
                        raise InputError(f"dataset {item.name} has no split {self.split!r}; it has {listed(data)}")
                    data = data[self.split]
            else:
                _check_frames(Path(item.name))
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
            if label is not None and hasattr(label, "int2str"):  # ClassLabel: the number's name; -1 stands for none
                number = row[self.domain_field]
                row = {**row, self.domain_field: None if number is None or number < 0 else label.int2str(number)}
            yield row


def _rows(batch: Any) -> list[Any]:
    """The rows of a record batch; in place of one that is not UTF-8, what is wrong with it."""
    try:
        return list(batch.to_pylist())
    except UnicodeDecodeError as error:
        if len(batch) == 1:
            return [BadRecord("invalid UTF-8", f"invalid UTF-8 ({error.reason})")]
        return [row for i in range(len(batch)) for row in _rows(batch.slice(i, 1))]


def _lines(path: Path, content: Content) -> Iterator[bytes]:
    pending: list[bytes] = []  # pieces of a line that spans blocks; joined once, so long lines cost linear time
    count = 0
    try:
        for block in blocks(path, content):
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
    except LLDError:
        raise
    except ValueError as error:
        raise CorruptError(f"{path} is damaged after {count} complete lines ({error})") from None
    if last := b"".join(pending):
        yield last


def _check_frames(folder: Path) -> None:
    """Refuse a zstd file of a local dataset that is cut off: what `datasets` reads it with takes it for shorter data.

    Raises:
        CorruptError: naming the file.
    """
    for path in sorted(folder.glob("**/*")) if folder.is_dir() else ():
        if path.is_file() and read_name(path).compression == "zstd":
            for _ in _lines(path, Content()):
                pass


def _text_of(raw: bytes) -> str:
    try:
        return raw.removeprefix(BOM).decode()
    except UnicodeDecodeError as error:
        start = error.start + (len(BOM) if raw.startswith(BOM) else 0)
        line = raw.count(b"\n", 0, start) + 1
        at = f", byte {start + 1} of the file"
        raise BadRecord("invalid UTF-8", f"invalid UTF-8 ({error.reason})", at, line) from None
