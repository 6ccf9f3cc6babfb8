"""The offline teacher of distillation: its k likeliest next tokens at every position of the shards, and the mass of the others.

    <domain>.ids.bin        little-endian uint16 or uint32 [N, k]: the k likeliest next tokens, the likeliest first
    <domain>.logprob.bin    little-endian float32 [N, k]: their log p, natural logarithm, temperature 1; finite
    <domain>.rest.bin       little-endian float32 [N]: log of the mass of all other ids; -inf where there are none
    cache.json              teacher, tokenizer, corpus, sizes and XXH3 checksums; written last

Window w of a domain is its tokens [w T, (w + 1) T), T = block_size, and N = windows * T: row w T + i tells the token that follows
token w T + i of the shard, given the tokens of window w up to it and nothing before. So a row's number is a token's position.
That is the context a model in training gets from `DomainMixture(..., aligned=True)`.

A folder without cache.json is unfinished. Its progress.json says how many windows of each domain are safely on disk; a killed
writer goes on from there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import xxhash

from lldfast.backends import versions
from lldfast.data.shards import DTYPES, TokenShards, xxh3_file
from lldfast.errors import CorruptError, InputError, listed
from lldfast.files import explain_write_errors, file_stems, fsync_folder, read_json, write_json

FORMAT = "lldfast-teacher-cache"
VERSION = 1
CACHE, PROGRESS = "cache.json", "progress.json"
PARTS = ("ids", "logprob", "rest")
COMMIT_SECONDS = 10.0  # the most work that a kill can cost
FLOAT = np.dtype("<f4")


@dataclasses.dataclass(frozen=True)
class CacheSpec:
    """What a cache is of. dtype: of the ids; windows: how many of each domain; the others as in `TeacherCache`."""

    k: int
    block_size: int
    vocab_size: int
    dtype: str
    teacher: dict[str, Any]
    tokenizer: dict[str, Any]
    corpus_hash: str
    windows: dict[str, int]

    def difference(self, other: CacheSpec) -> str | None:
        """The first field in which another spec would give other numbers, with both values; None when there is none."""
        for key, one, two in [*self._compared(other), ("domains", list(self.windows), list(other.windows))]:
            if one != two:
                return f"{key} is {one!r}, not {two!r}"
        for domain, n in self.windows.items():
            if n != other.windows[domain]:
                return f"domain {domain!r} has {n} windows, not {other.windows[domain]}"
        return None

    def _compared(self, other: CacheSpec) -> list[tuple[str, Any, Any]]:
        keys = ("k", "block_size", "vocab_size", "dtype", "corpus_hash")
        rows: list[tuple[str, Any, Any]] = [(key, getattr(self, key), getattr(other, key)) for key in keys]
        rows.append(("tokenizer hash", self.tokenizer.get("hash"), other.tokenizer.get("hash")))
        # A teacher's name and place may change; its weights and their dtype decide.
        return rows + [(f"teacher {key}", self.teacher.get(key), other.teacher.get(key)) for key in ("hash", "dtype")]

    def shape(self, part: str, windows: int) -> tuple[int, ...]:
        """Of the file of a part that holds so many windows."""
        rows = windows * self.block_size
        return (rows,) if part == "rest" else (rows, self.k)

    def array_dtype(self, part: str) -> np.dtype:
        return DTYPES[self.dtype] if part == "ids" else FLOAT

    def n_bytes(self, part: str, windows: int) -> int:
        """Size of the file of a part that holds so many windows."""
        return int(np.prod(self.shape(part, windows), dtype=np.int64)) * self.array_dtype(part).itemsize


class CacheWriter:
    """Writes a cache window by window; a folder that a killed writer left is gone on with.

    Args:
        folder: where the files go.
        spec: what is written.

    Attributes: done ({domain: windows written}).

    Use it in a `with` block, which puts on disk what was appended also when it is left by an error.

    Raises:
        InputError: the folder holds an unfinished cache of another spec.
        CorruptError: a file is shorter than progress.json says (from `append` and `finish`).
        WriteError: the disk is full or refuses (from the constructor, `append`, `commit` and `finish`).
    """

    def __init__(self, folder: str | os.PathLike[str], spec: CacheSpec) -> None:
        self.folder, self.spec = Path(folder), spec
        stems = file_stems(spec.windows)
        self._files = {domain: {part: f"{stem}.{part}.bin" for part in PARTS} for domain, stem in stems.items()}
        self._progress = self.folder / PROGRESS
        self._handles: dict[str, IO[bytes]] = {}
        self._open_domain: str | None = None
        self.done = dict.fromkeys(spec.windows, 0)
        if self._progress.exists():
            stored, done = _read_progress(self._progress)
            differs = stored.difference(spec)
            if differs is not None:
                raise InputError(f"{self.folder} holds an unfinished teacher cache whose {differs}: choose another, or remove it")
            self.done = {domain: done[domain] for domain in spec.windows}
        self._committed = dict(self.done)
        self._write_progress()
        self._last_commit = time.monotonic()

    def append(self, domain: str, ids: np.ndarray, logprob: np.ndarray, rest: np.ndarray) -> None:
        """Write the next windows of a domain: ids [n, T, k], logprob [n, T, k], rest [n, T].

        On disk they are safe after the next `commit`, which happens every few seconds.
        """
        n = len(ids)
        if self.done[domain] + n > self.spec.windows[domain]:
            raise InputError(f"domain {domain!r}: window {self.done[domain] + n} of {self.spec.windows[domain]}")
        self._select(domain)
        for part, values in zip(PARTS, (ids, logprob, rest)):
            expected = (n, self.spec.block_size) if part == "rest" else (n, self.spec.block_size, self.spec.k)
            if values.shape != expected:
                raise InputError(f"domain {domain!r}: {part} has shape {values.shape}, not {expected}")
            with explain_write_errors(self.folder / self._files[domain][part]):
                self._handles[part].write(values.astype(self.spec.array_dtype(part), copy=False).tobytes())
        self.done[domain] += n  # only now: rows of one part alone are cut off when the work goes on
        if time.monotonic() - self._last_commit >= COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Make what was appended safe on disk, then say so in progress.json."""
        for part, handle in self._handles.items():
            with explain_write_errors(self.folder / self._files[str(self._open_domain)][part]):
                handle.flush()
                os.fsync(handle.fileno())
        if self.done != self._committed:
            self._write_progress()
            self._committed = dict(self.done)
        self._last_commit = time.monotonic()

    def finish(self) -> None:
        """Publish the cache: checksums, then cache.json.

        Raises:
            InputError: windows of a domain are missing.
        """
        for domain, n in self.spec.windows.items():
            if self.done[domain] != n:
                raise InputError(f"{self.folder}: domain {domain!r} has {self.done[domain]} of {n} windows")
            self._select(domain)  # makes the empty files of a domain without a window, and cuts off what a kill left
        self._close()
        domains = {}
        for domain, n in self.spec.windows.items():
            files = self._files[domain]
            checksums = {f"{part}_xxh3": xxh3_file(self.folder / files[part]) for part in PARTS}
            domains[domain] = {"windows": n, **files, **checksums}
        header = {"format": FORMAT, "version": VERSION, **_header(self.spec), "versions": versions()}
        write_json(self.folder / CACHE, {**header, "domains": domains})
        with explain_write_errors(self._progress):
            self._progress.unlink()

    def _write_progress(self) -> None:
        header = {"format": f"{FORMAT}-progress", "version": VERSION, **_header(self.spec)}
        write_json(self._progress, {**header, "windows": self.spec.windows, "done": self.done})

    def _select(self, domain: str) -> None:
        """Open the files of a domain behind its last window, and close those of the domain before."""
        if domain == self._open_domain:
            return
        self._close()
        self._open_domain = domain
        for part in PARTS:
            path = self.folder / self._files[domain][part]
            expected = self.spec.n_bytes(part, self.done[domain])
            with explain_write_errors(path):
                handle = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115 (closed by _close)
                self._handles[part] = handle
                size = handle.seek(0, os.SEEK_END)
                if size < expected:
                    raise CorruptError(_wrong_size(path, domain, size, PROGRESS, expected))
                handle.truncate(expected)
                handle.seek(expected)
        with explain_write_errors(self.folder):
            fsync_folder(self.folder)

    def _close(self) -> None:
        self.commit()
        handles, self._handles, self._open_domain = self._handles, {}, None
        for handle in handles.values():
            handle.close()

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        # After finish() this does nothing; after an error a failing write must not hide that error.
        with contextlib.suppress(OSError):
            self.commit()
        for handle in self._handles.values():
            with contextlib.suppress(OSError):
                handle.close()


