"""The custom op behind `distill_loss_from_logits`: loss per token of given logits, and its gradient by the student's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lldfast.ops.chunks import accumulate_dtype, pieces
from lldfast.ops.distill import rows as distill_rows
from lldfast.ops.distill.spec import SPEC, Spec

_INPUTS = f"Tensor student, Tensor teacher, Tensor? labels, {SPEC}"


@torch.library.custom_op("lldfast::distill_logits", mutates_args=(), schema=f"({_INPUTS}) -> (Tensor, Tensor)")
def forward(student: Tensor, teacher: Tensor, labels: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    """Divergence and cross entropy of each token [T], 0 where ignored."""
    spec, dtype = Spec(*rest), accumulate_dtype(student, teacher)
    divergence, ce = student.new_zeros(len(student), dtype=dtype), student.new_zeros(len(student), dtype=dtype)
    vocab_s, vocab_t = distill_rows.vocabularies(spec, student.shape[1], teacher.shape[1])
    rows = distill_rows.kept(spec, labels, vocab_s)
    count = len(student) if rows is None else len(rows)
    for chunk in pieces(count, max(vocab_s, vocab_t), 4, distill_rows.budget(spec, student.device)):
        at = chunk if rows is None else rows[chunk]
        y = None if labels is None else labels[at].long()
        divergence[at], ce[at] = distill_rows.run(spec, student[at, :vocab_s], teacher[at, :vocab_t], y, None, None, None)
    return divergence, ce


@forward.register_fake
def _(student: Tensor, teacher: Tensor, labels: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    dtype = accumulate_dtype(student, teacher)
    return student.new_empty(student.shape[0], dtype=dtype), student.new_empty(student.shape[0], dtype=dtype)


@torch.library.custom_op(
    "lldfast::distill_logits_backward",
    mutates_args=(),
    schema=f"(Tensor g_divergence, Tensor g_ce, {_INPUTS}) -> Tensor",
)
def backward(g_divergence: Tensor, g_ce: Tensor, student: Tensor, teacher: Tensor, labels: Tensor | None, *rest: Any) -> Tensor:
    """Gradient by the student's logits [T, V_s] in their dtype; 0 at ignored tokens and behind valid_vocab."""
    spec = Spec(*rest)
    vocab_s, vocab_t = distill_rows.vocabularies(spec, student.shape[1], teacher.shape[1])
    rows = distill_rows.kept(spec, labels, vocab_s)
    whole = rows is None and vocab_s == student.shape[1]
    out = (torch.empty_like if whole else torch.zeros_like)(student, memory_format=torch.contiguous_format)
    count = len(student) if rows is None else len(rows)
    for chunk in pieces(count, max(vocab_s, vocab_t), 4, distill_rows.budget(spec, student.device)):
        at = chunk if rows is None else rows[chunk]
        y = None if labels is None else labels[at].long()
        part = out[at, :vocab_s]
        distill_rows.run(spec, student[at, :vocab_s], teacher[at, :vocab_t], y, g_divergence[at], g_ce[at], part)
        if rows is not None:
            out[at, :vocab_s] = part
    return out


@backward.register_fake
def _(g_divergence: Tensor, g_ce: Tensor, student: Tensor, teacher: Tensor, labels: Tensor | None, *rest: Any) -> Tensor:
    return torch.empty_like(student, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)  # the outputs that nobody differentiates are as large as the gradients
    student, teacher, labels, *ctx.options = inputs
    ctx.save_for_backward(student, teacher, labels)


def _autograd(ctx: Any, g_divergence: Tensor | None, g_ce: Tensor | None) -> tuple[Tensor | None, ...]:
    student, teacher, labels = ctx.saved_tensors
    dtype = accumulate_dtype(student, teacher)
    gs = [student.new_zeros(len(student), dtype=dtype) if g is None else g.contiguous() for g in (g_divergence, g_ce)]
    return (backward(*gs, student, teacher, labels, *ctx.options), *[None] * (2 + len(ctx.options)))


forward.register_autograd(_autograd, setup_context=_setup_context)
