"""Which files of a folder are read, as what, and which are not: none is left out or taken for text without being named."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from lldfast.data.making.compression import read_name
from lldfast.data.making.kinds import JSON_LINES, Kind, kind_of
from lldfast.errors import InputError

MOST_LISTED = 100  # names in prepare.json, of each kind; the counts are of all
MOST_SHOWN = 5  # in a message

# What lies beside data: checksums and indexes, which are never text; what describes records, where there are records.
NEVER_TEXT = re.compile(r"(?i).*\.(crc|md5|sha1|sha224|sha256|sha384|sha512|idx)|(md5|sha\d+)sums?(\.txt)?|_success")
BESIDE_RECORDS = re.compile(
    r"(?i)(readme|licen[sc]e|copying|notice|citation|changelog|dataset_infos?|dataset_card|checksums?|manifest)\b.*|_[a-z].*|.*\.lock"
)


class Listed:
    """Names, of which the first are kept."""

    def __init__(self) -> None:
        self.count = 0
        self.names: list[str] = []

    def add(self, name: str) -> None:
        self.count += 1
        if len(self.names) < MOST_LISTED:
            self.names.append(printable(name))

    def __str__(self) -> str:
        more = f", and {self.count - MOST_SHOWN:,} more" if self.count > MOST_SHOWN else ""
        return ", ".join(self.names[:MOST_SHOWN]) + more


def printable(name: str) -> str:
    """A file's name as text: bytes in it that are not UTF-8 are written out."""
    return name.encode(errors="backslashreplace").decode()


@dataclass
class Survey:
    """What was found about the files of the inputs, for people.

    Attributes:
        plain_text: files that are a document each.
        not_read, unexpected: why -> files; "unexpected" are read, though their names say something else.
        empty: files without text.
        not_domains: folders with folders in them that are no domains -> the file in it that says so, by holding records.
    """

    plain_text: Listed = field(default_factory=Listed)
    empty: Listed = field(default_factory=Listed)
    not_read: dict[str, Listed] = field(default_factory=dict)
    unexpected: dict[str, Listed] = field(default_factory=dict)
    not_domains: dict[Path, Path] = field(default_factory=dict)

    def leave_out(self, path: Path, why: str) -> None:
        self.not_read.setdefault(why, Listed()).add(str(path))

    def take(self, path: Path, kind: Kind) -> None:
        """Note a file that is read."""
        if kind.unexpected:
            self.unexpected.setdefault(kind.unexpected, Listed()).add(str(path))
        if kind.holds == "text":
            self.plain_text.add(str(path))
        elif kind.holds == "empty":
            self.empty.add(str(path))

    def why_labelled(self, path: Path) -> str:
        """For an error about the label of a record of this file: why its folder does not give one, and what to do; or ""."""
        for folder, records in self.not_domains.items():
            if folder in path.parents:
                because = f"because of {printable(str(records))}: put it into a domain's folder, or elsewhere"
                return f" ({printable(str(folder))} is not taken as a folder per domain {because})"
        return ""

    def notes(self) -> list[str]:
        """A line for each thing that a reader of the corpus should know."""
        lines = [f"{_files(found)} not read ({why}): {found}" for why, found in sorted(self.not_read.items())]
        lines += [f"{_files(found)} read as what the content says ({what}): {found}" for what, found in self.unexpected.items()]
        if self.empty.count:
            lines.append(f"{_files(self.empty)} empty: {self.empty}")
        if self.plain_text.count:
            lines.append(f"{_files(self.plain_text)} taken as plain text, a document each: {self.plain_text}")
        return lines

    def to_json(self) -> dict[str, Any]:
        def shown(found: Listed) -> dict[str, Any]:
            return {"count": found.count, "names": found.names}

        return {
            "plain_text": shown(self.plain_text),
            "empty": shown(self.empty),
            "not_read": {why: shown(found) for why, found in sorted(self.not_read.items())},
            "unexpected": {what: shown(found) for what, found in sorted(self.unexpected.items())},
        }


def _files(found: Listed) -> str:
    return f"{found.count:,} file{' is' if found.count == 1 else 's are'}"


class Found(NamedTuple):
    """A file that is read; `domain` is set where its folder gives the label."""

    kind: str  # "jsonl", "parquet" or "text"
    path: Path
    domain: str | None = None


