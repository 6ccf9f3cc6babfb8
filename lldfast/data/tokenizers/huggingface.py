"""Tokenizers of Hugging Face: what a tokenizer.json holds, and transformers' classes that have no such file."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lldfast.backends import require
from lldfast.data.gpt2bpe import byte_alphabet, is_gpt2
from lldfast.data.tokenizers.base import Ids, TextError, Tokenizer, hash_of, hash_of_ranks
from lldfast.data.tokenizers.control import control_ids, without_control
from lldfast.errors import InputError
from lldfast.files import atomic_path


class _WithTemplate(Tokenizer):
    """What both kinds share: a library that by default puts special tokens around a text, after a template of its own."""

    kind = "hf"

    def _full(self, text: str) -> list[int]:
        """The ids with the template's special tokens."""
        raise NotImplementedError

    def encode_batch_native(self, texts: Sequence[str]) -> list[Ids]:
        return [self._in_template(text, kept, i) for i, (text, kept) in enumerate(zip(texts, self.encode_batch(texts)))]

    def _in_template(self, text: str, kept: Ids, index: int) -> Ids:
        """The library's ids of a text, with `kept` for the part that is the text's own."""
        own, full = self._encode(text), np.array(self._full(text), np.uint32)
        if np.array_equal(own, kept):
            return full
        for start in range(len(full) - len(own) + 1):
            if np.array_equal(full[start : start + len(own)], own):
                return np.concatenate((full[:start], kept, full[start + len(own) :]))
        raise TextError(f"tokenizer {self.name}: the text gives a control token, and its template hides where", index)


class HFTokenizer(_WithTemplate):
    """A `tokenizers.Tokenizer`: what a tokenizer.json holds.

    A text is one call of the library, at any length: its BPE and Unigram take time that grows with the length of a word by a
    little more than in proportion, so that no word is cut.

    Args:
        backend: copied, since its settings are changed.
        name, eot, bos: as the attributes.
        control: ids of control tokens; default the special added tokens, `eot` and `bos` (see `control_ids`).
    """

    def __init__(self, backend: Any, name: str, eot: int | None, bos: int | None, control: Iterable[int] | None = None) -> None:
        self.backend = require("tokenizers", purpose="this tokenizer needs").Tokenizer.from_str(backend.to_str())
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = True  # special tokens in a text are text
        ids = self.backend.get_vocab(with_added_tokens=True)
        if not ids:
            raise InputError(f"tokenizer {name} has an empty vocabulary")
        adds_bos = bos is not None and self.backend.encode("").ids[:1] == [bos]  # of no text only the template's tokens
        control = control_ids(self.backend, eot, bos) if control is None else control
        super().__init__(name, max(ids.values()) + 1, eot, bos, adds_bos, control, _hash_backend(self.backend))

    def _encode(self, text: str) -> Ids:
        text.encode()  # a lone surrogate raises UnicodeEncodeError here; the library's TypeError says less
        return np.array(self.backend.encode(text, add_special_tokens=False).ids, np.uint32)

    def encode_batch(self, texts: Sequence[str], threads: int | None = None) -> list[Ids]:
        try:
            with self._explained():
                encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except TextError:
            return [self._checked(text, i) for i, text in enumerate(texts)]  # one by one, to name the text at fault
        found = [np.array(encoding.ids, np.uint32) for encoding in encodings]
        return [self._checked(text, i) if self.forged(ids).any() else ids for i, (text, ids) in enumerate(zip(texts, found))]

    def _full(self, text: str) -> list[int]:
        return list(self.backend.encode(text).ids)

    @functools.cached_property
    def _uncontrolled(self) -> Any:
        return without_control(self.backend, self.control)

    def _respell(self, text: str) -> Ids:
        own = self.backend.encode(text, add_special_tokens=False)
        try:
            respelled = self._uncontrolled.encode(text, add_special_tokens=False)
        except Exception as error:  # the library raises bare Exception where the vocabulary lacks an unknown token
            raise self._forged(text) from error
        written = np.zeros(len(text), bool)
        for start, end in respelled.offsets:
            written[start:end] = True
        for i in np.flatnonzero(self.forged(np.array(own.ids))):
            start, end = own.offsets[i]
            if any(not written[j] and not text[j].isspace() for j in range(start, end)):  # a BPE drops what it does not know
                raise self._forged(text)
        return np.array(respelled.ids, np.uint32)

    def _decode(self, ids: list[int]) -> str:
        return str(self.backend.decode(ids, skip_special_tokens=False))

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "file": "tokenizer.json"}

    def save(self, path: str | os.PathLike[str]) -> str | None:
        path = Path(path)
        file = path if path.suffix == ".json" else path / "tokenizer.json"
        with atomic_path(file) as temporary:
            temporary.write_text(self.backend.to_str(pretty=True), encoding="utf-8")
        return file.name


class SlowTokenizer(_WithTemplate):
    """A transformers tokenizer without a tokenizer.json form (pure Python, SentencePiece): scoring only."""

    def __init__(self, backend: Any, name: str, eot: int | None, bos: int | None) -> None:
        self.backend = backend
        vocab = backend.get_vocab()
        files = [getattr(backend, attribute, None) for attribute in ("vocab_file", "merges_file")]
        content = [hashlib.sha256(Path(f).read_bytes()).hexdigest() for f in files if f and Path(f).is_file()]
        adds_bos = bos is not None and list(backend("a")["input_ids"])[:1] == [bos]
        fingerprint = hash_of({"class": type(backend).__name__, "vocab": vocab, "files": content})
        special = {i for i, token in backend.added_tokens_decoder.items() if token.special} | {*backend.all_special_ids}
        control = {int(i) for i in special | {bos} if i is not None and i != backend.unk_token_id}
        control |= set() if eot is None else {eot}
        size = max(vocab.values(), default=len(backend) - 1) + 1
        super().__init__(name, size, eot, bos, adds_bos, control, fingerprint)

    def _encode(self, text: str) -> Ids:
        return np.array(self.backend.encode(text, add_special_tokens=False, split_special_tokens=True), np.uint32)

    def _full(self, text: str) -> list[int]:
        return list(self.backend(text, split_special_tokens=True)["input_ids"])

    def _respell(self, text: str) -> Ids:
        """Each control token as its characters."""
        ids: list[int] = []
        for token in self.backend.tokenize(text, split_special_tokens=True):
            i = self.backend.convert_tokens_to_ids(token)
            ids += self.backend.convert_tokens_to_ids(list(token)) if i in self.control else [i]
        if None in ids:  # a character that is not in the vocabulary, which has no unknown token
            raise self._forged(text)
        return np.array(ids, np.uint32)

    def _decode(self, ids: list[int]) -> str:
        return str(self.backend.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def save(self, path: str | os.PathLike[str]) -> str | None:
        kind = type(self.backend).__name__
        raise InputError(f"tokenizer {self.name} ({kind}) has no tokenizer.json form: it can score texts, not make shards")


def _hash_backend(backend: Any) -> str:
    content = json.loads(backend.to_str())
    if is_gpt2(content):
        byte_of = byte_alphabet()
        special = {t["content"]: t["id"] for t in content["added_tokens"]}
        ranks = {i: bytes(byte_of[c] for c in token) for token, i in content["model"]["vocab"].items() if token not in special}
        ranks |= {i: token.encode() for token, i in special.items()}
        return hash_of_ranks(ranks, "gpt2", special)
    # The post-processor adds special tokens and the decoder turns ids to text: neither changes what `encode` answers.
    return hash_of({key: content[key] for key in ("normalizer", "pre_tokenizer", "model", "added_tokens")})
