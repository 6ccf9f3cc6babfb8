"""The tokenizer that a GGUF file describes, as a `tokenizers.Tokenizer`, and what its folder says about special tokens.

Byte-level BPE (`tokenizer.ggml.model` "gpt2") and SentencePiece's BPE ("llama") are built; other kinds are refused by name. What
was built is compared with the file's lists before it is used.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from lldfast.errors import CorruptError, InputError
from lldfast.files import write_json
from lldfast.models.gguf.pretokenizers import SPLITTINGS, Splitting
from lldfast.models.gguf.reader import GGUFFile

# tokenizer.ggml.token_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
SPACE = "▁"  # SentencePiece's, U+2581

# Keys without a say in the ids of a text: what a program adds around it, or names of tokens for other uses.
_HARMLESS = {
    "chat_template", "ggml.add_eos_token", "ggml.add_sep_token", "ggml.eot_token_id", "ggml.eom_token_id", "ggml.cls_token_id",
    "ggml.seperator_token_id", "ggml.mask_token_id", "ggml.prefix_token_id", "ggml.suffix_token_id", "ggml.middle_token_id",
    "ggml.fim_pre_token_id", "ggml.fim_suf_token_id", "ggml.fim_mid_token_id", "ggml.fim_pad_token_id", "ggml.fim_rep_token_id",
    "ggml.fim_sep_token_id", "ggml.suppress_tokens", "ggml.token_type_count", "ggml.eog_token_ids", "huggingface.json",
}  # fmt: skip
_USED = {
    "ggml.model", "ggml.pre", "ggml.tokens", "ggml.token_type", "ggml.scores", "ggml.merges", "ggml.bos_token_id",
    "ggml.eos_token_id", "ggml.unknown_token_id", "ggml.padding_token_id", "ggml.add_bos_token", "ggml.add_space_prefix",
    "ggml.remove_extra_whitespaces", "ggml.precompiled_charsmap",
}  # fmt: skip
_WAY_OUT = "pass tokenizer= (--tokenizer), the tokenizer that the model was published with"


def build(file: GGUFFile) -> tuple[Any, dict[str, Any]]:
    """(tokenizers.Tokenizer, the entries of tokenizer_config.json).

    Raises:
        InputError: a kind, splitting or setting that is not known, by key and value; duplicate tokens.
        CorruptError: lists of the file that contradict each other.
    """
    said = {key.removeprefix("tokenizer."): value for key, value in file.metadata.items() if key.startswith("tokenizer.")}
    for key, value in said.items():
        if key not in _USED | _HARMLESS and not key.startswith("chat_template"):
            raise refusal(file, key, value, "the key is not known")
    kind = said.get("ggml.model")
    vocabulary = _Vocabulary(file, said)
    if said.get("ggml.remove_extra_whitespaces") or said.get("ggml.precompiled_charsmap"):
        key = "ggml.remove_extra_whitespaces" if said.get("ggml.remove_extra_whitespaces") else "ggml.precompiled_charsmap"
        raise refusal(file, key, said[key], "this normalisation of texts is not known for this kind of tokenizer")
    if kind == "gpt2":
        backend, adds_bos = _byte_level(vocabulary)
    elif kind == "llama":
        backend, adds_bos = _sentencepiece(vocabulary)
    else:
        raise refusal(file, "ggml.model", kind, "only gpt2 (byte-level BPE) and llama (SentencePiece BPE) can be rebuilt")
    _compare(vocabulary, backend)
    settings = vocabulary.settings
    bos = settings.get("bos_token")
    if said.get("ggml.add_bos_token", adds_bos) and bos is not None:
        from tokenizers import processors

        ids = [(bos, vocabulary.ids[bos])]
        backend.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=ids
        )
    return backend, settings


def save(backend: Any, settings: dict[str, Any], folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json, which load as they are, here and in transformers."""
    backend.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **settings})


def refusal(file: GGUFFile, key: str, value: Any, why: str) -> InputError:
    return InputError(f"{file.path}: tokenizer.{key} is {str(value)[:60]!r}: {why}; {_WAY_OUT}")


class _Vocabulary:
    """The file's lists, checked against each other."""

    def __init__(self, file: GGUFFile, said: dict[str, Any]) -> None:
        self.file, self.said = file, said
        self.tokens: list[str] = self._list("ggml.tokens", None)
        count = len(self.tokens)
        self.types: list[int] = self._list("ggml.token_type", [NORMAL] * count)
        self.scores: list[float] = self._list("ggml.scores", [0.0] * count)
        for key, values in (("token_type", self.types), ("scores", self.scores)):
            if len(values) != count:
                raise CorruptError(f"{file.path}: {count} tokens, but {len(values)} values in tokenizer.ggml.{key}")
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        if len(self.ids) != count:
            twice = next(token for i, token in enumerate(self.tokens) if self.ids[token] != i)
            raise refusal(file, "ggml.tokens", twice, "this token stands in the list twice")
        rows = file.tensors["token_embd.weight"].shape[-1] if "token_embd.weight" in file.tensors else count
        if count > rows:
            raise InputError(f"{file.path}: {count} tokens, but token_embd.weight has {rows} rows")

    def _list(self, key: str, default: list[Any] | None) -> list[Any]:
        values = self.said.get(key, default)
        if not isinstance(values, list) or not values:
            raise InputError(f"{self.file.path}: tokenizer.{key} is missing or empty; {_WAY_OUT}")
        return values

    @property
    def merges(self) -> list[tuple[str, str]]:
        """The file's merges: two tokens with one blank between them."""
        found = []
        for line in self.said.get("ggml.merges", []):
            left, _, right = line.partition(" ")
            if left not in self.ids or right not in self.ids or left + right not in self.ids:
                raise CorruptError(f"{self.file.path}: merge {line!r} of tokenizer.ggml.merges is not made of tokens of the file")
            found.append((left, right))
        return found

    @property
    def settings(self) -> dict[str, Any]:
        found: dict[str, Any] = {"clean_up_tokenization_spaces": False}
        defaults = DEFAULT_IDS if self.said.get("ggml.model") == "llama" else {}
        for name, key in SPECIAL.items():
            number = self.said.get(f"ggml.{key}_token_id", defaults.get(key))
            if number is not None:
                if not 0 <= number < len(self.tokens):
                    raise refusal(self.file, f"ggml.{key}_token_id", number, f"the file has {len(self.tokens)} tokens")
                found[name] = self.tokens[number]
        if isinstance(template := self.said.get("chat_template"), str):
            found["chat_template"] = template
        return found

    def add_special(self, backend: Any, tokens: list[str]) -> None:
        """Control tokens as special ones, user-defined ones as plain added tokens: llama.cpp takes both out of a text whole."""
        from tokenizers import AddedToken

        special = [token for token, kind in zip(tokens, self.types, strict=True) if kind in (UNKNOWN, CONTROL)]
        plain = [token for token, kind in zip(tokens, self.types, strict=True) if kind == USER_DEFINED]
        backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
        backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in plain])


