"""Any causal language model behind one interface: hidden states and a head, a tokenizer, a rule for the first token.

A `LanguageModel` wraps our GPT, a Hugging Face model or a GGUF file. `score` needs hidden states and the head apart, so that no
logits of a whole batch are alive; probe.py finds out whether that can be. A model whose head cannot be told apart is scored
through its full logits, which a note and `identity["head"]` say. The module may change: its head is looked up at each use, and
the probe is repeated where anything is different that it depends on.

First token (`bos`): "auto" puts one token before every text, so that each of its tokens is scored: the tokenizer's BOS where
the tokenizer itself would add it, else the end-of-text token, which separates documents in GPT-2-like training data, else a
BOS that is merely defined. "native" takes exactly what the tokenizer does by default, "none" adds nothing; without a token in
front, a text's first token is context only. Text tokens come from `Tokenizer.encode`, which never adds specials: no BOS twice.

Texts longer than the context are cut into windows of `context_length` input tokens. A window starts with the last token of
the one before (the first with BOS), so that every token is scored exactly once.
"""

from __future__ import annotations

import contextlib
import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
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
from lldfast.models.forward import forget_lengths, full_logits, head_input
from lldfast.models.gpt import GPT
from lldfast.models.head import Head, output_layer
from lldfast.models.identity import parameter_hash
from lldfast.models.probe import Findings, fingerprint, probe
from lldfast.models.together import ANY, Together
from lldfast.terminal import note

