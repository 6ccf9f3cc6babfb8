"""Token shards: one memory-mapped file of tokens per domain, which np.memmap and nanoGPT read as they are.

    <domain>.bin     little-endian uint16 or uint32 tokens; every document ends with the end-of-text token
    <domain>.idx     little-endian int64 [documents + 1]: where each document begins, then the number of tokens
    manifest.json    tokenizer, vocabulary, and per domain the file, sizes and XXH3 checksums; written last

A folder without a manifest is unfinished. Opening one checks every size, `verify` the checksums and the contents.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import xxhash

from lldfast.backends import extension
from lldfast.data.tokenizer import Tokenizer, tokenizer_from_manifest
from lldfast.errors import CorruptError, InputError, listed
from lldfast.files import explain_write_errors, file_stem, read_json, write_json

FORMAT = "lldfast-shards"
VERSION = 1
MANIFEST = "manifest.json"
# Little-endian on disk whatever the machine.
DTYPES: dict[str, np.dtype] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_STEP = 1 << 24  # tokens checked at a time


def xxh3_file(path: str | os.PathLike[str]) -> str:
    """XXH3-64 of a file's bytes as 16 hex digits; by the C++ extension, or the xxhash package where it was not built.

    Raises:
        InputError: there is no such file.
    """
    try:
        with open(path, "rb") as handle:
            if os.fstat(handle.fileno()).st_size == 0:  # an empty file cannot be mapped
                return _xxh3(b"")
            with mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as view:
                return _xxh3(view)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None


def _xxh3(buffer: bytes | mmap.mmap) -> str:
    module = extension()
    return f"{module.xxh3_64(buffer):016x}" if module is not None else xxhash.xxh3_64_hexdigest(buffer)


class ShardWriter:
    """Writes the tokens of one domain, document by document, into an unfinished shard folder.

    Args:
        folder: where <domain>.bin and .idx go; an existing pair is overwritten.
        domain: its name, any non-empty text.
        dtype: "uint16" or "uint32".
        stem: its files' name without an ending; default `file_stem(domain)`. The writer of several domains gives those of
            `file_stems`, so that two whose names differ in case alone have files of their own on every file system.

    Leaving the `with` block by an error, or never calling `close`, leaves files that no manifest names.

    Raises:
        InputError: the name is empty or not valid Unicode, or the dtype is unknown.
        WriteError: the disk is full or refuses (from the constructor, `add` and `close`).
    """

    def __init__(self, folder: str | os.PathLike[str], domain: str, dtype: str, stem: str | None = None) -> None:
        if dtype not in DTYPES:
            raise InputError(f"domain {domain!r}: token dtype {dtype!r} is unknown; choose {' or '.join(DTYPES)}")
        self.domain = domain
        self.dtype = dtype
        self.path = Path(folder) / f"{file_stem(domain) if stem is None else stem}.bin"
        self._n_bytes = 0
        self._offsets = [0]
        with explain_write_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._handle: IO[bytes] = open(self.path, "wb")  # noqa: SIM115 (closed by close)

    def add(self, tokens: np.ndarray, n_bytes: int = 0) -> None:
        """Append a document: token ids [n], its end-of-text token included; n_bytes is the UTF-8 length of its text.

        Raises:
            InputError: the document is empty, or an id does not fit the dtype.
        """
        ids = np.asarray(tokens)
        if ids.ndim != 1 or ids.size == 0 or ids.dtype.kind not in "iu":
            raise InputError(f"domain {self.domain!r}: a document must be a non-empty list of token ids")
        if ids.min() < 0 or ids.max() > np.iinfo(DTYPES[self.dtype]).max:
            bad = ids.min() if ids.min() < 0 else ids.max()
            raise InputError(f"domain {self.domain!r}: token id {bad} does not fit {self.dtype}")
        with explain_write_errors(self.path):
            self._handle.write(ids.astype(DTYPES[self.dtype]).tobytes())
        self._offsets.append(self._offsets[-1] + ids.size)
        self._n_bytes += n_bytes

    def close(self) -> dict[str, Any]:
        """Flush both files to disk and return the domain's entry of the manifest."""
        index = self.path.with_suffix(".idx")
        with explain_write_errors(self.path), self._handle:
            self._handle.flush()
            os.fsync(self._handle.fileno())
        with explain_write_errors(index), open(index, "wb") as handle:
            handle.write(np.asarray(self._offsets, dtype="<i8").tobytes())
            handle.flush()
            os.fsync(handle.fileno())
        return {
            "file": self.path.name,
            "dtype": self.dtype,
            "tokens": self._offsets[-1],
            "documents": len(self._offsets) - 1,
            "bytes": self._n_bytes,
            "xxh3": xxh3_file(self.path),
            "idx_xxh3": xxh3_file(index),
        }

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        # After close() this does nothing; after an error a failing flush must not hide that error.
        with contextlib.suppress(OSError):
            self._handle.close()