DEFAULT_IDS = {"bos": 1, "eos": 2, "unknown": 0}  # llama.cpp's for SentencePiece


def _byte_level(vocabulary: _Vocabulary) -> tuple[Any, bool]:
    from tokenizers import Tokenizer, decoders, models

    splitting = _splitting(vocabulary)
    if vocabulary.said.get("ggml.add_space_prefix"):
        raise refusal(vocabulary.file, "ggml.add_space_prefix", True, "not known for byte-level BPE")
    if "ggml.merges" not in vocabulary.said:
        raise InputError(f"{vocabulary.file.path}: tokenizer.ggml.merges is missing; {_WAY_OUT}")
    backend = Tokenizer(models.BPE(vocabulary.ids, vocabulary.merges, ignore_merges=splitting.whole_words))
    if (normalizer := splitting.normalizer()) is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer, backend.decoder = splitting.pre_tokenizer(), decoders.ByteLevel()
    vocabulary.add_special(backend, vocabulary.tokens)
    return backend, splitting.adds_bos


def _splitting(vocabulary: _Vocabulary) -> Splitting:
    file, name = vocabulary.file, vocabulary.said.get("ggml.pre")
    if name is None:
        warnings.warn(
            f"{file.path} does not say how texts are split (no tokenizer.ggml.pre): llama.cpp's default is taken, which no"
            f" published tokenizer has. For the ids that the model was trained with, {_WAY_OUT}",
            stacklevel=2,
        )
    if (found := SPLITTINGS.get("default" if name is None else name)) is None:
        raise refusal(file, "ggml.pre", name, "this way to split texts is not among those of docs/GGUF.md")
    return found


def _sentencepiece(vocabulary: _Vocabulary) -> tuple[Any, bool]:
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers.tokenization_utils_base import generate_merges

    if not ("ggml.scores" in vocabulary.said or "ggml.merges" in vocabulary.said):
        raise InputError(f"{vocabulary.file.path}: tokenizer.ggml.scores is missing; {_WAY_OUT}")
    gemma = vocabulary.file.architecture.startswith("gemma")
    # Gemma's runs of blanks: llama.cpp writes them as blanks, the published vocabulary as SentencePiece's sign.
    tokens = [SPACE * len(t) if gemma and t and not t.strip(" ") else t for t in vocabulary.tokens]
    ids = {token: i for i, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        raise refusal(vocabulary.file, "ggml.tokens", SPACE, "runs of blanks stand in the list in two spellings")
    apart = {token for token, kind in zip(tokens, vocabulary.types, strict=True) if kind in (UNKNOWN, CONTROL, BYTE)}
    ranks = dict(zip(tokens, map(float, vocabulary.scores), strict=True))
    if gemma:  # SentencePiece's scores, which the file replaces by one number for all of its user-defined pieces
        ranks = {token: 0.0 if vocabulary.types[i] == USER_DEFINED else -float(i) for token, i in ids.items()}
    merges = vocabulary.merges or generate_merges(ids, ranks, skip_tokens=apart)
    unknown = vocabulary.settings.get("unk_token")
    fallback = all(f"<0x{byte:02X}>" in ids for byte in range(256))
    backend = Tokenizer(models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=fallback))
    prefix = bool(vocabulary.said.get("ggml.add_space_prefix", not gemma))
    replace = normalizers.Replace(" ", SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace]) if prefix else replace
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    vocabulary.add_special(backend, tokens)
    return backend, True


def _compare(vocabulary: _Vocabulary, backend: Any) -> None:
    """Every id has the file's token, none is new, and the merges are the file's."""
    file, found = vocabulary.file, {i: token for token, i in backend.get_vocab(with_added_tokens=True).items()}
    for i, token in enumerate(vocabulary.tokens):
        if found.get(i) not in (token, SPACE * len(token) if token and not token.strip(" ") else token):
            raise InputError(
                f"{file.path}: id {i} is token {token!r} in the file and {found.get(i)!r} in the converted tokenizer"
            )
    if len(found) != len(vocabulary.tokens):
        raise InputError(f"{file.path}: {len(vocabulary.tokens)} tokens in the file, {len(found)} in the converted tokenizer")
    if said := vocabulary.said.get("ggml.merges"):
        built = [" ".join(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
        if built != said:
            raise InputError(f"{file.path}: the converted tokenizer's merges are not those of tokenizer.ggml.merges")
