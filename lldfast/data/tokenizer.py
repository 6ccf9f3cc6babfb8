"""Tokenizers behind one small interface: GPT-2 through tiktoken, Hugging Face files, a byte-level BPE trained here, bytes.

`encode` never adds special tokens and never recognises them in a text: "<|endoftext|>" inside a document is plain
characters, so no text can forge a document boundary, also where the model's own vocabulary has "</s>" as an entry (see
`Tokenizer`). Whoever needs EOT or BOS adds `eot` or `bos` himself.

`hash` is taken over what decides the encoding, not over a file: two tokenizers are the same iff their hashes are equal,
and GPT-2's BPE has one hash whether it comes from tiktoken or from a Hugging Face folder.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lldfast.backends import require
from lldfast.data.gpt2bpe import EOT
from lldfast.data.tokenizers.base import ByteTokenizer, Ids, TextError, Tokenizer
from lldfast.data.tokenizers.control import control_ids, named_tokens
from lldfast.data.tokenizers.huggingface import HFTokenizer, SlowTokenizer
from lldfast.data.tokenizers.tiktokens import TiktokenTokenizer
from lldfast.data.tokenizers.training import train_bpe
from lldfast.errors import CorruptError, InputError, LLDError
from lldfast.files import read_json

__all__ = [
    "ByteTokenizer",
    "HFTokenizer",
    "Ids",
    "SlowTokenizer",
    "TextError",
    "TiktokenTokenizer",
    "Tokenizer",
    "load_tokenizer",
    "tokenizer_from_manifest",
    "train_bpe",
]

# Tokens that end a document in pretraining data come before a chat model's eos, which ends a turn.
DOCUMENT_END = (EOT, "<|end_of_text|>")
KNOWN_EOS = ("</s>", "<eos>", "[EOS]")

_require = functools.partial(require, purpose="this tokenizer needs")


def load_tokenizer(spec: Any) -> Tokenizer:
    """A tokenizer from "gpt2" (or another tiktoken name), "bytes", a tokenizer.json, a model's folder (lldfast's or Hugging
    Face's) or a hub id.

    Tokenizer objects of the libraries `tokenizers` and `transformers` are wrapped; a `Tokenizer` comes back as it is.

    Raises:
        InputError: `spec` is none of these, or the hub cannot be reached.
        CorruptError: a tokenizer.json that cannot be read.
        MissingDependencyError: GPT-2's vocabulary is neither installed nor downloadable, or a package is absent.
    """
    if isinstance(spec, Tokenizer):
        return spec
    if not isinstance(spec, (str, os.PathLike)):
        return _wrap(spec)
    if spec == "bytes":
        return ByteTokenizer()
    path = Path(spec)
    if not path.exists():
        if str(spec) in _require("tiktoken").list_encoding_names():
            return TiktokenTokenizer(str(spec))
        if path.suffix or path.is_absolute() or str(spec).startswith("."):
            raise InputError(f"tokenizer {spec}: no such file")
        path = _download(str(spec))
    if (path / "model.json").is_file():  # of `GPT.save`, which names its tokenizer
        content = read_json(path / "model.json")
        entry = content.get("tokenizer") if isinstance(content, dict) else None
        if not isinstance(entry, dict):
            raise InputError(f"tokenizer {spec}: its model.json names no tokenizer")
        return tokenizer_from_manifest(entry, path)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        transformers = _require("transformers")
        try:
            # Code that a tokenizer brings along is not run, and nobody is asked on the terminal whether it may be.
            options = {"local_files_only": True, "trust_remote_code": False}
            return _wrap(transformers.AutoTokenizer.from_pretrained(str(path), **options), str(spec))
        except LLDError:
            raise
        except Exception as error:  # transformers raises OSError, ValueError, KeyError, ...: all mean "no tokenizer here"
            if "trust_remote_code=True" in str(error):
                raise InputError(f"tokenizer {spec} brings Python code of its own, which is not run: pass tokenizer=") from None
            raise InputError(f"tokenizer {spec}: no tokenizer.json, and transformers cannot load it ({error})") from error
    # A local file is named by its last two parts: manifests and models travel, and the folders above mean nothing elsewhere.
    local = Path(spec).exists()
    return _read_tokenizer_json(file, f"{file.absolute().parent.name}/{file.name}" if local else str(spec))


def tokenizer_from_manifest(entry: Mapping[str, Any], folder: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer that a "tokenizer" entry describes; its file is looked for in `folder` and the folder above.

    Raises:
        InputError: the tokenizer's file is missing.
        CorruptError: what was found does not have the hash of the entry.
    """
    for key in ("name", "hash", "eot", "bos"):
        if key not in entry:
            raise CorruptError(f"{folder}: the tokenizer's entry has no field {key!r}")
    if entry.get("file"):
        if Path(str(entry["file"])).name != entry["file"]:
            raise CorruptError(f"{folder}: the tokenizer's file {entry['file']!r} is not the name of a file in this folder")
        tried = [Path(folder) / entry["file"], Path(folder).absolute().parent / entry["file"]]
        file = next((candidate for candidate in tried if candidate.is_file()), None)
        if file is None:
            raise InputError(f"the file of tokenizer {entry['name']} is missing: looked for {' and '.join(map(str, tried))}")
        tokenizer: Tokenizer = _read_tokenizer_json(file, entry["name"], entry["eot"], entry["bos"], entry.get("control"))
    else:
        tokenizer = load_tokenizer(entry["name"])
    if tokenizer.hash != entry["hash"]:
        found = f"hash {tokenizer.hash}, but {entry['hash']} was recorded"
        raise CorruptError(f"{folder}: tokenizer {entry['name']} has {found}; its file was replaced")
    return tokenizer


