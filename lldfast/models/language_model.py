"""Any causal language model behind one interface: hidden states and a head, a tokenizer, a rule for the first token.

A `LanguageModel` wraps our GPT, a Hugging Face model or a GGUF file. `score` needs hidden states and the head apart, so that no
logits of a whole batch are alive. For Hugging Face models the parts are found by name and then *checked*: the head applied
to the hidden states of a probe must give the model's own logits (softcap and logit scale included). A model that fails the
check is scored through its full logits, and `identity["head"]` says so.

First token (`bos`): "auto" puts one token before every text, so that each of its tokens is scored: the tokenizer's BOS where
the tokenizer itself would add it, else the end-of-text token, which separates documents in GPT-2-like training data, else a
BOS that is merely defined. "native" takes exactly what the tokenizer does by default, "none" adds nothing; without a token in
front, a text's first token is context only. Text tokens come from `Tokenizer.encode`, which never adds specials: no BOS twice.

Texts longer than the context are cut into windows of `context_length` input tokens. A window starts with the last token of
the one before (the first with BOS), so that every token is scored exactly once.
"""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn as nn
import xxhash
from torch import Tensor

from lldfast.backends import pick_device, require
from lldfast.data.evalset import EvalSet
from lldfast.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_from_manifest
from lldfast.errors import InputError
from lldfast.models import gguf
from lldfast.models.gguf import file_hash
from lldfast.models.gpt import DTYPES, GPT, read_gpt_json
from lldfast.ops.chunks import transform_

BOS_MODES = ("auto", "native", "none")
# Names of the context length in Hugging Face configurations.
CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "seq_length", "max_seq_len")
UNLIMITED = 1 << 30  # a state-space model has no context length
TOKENIZED_SETS = 4  # tokenised evaluation sets kept per model: estimate, measure and some spare