BOS_MODES = ("auto", "native", "none")
SAMPLE = 16  # numbers of a weight by which a change is noticed
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
        context_length: most input tokens at once.
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
        self._weights_hash, self._weights_then = weights_hash, () if weights_hash is None else _state(module)
        self._set_bos(bos)
        self.tokenized: OrderedDict[tuple[str, str, int, int, int], list[Segment]] = OrderedDict()
        self._found: Findings | None = None
        self._found_for: list[Any] = []  # fingerprints, the second one deep
        self._settled = self._whole = False
        self._noted: set[str] = set()
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
    def vocab_size(self) -> int:
        """Ids that the head tells apart."""
        return self.module.config.valid_vocab if isinstance(self.module, GPT) else self._findings().vocab

    @property
    def separate_head(self) -> bool:
        """Whether `hidden` and `head` work; otherwise `logits` is the only way. Set to False it stays so."""
        return not self._whole and (isinstance(self.module, GPT) or self._findings().measured is not None)

    @separate_head.setter
    def separate_head(self, wanted: bool) -> None:
        self._whole = not wanted

    @property
    def head_note(self) -> str:
        """ "weight", or "logits" and why the head cannot be told apart."""
        if self._whole:
            return "logits (as was asked for)"
        return "weight" if self.separate_head else f"logits ({self._findings().reason})"

    @property
    def together(self) -> Together:
        """Which texts may share a batch."""
        found = ANY if isinstance(self.module, GPT) else self._findings().together
        return found._replace(room=self.context_length)

    def look_again(self) -> None:
        """Before a pass over texts: probe the model again where something deep inside has changed since, too.

        Raises:
            InputError: it is not causal now, or draws random numbers.
        """
        if not isinstance(self.module, GPT):
            self._findings(deep=True)

    @contextlib.contextmanager
    def settled(self) -> Iterator[None]:
        """Inside, the model is taken for what it is now: hooks that the caller puts on its modules are no change of it."""
        if not isinstance(self.module, GPT):
            self._findings()
        before, self._settled = self._settled, True
        try:
            yield
        finally:
            self._settled = before

    def _findings(self, deep: bool = False) -> Findings:
        """Of the module as it is.

        Raises:
            InputError: it is not causal, draws random numbers, or does not run on token ids alone.
        """
        if self._found is not None and self._settled:
            return self._found
        found = self._found
        stands = found is not None and fingerprint(self.module) == self._found_for[0]
        if stands and deep:
            # Where tokens did not reach each other, another look may decide: weights can change without a trace.
            stands = found is not None and found.decided and fingerprint(self.module, deep=True) == self._found_for[1]
        if not stands or found is None:
            self._found = None  # what stood does so no longer, also where the probe raises
            self._found = found = self._probed()
            self._found_for = [fingerprint(self.module), fingerprint(self.module, deep=True)]
        return found

    def _probed(self) -> Findings:
        try:
            found = probe(self.module)
        except InputError as error:
            raise InputError(f"{self.name}: {error}") from None
        if found.together != ANY:
            self._note(f"{self.name}: texts change each other's values in a batch: it gets {found.together}")
        return found

    def _note(self, text: str) -> None:
        """Say it once for a model."""
        if text not in self._noted:
            self._noted.add(text)
            note(text)

    def note_full_logits(self, tokens: int) -> None:
        """Say once why the model is scored through full logits, and what a batch of so many tokens costs in memory."""
        need = f"{4 * tokens * self.vocab_size / 2**20:,.0f} MiB for {tokens:,} tokens x {self.vocab_size:,} ids"
        self._note(f"{self.name}: scored through its full {self.head_note}: {need}, and more for a text longer than that")

    @property
    def identity(self) -> dict[str, Any]:
        parameters = list(self.module.parameters())
        return {
            "name": self.name,
            "kind": self.kind,
            **self._facts,
            "hash": self._hash(),
            "parameters": sum(p.numel() for p in parameters),
            "dtype": str(parameters[0].dtype).removeprefix("torch."),
            "tokenizer": {"name": self.tokenizer.name, "hash": self.tokenizer.hash},
            "bos": {"mode": self.bos, "id": self.bos_id},
            "context_length": self.context_length,
            "head": self.head_note,
        }

    def _hash(self) -> str:
        """Of the file, as long as the weights are the file's."""
        if self._weights_hash is not None and self._weights_then == _state(self.module):
            return self._weights_hash
        return parameter_hash(self.module)

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
        """ids [B, T] -> hidden states [B, T, d] that the head is applied to.

        Rows have the values that they have alone where the batch obeys `together`.
        """
        if isinstance(self.module, GPT):
            return self.module(ids)
        self._check_apart()
        return self._run(head_input, ids)

    def head(self) -> Head:
        """The head with its current weights."""
        if isinstance(self.module, GPT):
            return Head(self.module.head_weight, valid_vocab=self.module.config.valid_vocab)
        self._check_apart()
        measured = self._findings().measured
        assert measured is not None
        return measured.head(output_layer(self.module))

    def logits(self, ids: Tensor) -> Tensor:
        """ids [B, T] -> the model's own logits [B, T, vocab_size]; see `hidden`."""
        return self.module.logits(ids) if isinstance(self.module, GPT) else self._run(full_logits, ids)

    def _check_apart(self) -> None:
        if not self.separate_head:
            raise InputError(f"{self.name}: hidden states and head cannot be told apart ({self.head_note}); use logits()")

    def _run(self, values: Callable[[Any, Tensor], Tensor], ids: Tensor) -> Tensor:
        together = self._findings().together
        if together.alone and len(ids) > 1:
            return torch.cat([values(self.module, row[None]) for row in ids])
        if ids.shape[1] >= together.fresh_from:
            forget_lengths(self.module, ids)
        return values(self.module, ids)

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
        key = (evalset.hash, self.bos, self.context_length, overlap, self.vocab_size)
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


def _state(module: nn.Module) -> tuple[Any, ...]:
    """Another value when a weight was changed in place or replaced; some numbers of each weight show what `.data` hides."""
    found: list[Any] = []
    for p in module.parameters():
        some = [] if p.is_meta else p.detach().flatten()[:: max(1, p.numel() // SAMPLE)][:SAMPLE].tolist()
        found.append((id(p), 0 if p.is_inference() else p._version, str(some)))  # of a NaN too, which is not itself
    return tuple(found)
