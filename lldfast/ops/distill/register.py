"""The custom ops of a loss from the student's hidden states and head, registered once for each kind of teacher.

NAME gives the parts of each token's loss; its backward computes the logits again, for an upstream gradient per token. NAME_grads
gives those parts and the gradients of their weighted sum; it is what a backward calls. NAME_sum gives the weighted sum with its
gradients, from one sweep, so that its backward only scales them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from lldfast.ops.distill.sweep import Student, Upstream
from lldfast.ops.grads import Grads, scale_grads

STUDENT = "Tensor hidden, Tensor weight, Tensor? bias, Tensor? labels"
NEEDS = "bool need_hidden, bool need_weight, bool need_bias"

Op = Callable[..., tuple[Tensor, ...]]


class Teacher(Protocol):
    """What an op's arguments behind the student's say: a teacher and the loss against it."""

    def dtype(self, student: Student) -> torch.dtype:
        """Of sums and results: fp32, or fp64 when an input is fp64."""

    def zero_grads(self, student: Student, needs: tuple[bool, bool, bool]) -> Grads:
        """What `sweep` adds to, in the dtypes it wants them in."""

    def sweep(self, student: Student, upstream: Upstream | None, grads: Grads | None) -> tuple[Tensor, Tensor]:
        """(divergence [T], cross entropy [T]), 0 where ignored; with upstream, gradients of their weighted sum go to grads."""


def register(name: str, schema: str, read: Callable[..., Teacher]) -> tuple[Op, Op]:
    """Makes the three ops; gives `lldfast::NAME` and `lldfast::NAME_sum`, which callers need.

    Args:
        schema: of the arguments behind the student's, tensors first.
        read: those arguments -> the teacher.
    """
    arguments = f"{STUDENT}, {schema}"
    tensors = arguments.count("Tensor")

    def parts(args: tuple[Any, ...]) -> tuple[Student, Teacher]:
        of_student = len(Student._fields)
        return Student(*args[:of_student]), read(*args[of_student:])

    def empty_tokens(args: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        student, teacher = parts(args)
        like, dtype = student.hidden, teacher.dtype(student)
        return like.new_empty(like.shape[0], dtype=dtype), like.new_empty(like.shape[0], dtype=dtype)

    @torch.library.custom_op(f"lldfast::{name}", mutates_args=(), schema=f"({arguments}) -> (Tensor, Tensor)")
    def forward(*args: Any) -> tuple[Tensor, ...]:
        """Divergence and cross entropy of each token [T], 0 where ignored; no gradient is computed here."""
        student, teacher = parts(args)
        return teacher.sweep(student, None, None)

    @forward.register_fake
    def _(*args: Any) -> tuple[Tensor, ...]:
        return empty_tokens(args)

    @torch.library.custom_op(
        f"lldfast::{name}_grads",
        mutates_args=(),
        schema=f"(Tensor g_divergence, Tensor g_ce, {arguments}, {NEEDS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    )
    def with_grads(g_divergence: Tensor, g_ce: Tensor, *args: Any) -> tuple[Tensor, ...]:
        """Divergence and cross entropy [T], and the gradients of their sum weighted by g_divergence and g_ce.

        dH, dW, dbias have the dtypes of hidden, weight and bias (fp32 without one); they are summed in fp32 and rounded once.
        """
        student, teacher = parts(args[:-3])
        grads = teacher.zero_grads(student, args[-3:])
        tokens = teacher.sweep(student, (g_divergence, g_ce), grads)
        return (*tokens, *(x.to(dtype) for x, dtype in zip(grads, grad_dtypes(student), strict=True)))

    @with_grads.register_fake
    def _(g_divergence: Tensor, g_ce: Tensor, *args: Any) -> tuple[Tensor, ...]:
        return *empty_tokens(args[:-3]), *empty_grads(parts(args[:-3])[0], args[-3:])

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)  # the outputs that nobody differentiates are as large as the gradients
        ctx.options = inputs[tensors:]
        ctx.save_for_backward(*inputs[:tensors])

    def autograd(ctx: Any, g_divergence: Tensor | None, g_ce: Tensor | None) -> tuple[Tensor | None, ...]:
        """With an upstream gradient per token, which the forward cannot know: the logits are computed again."""
        args = (*ctx.saved_tensors, *ctx.options)
        student, teacher = parts(args)
        hidden, dtype = student.hidden, teacher.dtype(student)
        gs = [hidden.new_zeros(len(hidden), dtype=dtype) if g is None else g.contiguous() for g in (g_divergence, g_ce)]
        needs = ctx.needs_input_grad[:3]
        *_, dh, dw, db = with_grads(*gs, *args, *needs)
        return *wanted((dh, dw, db), needs), *[None] * (len(args) - 3)

    forward.register_autograd(autograd, setup_context=setup_context)

    @torch.library.custom_op(
        f"lldfast::{name}_sum",
        mutates_args=(),
        schema=f"(Tensor weights, float ce_weight, {arguments}, {NEEDS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    )
    def weighted_sum(weights: Tensor, ce_weight: float, *args: Any) -> tuple[Tensor, ...]:
        """sum_t weights_t (divergence_t + ce_weight ce_t), divergence and ce [T], and the gradients of the sum: one sweep.

        For a mean the weights have its divisor already: gradients that are final are kept as they are to be, in half the memory.
        """
        divergence, ce, *grads = with_grads(weights, weights * ce_weight, *args)
        total = (weights.double() * divergence.double()).sum() + ce_weight * (weights.double() * ce.double()).sum()
        return total.to(divergence.dtype), divergence, ce, *grads

    @weighted_sum.register_fake
    def _(weights: Tensor, ce_weight: float, *args: Any) -> tuple[Tensor, ...]:
        divergence, ce = empty_tokens(args[:-3])
        return divergence.new_empty(()), divergence, ce, *empty_grads(parts(args[:-3])[0], args[-3:])

    def sum_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        _, _, hidden, weight, bias, *_ = inputs
        ctx.count = len(inputs)
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(hidden, weight, bias, *output[3:])

    def sum_autograd(ctx: Any, g: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if g is None:
            return (None,) * ctx.count
        scaled = scale_grads(g, *ctx.saved_tensors)
        return None, None, *wanted(scaled, ctx.needs_input_grad[2:5]), *[None] * (ctx.count - 5)

    weighted_sum.register_autograd(sum_autograd, setup_context=sum_setup_context)
    return forward, weighted_sum


def grad_dtypes(student: Student) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
    """Of dH, dW and dbias."""
    return student.hidden.dtype, student.weight.dtype, torch.float32 if student.bias is None else student.bias.dtype


def empty_grads(student: Student, needs: tuple[bool, ...]) -> tuple[Tensor, ...]:
    """dH [T, d], dW [V, d], dbias [V], of size 0 where not needed."""
    hidden, weight = student.hidden, student.weight
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    return tuple(
        hidden.new_empty(shape if need else (0,), dtype=dtype)
        for shape, dtype, need in zip(shapes, grad_dtypes(student), needs, strict=True)
    )


def wanted(grads: tuple[Tensor, ...], needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """None in place of the gradients that nobody needs."""
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))