def write_manifest(
    folder: str | os.PathLike[str],
    tokenizer: Mapping[str, Any],
    vocab_size: int,
    entries: Mapping[str, Mapping[str, Any]],
    *,
    sampled: bool = False,
) -> str:
    """Publish a shard folder: write its manifest atomically, last of all. Returns the corpus hash.

    Args:
        folder: where the domains' files are.
        tokenizer: `Tokenizer.describe()`: name, kind, hash, vocab_size, eot, bos, control, file.
        vocab_size: every token id is below it.
        entries: domain name -> what `ShardWriter.close` returned; their order is the order of `TokenShards.domains`.
        sampled: a model wrote the documents: inside them control tokens other than end-of-text are no fault.

    Raises:
        InputError: there is no domain, or the domains differ in dtype.
    """
    dtypes = sorted({entry["dtype"] for entry in entries.values()})
    if len(dtypes) != 1:
        raise InputError(f"{folder}: the shards need one token dtype, not {dtypes or 'none: there is no domain'}")
    corpus_hash = _corpus_hash(tokenizer, entries)
    write_json(
        Path(folder) / MANIFEST,
        {
            "format": FORMAT,
            "version": VERSION,
            "dtype": dtypes[0],
            "tokenizer": dict(tokenizer),
            "vocab_size": vocab_size,
            **({"sampled": True} if sampled else {}),
            "domains": {domain: {k: v for k, v in entry.items() if k != "dtype"} for domain, entry in entries.items()},
            "corpus_hash": corpus_hash,
        },
    )
    return corpus_hash


def _corpus_hash(tokenizer: Mapping[str, Any], entries: Mapping[str, Mapping[str, Any]]) -> str:
    # Over names and checksums in sorted order: the same texts and tokenizer give the same hash wherever they lie.
    digest = hashlib.blake2b(str(tokenizer.get("hash")).encode(), digest_size=8)
    for domain in sorted(entries):
        digest.update(f"\0{domain}\0{entries[domain]['xxh3']}\0{entries[domain]['idx_xxh3']}".encode())
    return digest.hexdigest()


