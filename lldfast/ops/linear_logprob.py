"""Token log-likelihoods and the training loss from hidden states and the head: no [T, V] tensor of logits is ever alive.

`z = softcap(logit_scale * (H W^T + bias))`, `logprob_t = z_t[y_t] - logsumexp(z_t)` (eq. (1)). z is summed in fp32, and z_y is
read from the same tile as the lse. Backends: C++ on a CPU (csrc/cpu/linear_logprob), Triton on a GPU, and torch anywhere.
"""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from lldfast.errors import InputError
from lldfast.ops import logprob as given
from lldfast.ops import native, torch_linear
from lldfast.ops.autocast import autocast_factors
from lldfast.ops.check import check_bias, check_precision, check_reduction, check_scoring
from lldfast.ops.chunks import Outputs, accumulate_dtype, local_vocab
from lldfast.ops.dispatch import OPTIONS, Options, choose
from lldfast.ops.grads import Grads, scale_grads
from lldfast.ops.head import HeadProduct
from lldfast.ops.logprob import LogprobResult


def reference(hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> LogprobResult:
    """The oracle: H W^T and `logprob.reference` in fp64; options as there. Padded rows of the weight are not multiplied."""
    valid_vocab, vocab_start = options.get("valid_vocab"), options.get("vocab_start", 0)
    vocab = local_vocab(weight.shape[0], valid_vocab, vocab_start)
    bias = options.pop("bias", None)
    logits = hidden.double() @ weight[:vocab].double().T
    return given.reference(logits, labels, bias=None if bias is None else bias[:vocab], **options)


def factors(hidden: Tensor, weight: Tensor, precision: str | None) -> tuple[Tensor, Tensor]:
    """What Triton multiplies: both in one dtype."""
    if precision == "bf16":
        return hidden.bfloat16(), weight.bfloat16()
    return (hidden, weight) if hidden.dtype == weight.dtype else (hidden.float(), weight.float())


_INPUTS = f"Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, {OPTIONS}"
_NEEDS = "bool need_hidden, bool need_weight, bool need_bias"


@torch.library.custom_op(
    "lldfast::linear_logprob",
    mutates_args=(),
    schema=f"({_INPUTS}, bool argmax, bool entropy) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _forward(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    o, (argmax, entropy) = Options(*rest[:-2]), rest[-2:]
    out = Outputs.zeros(hidden, len(hidden), accumulate_dtype(hidden, weight), argmax, entropy)
    kept, vocab = o.kept(len(weight), labels), o.vocab(len(weight))
    every: slice | Tensor = slice(None) if kept is None else kept
    if len(hidden) == 0 or (kept is not None and len(kept) == 0):
        return tuple(out)
    if vocab == 0:
        out.put_empty_shard(every)
        return tuple(out)
    y = labels.long() - o.vocab_start
    if o.backend == "cpp" and hidden.shape[1] > 0:
        native.linear_logprob_fwd(hidden, weight, y, kept, vocab, bias, o.softcap, o.logit_scale, o.precision, out)
        if argmax and o.vocab_start:
            out.argmax[every] += o.vocab_start
    elif o.backend == "triton":
        from lldfast_kernels.linear_logprob import linear_logprob_fwd

        h, w = factors(hidden[every], weight, o.precision)
        out.put(every, linear_logprob_fwd(h, w, y[every], **o.triton(vocab, bias), argmax=argmax, entropy=entropy), o.vocab_start)
    else:
        head = HeadProduct(hidden, weight, bias, vocab, o.precision)
        torch_linear.forward(head, hidden, y, kept, o.shard(len(weight)), o.softcap, o.logit_scale, o.vocab_start, out)
    return tuple(out)


@_forward.register_fake
def _(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(Outputs.zeros(hidden, hidden.shape[0], accumulate_dtype(hidden, weight), *rest[-2:]))


@torch.library.custom_op(
    "lldfast::linear_logprob_backward",
    mutates_args=(),
    schema=f"(Tensor g, Tensor h, Tensor logprob, Tensor lse, {_INPUTS}, {_NEEDS}) -> (Tensor, Tensor, Tensor)",
)
def _backward(
    g: Tensor,
    h: Tensor,
    logprob: Tensor,
    lse: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    o, needs = Options(*rest[:-3]), rest[-3:]
    vocab, kept = o.vocab(len(weight)), (labels != o.ignore_index).nonzero()[:, 0]
    y = labels.long() - o.vocab_start
    if len(kept) == 0 or vocab == 0:
        return _empty_grads(torch.zeros_like, hidden, weight, bias, needs)
    if o.backend == "cpp" and hidden.shape[1] > 0:
        rows = None if len(kept) == len(labels) else kept
        # The kernel writes every row that has a value; the others are 0.
        make_h = torch.empty_like if rows is None else torch.zeros_like
        make_w = torch.empty_like if vocab == len(weight) else torch.zeros_like
        dh = make_h(hidden, memory_format=torch.contiguous_format) if needs[0] else hidden.new_empty(0)
        dw = make_w(weight, memory_format=torch.contiguous_format) if needs[1] else weight.new_empty(0)
        db = hidden.new_zeros(len(weight) if needs[2] else 0, dtype=torch.float32)
        native.linear_logprob_bwd(
            hidden, weight, y, rows, vocab, bias, o.softcap, o.logit_scale, o.precision, logprob.contiguous(),
            lse.contiguous(), g.contiguous(), h.contiguous(), dh, dw, db,
        )  # fmt: skip
    elif o.backend == "triton":
        from lldfast_kernels.linear_logprob import linear_logprob_bwd

        x, w = factors(hidden[kept], weight, o.precision)
        part, dw, db = linear_logprob_bwd(
            g[kept], h[kept], x, w, y[kept], lse[kept], **o.triton(vocab, bias),
            need_hidden=needs[0], need_weight=needs[1], need_bias=needs[2],
        )  # fmt: skip
        dh = part
        if needs[0]:
            dh = torch.zeros_like(hidden)
            dh[kept] = part.to(hidden.dtype)
    else:
        head = HeadProduct(hidden, weight, bias, vocab, o.precision)
        grads = Grads.zeros(hidden, weight, head.dtype, *needs)
        torch_linear.backward(head, g, h, logprob, lse, hidden, y, kept, o.shard(len(weight)), o.softcap, o.logit_scale, grads)
        dh, dw, db = grads
    return dh.to(hidden.dtype), dw.to(weight.dtype), db if bias is None else db.to(bias.dtype)


def _empty_grads(
    make: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: tuple[bool, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        make(hidden, memory_format=torch.contiguous_format) if needs[0] else hidden.new_empty(0),
        make(weight, memory_format=torch.contiguous_format) if needs[1] else weight.new_empty(0),
        hidden.new_empty(0, dtype=torch.float32) if bias is None else make(bias) if needs[2] else bias.new_empty(0),
    )


@_backward.register_fake
def _(
    g: Tensor,
    h: Tensor,
    logprob: Tensor,
    lse: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    return _empty_grads(torch.empty_like, hidden, weight, bias, rest[-3:])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, labels, bias, *ctx.options = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(hidden, weight, labels, output[0], output[1], bias)


def _autograd(ctx: Any, g: Tensor | None, h: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    hidden, weight, labels, logprob, lse, bias = ctx.saved_tensors
    g = torch.zeros_like(lse) if g is None else g
    h = torch.zeros_like(lse) if h is None else h
    need_hidden, need_weight, _, need_bias = ctx.needs_input_grad[:4]
    dh, dw, db = _backward(
        g, h, logprob, lse, hidden, weight, labels, bias, *ctx.options[:-2], need_hidden, need_weight, need_bias
    )
    return (dh if need_hidden else None, dw if need_weight else None, None, db if need_bias else None, *[None] * 9)


_forward.register_autograd(_autograd, setup_context=_setup_context)


@torch.library.custom_op(
    "lldfast::linear_cross_entropy",
    mutates_args=(),
    schema=f"({_INPUTS}, {_NEEDS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    """Summed loss, number of scored tokens, logprob per token, and the gradients of the sum.

    For backends that hold a chunk's logits and so get its gradient for two products more. The C++ kernels never hold them.
    """
    o, needs = Options(*rest[:-3]), rest[-3:]
    vocab = o.vocab(len(weight))
    head = HeadProduct(hidden, weight, bias, vocab, o.precision)
    grads = Grads.zeros(hidden, weight, head.dtype, *needs)
    kept = o.kept(len(weight), labels)
    logprobs = hidden.new_zeros(len(hidden), dtype=head.dtype)
    run = torch_linear.loss_and_grad(head, o.softcap, o.logit_scale, any(needs))
    if o.backend == "triton":
        from lldfast_kernels.logprob import logprob_bwd, logprob_fwd

        options = o.triton(vocab, head.bias)

        def run(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            logprob, lse, *_ = logprob_fwd(z, y, **options)
            if any(needs):
                logprob_bwd(torch.full_like(lse, -1.0), torch.zeros_like(lse), z, y, lse, **options, out=z)
            return logprob, z

    torch_linear.cross_entropy(head, hidden, labels.long(), kept, run, grads, logprobs)
    total = -logprobs.sum(dtype=torch.float64)
    scored = len(hidden) if kept is None else len(kept)
    return total.to(head.dtype), total.new_full((), scored, dtype=head.dtype), logprobs, *grads


@_cross_entropy.register_fake
def _(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    dtype = accumulate_dtype(hidden, weight)
    loss, scored, logprobs = (hidden.new_empty(shape, dtype=dtype) for shape in ((), (), (hidden.shape[0],)))
    return loss, scored, logprobs, *Grads.zeros(hidden, weight, dtype, *rest[-3:])


def _cross_entropy_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # the outputs that nobody differentiates are as large as the gradients
    hidden, weight, _, bias = inputs[:4]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(hidden, weight, bias, *output[3:])


def _cross_entropy_autograd(ctx: Any, g: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if g is None:
        return (None,) * len(ctx.needs_input_grad)
    hidden, weight, bias, *sums = ctx.saved_tensors
    dh, dw, db = scale_grads(g, hidden, weight, bias, *sums)
    need_hidden, need_weight, _, need_bias = ctx.needs_input_grad[:4]
    return (dh if need_hidden else None, dw if need_weight else None, None, db if need_bias else None, *[None] * 10)


_cross_entropy.register_autograd(_cross_entropy_autograd, setup_context=_cross_entropy_setup)


def _prepare(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    valid_vocab: int | None,
    vocab_start: int,
    precision: str | None,
) -> tuple[Tensor, Tensor, Tensor, str | None]:
    """Checked inputs, hidden flattened to [T, d] and labels to [T], and the precision."""
    inputs = {"hidden": hidden, "weight": weight, "bias": bias}
    check_scoring(inputs, labels, hidden.shape[:-1], softcap, logit_scale, valid_vocab, vocab_start)
    check_precision(precision)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise InputError(f"weight has shape {tuple(weight.shape)}, but hidden has width {hidden.shape[-1]}: it must be [V, d]")
    check_bias(bias, weight.shape[0])
    hidden, weight, precision = autocast_factors(hidden, weight, precision)
    flat = hidden.reshape(-1, hidden.shape[-1]) if hidden.dim() != 2 else hidden
    return flat, weight, labels.reshape(-1), precision


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

    Options, vocabulary shards and errors as in `logprob`; rows of the weight (and bias) behind `valid_vocab` do not matter.
    Differentiable in logprob and lse by hidden, weight and bias; the backward computes the logits again.

    Args:
        precision: how H W^T is multiplied; sums are in fp32 always. None: inputs as they are, exactly (under autocast: as a
            linear layer would). "bf16": inputs rounded to bf16. "bf16x3": inputs in two bf16 terms each, which keeps 16 bits of
            them (error under 1e-4 nats) at several times the speed of fp32 where a CPU has AMX; elsewhere it is computed in fp32.
        backend: "auto", "cpp", "triton" or "torch" (`lldfast.backends()` says what runs here).
    """
    x, w, y, precision = _prepare(hidden, weight, labels, bias, softcap, logit_scale, valid_vocab, vocab_start, precision)
    backend = choose("linear_logprob", backend, hidden, weight)
    options = Options(softcap, logit_scale, ignore_index, valid_vocab, vocab_start, precision, backend)
    out = _forward(x, w, y, bias, *options, return_argmax, return_entropy)
    return LogprobResult.shaped(out, labels.shape, return_lse, return_argmax, return_entropy)


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

    "none" gives the loss per token, in the labels' shape and 0 at ignored ones. Who only wants to look at the tokens' losses
    takes `return_logprob=True`: (loss, logprob), logprob [...] detached, at no cost. Gradients are summed in fp32 and rounded
    once, to the inputs' dtypes; where bf16 is multiplied, softmax(z) is rounded to bf16 and the label's own term is not. For
    tensor-parallel heads use `linear_logprob` with vocab_start and `merge_vocab_shards`, which are differentiable.

    Raises:
        InputError: as `linear_logprob`, or an unknown reduction.
    """
    check_reduction(reduction)
    x, w, y, precision = _prepare(hidden, weight, labels, bias, softcap, logit_scale, valid_vocab, 0, precision)
    if valid_vocab is not None and valid_vocab > weight.shape[0]:
        raise InputError(f"valid_vocab={valid_vocab} is more than the {weight.shape[0]} rows of weight")
    backend = choose("linear_logprob", backend, hidden, weight)
    options = Options(softcap, logit_scale, ignore_index, valid_vocab, 0, precision, backend)
    on = torch.is_grad_enabled()
    needs = (on and x.requires_grad, on and w.requires_grad, bias is not None and on and bias.requires_grad)
    if reduction == "none" or backend == "cpp":
        each = _forward(x, w, y, bias, *options, False, False)[0]
        if reduction == "none":
            loss = -each.reshape(labels.shape)
        else:
            loss = -each.sum(dtype=torch.float64)
            scored = (y != ignore_index).sum().clamp(min=1)
            loss = (loss if reduction == "sum" else loss / scored).to(each.dtype)
    else:
        loss, scored, each, *_ = _cross_entropy(x, w, y, bias, *options, *needs)
        loss = loss if reduction == "sum" else loss / scored.clamp(min=1)
    return (loss, each.detach().reshape(labels.shape)) if return_logprob else loss
