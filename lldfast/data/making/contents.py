"""Whether an input still holds what it held: its content decides, not its size or times.

A change in place may keep the size, and tools that copy restore times (`rsync -t`, `touch -r`), so the bytes themselves are
hashed: while they are read, and again whenever a finished or interrupted result is to be taken for what they give. That second
time costs one read of the inputs at the speed of the disk, or of memory: nothing is decompressed or parsed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from lldfast.backends import require
from lldfast.errors import InputError

FILES = ("jsonl", "parquet", "text")


class Content:
    """Hash of the bytes that were read of an input, taken while they are.

    Attributes:
        n_bytes: how many; fewer than there are where reading stopped early.
    """

    def __init__(self) -> None:
        self.n_bytes = 0
        self._state = xxhash.xxh3_128()

    def update(self, raw: bytes) -> None:
        self.n_bytes += len(raw)
        self._state.update(raw)

    def take(self, other: Content) -> None:
        """Become what another found."""
        self.n_bytes, self._state = other.n_bytes, other._state

    def to_json(self) -> list[Any]:
        """[bytes, XXH3-128]"""
        return [self.n_bytes, str(self._state.hexdigest())]


@dataclass(frozen=True)
class Input:
    """One file, dataset or generator of documents; `domain` is set where the folder, not a field, gives the label."""

    kind: str  # "jsonl", "parquet", "text", "disk", "hub" or "builtin"
    name: str
    domain: str | None = None

    @property
    def unit(self) -> str:
        """What its records are called."""
        return "row" if self.kind in ("parquet", "disk", "hub") else "line"

    def stamp(self) -> list[Any]:
        """Kind, name, and a file's size: what a look tells."""
        path = Path(self.name)
        if self.kind in FILES and path.exists():
            return [self.kind, self.name, path.stat().st_size]
        return [self.kind, self.name]

    def content(self, config: str | None = None, n_bytes: int | None = None) -> Content:
        """What the input holds now: of a file its first `n_bytes` bytes or all, of a dataset on disk all its files, of one on
        the hub its revision, of the builtin corpus its texts.

        Raises:
            InputError: the hub does not answer.
        """
        content, path = Content(), Path(self.name)
        if self.kind == "builtin":
            from lldfast.data.making import builtin

            for text, domain in builtin.documents():
                add_document(content, text, domain)
        elif self.kind in FILES:
            _add_file(content, path, n_bytes)
        elif path.is_dir():
            for file in sorted(file for file in path.glob("**/*") if file.is_file()):
                content.update(f"\0{file.relative_to(path).as_posix()}\0{file.stat().st_size}\0".encode())
                _add_file(content, file, None)
        else:
            content.update(_revision(self.name, config).encode())
        return content


def add_document(content: Content, text: str, domain: str) -> None:
    """Hash a document of a generator, which has no bytes of its own."""
    for value in (text, domain):
        raw = value.encode()
        content.update(len(raw).to_bytes(8, "little") + raw)


def _add_file(content: Content, path: Path, n_bytes: int | None) -> None:
    left = path.stat().st_size if n_bytes is None else n_bytes
    with open(path, "rb") as file:
        while left > 0 and (raw := file.read(min(1 << 20, left))):
            content.update(raw)
            left -= len(raw)


def _revision(name: str, config: str | None) -> str:
    """Repositories and commits of the data files of a dataset on the hub."""
    datasets = require("datasets", "this input needs")
    try:
        builder = datasets.load_dataset_builder(name, config)
    except Exception as error:  # datasets and the hub client raise many classes of their own
        here = "there is no file or folder of that name here either"
        raise InputError(f"dataset {name} (config {config}) cannot be opened: {error}; {here}") from error
    files = builder.config.data_files or {}
    origins = {origin for split in files.values() for origin in getattr(split, "origin_metadata", ())}
    return repr(sorted(origins)) if origins else str(builder.hash)