def one_file(path: Path, text_field: str, survey: Survey) -> Found:
    """A file that is named itself: records, by content or, where that leaves it open, by name.

    Raises:
        InputError: it holds no records that can be read.
        CorruptError: it cannot be decompressed.
    """
    kind = kind_of(path, text_field)
    if kind.refused:
        raise InputError(f"{path} is {kind.refused}")
    if kind.holds == "binary":
        raise InputError(f"{path} is binary, which is not read: give its text, as JSON lines, Parquet or files of plain text")
    called_json = read_name(path).suffix in (*JSON_LINES, ".json")
    if kind.holds in ("text", "empty") and not called_json:
        what = "it is empty" if kind.holds == "empty" else f"it holds {kind.is_text}"
        raise InputError(
            f"{path}: expected .jsonl (JSON lines, plain or compressed with gzip, zstd, bz2 or xz), .parquet, a folder or a"
            f" dataset id; {what}"
        )
    if kind.holds == "text":  # called JSON: its lines are read as such, and the first that is none is named
        kind.holds = "jsonl"
    survey.take(path, kind)
    return Found("parquet" if kind.holds == "parquet" else "jsonl", path)


def files_of(folder: Path, labelled: bool, text_field: str, survey: Survey) -> list[Found]:
    """The files of a folder that are read: records with labels, or a folder per domain.

    Records in the folder itself, or a label field, mean that labels are in the records; else the folders in it are domains.

    Raises:
        InputError: there is nothing to read, or a file holds records in a form that is not read.
        CorruptError: a file cannot be decompressed.
    """
    files, others = _walk(folder)
    top = [path for path in files if path.parent == folder and not NEVER_TEXT.fullmatch(path.name)]
    folders = sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))
    kinds = {path: kind_of(path, text_field) for path in top}
    trigger = _is_records if folders else lambda path, kind: _is_records(path, kind) or kind.holds == "jsonl"
    records = next((path for path, kind in kinds.items() if trigger(path, kind)), None)
    if labelled or records:
        if folders and records and not labelled:
            survey.not_domains[folder] = records
        _leave_out(others, survey)
        return _labelled(folder, files, kinds, text_field, survey)
    names = {child.name for child in folders}
    if not folders:
        _refuse([(path, kind) for path, kind in kinds.items() if kind.refused])
        raise InputError(f"{folder}: neither data files nor a folder per domain in it")
    # A domain may be a link to another, and one that is hidden is none: what is in the domains they tell themselves.
    _leave_out({path: why for path, why in others.items() if path.relative_to(folder).parts[0] not in names}, survey)
    for path in files:
        if path.parent == folder:
            survey.leave_out(path, "in no domain's folder")
    found: list[Found] = []
    for child in folders:
        found += _domain(child, text_field, survey)
    return found


def _labelled(folder: Path, files: Iterable[Path], known: dict[Path, Kind], text_field: str, survey: Survey) -> list[Found]:
    kinds = _kinds(files, known, text_field, survey)
    _refuse([(path, kind) for path, kind in kinds.items() if kind.refused])
    # Where no file has the text field, those that lack it are read: the error names the fields that they have.
    records = [path for path, kind in kinds.items() if _is_records(path, kind)]
    records = records or [path for path, kind in kinds.items() if kind.holds == "jsonl"]
    if not records:
        raise InputError(f"{folder}: no JSONL or Parquet file in this folder (a folder per domain needs no domain field)")
    wanted = set(records)
    for path, kind in kinds.items():
        if path in wanted or kind.holds == "empty":
            survey.take(path, kind)
        else:
            survey.leave_out(path, f"JSON without the field {text_field!r}" if kind.holds == "jsonl" else kind.is_text)
    return [Found(kinds[path].holds, path) for path in records]