class TeacherCache:
    """A finished teacher cache, opened for reading.

    Args:
        path: the folder that `lldfast teach` made.

    Attributes: path, k, block_size, vocab_size (ids the teacher's distribution is over), dtype (of the ids on disk), domains
    (names), corpus_hash (of the shards), tokenizer (dict: name, kind, hash, ...), teacher (dict: name, hash of the weights, ...),
    windows ({domain: n}), spec (all of these).

    Raises:
        InputError: there is no finished teacher cache at `path`.
        CorruptError: cache.json is damaged or from a newer version, or a file is missing or has another size; it is named.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        file = self.path / CACHE
        if not file.is_file():
            state = "is unfinished: run the same `lldfast teach` again" if (self.path / PROGRESS).is_file() else f"has no {CACHE}"
            raise InputError(f"{self.path} {state}; it is not a teacher cache that `lldfast teach` finished")
        stored = read_json(file)
        _check_format(file, stored, FORMAT)
        try:
            self._entries: dict[str, dict[str, Any]] = stored["domains"]
            self.windows = {domain: int(entry["windows"]) for domain, entry in self._entries.items()}
            self.spec = _spec(stored, self.windows)
            names = [entry[part] for entry in self._entries.values() for part in PARTS]
            outside = [name for name in names if Path(name).name != name]
            sums = [str(entry[f"{part}_xxh3"]) for entry in self._entries.values() for part in PARTS]
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise CorruptError(f"{file}: a field is missing or wrong ({error!r})") from None
        if not sums:
            raise CorruptError(f"{file} lists no domain")
        if outside:
            raise CorruptError(f"{file}: {outside[0]!r} is not the name of a file in this folder")
        s = self.spec
        self.k, self.block_size, self.vocab_size, self.dtype = s.k, s.block_size, s.vocab_size, DTYPES[s.dtype]
        self.teacher, self.tokenizer, self.corpus_hash = s.teacher, s.tokenizer, s.corpus_hash
        self.domains = list(self.windows)
        for domain in self.domains:
            for part in PARTS:
                self._check_size(domain, part)
        self._maps: dict[tuple[str, str], np.ndarray] = {}

    def __repr__(self) -> str:
        windows = sum(self.windows.values())
        return (
            f"TeacherCache({str(self.path)!r}: k={self.k}, {len(self.domains)} domains, {windows} windows of {self.block_size})"
        )

    def file(self, domain: str, part: str) -> Path:
        """The file of a domain's "ids", "logprob" or "rest".

        Raises:
            InputError: there is no such domain.
        """
        if domain not in self._entries:
            raise InputError(f"{self.path} has no domain {domain!r}; it has: {listed(self.domains)}")
        return self.path / self._entries[domain][part]

    def _check_size(self, domain: str, part: str) -> None:
        path, expected = self.file(domain, part), self.spec.n_bytes(part, self.windows[domain])
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            raise CorruptError(f"{path}: the file of domain {domain!r} is missing") from None
        if size != expected:
            raise CorruptError(_wrong_size(path, domain, size, CACHE, expected))

    def part(self, domain: str, part: str) -> np.ndarray:
        """The whole "ids" [N, k], "logprob" [N, k] or "rest" [N] of a domain, memory-mapped and read-only."""
        path, key = self.file(domain, part), (domain, part)
        if key not in self._maps:
            shape, dtype = self.spec.shape(part, self.windows[domain]), self.spec.array_dtype(part)
            empty = 0 in shape  # an empty file cannot be mapped
            self._maps[key] = np.empty(shape, dtype) if empty else np.memmap(path, dtype=dtype, mode="r", shape=shape)
        return self._maps[key]

    def rows(
        self, domain: np.ndarray, start: np.ndarray, domains: Sequence[str]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the teacher says of the windows that begin at `start`: ids [B, T, k] int64, logprob [B, T, k], rest [B, T] fp32.

        Args:
            domain: int [B], each window's index into `domains`.
            start: int [B], position of its first token in the domain, as `Batch.start` of an aligned mixture.
            domains: names, in the caller's order.

        Raises:
            InputError: a start is not where a cached window begins, or a domain is not in the cache.
        """
        n, length = len(start), self.block_size
        ids = np.empty((n, length, self.k), np.int64)
        logprob = np.empty((n, length, self.k), np.float32)
        rest = np.empty((n, length), np.float32)
        for row, (index, first) in enumerate(zip(domain.tolist(), start.tolist(), strict=True)):
            name = domains[index]
            ids_of, logprob_of, rest_of = (self.part(name, part) for part in PARTS)
            if first % length or not 0 <= first < len(rest_of):
                raise InputError(
                    f"{self.path}: token {first} of domain {name!r} does not begin a cached window; there are "
                    f"{self.windows[name]} of {length} tokens"
                )
            rows = slice(first, first + length)
            ids[row], logprob[row], rest[row] = ids_of[rows], logprob_of[rows], rest_of[rows]
        return torch.from_numpy(ids), torch.from_numpy(logprob), torch.from_numpy(rest)

    def check(self, shards: TokenShards, block_size: int, domains: Sequence[str] | None = None) -> None:
        """Refuse shards, a block size or domains that this cache was not made for.

        Args:
            domains: those that will be read; default all of the shards'.

        Raises:
            InputError: tokenizer, corpus, block size or domains differ; both sides are named.
        """
        shards.check_tokenizer(self.tokenizer, f"the teacher cache {self.path}")
        if self.corpus_hash != shards.corpus_hash:
            raise InputError(
                f"the teacher cache {self.path} was made from the corpus {self.corpus_hash}, but {shards.path} is the corpus "
                f"{shards.corpus_hash}"
            )
        if self.block_size != block_size:
            raise InputError(f"the teacher cache {self.path} has windows of {self.block_size} tokens, not of {block_size}")
        missing = [name for name in (shards.domains if domains is None else domains) if name not in self.windows]
        if missing:
            has = listed(self.domains)
            raise InputError(f"the teacher cache {self.path} lacks the domain {missing[0]!r} of {shards.path}; it has: {has}")

    def verify(self) -> None:
        """Read every byte and compare the checksums.

        Raises:
            CorruptError: the first file found wrong.
        """
        for domain in self.domains:
            for part in PARTS:
                found, expected = xxh3_file(self.file(domain, part)), self._entries[domain][f"{part}_xxh3"]
                if found != expected:
                    raise CorruptError(
                        f"{self.file(domain, part)}: checksum {found} where {CACHE} says {expected} (domain {domain!r})"
                    )

    @property
    def content_hash(self) -> str:
        """XXH3-128 (hex) over the checksums that cache.json lists."""
        sums = [[domain, *(entry[f"{part}_xxh3"] for part in PARTS)] for domain, entry in self._entries.items()]
        return xxhash.xxh3_128_hexdigest(json.dumps(sums, ensure_ascii=False).encode())

    def statistics(self, domain: str) -> tuple[float, float]:
        """(mean mass outside the k ids, mean lower bound of the entropy in nats) of a domain; NaN without a window.

        Reads the files once. The bound is the entropy with all other ids taken for one.
        """
        logprob, rest = self.part(domain, "logprob"), self.part(domain, "rest")
        mass = entropy = 0.0
        for first in range(0, len(rest), 1 << 14):
            p, r = (np.asarray(part[first : first + (1 << 14)], np.float64) for part in (logprob, rest))
            others = np.exp(r)
            mass += float(others.sum())
            entropy -= float((np.exp(p) * p).sum()) + float((others * np.where(others > 0, r, 0.0)).sum())
        return (mass / len(rest), entropy / len(rest)) if len(rest) else (float("nan"), float("nan"))

    def n_bytes(self, domain: str) -> int:
        """Size on disk."""
        return sum(self.spec.n_bytes(part, self.windows[domain]) for part in PARTS)


