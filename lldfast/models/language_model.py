"""Any causal language model behind one interface: hidden states and a head, a tokenizer, a rule for the first token.

A `LanguageModel` wraps our GPT, a Hugging Face model or a GGUF file. `score` needs hidden states and the head apart, so that no
logits of a whole batch are alive; head.py finds and checks them. A model whose head cannot be told apart is scored through its
full logits, and `identity["head"]` says so.

First token (`bos`): "auto" puts one token before every text, so that each of its tokens is scored: the tokenizer's BOS where
the tokenizer itself would add it, else the end-of-text token, which separates documents in GPT-2-like training data, else a
BOS that is merely defined. "native" takes exactly what the tokenizer does by default, "none" adds nothing; without a token in
front, a text's first token is context only. Text tokens come from `Tokenizer.encode`, which never adds specials: no BOS twice.

Texts longer than the context are cut into windows of `context_length` input tokens. A window starts with the last token of
the one before (the first with BOS), so that every token is scored exactly once.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn as nn
from torch import Tensor

from lldfast.backends import pick_device
from lldfast.data.evalset import EvalSet
from lldfast.data.tokenizer import TextError, Tokenizer
from lldfast.errors import InputError
from lldfast.models.gpt import GPT
from lldfast.models.head import Head, take_apart
from lldfast.models.identity import parameter_hash

BOS_MODES = ("auto", "native", "none")
TOKENIZED_SETS = 4  # tokenised evaluation sets kept per model: estimate, measure and some spare


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
            self._trunk, self._head, self.vocab_size, self.head_note = take_apart(module)
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
            InputError: the tokenizer refuses a text or gives a token outside the model's vocabulary (text and domain named), or
                overlap does not fit the context.
        """
        if not 0 <= overlap < self.context_length:
            raise InputError(f"overlap={overlap} must be in [0, {self.context_length}), the context length of {self.name}")
        key = (evalset.hash, self.bos, self.context_length, overlap)
        if key not in self.tokenized:
            segments: list[Segment] = []
            for i, ids in enumerate(self._encode(evalset)):
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

    def _encode(self, evalset: EvalSet) -> list[npt.NDArray[np.int64]]:
        """Ids of each text with what goes before it."""
        encode = self.tokenizer.encode_batch_native if self.bos == "native" else self.tokenizer.encode_batch
        try:
            found = encode(evalset.texts)
        except TextError as error:
            raise InputError(f"{self.name}: text {error.index} (domain {evalset.domain[error.index]}): {error}") from error
        prefix = np.array([] if self.bos_id is None else [self.bos_id], np.int64)
        return [np.concatenate((prefix, ids.astype(np.int64))) for ids in found]


def windows(text: int, ids: npt.NDArray[np.int64], context: int, overlap: int) -> list[Segment]:
    """Segments that score ids[1:] once each; none for fewer than two ids."""
    segments, start, scored = [], 0, 0
    while scored < len(ids) - 1:
        end = min(start + context, len(ids) - 1)
        segments.append(Segment(text, ids[start : end + 1], scored - start))
        scored, start = end, end - overlap
    return segments
