"""The evaluation corpus: short texts, each with its domain, on which every log-likelihood of an experiment is computed.

A text is a chunk of at most 1,024 UTF-8 bytes of a document that training never sees. Its part says what it is for:
"estimate" texts give the differences Delta from which weights are computed, "measure" texts judge the result. `lldfast
prepare` builds the file (making/evalplan.py chooses the texts); `EvalSet.from_texts` wraps texts of your own.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from lldfast.errors import CorruptError, InputError, listed
from lldfast.files import atomic_path

PARTS = ("estimate", "measure")
COLUMNS = ("text", "domain", "part", "n_bytes", "document")


class EvalSet:
    """N evaluation texts in a fixed order; treat it as immutable.

    Attributes:
        texts: the N texts.
        domain: object array of domain names, [N].
        part: object array of "estimate" or "measure", [N].
        n_bytes: UTF-8 bytes of each text, int64 [N].
        document: number of the document each text was cut from (-1: unknown), int64 [N].
        domains: the domain names in order of first appearance (`prepare` writes them sorted).

    Raises:
        InputError: lengths differ, an empty or unencodable text, an empty domain name, an unknown part.
    """

    def __init__(
        self,
        texts: Sequence[str],
        domain: Iterable[str],
        part: Iterable[str],
        document: Iterable[int] | None = None,
    ) -> None:
        self.texts = list(texts)
        n = len(self.texts)
        self.domain = _objects(domain, n, "domain")
        self.part = _objects(part, n, "part")
        try:
            self.document = np.array([-1] * n if document is None else list(document), np.int64)
        except (TypeError, ValueError) as error:
            raise InputError(f"document numbers must be integers ({error})") from None
        if len(self.document) != n:
            raise InputError(f"{n} texts but {len(self.document)} document numbers")
        self.n_bytes = np.fromiter((_utf8_length(text, i) for i, text in enumerate(self.texts)), np.int64, n)
        for i, (name, which) in enumerate(zip(self.domain, self.part, strict=True)):
            if not isinstance(name, str) or not name.strip():
                raise InputError(f"text {i} has no domain name (got {name!r})")
            _utf8_length(name, i, "the domain name of text")
            if which not in PARTS:
                raise InputError(f"text {i} (domain {name}): part must be one of {', '.join(PARTS)}, got {which!r}")
        self.domains = list(dict.fromkeys(self.domain.tolist()))

    @classmethod
    def from_texts(cls, texts: Sequence[str], domains: Iterable[str], part: str | Iterable[str] | None = None) -> EvalSet:
        """Wrap texts of your own; `part` is one name for all of them or one per text (default: all "measure")."""
        which = [part or "measure"] * len(texts) if part is None or isinstance(part, str) else part
        return cls(texts, domains, which)

    def __len__(self) -> int:
        return len(self.texts)

    def __repr__(self) -> str:
        return f"EvalSet({len(self)} texts, {len(self.domains)} domains, {int(self.n_bytes.sum())} bytes)"

    @functools.cached_property
    def hash(self) -> str:
        """XXH3-128 (hex) over texts, domains and parts, in order: equal hashes mean comparable log-likelihood vectors."""
        digest = xxhash.xxh3_128()
        for row in zip(self.texts, self.domain, self.part, strict=True):
            for field in row:
                raw = field.encode()
                # The length keeps ("ab", "c") and ("a", "bc") apart.
                digest.update(len(raw).to_bytes(8, "little") + raw)
        return digest.hexdigest()

    @functools.cached_property
    def text_hash(self) -> npt.NDArray[np.uint64]:
        """XXH3-64 of each text [N], by which log-likelihood vectors of the same texts are told from others."""
        return np.array([xxhash.xxh3_64_intdigest(text.encode()) for text in self.texts], np.uint64)

    def counts(self) -> dict[str, int]:
        """Number of texts by domain."""
        return {name: int((self.domain == name).sum()) for name in self.domains}

    def select(self, part: str | None = None, domains: str | Iterable[str] | None = None) -> EvalSet:
        """The texts of one part and/or some domains, in the same order.

        Raises:
            InputError: an unknown part or domain.
        """
        keep = np.ones(len(self), bool)
        if part is not None:
            if part not in PARTS:
                raise InputError(f"unknown part {part!r}: expected one of {', '.join(PARTS)}")
            keep &= self.part == part
        if domains is not None:
            wanted = [domains] if isinstance(domains, str) else list(domains)
            unknown = [name for name in wanted if name not in self.domains]
            if unknown:
                raise InputError(f"the evaluation corpus has no domain {unknown[0]!r}; it has {listed(self.domains)}")
            keep &= np.isin(self.domain.astype(str), wanted)
        rows = np.flatnonzero(keep)
        return EvalSet([self.texts[i] for i in rows], self.domain[rows], self.part[rows], self.document[rows])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write Parquet with the columns text, domain, part, n_bytes, document; atomically.

        Raises:
            WriteError: the file cannot be written.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = [
            pa.array(self.texts, pa.string()),
            pa.array(self.domain.tolist(), pa.string()),
            pa.array(self.part.tolist(), pa.string()),
            pa.array(self.n_bytes),
            pa.array(self.document),
        ]
        meta = {"format": "lldfast-evalset", "version": "1", "hash": self.hash}
        table = pa.table(dict(zip(COLUMNS, columns, strict=True)), metadata=meta)
        with atomic_path(path) as temporary:
            pq.write_table(table, temporary, compression="zstd")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> EvalSet:
        """Read what `save` wrote, checking the hash stored with it.

        Raises:
            InputError: no such file.
            CorruptError: not Parquet, a column is missing, or the content no longer fits its hash.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        if not Path(path).is_file():
            raise InputError(f"{path}: no such evaluation corpus")
        try:  # bytes of a text or a name that are no longer UTF-8 are found only where they become Python's strings
            table = pq.read_table(path)
            names = list(table.column_names)
            data: dict[str, list[Any]] = {name: table[name].to_pylist() for name in COLUMNS if names.count(name) == 1}
            metadata = table.schema.metadata or {}
        except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
            raise CorruptError(f"{path} is not a readable Parquet file ({error})") from None
        missing = [name for name in COLUMNS if name not in data]
        if missing:
            there = ", ".join(names)
            raise CorruptError(f"{path} is not an evaluation corpus: it has no column {missing[0]} (its columns: {there})")
        try:
            evalset = cls(data["text"], data["domain"], data["part"], data["document"])
        except (InputError, TypeError) as error:
            raise CorruptError(f"{path}: {error}") from None
        stored = metadata.get(b"hash")
        if stored is not None and stored != evalset.hash.encode():
            raise CorruptError(f"{path}: the texts no longer fit the hash stored with them; the file was altered")
        if data["n_bytes"] != evalset.n_bytes.tolist():
            raise CorruptError(f"{path}: column n_bytes does not fit the texts")
        return evalset


def _objects(values: Iterable[str], n: int, what: str) -> npt.NDArray[np.object_]:
    items = list(values)
    if len(items) != n:
        raise InputError(f"{n} texts but {len(items)} values of {what}")
    out = np.empty(n, dtype=object)
    out[:] = items
    return out


def _utf8_length(text: Any, i: int, what: str = "text") -> int:
    if not isinstance(text, str) or not text:
        raise InputError(f"{what} {i} is not a non-empty string (got {text!r})")
    try:
        return len(text.encode())
    except UnicodeEncodeError as error:
        raise InputError(f"{what} {i} is not valid Unicode: {error.reason} at character {error.start}") from None