def _domain(folder: Path, text_field: str, survey: Survey) -> list[Found]:
    """The files of one domain's folder: records are records, and what is not is a document.

    A file with records in a form that is not read is refused where at least half of the files are records, descriptions beside
    them not counted; in a folder of texts it is one of them.
    """
    files, others = _walk(folder)
    _leave_out(others, survey)
    kinds = _kinds(files, {}, text_field, survey)
    records = {path for path, kind in kinds.items() if _is_records(path, kind)}
    unread = [(path, kind) for path, kind in kinds.items() if kind.refused]
    if unread:
        data = records.union(path for path, kind in kinds.items() if kind.refused or _may_be_records(path, kind))
        texts = [path for path, kind in kinds.items() if kind.holds != "empty" and not BESIDE_RECORDS.fullmatch(path.name)]
        if 2 * len(data) >= len(data.union(texts)):
            _refuse(unread)
    if not records:  # most of the files decide what such lines are
        doubtful = {path for path, kind in kinds.items() if _may_be_records(path, kind)}
        records = doubtful if 2 * len(doubtful) >= sum(kind.holds != "empty" for kind in kinds.values()) else set()
    found: list[Found] = []
    for path, kind in kinds.items():
        beside = _may_be_records(path, kind) or BESIDE_RECORDS.fullmatch(path.name)
        if records and path not in records and kind.holds != "empty" and beside:
            survey.leave_out(path, "beside records")
            continue
        if path not in records and kind.holds != "empty":
            kind.holds, kind.unexpected = "text", f"{kind.is_text}, taken as a document" if kind.refused else ""
        survey.take(path, kind)
        # An empty file is a document without text: so a domain of nothing else is told, and does not vanish.
        found.append(Found("text" if kind.holds == "empty" else kind.holds, path, folder.name))
    if not found:
        only = Survey()  # what is in this folder
        _leave_out(others, only)
        _kinds(files, {}, text_field, only)
        what = f"no file that is read: {'; '.join(only.notes())}" if only.not_read else "no files"
        raise InputError(f"{folder}: the folder of domain {folder.name!r} has {what}")
    return found


def _kinds(files: Iterable[Path], known: Mapping[Path, Kind], text_field: str, survey: Survey) -> dict[Path, Kind]:
    """What the files hold, without those that are never text: by their names, or binary.

    Raises:
        InputError: one holds records, or is an archive, in a form that is not read.
    """
    kinds = {}
    for path in files:
        if NEVER_TEXT.fullmatch(path.name):
            survey.leave_out(path, "checksums, indexes and marks")
        elif (kind := known.get(path) or kind_of(path, text_field)).holds == "binary":
            survey.leave_out(path, kind.is_text)
        else:
            kinds[path] = kind
    _refuse([(path, kind) for path, kind in kinds.items() if kind.refused and not kind.may_be_text])
    return kinds


def _is_records(path: Path, kind: Kind) -> bool:
    """Parquet, JSON lines with the text field, and what is called JSON lines."""
    return kind.holds == "parquet" or (kind.holds == "jsonl" and (kind.has_text or read_name(path).suffix in JSON_LINES))


def _may_be_records(path: Path, kind: Kind) -> bool:
    """JSON lines without the text field: of data that names its text otherwise, or a document that happens to be such lines."""
    return kind.holds == "jsonl" and kind.n_objects > 1 and read_name(path).suffix in (".json", "")


def _leave_out(others: Mapping[Path, str], survey: Survey) -> None:
    for path, why in others.items():
        survey.leave_out(path, why)


def _refuse(refused: list[tuple[Path, Kind]]) -> None:
    if refused:
        shown = "; ".join(f"{path} is {kind.refused}" for path, kind in refused[:MOST_SHOWN])
        more = f"; and {len(refused) - MOST_SHOWN} more files" if len(refused) > MOST_SHOWN else ""
        raise InputError(f"{shown}{more}; or move what is no data out of the folder")


def _walk(folder: Path) -> tuple[list[Path], dict[Path, str]]:
    """(files, why not for each thing that is never looked at) under a folder, sorted.

    Links to folders elsewhere are followed. A link to what lies around it, or is read at its own place, would be read twice
    or for ever.
    """
    files: list[Path] = []
    others: dict[Path, str] = {}
    root, walked = folder.resolve(), set()

    def look(here: Path, hidden: bool) -> None:
        walked.add(here.resolve())
        try:
            children = sorted(here.iterdir())
        except PermissionError:
            others[here] = "a folder that may not be read"
            return
        for path in children:
            out_of_sight = hidden or path.name.startswith(".")
            if path.is_dir():
                real = path.resolve()
                twice = real in walked or (path.is_symlink() and (real.is_relative_to(root) or root.is_relative_to(real)))
                if not twice:
                    look(path, out_of_sight)
                elif not hidden:
                    others[path] = "a link to a folder that is read at its own place"
            elif not path.is_file():
                others[path] = "a link to nothing" if path.is_symlink() else "no regular file"
            elif out_of_sight:
                others[path] = "hidden"
            else:
                files.append(path)

    look(folder, False)
    return sorted(files), dict(sorted(others.items()))