class TokenShards:
    """The token shards of a data folder, opened for reading.

    Args:
        path: the folder that `lldfast prepare` made, or its shards/ inside.

    Attributes: path, manifest (dict), domains (names, manifest order), dtype, vocab_size, eot, control (ids of control tokens,
    which no text gives; None where the manifest lists none), tokenizer (dict: name, kind, hash, ...), n_tokens and n_documents
    (by domain name), corpus_hash.

    Raises:
        InputError: there is no finished shard folder at `path`.
        CorruptError: the manifest is damaged or from a newer version, or a file is missing or has another size; it is named.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = _find(Path(path))
        manifest_path = self.path / MANIFEST
        self.manifest: dict[str, Any] = read_json(manifest_path)
        if not isinstance(self.manifest, dict) or self.manifest.get("format") != FORMAT:
            raise CorruptError(f"{manifest_path} is not a {FORMAT} manifest")
        if self.manifest.get("version") != VERSION:
            raise CorruptError(f"{manifest_path}: format version {self.manifest.get('version')}; this lldfast reads {VERSION}")
        try:
            self.tokenizer: dict[str, Any] = dict(self.manifest["tokenizer"])
            self.dtype = DTYPES[self.manifest["dtype"]]
            self.vocab_size = int(self.manifest["vocab_size"])
            self.eot = int(self.tokenizer["eot"])
            listed = self.tokenizer.get("control")
            self.control = None if listed is None else tuple(int(i) for i in listed)
            self.corpus_hash = str(self.manifest["corpus_hash"])
            self._entries: dict[str, dict[str, Any]] = self.manifest["domains"]
            self.domains = list(self._entries)
            self.n_tokens = {domain: int(entry["tokens"]) for domain, entry in self._entries.items()}
            self.n_documents = {domain: int(entry["documents"]) for domain, entry in self._entries.items()}
            intact = self.corpus_hash == _corpus_hash(self.tokenizer, self._entries)
            files = [entry["file"] for entry in self._entries.values()]
            outside = [file for file in files if Path(file).name != file]
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise CorruptError(f"{manifest_path}: a field is missing or wrong ({error!r})") from None
        if not intact:
            raise CorruptError(f"{manifest_path}: the corpus hash does not match the domains listed; the manifest was altered")
        if not self.domains:
            raise CorruptError(f"{manifest_path} lists no domain")
        if outside:
            raise CorruptError(f"{manifest_path}: {outside[0]!r} is not the name of a file in this folder")
        if len(set(files)) < len(files):
            raise CorruptError(f"{manifest_path}: two domains name the file {next(f for f in files if files.count(f) > 1)!r}")
        for domain in self.domains:
            self._check_size(self._bin(domain), domain, self.n_tokens[domain] * self.dtype.itemsize)
            self._check_size(self._idx(domain), domain, (self.n_documents[domain] + 1) * 8)
        self._tokens: dict[str, np.ndarray] = {}

    def _bin(self, domain: str) -> Path:
        return self.path / self._entries[domain]["file"]

    def _idx(self, domain: str) -> Path:
        return self._bin(domain).with_suffix(".idx")

    def _check_size(self, path: Path, domain: str, expected: int) -> None:
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            raise CorruptError(f"{path}: the file of domain {domain!r} is missing") from None
        if size != expected:
            raise CorruptError(
                f"{path}: domain {domain!r} has {size} bytes on disk where the manifest says {expected}: truncated or swapped"
            )

    def _entry(self, domain: str) -> dict[str, Any]:
        if domain not in self._entries:
            raise InputError(f"{self.path} has no domain {domain!r}; it has: {listed(self.domains)}")
        return self._entries[domain]

    def tokens(self, domain: str) -> np.ndarray:
        """The domain's tokens, [n_tokens] uint16 or uint32, memory-mapped and read-only."""
        self._entry(domain)
        if domain not in self._tokens:
            self._tokens[domain] = _map(self._bin(domain), self.dtype)
        return self._tokens[domain]

    def offsets(self, domain: str) -> np.ndarray:
        """Document boundaries, int64 [n_documents + 1]: document i is tokens(domain)[offsets[i] : offsets[i + 1]]."""
        self._entry(domain)
        return _map(self._idx(domain), np.dtype("<i8"))

    def proportions(self) -> dict[str, float]:
        """Each domain's share of all tokens, by name."""
        total = sum(self.n_tokens.values())
        return {domain: n / total for domain, n in self.n_tokens.items()}

    def shard_file(self, domain: str) -> Path:
        """The file that holds the domain's tokens, for error messages and other readers."""
        self._entry(domain)
        return self._bin(domain)

    def verify(self) -> None:
        """Read every byte: checksums, document offsets, token ids below the vocabulary, and the control tokens: end-of-text
        at the end of every document and nowhere else, no other one unless a model wrote the documents.

        Raises:
            CorruptError: the first file found wrong, with the place and the value.
        """
        for domain in self.domains:
            tokens, offsets = self.tokens(domain), self.offsets(domain)
            path, index = self._bin(domain), self._idx(domain)
            self._check_contents(path, index, domain, tokens, offsets)
            for file, key in ((path, "xxh3"), (index, "idx_xxh3")):
                found, expected = xxh3_file(file), self._entries[domain][key]
                if found != expected:
                    raise CorruptError(f"{file}: checksum {found} where the manifest says {expected} (domain {domain!r})")
        self.check_documents(() if self.manifest.get("sampled") else self.control or ())

    def check_documents(self, control: Iterable[int]) -> None:
        """Count control tokens: each document must have one end-of-text, as its last token, and none of `control`.

        A text that could write such an id would forge a document's end or a turn of a chat.

        Raises:
            CorruptError: file, domain, document and position of the first token that is wrong.
        """
        wanted = np.zeros(self.vocab_size, bool)
        wanted[[i for i in (self.eot, *control) if 0 <= i < self.vocab_size]] = True
        for domain in self.domains:
            tokens, offsets = self.tokens(domain), self.offsets(domain)
            for start in range(0, len(tokens), _STEP):
                found = start + np.flatnonzero(wanted[tokens[start : start + _STEP]])
                document = np.searchsorted(offsets, found, side="right") - 1
                forged = (tokens[found] != self.eot) | (found + 1 != offsets[document + 1])
                if forged.any():
                    first = int(forged.argmax())
                    at, number = int(found[first]), int(document[first])
                    where = f"{self._bin(domain)}: document {number} of domain {domain!r}, token {at - int(offsets[number])}"
                    raise CorruptError(
                        f"{where} (position {at} of the file): the control token {tokens[at]}, where only end-of-text"
                        f" ({self.eot}) at a document's end is allowed"
                    )

    def _check_contents(self, path: Path, index: Path, domain: str, tokens: np.ndarray, offsets: np.ndarray) -> None:
        if len(tokens) == 0:
            raise CorruptError(f"{path}: domain {domain!r} has no document")
        if offsets[0] != 0 or offsets[-1] != len(tokens) or (np.diff(offsets) < 1).any():
            raise CorruptError(f"{index}: the document offsets of domain {domain!r} do not rise from 0 to {len(tokens)}")
        for start in range(0, len(tokens), _STEP):
            part = tokens[start : start + _STEP]
            if part.max() >= self.vocab_size:
                at = start + int(np.argmax(part >= self.vocab_size))
                raise bad_token_error(path, domain, at, int(tokens[at]), self.vocab_size)
        ends = tokens[offsets[1:] - 1]
        if (ends != self.eot).any():
            document = int(np.argmax(ends != self.eot))
            raise CorruptError(
                f"{path}: document {document} of domain {domain!r} does not end with the end-of-text token {self.eot}"
            )

    def check_tokenizer(self, other: Mapping[str, Any] | str, name: str) -> None:
        """Refuse another tokenizer than the one these shards were made with.

        Args:
            other: its `describe()` entry, or its hash.
            name: who uses it ("base model ..."), for the message.

        Raises:
            InputError: the hashes differ; both tokenizers are named.
        """
        theirs = {"hash": other} if isinstance(other, str) else dict(other)
        if theirs.get("hash") == self.tokenizer["hash"]:
            return
        raise InputError(
            f"{name} uses the tokenizer {theirs.get('name', '')!r} (hash {theirs.get('hash')}), but {self.path} was made with "
            f"{self.tokenizer.get('name')!r} (hash {self.tokenizer['hash']})"
        )

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer the shards were made with; its hash is checked.

        Raises:
            InputError: its file is missing beside the shards.
            CorruptError: the file has another hash.
        """
        return tokenizer_from_manifest(self.tokenizer, self.path)

    def __repr__(self) -> str:
        return f"TokenShards({str(self.path)!r}: {len(self.domains)} domains, {sum(self.n_tokens.values())} tokens)"


def bad_token_error(path: Path, domain: str, position: int, token: int, vocab_size: int) -> CorruptError:
    """The error for a token id that the vocabulary does not have; `position` counts the shard's tokens from 0."""
    return CorruptError(
        f"{path}: token id {token} at position {position} of domain {domain!r} is not below the vocabulary of {vocab_size}"
    )


def _find(path: Path) -> Path:
    for folder in (path, path / "shards"):
        if (folder / MANIFEST).is_file():
            return folder
    raise InputError(f"{path}: no {MANIFEST} here or in shards/: not a folder that `lldfast prepare` finished")


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        return np.empty(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r")