@dataclass(frozen=True)
class Head:
    """`logits = softcap(logit_scale * (hidden @ weight.T + bias))`, of which ids below valid_vocab are real."""

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0
    valid_vocab: int | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., valid_vocab] in the dtype of hidden; for probes and for chunks of a few rows."""
        weight = self.weight[: self.valid_vocab].to(hidden.dtype)
        bias = None if self.bias is None else self.bias[: self.valid_vocab].to(hidden.dtype)
        return transform_(hidden @ weight.T, bias, self.softcap, self.logit_scale)

    def options(self) -> dict[str, Any]:
        """Keyword arguments of `linear_logprob`."""
        return {"bias": self.bias, "softcap": self.softcap, "logit_scale": self.logit_scale, "valid_vocab": self.valid_vocab}


@dataclass(frozen=True)
class Segment:
    """One window of a text: `ids` are its input tokens and the last label, and the labels from `first` on are scored."""

    text: int
    ids: npt.NDArray[np.int64]
    first: int = 0

    def __len__(self) -> int:
        return len(self.ids) - 1


class LanguageModel:
    """A causal language model that can be scored.

    Attributes:
        name: for people. tokenizer: its Tokenizer. module: the torch module that owns the parameters.
        bos, bos_id: the mode given, and the id put before each text (None: nothing, or "native").
        context_length: most input tokens at once. vocab_size: ids the head tells apart.
        separate_head: whether `hidden` and `head` work; otherwise `logits` is the only way.
        identity: facts for provenance: name, kind, source, hash of the weights, licence, parameters, dtype, bos, head, extra.
    """

    def __init__(
        self,
        module: nn.Module,
        tokenizer: Tokenizer,
        *,
        name: str,
        kind: str,
        source: str,
        context_length: int,
        bos: str = "auto",
        weights_hash: str | None = None,
        licence: str | None = None,
        extra: dict[str, Any] | None = None,
    ) -> None:
        self.module, self.tokenizer, self.name, self.kind = module, tokenizer, name, kind
        self.context_length = context_length
        self._facts = {"source": source, "licence": licence, "extra": extra or {}}
        self._weights_hash = weights_hash
        self._set_bos(bos)
        self.tokenized: OrderedDict[tuple[str, str, int, int], list[Segment]] = OrderedDict()
        if isinstance(module, GPT):
            self._trunk: Any = module
            self._head: Head | None = None
            self.separate_head, self.vocab_size, self.head_note = True, module.config.valid_vocab, "weight"
        else:
            self._trunk, self._head, self.vocab_size, self.head_note = _take_apart(module)
            self.separate_head = self._head is not None
        if self.bos_id is not None and self.bos_id >= self.vocab_size:
            raise InputError(f"{name}: the first token (id {self.bos_id}) is outside the model's vocabulary of {self.vocab_size}")

    @classmethod
    def from_gpt(cls, gpt: GPT, tokenizer: Tokenizer, name: str = "gpt", *, bos: str = "auto", **facts: Any) -> LanguageModel:
        """Wrap a GPT in memory; it may go on training, and `identity["hash"]` follows its weights."""
        if tokenizer.vocab_size > gpt.config.valid_vocab:
            raise InputError(
                f"{name}: tokenizer {tokenizer.name} has {tokenizer.vocab_size} ids, the model only {gpt.config.valid_vocab}"
            )
        facts = {"kind": "gpt", "source": "memory", **facts}
        return cls(gpt, tokenizer, name=name, context_length=gpt.config.block_size, bos=bos, **facts)

    def __repr__(self) -> str:
        about = f"{self.name!r}, {self.kind}, tokenizer={self.tokenizer.name!r}, bos={self.bos!r}, device={self.device}"
        return f"LanguageModel({about})"

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def identity(self) -> dict[str, Any]:
        parameters = list(self.module.parameters())
        return {
            "name": self.name,
            "kind": self.kind,
            **self._facts,
            "hash": self._weights_hash or parameter_hash(self.module),
            "parameters": sum(p.numel() for p in parameters),
            "dtype": str(parameters[0].dtype).removeprefix("torch."),
            "tokenizer": {"name": self.tokenizer.name, "hash": self.tokenizer.hash},
            "bos": {"mode": self.bos, "id": self.bos_id},
            "context_length": self.context_length,
            "head": self.head_note,
        }

    def _set_bos(self, bos: str) -> None:
        if bos not in BOS_MODES:
            raise InputError(f"bos={bos!r} is not one of {', '.join(BOS_MODES)}")
        t = self.tokenizer
        self.bos = bos
        first = t.bos if t.adds_bos or t.eot is None else t.eot
        self.bos_id: int | None = first if bos == "auto" else None

    def to(self, device: str | torch.device) -> LanguageModel:
        """Move the model in place; its head moves along, since Module.to keeps the parameter objects.

        Args:
            device: "auto" (cuda where there is one, else the CPU) or one by name.

        Raises:
            InputError: there is no such device, or the model does not fit it.
        """
        place = pick_device(device, f"{self.name}: device")
        try:
            self.module.to(place)
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"{self.name}: device {str(device)!r} cannot be used here: {error}") from None
        return self

    def with_bos(self, bos: str) -> LanguageModel:
        """The same model under another first-token rule."""
        other = copy.copy(self)
        other._set_bos(bos)
        return other

    def hidden(self, ids: Tensor) -> Tensor:
        """ids [B, T] -> hidden states [B, T, d] that the head is applied to; causal, so right padding changes nothing."""
        if isinstance(self.module, GPT):
            return self.module(ids)
        if not self.separate_head:
            raise InputError(f"{self.name}: hidden states and head cannot be told apart ({self.head_note}); use logits()")
        return self._trunk(input_ids=ids, use_cache=False).last_hidden_state

    def head(self) -> Head:
        """The head with its current weights."""
        if isinstance(self.module, GPT):
            return Head(self.module.head_weight, valid_vocab=self.module.config.valid_vocab)
        if self._head is None:
            raise InputError(f"{self.name}: hidden states and head cannot be told apart ({self.head_note}); use logits()")
        return self._head

    def logits(self, ids: Tensor) -> Tensor:
        """ids [B, T] -> the model's own logits [B, T, vocab_size]."""
        return self.module.logits(ids) if isinstance(self.module, GPT) else self.module(input_ids=ids, use_cache=False).logits

    def tokenize(self, evalset: EvalSet, overlap: int = 0) -> list[Segment]:
        """Windows of all texts, in the order of the texts; kept for the last few evaluation sets.

        Args:
            overlap: input tokens that a window repeats from the one before, as context only.

        Raises:
            InputError: a token is outside the model's vocabulary (text and domain named), or overlap does not fit the context.
        """
        if not 0 <= overlap < self.context_length:
            raise InputError(f"overlap={overlap} must be in [0, {self.context_length}), the context length of {self.name}")
        key = (evalset.hash, self.bos, self.context_length, overlap)
        if key not in self.tokenized:
            segments: list[Segment] = []
            for i, ids in enumerate(self._encode(evalset.texts)):
                if len(ids) and int(ids.max()) >= self.vocab_size:
                    raise InputError(
                        f"{self.name}: text {i} (domain {evalset.domain[i]}) has token {int(ids.max())}, outside the vocabulary "
                        f"of {self.vocab_size}; tokenizer {self.tokenizer.name} does not belong to this model"
                    )
                segments += windows(i, ids, self.context_length, overlap)
            self.tokenized[key] = segments
            if len(self.tokenized) > TOKENIZED_SETS:
                self.tokenized.popitem(last=False)
        self.tokenized.move_to_end(key)
        return self.tokenized[key]

    def _encode(self, texts: Sequence[str]) -> list[npt.NDArray[np.int64]]:
        """Ids of each text with what goes before it."""
        if self.bos == "native":
            backend = getattr(self.tokenizer, "backend", None)
            if backend is not None:
                return [np.asarray(_native_ids(backend, text), np.int64) for text in texts]
        prefix = np.array([] if self.bos_id is None else [self.bos_id], np.int64)
        return [np.concatenate((prefix, ids.astype(np.int64))) for ids in self.tokenizer.encode_batch(texts)]


