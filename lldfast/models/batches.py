"""Segments in batches through a model: log-likelihoods per token, and their sums per segment.

The layers and the head want different batches. On a CPU the layers are fastest on a few hundred tokens, whose activations stay in
cache; the head reads its whole weight per call and is fastest on thousands. So the layers run batch by batch, and the hidden
states of scored tokens wait until the head's batch is full.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lldfast.errors import InputError
from lldfast.models.gpt import DTYPES
from lldfast.models.language_model import LanguageModel, Segment
from lldfast.models.modes import evaluation_mode
from lldfast.models.together import ANY, Together
from lldfast.ops.linear_logprob import linear_logprob
from lldfast.ops.logprob import logprob
from lldfast.ops.segments import SegmentSums

IGNORE = -100
# A model whose head cannot be taken apart holds full logits: its batches are cut to this many bytes of them.
LOGITS_BYTES = 256 << 20
# On a CPU a batch whose widest activation (about 4 d floats a token) leaves the cache is slower: by 25 % for GPT-2 124M in
# batches of 4,096 tokens against 300, by 35 % for a width of 96 in batches of 16,384 against 2,048 (one EPYC core, AVX-512).
CPU_ACTIVATION_BYTES = 4 << 20
# Hidden states of this many tokens are scored at once.
HEAD_TOKENS = 2048

Ints = npt.NDArray[np.int64]


@dataclass
class SegmentBatch:
    """ids [B, T] right-padded, labels [B, T] (-100: padding, or context only), segment [B]: the number of each row's segment."""

    ids: Tensor
    labels: Tensor
    segment: Ints

    def to(self, device: torch.device) -> SegmentBatch:
        return SegmentBatch(self.ids.to(device), self.labels.to(device), self.segment)