def _read_tokenizer_json(
    file: Path, name: str, eot: int | None = None, bos: int | None = None, control: Any = None
) -> HFTokenizer:
    try:
        backend = _require("tokenizers").Tokenizer.from_file(str(file))
    except LLDError:
        raise
    except Exception as error:  # the Rust library raises bare Exception
        raise CorruptError(f"{file} is not a tokenizer.json ({error})") from error
    settings: dict[str, Any] = {}
    for extra in ("special_tokens_map.json", "tokenizer_config.json"):
        if (file.parent / extra).is_file():
            content = read_json(file.parent / extra)
            if not isinstance(content, dict):
                raise CorruptError(f"{file.parent / extra}: expected a JSON object, got {type(content).__name__}")
            settings |= {key: value for key, value in content.items() if value is not None}
    if eot is None:
        eot = _document_end(backend.token_to_id, settings.get("eos_token"))
    if bos is None:
        bos = _token_id(backend.token_to_id, settings.get("bos_token"))
    if control is None:  # also of entries from before they listed them
        control = control_ids(backend, eot, bos, named_tokens(settings))
    elif not isinstance(control, list) or not all(type(i) is int and i >= 0 for i in control):
        raise CorruptError(f"{file.parent}: the control tokens of tokenizer {name} must be a list of ids, got {control!r:.100}")
    return HFTokenizer(backend, name, eot, bos, control)


def _wrap(tokenizer: Any, name: str | None = None) -> Tokenizer:
    """Wrap a tokenizer object of `tokenizers` or `transformers`."""
    name = name or str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)
    if hasattr(tokenizer, "encode_special_tokens"):
        return HFTokenizer(tokenizer, name, _document_end(tokenizer.token_to_id, None), None)
    if not hasattr(tokenizer, "get_vocab") or not hasattr(tokenizer, "convert_tokens_to_ids"):
        kind = type(tokenizer).__name__
        raise InputError(f"cannot use a {kind} as tokenizer: expected a name, a path, or a tokenizers / transformers tokenizer")
    vocab = tokenizer.get_vocab()
    eot, bos = _document_end(vocab.get, tokenizer.eos_token), _token_id(vocab.get, tokenizer.bos_token)
    if getattr(tokenizer, "is_fast", False):
        named = [tokenizer.convert_ids_to_tokens(i) for i in tokenizer.all_special_ids if i != tokenizer.unk_token_id]
        named += [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        control = control_ids(tokenizer.backend_tokenizer, eot, bos, named)
        return HFTokenizer(tokenizer.backend_tokenizer, name, eot, bos, control)
    return SlowTokenizer(tokenizer, name, eot, bos)


def _document_end(lookup: Any, eos: Any) -> int | None:
    candidates = [*DOCUMENT_END, eos, *KNOWN_EOS]
    return next((found for token in candidates if (found := _token_id(lookup, token)) is not None), None)


def _token_id(lookup: Any, token: Any) -> int | None:
    if isinstance(token, dict):
        token = token.get("content")
    found = lookup(token) if token else None
    return None if found is None else int(found)


def _download(name: str) -> Path:
    hub = _require("huggingface_hub")
    patterns = ["tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "*.model", "config.json", "added_tokens.json"]
    try:
        return Path(hub.snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # network and HTTP libraries raise classes of their own
        known = "gpt2, bytes, a tokenizer.json, a Hugging Face folder or a hub id"
        raise InputError(f"tokenizer {name!r} is none of {known} (the hub answered: {type(error).__name__}: {error})") from error
