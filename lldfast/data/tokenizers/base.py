"""What every tokenizer offers, and the simplest one: bytes."""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from lldfast.errors import InputError, LLDError

Ids = npt.NDArray[np.uint32]


class TextError(InputError):
    """A text that the tokenizer cannot encode; `index` is its place in the batch."""

    def __init__(self, message: str, index: int = 0) -> None:
        super().__init__(message)
        self.index = index


class Tokenizer:
    """What every tokenizer offers.

    Control tokens are those that end or begin documents, turns and masks: no text gives their ids, whatever it spells. The
    tokenizer's own ids stand unless one of them is a control id; only then the text is written with the rest of the
    vocabulary (`_respell`), and where that has no way to write it, the text is refused.

    Attributes:
        name, kind: for people; kind is "tiktoken", "hf" or "bytes".
        vocab_size: one more than the largest id.
        eot: id of the token that ends a document, or None.
        bos: id of the token that begins a text for models trained with one, or None.
        adds_bos: whether the Hugging Face tokenizer itself would prepend `bos` by default (`encode` never does).
        control: ids of the control tokens, ascending; `eot` is one of them, the unknown token and the bytes of a byte fallback
            are none.
        hash: equal iff two tokenizers encode alike.
    """

    kind = ""

    def __init__(
        self,
        name: str,
        vocab_size: int,
        eot: int | None,
        bos: int | None,
        adds_bos: bool,
        control: Iterable[int],
        fingerprint: str,
    ) -> None:
        self.name, self.vocab_size, self.hash = name, vocab_size, fingerprint
        self.eot, self.bos, self.adds_bos = eot, bos, adds_bos
        self.control = tuple(sorted(control))

    def __repr__(self) -> str:
        return f"Tokenizer({self.name!r}, {self.kind}, vocab_size={self.vocab_size}, hash={self.hash})"

    def _encode(self, text: str) -> Ids:
        raise NotImplementedError

    def _decode(self, ids: list[int]) -> str:
        raise NotImplementedError

    def _respell(self, text: str) -> Ids:
        """Ids of a text whose own ids have a control token in them. A kind that can be forged says how."""
        raise self._forged(text)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without special tokens and without any id of `control`.

        Raises:
            InputError: `text` is not a string of valid Unicode, or it spells a control token that the vocabulary cannot write
                in another way.
        """
        return [int(i) for i in self._checked(text)]

    def encode_batch(self, texts: Sequence[str], threads: int | None = None) -> list[Ids]:
        """uint32 ids of each text, in order, on `threads` threads (default: one per core).

        Hugging Face tokenizers bring a thread pool of their own, which RAYON_NUM_THREADS and TOKENIZERS_PARALLELISM govern.

        Raises:
            TextError: as `encode`; an InputError whose `index` says which text.
        """
        threads = min(threads or os.cpu_count() or 1, len(texts))
        if threads <= 1:
            return [self._checked(text, i) for i, text in enumerate(texts)]
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(self._checked, texts, range(len(texts))))

    def encode_batch_native(self, texts: Sequence[str]) -> list[Ids]:
        """uint32 ids of each text as a Hugging Face tokenizer gives them by default, with the special tokens of its template.

        Raises:
            TextError: as `encode_batch`.
        """
        return self.encode_batch(texts)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD.

        Raises:
            InputError: an id is outside the vocabulary.
        """
        plain = [int(i) for i in ids]
        bad = next((i for i in plain if not 0 <= i < self.vocab_size), None)
        if bad is not None:
            raise InputError(f"tokenizer {self.name}: id {bad} is outside its vocabulary of {self.vocab_size}")
        return self._decode(plain)

    def describe(self) -> dict[str, Any]:
        """The "tokenizer" entry of manifest.json and model.json; `tokenizer_from_manifest` reads it back."""
        return {
            "name": self.name,
            "kind": self.kind,
            "hash": self.hash,
            "vocab_size": self.vocab_size,
            "eot": self.eot,
            "bos": self.bos,
            "control": list(self.control),
            "file": None,
        }

    def save(self, path: str | os.PathLike[str]) -> str | None:
        """Write what loading again needs into the folder (or .json file) `path`; its name, or None if nothing is needed."""
        return None

    @functools.cached_property
    def _is_control(self) -> npt.NDArray[np.bool_]:
        is_control = np.zeros(self.vocab_size + 1, bool)  # the last stands for ids outside the vocabulary
        is_control[[i for i in self.control if i < self.vocab_size]] = True
        return is_control

    def forged(self, ids: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """Which of the ids, [n], are control tokens."""
        return self._is_control[np.minimum(ids, self.vocab_size)]

    def _checked(self, text: str, index: int = 0) -> Ids:
        if not isinstance(text, str):
            raise TextError(f"tokenizer {self.name}: expected a string, got {type(text).__name__}", index)
        try:
            with self._explained():
                ids = self._encode(text)
                return self._kept(text, ids)
        except TextError as error:
            raise TextError(str(error), index) from error.__cause__

    def _kept(self, text: str, ids: Ids) -> Ids:
        """The ids of a text, respelled where a control token is among them."""
        if not self.forged(ids).any():
            return ids
        respelled = self._respell(text)
        if self.forged(respelled).any():
            raise self._forged(text)
        return respelled

    def _forged(self, text: str) -> TextError:
        found = self._encode(text)
        control = int(found[self.forged(found)][0])
        token = self._decode([control])
        return TextError(
            f"tokenizer {self.name}: the text gives the control token {token!r} (id {control}), and the vocabulary has no other"
            " way to write it"
        )

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn what the libraries raise about a text into a `TextError`."""
        try:
            yield
        except LLDError:
            raise
        except UnicodeEncodeError as error:
            at = f"{error.reason} at character {error.start}"
            raise TextError(f"tokenizer {self.name}: the text is not valid Unicode ({at})") from None
        except Exception as error:  # tokenizers raises bare Exception, tiktoken ValueError, transformers what it likes
            raise TextError(f"tokenizer {self.name} fails on a text ({type(error).__name__}: {error})") from error
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # of Rust code; no Exception, and of no class that can be imported
                raise
            raise TextError(f"tokenizer {self.name} fails on a text (panic: {error})") from error


class ByteTokenizer(Tokenizer):
    """One token per UTF-8 byte; id 256 ends a document."""

    kind = "bytes"

    def __init__(self) -> None:
        super().__init__("bytes", 257, 256, None, False, [256], hash_of({"type": "bytes", "eot": 256}))

    def _encode(self, text: str) -> Ids:
        return np.frombuffer(text.encode(), np.uint8).astype(np.uint32)

    def _decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")


def hash_of(content: Any) -> str:
    """What decides an encoding -> the hash by which tokenizers are told apart."""
    return xxhash.xxh3_128(json.dumps(content, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def hash_of_ranks(ranks: Mapping[int, bytes], pattern: str, special: Mapping[str, int]) -> str:
    """The hash of a byte-level BPE, whichever library runs it."""
    tokens = [[i, ranks[i].hex()] for i in sorted(ranks)]
    return hash_of({"type": "byte-bpe", "pattern": pattern, "special": dict(special), "ranks": tokens})