def batches(
    segments: Sequence[Segment], batch_tokens: int, which: npt.ArrayLike | None = None, *, together: Together = ANY
) -> Iterator[SegmentBatch]:
    """Pack segments (or those at indices `which`), longest first, into batches of at most `batch_tokens` tokens with padding.

    A segment longer than that is a batch of its own. Longest first shows a lack of memory at once. Which segments may share a
    batch `together` says: `LanguageModel.together` of the model that sees them.
    """
    if batch_tokens < 1:
        raise InputError(f"batch_tokens must be positive, not {batch_tokens}")
    chosen = np.arange(len(segments)) if which is None else np.asarray(which, np.int64)
    lengths = np.array([together.inputs(len(segment.ids)) for segment in segments], np.int64)
    chosen = chosen[np.argsort(-lengths[chosen], kind="stable")]
    start = 0
    while start < len(chosen):
        longest = lengths[chosen[start]]
        most = 1 if together.alone else max(1, batch_tokens // longest)
        rows = [i for i in chosen[start : start + most] if together.group(lengths[i]) == together.group(longest)]
        ids = np.zeros((len(rows), longest), np.int64)
        labels = np.full((len(rows), longest), IGNORE, np.int64)
        for row, i in enumerate(rows):
            s = segments[i]
            ids[row, : lengths[i]] = s.ids[: lengths[i]]
            labels[row, s.first : len(s)] = s.ids[1 + s.first :]
        yield SegmentBatch(torch.from_numpy(ids), torch.from_numpy(labels), np.array(rows, np.int64))
        start += len(rows)


def hidden_states(model: LanguageModel, batch: SegmentBatch, amp_dtype: str | None) -> Tensor:
    """[B, T, d], of a model whose head can be taken apart."""
    with _autocast(model, amp_dtype):
        return model.hidden(batch.ids)


def head_logprobs(
    model: LanguageModel, hidden: Tensor, labels: Tensor, backend: str, amp_dtype: str | None, precision: str | None
) -> Tensor:
    """Log-likelihood of labels [...] from hidden states [..., d]."""
    head = model.head()
    if precision is None and amp_dtype == "bfloat16":
        precision = "bf16"  # the head is a layer too
    options = {"backend": backend, "precision": precision, **head.options()}
    return linear_logprob(hidden, head.weight, labels, **options).logprob


def token_logprobs(
    model: LanguageModel,
    batch: SegmentBatch,
    *,
    backend: str = "auto",
    amp_dtype: str | None = None,
    precision: str | None = None,
) -> Tensor:
    """Log-likelihood of the labels, fp32 [B, T], 0 where ignored; differentiable when gradients are on."""
    if model.separate_head:
        return head_logprobs(model, hidden_states(model, batch, amp_dtype), batch.labels, backend, amp_dtype, precision)
    if precision is not None:
        raise InputError(
            f"{model.name} makes its own logits: precision={precision!r} needs a model whose head can be taken apart"
        )
    with _autocast(model, amp_dtype):
        logits = model.logits(batch.ids)
    return logprob(logits, batch.labels, backend=backend).logprob


def layer_tokens(model: LanguageModel, batch_tokens: int) -> int:
    """batch_tokens, or less where a larger batch would only cost memory or time; asked before a pass over texts."""
    model.look_again()
    if not model.separate_head:
        tokens = max(1, min(batch_tokens, LOGITS_BYTES // (4 * model.vocab_size)))
        model.note_full_logits(tokens)
        return tokens
    if model.device.type == "cpu":
        return min(batch_tokens, max(256, CPU_ACTIVATION_BYTES // (16 * model.head().weight.shape[1])))
    return batch_tokens


def gradient_tokens(model: LanguageModel, batch_tokens: int) -> int:
    """batch_tokens for a pass with gradients, or less where full logits are alive; asked before a pass over texts."""
    most = layer_tokens(model, batch_tokens)
    return batch_tokens if model.separate_head else most


def evaluating(model: LanguageModel) -> contextlib.AbstractContextManager[None]:
    """Evaluation mode (no dropout) inside a `with` block; afterwards each submodule has the mode that it had."""
    return evaluation_mode(model.module)


def _autocast(model: LanguageModel, amp_dtype: str | None) -> contextlib.AbstractContextManager[Any]:
    if amp_dtype in (None, "float32"):
        return contextlib.nullcontext()
    if amp_dtype not in DTYPES:
        raise InputError(f"amp_dtype={amp_dtype!r} is not one of {', '.join(DTYPES)}")
    return torch.autocast(model.device.type, DTYPES[amp_dtype])


def segment_sums(
    model: LanguageModel,
    segments: Sequence[Segment],
    batch_tokens: int,
    backend: str,
    amp_dtype: str | None,
    precision: str | None,
    progress: Callable[[int], None],
) -> SegmentSums:
    """Log-likelihood and scored tokens of each segment; `progress` gets the number of tokens that the layers have done."""
    sums = SegmentSums.zeros(len(segments))
    waiting: list[tuple[Tensor, Tensor, Ints]] = []
    done = count = 0

    def score_waiting() -> None:
        hidden, labels, segment = zip(*waiting, strict=True)
        values = head_logprobs(model, torch.cat(hidden), torch.cat(labels), backend, amp_dtype, precision)
        sums.add(values, np.concatenate(segment))
        waiting.clear()

    for batch in batches(segments, layer_tokens(model, batch_tokens), together=model.together):
        on_device = batch.to(model.device)
        scored = on_device.labels != IGNORE
        if model.separate_head:
            hidden = hidden_states(model, on_device, amp_dtype)
            waiting.append((hidden[scored], on_device.labels[scored], np.repeat(batch.segment, scored.sum(1).cpu().numpy())))
            count += len(waiting[-1][1])
            if count >= HEAD_TOKENS:
                score_waiting()
                count = 0
        else:
            values = token_logprobs(model, on_device, backend=backend, amp_dtype=amp_dtype, precision=precision)
            sums.add(values, batch.segment, scored)
        done += sum(len(segments[i]) for i in batch.segment)
        progress(done)
    if waiting:
        score_waiting()
    return sums
