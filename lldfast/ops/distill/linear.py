"""The custom ops behind `distill_loss`: both models' logits in row chunks of a byte budget, the gradient in the same sweep.

A chunk's logits are products of hidden states and heads; a backend's kernel turns the student's into their gradient in place, and
two more products give dH and dW, summed in fp32. So a loss with its gradient costs four matrix products, as few as there can be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lldfast.backends import extension
from lldfast.errors import InputError
from lldfast.ops import native
from lldfast.ops.chunks import accumulate_dtype, pieces, transform_
from lldfast.ops.distill import rows as distill_rows
from lldfast.ops.distill import topk as distill_topk
from lldfast.ops.distill.logits import kept
from lldfast.ops.distill.spec import SPEC, Spec
from lldfast.ops.grads import Grads, scale_grads
from lldfast.ops.head import LEAST_ROWS, product

# Rows of a head that are multiplied at a time on a CPU: a 16-bit head is widened no further, and the libraries' own packed copies
# stay small.
BLOCK_ROWS = 4096

HEADS = (
    "float? softcap, float logit_scale, float? teacher_softcap, float teacher_logit_scale, str? precision, str? teacher_precision"
)
_INPUTS = f"Tensor h, Tensor w, Tensor th, Tensor tw, Tensor? labels, Tensor? bias, Tensor? teacher_bias, {HEADS}, {SPEC}"
_NEEDS = "bool need_hidden, bool need_weight, bool need_bias"


class Heads(NamedTuple):
    """Options of the two heads, then those of the loss."""

    softcap: float | None
    logit_scale: float
    teacher_softcap: float | None
    teacher_logit_scale: float
    precision: str | None
    teacher_precision: str | None


class Factors:
    """A head's real rows for matrix products with fp32 sums, and a buffer of logits that every chunk reuses.

    A CPU takes it block by block: a widened or packed copy of a whole head would cost more than the logits.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, vocab: int, precision: str | None, dtype: torch.dtype
    ) -> None:
        self.dtype = dtype
        self.narrow = torch.bfloat16 if precision == "bf16" else None
        self.weight = weight[:vocab]
        self.bias = None if bias is None else bias[:vocab].to(self.dtype)
        kinds = {x.dtype if self.narrow is None else self.narrow for x in (hidden, weight)}
        # CUDA multiplies 16-bit factors into fp32; a CPU would round the logits to 16 bits, so it gets fp32 factors.
        wide = hidden.device.type == "cuda" and len(kinds) == 1 and next(iter(kinds)).itemsize == 2
        self.factor = next(iter(kinds)) if wide else self.dtype
        if hidden.device.type == "cuda":
            self.step, self.weight = len(self.weight), self.cast(self.weight)
        else:
            self.step = BLOCK_ROWS
        self.buffers: dict[torch.dtype, Tensor] = {}

    def cast(self, x: Tensor) -> Tensor:
        return (x if self.narrow is None else x.to(self.narrow)).to(self.factor)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        vocab = len(self.weight)
        for first in range(0, vocab, self.step):
            part = slice(first, min(first + self.step, vocab))
            yield part, self.cast(self.weight[part])

    def buffer(self, rows: int, dtype: torch.dtype) -> Tensor:
        """[rows, V] that the next chunk takes again; rows of whole cache lines, since GPU libraries are slow on others."""
        vocab, kept = len(self.weight), self.buffers.get(dtype)
        if kept is None or len(kept) < rows:
            kept = self.buffers[dtype] = self.weight.new_empty((rows, -(-vocab // 16) * 16), dtype=dtype)
        return kept[:rows, :vocab]

    def logits(self, h: Tensor) -> Tensor:
        """h W^T [R, V], which the caller may overwrite."""
        z = self.buffer(len(h), self.dtype)
        for part, w in self.blocks():
            product(h, w.T, z[:, part])
        return z

    def add_grads(self, dz: Tensor, h: Tensor, grads: Grads, rows: slice | Tensor) -> None:
        """dH[rows] = dz W, dW += dz^T h, dbias += sum dz; sums in fp32, dz in the dtype of the factors."""
        if grads.bias.numel():
            grads.bias[: len(self.weight)] += dz.sum(0)
        dz = dz.to(h.dtype)
        dh = grads.hidden.new_zeros(len(dz), self.weight.shape[1]) if grads.hidden.numel() else None
        for part, w in self.blocks():
            if dh is not None:
                product(dz[:, part], w, dh, add=True)
            if grads.weight.numel():
                product(dz[:, part].T, h, grads.weight[part], add=True)
        if dh is not None:
            grads.hidden[rows] = dh


# (student logits [R, V_s], rows of the tokens, labels, g_divergence, g_ce, out) -> (divergence, ce): see distill_rows.run
Rows = Callable[[Tensor, slice | Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None], tuple[Tensor, Tensor]]
Upstream = tuple[Tensor, Tensor]


def chunks(
    spec: Spec, student: Factors, softcap: float | None, logit_scale: float, h: Tensor, labels: Tensor | None, vocab: int,
    run: Rows, upstream: Upstream | None, grads: Grads | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(divergence [T], cross entropy [T]) of the student's logits, chunk by chunk through `run`.

    With upstream (g_divergence, g_ce), [T] each, gradients of their weighted sum are added to grads. vocab: a chunk's columns.
    """
    divergence, ce = h.new_zeros(len(h), dtype=student.dtype), h.new_zeros(len(h), dtype=student.dtype)
    rows = kept(spec, labels, len(student.weight))
    count, least = len(h) if rows is None else len(rows), 1 if spec.chunk_bytes else LEAST_ROWS
    for chunk in pieces(count, vocab, student.dtype.itemsize, distill_rows.budget(spec, h.device), least):
        at = chunk if rows is None else rows[chunk]
        x = student.cast(h[at])
        z = transform_(student.logits(x), student.bias, softcap, logit_scale)
        y = None if labels is None else labels[at].long()
        if grads is None or upstream is None:
            divergence[at], ce[at] = run(z, at, y, None, None, None)
            continue
        slope = None if softcap is None else (z / softcap).square_().neg_().add_(1)
        # In the products' own dtype at once, where nothing else is done to it; else in place.
        plain = softcap is None and logit_scale == 1.0 and not grads.bias.numel()
        dz = student.buffer(len(x), student.factor) if plain and student.factor != student.dtype else z
        divergence[at], ce[at] = run(z, at, y, upstream[0][at], upstream[1][at], dz)
        if slope is not None:
            dz.mul_(slope)
        if logit_scale != 1.0:
            dz.mul_(logit_scale)
        student.add_grads(dz, x, grads, at)
    return divergence, ce


def fits_fused(spec: Spec, heads: Heads, h: Tensor, w: Tensor, th: Tensor, tw: Tensor, plain: bool) -> bool:
    """Whether `native.distill_linear` takes the call and is fast: AMX for both heads' products. plain: no biases."""
    if not tw.is_floating_point() or len(set(distill_rows.vocabularies(spec, len(w), len(tw)))) > 1:
        return False
    if spec.backend != "cpp" or not plain or heads.softcap is not None or heads.teacher_softcap is not None:
        return False
    if heads.logit_scale != 1.0 or heads.teacher_logit_scale != 1.0 or min(h.shape[1], th.shape[1], len(w)) == 0:
        return False
    precisions = (native.linear_precision(heads.precision, h, w), native.linear_precision(heads.teacher_precision, th, tw))
    module: Any = extension()
    return precisions == ("bf16", "bf16") and module is not None and module.isa() == "amx"


def sweep(
    spec: Spec, heads: Heads, h: Tensor, w: Tensor, th: Tensor, tw: Tensor, labels: Tensor | None, bias: Tensor | None,
    teacher_bias: Tensor | None, upstream: Upstream | None, grads: Grads | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`chunks` with a teacher that is there, whose logits are made beside the student's, or with its recorded top k.

    A recorded teacher comes as th = its largest log-probabilities [T, k], tw = their ids [T, k], teacher_bias = the log of what
    is left [T].
    """
    vocab_s, vocab_t = distill_rows.vocabularies(spec, len(w), len(tw))
    dtype = accumulate_dtype(h, w, th, tw)
    student = Factors(h, w, bias, vocab_s, heads.precision, dtype)
    options = (heads.softcap, heads.logit_scale, h, labels)
    if not tw.is_floating_point():
        assert teacher_bias is not None
        left: Tensor = teacher_bias
        if tw.numel() and (int(tw.min()) < 0 or int(tw.max()) >= vocab_s):
            raise InputError(f"the teacher's ids reach from {int(tw.min())} to {int(tw.max())}: the vocabulary is [0, {vocab_s})")
        tw = tw.long()

        def recorded(z: Tensor, at: slice | Tensor, *rest: Tensor | None) -> tuple[Tensor, Tensor]:
            return distill_topk.rows(spec, z, tw[at], th[at].to(dtype), left[at].to(dtype), *rest)

        return chunks(spec, student, *options, vocab_s, recorded, upstream, grads)
    if fits_fused(spec, heads, h, w, th, tw, plain=bias is None and teacher_bias is None):
        divergence, ce = h.new_zeros(len(h), dtype=dtype), h.new_zeros(len(h), dtype=dtype)
        g_divergence, g_ce = upstream or (None, None)
        dh, dw = (None, None) if grads is None else (grads.hidden, grads.weight)
        native.distill_linear(
            h, w, th, tw, labels, kept(spec, labels, vocab_s), vocab_s, spec, heads.precision, heads.teacher_precision,
            g_divergence, g_ce, divergence, ce, dh, dw,
        )  # fmt: skip
        return divergence, ce
    teacher = Factors(th, tw, teacher_bias, vocab_t, heads.teacher_precision, dtype)

    def run(z: Tensor, at: slice | Tensor, *rest: Tensor | None) -> tuple[Tensor, Tensor]:
        zt = teacher.logits(teacher.cast(th[at]))
        return distill_rows.run(spec, z, transform_(zt, teacher.bias, heads.teacher_softcap, heads.teacher_logit_scale), *rest)

    return chunks(spec, student, *options, max(vocab_s, vocab_t), run, upstream, grads)


def _unpack(rest: tuple[Any, ...]) -> tuple[Heads, Spec]:
    return Heads(*rest[: len(Heads._fields)]), Spec(*rest[len(Heads._fields) :])


@torch.library.custom_op("lldfast::distill_linear", mutates_args=(), schema=f"({_INPUTS}) -> (Tensor, Tensor)")
def forward(h: Tensor, w: Tensor, th: Tensor, tw: Tensor, labels: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    """Divergence and cross entropy of each token [T], 0 where ignored; no gradient is computed here."""
    bias, teacher_bias, *options = rest
    heads, spec = _unpack(tuple(options))
    return sweep(spec, heads, h, w, th, tw, labels, bias, teacher_bias, None, None)


@forward.register_fake
def _(h: Tensor, w: Tensor, th: Tensor, tw: Tensor, labels: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    dtype = accumulate_dtype(h, w, th, tw)
    return h.new_empty(h.shape[0], dtype=dtype), h.new_empty(h.shape[0], dtype=dtype)


@torch.library.custom_op(
    "lldfast::distill_linear_grads",
    mutates_args=(),
    schema=f"(Tensor g_divergence, Tensor g_ce, {_INPUTS}, {_NEEDS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def with_grads(
    g_divergence: Tensor, g_ce: Tensor, h: Tensor, w: Tensor, th: Tensor, tw: Tensor, labels: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    """Divergence and cross entropy [T], and the gradients of their sum weighted by g_divergence and g_ce.

    dH, dW, dbias have the dtypes of h, w and bias (fp32 without one); they are summed in fp32 and rounded once.
    """
    bias, teacher_bias, *options = rest
    heads, spec = _unpack(tuple(options[:-3]))
    dtypes = _grad_dtypes(h, w, bias)
    if fits_fused(spec, heads, h, w, th, tw, bias is None and teacher_bias is None):  # it writes each row once, as it is to be
        grads = Grads(*(torch.zeros_like(x) for x in _empty_grads(h, w, bias, tuple(options[-3:]))))
    else:
        grads = Grads.zeros(h, w, accumulate_dtype(h, w, th, tw), *options[-3:])
    tokens = sweep(spec, heads, h, w, th, tw, labels, bias, teacher_bias, (g_divergence, g_ce), grads)
    return (*tokens, *(x.to(t) for x, t in zip(grads, dtypes, strict=True)))


def _grad_dtypes(h: Tensor, w: Tensor, bias: Tensor | None) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
    return h.dtype, w.dtype, torch.float32 if bias is None else bias.dtype


def _empty_grads(h: Tensor, w: Tensor, bias: Tensor | None, needs: tuple[bool, ...]) -> tuple[Tensor, ...]:
    shapes = (h.shape, w.shape, w.shape[:1])
    dtypes = _grad_dtypes(h, w, bias)
    return tuple(h.new_empty(s if n else (0,), dtype=t) for s, t, n in zip(shapes, dtypes, needs, strict=True))


@with_grads.register_fake
def _(
    g_divergence: Tensor, g_ce: Tensor, h: Tensor, w: Tensor, th: Tensor, tw: Tensor, labels: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    dtype = accumulate_dtype(h, w, th, tw)
    return h.new_empty(h.shape[0], dtype=dtype), h.new_empty(h.shape[0], dtype=dtype), *_empty_grads(h, w, rest[0], rest[-3:])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)  # the outputs that nobody differentiates are as large as the gradients
    h, w, th, tw, labels, bias, teacher_bias, *ctx.options = inputs
    ctx.save_for_backward(h, w, th, tw, labels, bias, teacher_bias)


def _autograd(ctx: Any, g_divergence: Tensor | None, g_ce: Tensor | None) -> tuple[Tensor | None, ...]:
    """With an upstream gradient per token, which the forward cannot know: the logits are computed again."""
    h, w, th, tw, labels, bias, teacher_bias = ctx.saved_tensors
    dtype = accumulate_dtype(h, w, th, tw)
    gs = [h.new_zeros(len(h), dtype=dtype) if g is None else g.contiguous() for g in (g_divergence, g_ce)]
    needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[5])
    *_, dh, dw, db = with_grads(*gs, h, w, th, tw, labels, bias, teacher_bias, *ctx.options, *needs)
    out: list[Tensor | None] = [None] * (7 + len(ctx.options))
    for place, needed, grad in zip((0, 1, 5), needs, (dh, dw, db), strict=True):
        out[place] = grad if needed else None
    return tuple(out)


forward.register_autograd(_autograd, setup_context=_setup_context)


@torch.library.custom_op(
    "lldfast::distill_linear_sum",
    mutates_args=(),
    schema=f"(Tensor weights, float ce_weight, {_INPUTS}, {_NEEDS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def weighted_sum(weights: Tensor, ce_weight: float, h: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """sum_t weights_t (divergence_t + ce_weight ce_t), divergence and ce [T], and the gradients of the sum: one sweep.

    For a mean the weights have its divisor already: gradients that are final are kept as they are to be, in half the memory.
    """
    divergence, ce, *grads = with_grads(weights, weights * ce_weight, h, *rest)
    total = (weights.double() * divergence.double()).sum() + ce_weight * (weights.double() * ce.double()).sum()
    return total.to(divergence.dtype), divergence, ce, *grads


@weighted_sum.register_fake
def _(weights: Tensor, ce_weight: float, h: Tensor, w: Tensor, th: Tensor, tw: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    dtype = accumulate_dtype(h, w, th, tw)
    out = [h.new_empty(shape, dtype=dtype) for shape in ((), h.shape[:1], h.shape[:1])]
    return *out, *_empty_grads(h, w, rest[1], rest[-3:])


def _sum_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # the outputs that nobody differentiates are as large as the gradients
    _, _, h, w, _, _, _, bias, *_ = inputs
    ctx.count = len(inputs)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(h, w, bias, *output[3:])


def _sum_autograd(ctx: Any, g: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if g is None:
        return (None,) * ctx.count
    h, w, bias, *grads = ctx.saved_tensors
    scaled = scale_grads(g, h, w, bias, *grads)
    out: list[Tensor | None] = [None] * ctx.count
    for place, grad in zip((2, 3, 7), scaled, strict=True):
        out[place] = grad if ctx.needs_input_grad[place] else None
    return tuple(out)


weighted_sum.register_autograd(_sum_autograd, setup_context=_sum_setup)