def _wrong_size(path: Path, domain: str, size: int, source: str, expected: int) -> str:
    return f"{path}: domain {domain!r} has {size} bytes on disk where {source} says {expected}: truncated or swapped"


def _header(spec: CacheSpec) -> dict[str, Any]:
    fields = dataclasses.asdict(spec)
    del fields["windows"]
    return {"temperature": 1.0, **fields}


def _spec(stored: Mapping[str, Any], windows: dict[str, int]) -> CacheSpec:
    """The spec in a JSON header; a wrong one raises one of the errors that its readers turn into a CorruptError."""
    k, block_size, vocab_size = (int(stored[key]) for key in ("k", "block_size", "vocab_size"))
    if not 1 <= k <= vocab_size or block_size < 1 or min(windows.values(), default=0) < 0:
        raise ValueError(f"k={k}, block_size={block_size}, vocab_size={vocab_size}, windows={windows}")
    if stored["temperature"] != 1.0:
        raise ValueError(f"temperature={stored['temperature']}")
    DTYPES[stored["dtype"]]
    teacher, tokenizer = dict(stored["teacher"]), dict(stored["tokenizer"])
    tokenizer["hash"]
    return CacheSpec(k, block_size, vocab_size, stored["dtype"], teacher, tokenizer, str(stored["corpus_hash"]), windows)


def _check_format(file: Path, stored: Any, name: str) -> None:
    if not isinstance(stored, dict) or stored.get("format") != name:
        raise CorruptError(f"{file} is not a {name} file")
    if stored.get("version") != VERSION:
        raise CorruptError(f"{file}: format version {stored.get('version')}; this lldfast reads {VERSION}")


def _read_progress(file: Path) -> tuple[CacheSpec, dict[str, int]]:
    """What an unfinished cache is of, and how many windows of each domain are on disk."""
    stored = read_json(file)
    _check_format(file, stored, f"{FORMAT}-progress")
    try:
        spec = _spec(stored, {domain: int(n) for domain, n in stored["windows"].items()})
        done = {domain: int(stored["done"][domain]) for domain in spec.windows}
        if any(not 0 <= done[domain] <= n for domain, n in spec.windows.items()):
            raise ValueError(f"done={done}")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CorruptError(f"{file}: a field is missing or wrong ({error!r})") from None
    return spec, done


def as_json(value: Any) -> Any:
    """As it will be read back from a JSON file: tuples are lists."""
    return json.loads(json.dumps(value))
