"""Token log-likelihoods and the training loss from hidden states and the head: no [T, V] tensor of logits is ever alive.

`z = softcap(logit_scale * (H W^T + bias))`, `logprob_t = z_t[y_t] - logsumexp(z_t)` (eq. (1)), in row chunks of a fixed byte
budget. z is accumulated in fp32 and z_y is read from the same tile as the lse. Cross entropy computes its gradient in the same
sweep as the loss: dH = (softmax(z) - 1_y) W and dW = (softmax(z) - 1_y)^T H, three matrix products, as many as plain autograd.
"""

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from lldfast.backends import resolve
from lldfast.errors import InputError
from lldfast.ops import logprob as given
from lldfast.ops.logprob import (
    LogprobResult,
    Outputs,
    accumulate_dtype,
    add_at_labels_,
    check_bias,
    check_inputs,
    is_shard,
    kept_rows,
    local_vocab,
    logit_grad_,
    row_chunks,
    shape_result,
    softmax_stats_,
    transform_,
)

# Fewer rows than this and a chunk's matrix product is bound by reading W.
LEAST_ROWS = 256


def reference(hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> LogprobResult:
    """The oracle: H W^T and `logprob.reference` in fp64; options as there. Padded rows of the weight are not multiplied."""
    valid_vocab, vocab_start = options.get("valid_vocab"), options.get("vocab_start", 0)
    vocab = local_vocab(weight.shape[0], valid_vocab, vocab_start)
    bias = options.pop("bias", None)
    logits = hidden.double() @ weight[:vocab].double().T
    return given.reference(logits, labels, bias=None if bias is None else bias[:vocab], **options)


class Head:
    """The head's real rows, ready for matrix products, and a logits buffer that every chunk reuses (fresh pages are slow)."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, vocab: int) -> None:
        self.dtype = accumulate_dtype(hidden, weight)
        # CUDA multiplies 16-bit inputs into fp32 logits; the CPU would round the logits to 16 bits, so it gets fp32 inputs.
        self.wide = hidden.device.type == "cuda" and hidden.dtype == weight.dtype and hidden.dtype.itemsize == 2
        self.weight = weight[:vocab] if self.wide else weight[:vocab].to(self.dtype)
        self.bias = None if bias is None else bias[:vocab].to(self.dtype)
        self.buffer: Tensor | None = None

    def rows(self, hidden: Tensor, rows: slice | Tensor) -> Tensor:
        h = hidden[rows]
        return h if self.wide else h.to(self.dtype)

    def logits(self, h: Tensor, softcap: float | None, logit_scale: float) -> Tensor:
        """[R, V] in the buffer, which the caller may overwrite."""
        if self.buffer is None or len(self.buffer) < len(h):
            self.buffer = h.new_empty((len(h), len(self.weight)), dtype=self.dtype)
        z = self.buffer[: len(h)]
        if self.wide:
            torch.mm(h, self.weight.T, out_dtype=self.dtype, out=z)
        else:
            torch.mm(h, self.weight.T, out=z)
        return transform_(z, self.bias, softcap, logit_scale)

    def add_grads(self, dz: Tensor, h: Tensor, grads: "Grads", rows: slice | Tensor) -> None:
        """dH[rows] = dz W, dW += dz^T h, dbias += sum dz; in fp32: a 16-bit dz would cost gradient accuracy for little time."""
        vocab = len(self.weight)
        if grads.hidden.numel() and isinstance(rows, slice):
            torch.mm(dz, self.weight.to(self.dtype), out=grads.hidden[rows])
        elif grads.hidden.numel():
            # out= as above: a plain product would be cast to 16 bits under autocast
            grads.hidden[rows] = torch.mm(dz, self.weight.to(self.dtype), out=dz.new_empty(len(dz), self.weight.shape[1]))
        if grads.weight.numel():
            grads.weight[:vocab].addmm_(dz.T, h.to(self.dtype))
        if grads.bias.numel():
            grads.bias[:vocab] += dz.sum(0)


class Grads(NamedTuple):
    """fp32 gradients [T, d], [V, d], [V], zero at first; of size 0 where not needed."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor

    @classmethod
    def zeros(
        cls, hidden: Tensor, weight: Tensor, dtype: torch.dtype, need_hidden: bool, need_weight: bool, need_bias: bool
    ) -> "Grads":
        return cls(
            hidden.new_zeros(hidden.shape if need_hidden else (0,), dtype=dtype),
            hidden.new_zeros(weight.shape if need_weight else (0,), dtype=dtype),
            hidden.new_zeros(weight.shape[0] if need_bias else 0, dtype=dtype),
        )


@torch.library.custom_op("lldfast::linear_logprob", mutates_args=())
def _forward(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    valid_vocab: int | None,
    vocab_start: int,
    argmax: bool,
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens, vocab = hidden.shape[0], local_vocab(weight.shape[0], valid_vocab, vocab_start)
    head = Head(hidden, weight, bias, vocab)
    shard = is_shard(weight.shape[0], valid_vocab, vocab_start)
    out = Outputs.zeros(hidden, tokens, head.dtype, argmax, entropy)
    kept = kept_rows(labels, ignore_index, vocab_start + weight.shape[0] if valid_vocab is None else valid_vocab)
    for chunk in row_chunks(tokens if kept is None else len(kept), vocab, head.dtype, hidden.device, LEAST_ROWS):
        rows = chunk if kept is None else kept[chunk]
        if vocab == 0:
            out.put_empty_shard(rows)
            continue
        z = head.logits(head.rows(hidden, rows), softcap, logit_scale)
        out.put(rows, softmax_stats_(z, labels[rows].long() - vocab_start, shard, argmax, entropy), vocab_start)
    return tuple(out)  # type: ignore[return-value]


@_forward.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    valid_vocab: int | None,
    vocab_start: int,
    argmax: bool,
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    out = Outputs.zeros(hidden, hidden.shape[0], accumulate_dtype(hidden, weight), argmax, entropy)
    return tuple(out)  # type: ignore[return-value]


@torch.library.custom_op("lldfast::linear_logprob_backward", mutates_args=())
def _backward(
    g: Tensor,
    h: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    valid_vocab: int | None,
    vocab_start: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    vocab = local_vocab(weight.shape[0], valid_vocab, vocab_start)
    head = Head(hidden, weight, bias, vocab)
    shard = is_shard(weight.shape[0], valid_vocab, vocab_start)
    grads = Grads.zeros(hidden, weight, head.dtype, need_hidden, need_weight, need_bias)
    kept = (labels != ignore_index).nonzero()[:, 0]
    for chunk in row_chunks(len(kept), vocab, head.dtype, hidden.device, LEAST_ROWS):
        rows = kept[chunk]
        if vocab == 0:
            continue
        h_rows = head.rows(hidden, rows)
        z = head.logits(h_rows, softcap, logit_scale)
        y = labels[rows].long() - vocab_start
        dz = logit_grad_(z, y, shard, lse[rows], g[rows], h[rows], softcap, logit_scale)
        head.add_grads(dz, h_rows, grads, rows)
    return tuple(grads)  # type: ignore[return-value]


@_backward.register_fake
def _(
    g: Tensor,
    h: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    valid_vocab: int | None,
    vocab_start: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulate_dtype(hidden, weight)
    return tuple(Grads.zeros(hidden, weight, dtype, need_hidden, need_weight, need_bias))  # type: ignore[return-value]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, labels, bias, *ctx.options = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(hidden, weight, labels, output[1], bias)


def _autograd(ctx: Any, g: Tensor | None, h: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    hidden, weight, labels, lse, bias = ctx.saved_tensors
    g = torch.zeros_like(lse) if g is None else g
    h = torch.zeros_like(lse) if h is None else h
    need_hidden, need_weight, _, need_bias = ctx.needs_input_grad[:4]
    softcap, logit_scale, ignore_index, valid_vocab, vocab_start = ctx.options[:5]
    dh, dw, db = _backward(
        g, h, hidden, weight, labels, lse, bias, softcap, logit_scale, ignore_index, valid_vocab, vocab_start,
        need_hidden, need_weight, need_bias,
    )  # fmt: skip
    return (
        dh.to(hidden.dtype) if need_hidden else None,
        dw.to(weight.dtype) if need_weight else None,
        None,
        db.to(bias.dtype) if need_bias else None,
        *[None] * 7,
    )


_forward.register_autograd(_autograd, setup_context=_setup_context)


@torch.library.custom_op("lldfast::linear_cross_entropy", mutates_args=())
def _cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    valid_vocab: int | None,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Summed loss, number of scored tokens, logprob per token, and the gradients of the sum."""
    tokens, vocab = hidden.shape[0], local_vocab(weight.shape[0], valid_vocab, 0)
    head = Head(hidden, weight, bias, vocab)
    grads = Grads.zeros(hidden, weight, head.dtype, need_hidden, need_weight, need_bias)
    kept = kept_rows(labels, ignore_index, weight.shape[0] if valid_vocab is None else valid_vocab)
    scored = tokens if kept is None else len(kept)
    logprobs = hidden.new_zeros(tokens, dtype=head.dtype)
    minus_one = hidden.new_full((), -1.0, dtype=head.dtype)
    needed = need_hidden or need_weight or need_bias
    for chunk in row_chunks(scored, vocab, head.dtype, hidden.device, LEAST_ROWS):
        rows = chunk if kept is None else kept[chunk]
        y, h = labels[rows].long(), head.rows(hidden, rows)
        z = head.logits(h, softcap, logit_scale)
        slope = 1 - (z / softcap).square_() if softcap is not None and needed else None
        logprobs[rows], *_, dz = softmax_stats_(z, y, shard=False)
        if needed:
            add_at_labels_(dz, y, False, minus_one.expand(len(y)))
            if slope is not None:
                dz.mul_(slope)
            if logit_scale != 1.0:
                dz.mul_(logit_scale)
            head.add_grads(dz, h, grads, rows)
    total = -logprobs.sum(dtype=torch.float64)
    return total.to(head.dtype), total.new_full((), scored, dtype=head.dtype), logprobs, *grads


@_cross_entropy.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    valid_vocab: int | None,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulate_dtype(hidden, weight)
    loss, scored, logprobs = (hidden.new_empty(shape, dtype=dtype) for shape in ((), (), (hidden.shape[0],)))
    return loss, scored, logprobs, *Grads.zeros(hidden, weight, dtype, need_hidden, need_weight, need_bias)


@torch.library.custom_op("lldfast::linear_cross_entropy_backward", mutates_args=())
def _scale(
    g: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, dh: Tensor, dw: Tensor, db: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the sum times the upstream g, in the inputs' dtypes.

    An op of its own, and given the inputs, because it has no autograd formula: a second derivative raises instead of being 0.
    """
    return (dh * g).to(hidden.dtype), (dw * g).to(weight.dtype), (db * g).to(db.dtype if bias is None else bias.dtype)


@_scale.register_fake
def _(
    g: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, dh: Tensor, dw: Tensor, db: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dtypes = (hidden.dtype, weight.dtype, db.dtype if bias is None else bias.dtype)
    return tuple(torch.empty_like(x, dtype=t) for x, t in zip((dh, dw, db), dtypes, strict=True))  # type: ignore[return-value]


def _cross_entropy_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, _, bias = inputs[:4]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(hidden, weight, bias, *output[3:])


def _cross_entropy_autograd(ctx: Any, g: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    hidden, weight, bias, *sums = ctx.saved_tensors
    dh, dw, db = _scale(g, hidden, weight, bias, *sums)
    need_hidden, need_weight, _, need_bias = ctx.needs_input_grad[:4]
    return (dh if need_hidden else None, dw if need_weight else None, None, db if need_bias else None, *[None] * 7)


_cross_entropy.register_autograd(_cross_entropy_autograd, setup_context=_cross_entropy_setup)


def _prepare(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    valid_vocab: int | None,
    vocab_start: int,
    precision: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Checked inputs, hidden flattened to [T, d] and labels to [T]."""
    inputs = {"hidden": hidden, "weight": weight, "bias": bias}
    check_inputs(inputs, labels, hidden.shape[:-1], softcap, valid_vocab, vocab_start, precision)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise InputError(f"weight has shape {tuple(weight.shape)}, but hidden has width {hidden.shape[-1]}: it must be [V, d]")
    check_bias(bias, weight.shape[0])
    if hidden.device.type == "cuda" and torch.is_autocast_enabled("cuda"):
        # As a linear layer would. On a CPU autocast changes nothing: no 16-bit product there has an fp32 result.
        dtype = torch.get_autocast_dtype("cuda")
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    return hidden.reshape(-1, hidden.shape[-1]) if hidden.dim() != 2 else hidden, weight, labels.reshape(-1)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    valid_vocab: int | None = None,
    vocab_start: int = 0,
    precision: str | None = None,
    return_lse: bool = False,
    return_argmax: bool = False,
    return_entropy: bool = False,
    backend: str = "auto",
) -> LogprobResult:
    """Log-likelihood of `labels` [...] in nats per token, from hidden states [..., d] and a head weight [V, d].

    Options, vocabulary shards and errors as in `logprob`; rows of the weight (and bias) behind `valid_vocab` are never read.
    Differentiable in logprob and lse by hidden, weight and bias; the backward computes the logits again, chunk by chunk.
    16-bit inputs are taken as they are, multiplied and accumulated in fp32 (on a CPU that costs an fp32 copy of the weight).
    """
    x, w, y = _prepare(hidden, weight, labels, bias, softcap, valid_vocab, vocab_start, precision)
    resolve("linear_logprob", backend, hidden.device.type)
    out = _forward(x, w, y, bias, softcap, logit_scale, ignore_index, valid_vocab, vocab_start, return_argmax, return_entropy)
    return shape_result(out, labels.shape, return_lse, return_argmax, return_entropy)


@overload
def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, return_logprob: Literal[False] = False, **options: Any
) -> Tensor: ...
@overload
def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, return_logprob: Literal[True], **options: Any
) -> tuple[Tensor, Tensor]: ...
def linear_cross_entropy(  # type: ignore[misc]
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    reduction: str = "mean",
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    valid_vocab: int | None = None,
    precision: str | None = None,
    return_logprob: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Training loss -logprob in nats: fp32 scalar for reduction "mean" (over scored tokens; 0 if there are none) and "sum".

    "none" gives the loss per token, in the labels' shape and 0 at ignored ones; its backward computes the logits a second time,
    since nothing is known of the upstream gradient. Who only wants to look at the tokens' losses takes `return_logprob=True`:
    (loss, logprob), logprob [...] detached, at no cost. For tensor-parallel heads use `linear_logprob` with vocab_start and
    `merge_vocab_shards`, which are differentiable.

    Raises:
        InputError: as `linear_logprob`, or an unknown reduction.
    """
    if reduction not in ("mean", "sum", "none"):
        raise InputError(f"reduction={reduction!r} is not 'mean', 'sum' or 'none'")
    x, w, y = _prepare(hidden, weight, labels, bias, softcap, valid_vocab, 0, precision)
    if valid_vocab is not None and valid_vocab > weight.shape[0]:
        raise InputError(f"valid_vocab={valid_vocab} is more than the {weight.shape[0]} rows of weight")
    resolve("linear_logprob", backend, hidden.device.type)
    if reduction == "none":
        each = _forward(x, w, y, bias, softcap, logit_scale, ignore_index, valid_vocab, 0, False, False)[0].reshape(labels.shape)
        return (-each, each.detach()) if return_logprob else -each
    on = torch.is_grad_enabled()
    need_bias = bias is not None and on and bias.requires_grad
    loss, scored, each, *_ = _cross_entropy(
        x, w, y, bias, softcap, logit_scale, ignore_index, valid_vocab, on and x.requires_grad, on and w.requires_grad, need_bias
    )
    loss = loss if reduction == "sum" else loss / scored.clamp(min=1)
    return (loss, each.reshape(labels.shape)) if return_logprob else loss