def windows(text: int, ids: npt.NDArray[np.int64], context: int, overlap: int) -> list[Segment]:
    """Segments that score ids[1:] once each; none for fewer than two ids."""
    segments, start, scored = [], 0, 0
    while scored < len(ids) - 1:
        end = min(start + context, len(ids) - 1)
        segments.append(Segment(text, ids[start : end + 1], scored - start))
        scored, start = end, end - overlap
    return segments


def _native_ids(backend: Any, text: str) -> list[int]:
    if hasattr(backend, "encode_special_tokens"):
        return list(backend.encode(text, add_special_tokens=True).ids)
    return list(backend(text, split_special_tokens=True)["input_ids"])


def load_model(
    spec: Any,
    *,
    tokenizer: Any = None,
    device: str | torch.device | None = None,
    dtype: str = "float32",
    bos: str = "auto",
    context_length: int | None = None,
) -> LanguageModel:
    """Load a model for scoring, in evaluation mode. A model in memory keeps its mode and its place: it may be in training.

    Args:
        spec: folder of `GPT.save`, Hugging Face folder or hub id, a .gguf file, or a loaded Hugging Face model (with tokenizer=).
        tokenizer: a Tokenizer or what `load_tokenizer` takes; default: the model's own.
        device: "auto" (cuda where there is one, else the CPU) or one by name. Default: auto for what is loaded here; a model in
            memory stays where it is.
        dtype: "float32", "bfloat16" or "float16", the dtype of the weights (a loaded model keeps its own).
        context_length: use less context than the model has.

    Raises:
        InputError: nothing that can be loaded, an argument is wrong, or the device cannot be used.
        CorruptError: a file does not fit the hash stored beside it.
        MissingDependencyError: transformers (for GGUF also gguf and accelerate) is not installed.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype={dtype!r} is not one of {', '.join(DTYPES)}")
    own = None if tokenizer is None else load_tokenizer(tokenizer)
    if isinstance(spec, LanguageModel):
        raise InputError(f"{spec!r} is loaded already")
    if device is None and not isinstance(spec, nn.Module):
        device = "auto"
    place = None if device is None else pick_device(device)  # told now, not after a long load
    if isinstance(spec, nn.Module):
        model = _from_module(spec, own, bos)
    elif Path(spec).suffix == ".gguf":
        model = _from_gguf(Path(spec), own, dtype, bos)
    elif (Path(spec) / "model.json").is_file():
        model = _from_saved_gpt(Path(spec), own, bos)
        model.module.to(DTYPES[dtype])
    else:
        model = _from_hf(spec, own, dtype, bos)
    if context_length is not None:
        if not 1 <= context_length <= model.context_length:
            raise InputError(f"context_length={context_length} must be in [1, {model.context_length}] for {model.name}")
        model.context_length = context_length
    if not isinstance(spec, nn.Module):
        model.module.eval()
    return model if place is None else model.to(place)


def _from_module(module: nn.Module, tokenizer: Tokenizer | None, bos: str) -> LanguageModel:
    if tokenizer is None:
        raise InputError(f"a {type(module).__name__} in memory needs tokenizer=")
    if isinstance(module, GPT):
        return LanguageModel.from_gpt(module, tokenizer, bos=bos)
    name = str(getattr(module, "name_or_path", "") or type(module).__name__)
    return LanguageModel(
        module, tokenizer, name=name, kind="hf", source="memory", context_length=context_length_of(module), bos=bos
    )


def _from_saved_gpt(folder: Path, tokenizer: Tokenizer | None, bos: str) -> LanguageModel:
    about = read_gpt_json(folder)
    if tokenizer is None:
        if about.get("tokenizer") is None:
            raise InputError(f"{folder}: model.json names no tokenizer; pass tokenizer=")
        tokenizer = tokenizer_from_manifest(about["tokenizer"], folder)
    extra = about.get("extra") or {}
    facts = {"source": str(folder), "weights_hash": about["sha256"], "licence": extra.get("licence"), "extra": extra}
    return LanguageModel.from_gpt(GPT.load(folder), tokenizer, str(extra.get("name") or folder.name), bos=bos, **facts)


def _from_hf(spec: Any, tokenizer: Tokenizer | None, dtype: str, bos: str, **facts: Any) -> LanguageModel:
    transformers = require("transformers", "Hugging Face models need")
    path = Path(spec)
    if not path.is_dir() and (path.suffix or path.is_absolute() or str(spec).startswith(".") or str(spec).count("/") > 1):
        raise InputError(f"{spec}: no such model folder")
    if path.is_dir() and not (path / "config.json").is_file():
        raise InputError(f"{spec} is no model folder: it has neither model.json nor config.json")
    try:
        module = transformers.AutoModelForCausalLM.from_pretrained(str(spec), dtype=DTYPES[dtype])
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"transformers cannot load {spec} as a causal language model: {error}") from error
    folder = path if path.is_dir() else None
    defaults: dict[str, Any] = {
        "name": path.name if folder else str(spec),
        "kind": "hf",
        "source": str(spec),
        "weights_hash": None if folder is None else folder_hash(folder),
        "licence": None if folder is None else _card_licence(folder),
    }
    own = load_tokenizer(spec) if tokenizer is None else tokenizer
    return LanguageModel(module.eval(), own, context_length=context_length_of(module), bos=bos, **{**defaults, **facts})


def _from_gguf(file: Path, tokenizer: Tokenizer | None, dtype: str, bos: str) -> LanguageModel:
    """Convert the file to fp32 safetensors in the cache (once per content) and load that."""
    if not file.is_file():
        raise InputError(f"{file}: no such file")
    folder, digest = gguf.converted(file)
    general = gguf.general(file)
    return _from_hf(
        folder, tokenizer, dtype, bos, name=str(general.get("name") or file.stem), kind="gguf", source=str(file),
        weights_hash=digest, licence=general.get("license"), extra={"file": file.name},
    )  # fmt: skip


def _take_apart(model: Any) -> tuple[Any, Head | None, int, str]:
    """(trunk, head, vocabulary size, "weight" or why the head could not be taken apart), checked on a probe."""
    config = _text_config(model)
    probe = torch.arange(1, 9)[None] % _config_int(config, ("vocab_size",), 9)
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            expected = model(input_ids=probe.to(device), use_cache=False).logits
            vocab = expected.shape[-1]
            head, note = _find_head(model, config)
            if head is None:
                return None, None, vocab, f"logits ({note})"
            trunk = model.base_model
            hidden = trunk(input_ids=probe.to(device), use_cache=False).last_hidden_state
            if hidden.shape[-1] != head.weight.shape[1] or head.weight.shape[0] != vocab:
                return None, None, vocab, "logits (the head is not a matrix on the last hidden state)"
            # The same products, perhaps summed in another order: some roundings of the dtype apart at most.
            tolerance = 64 * torch.finfo(expected.dtype).eps * (1 + expected.float().abs().max())
            gap = (head.logits(hidden).float() - expected.float()).abs().max()
    finally:
        model.train(training)
    if not bool(gap <= tolerance):
        return None, None, vocab, f"logits (head times hidden state differs from the model's logits by {float(gap):.3g})"
    return trunk, head, vocab, "weight"


def _find_head(model: Any, config: Any) -> tuple[Head | None, str]:
    embeddings = getattr(model, "get_output_embeddings", lambda: None)()
    trunk = getattr(model, "base_model", model)
    if not isinstance(embeddings, nn.Linear) or not embeddings.weight.is_floating_point():
        return None, "no plain output matrix"
    if trunk is model:
        return None, "the model has no trunk of its own"
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    return Head(embeddings.weight, embeddings.bias, None if cap is None else float(cap), scale), ""


def context_length_of(model: Any) -> int:
    return _config_int(_text_config(model), CONTEXT_FIELDS, UNLIMITED)


def _text_config(model: Any) -> Any:
    config = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _config_int(config: Any, names: Sequence[str], default: int) -> int:
    values = [getattr(config, name, None) for name in names]
    return next((v for v in values if isinstance(v, int) and v > 0), default)


def _card_licence(folder: Path) -> str | None:
    """`license:` in the front matter of the folder's README.md."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    lines = card.read_text(encoding="utf-8", errors="replace").splitlines()
    if lines[:1] != ["---"]:
        return None
    for line in lines[1:]:
        if line == "---":
            break
        if line.startswith("license:"):
            return line.partition(":")[2].strip().strip("\"'") or None
    return None


def parameter_hash(module: nn.Module) -> str:
    """XXH3-128 (hex) over names and fp32 values of the parameters."""
    digest = xxhash.xxh3_128()
    for name, p in module.named_parameters():
        digest.update(name.encode())
        digest.update(p.detach().to("cpu", torch.float32).contiguous().numpy().data)
    return digest.hexdigest()


def folder_hash(folder: Path) -> str:
    """XXH3-128 over the weight files and config.json of a Hugging Face folder."""
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not weights:
        warnings.warn(f"{folder} has no weight files to hash; its identity covers config.json only", stacklevel=2)
    return file_hash(folder / "config.json", *weights)
