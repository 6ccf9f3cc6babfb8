"""Token log-likelihoods from given logits: `logprob_t = z_t[y_t] - logsumexp(z_t)`, the inner term of eq. (1).

The logits that are scored are `z = softcap(logit_scale * (logits + bias))` with `softcap(a) = c tanh(a / c)`, cut to the first
`valid_vocab` ids of the vocabulary. `reference()` is the fp64 truth; `logprob()` works through row chunks in fp32 (fp64 for fp64
input), so that no second [T, V] tensor is alive, and has a backward for logits and bias. Backends: C++ (csrc/cpu/logprob),
Triton, CUDA C++ (csrc/cuda/logprob.h) and torch.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lldfast.errors import InputError
from lldfast.ops import native
from lldfast.ops.check import check_bias, check_precision, check_scoring
from lldfast.ops.chunks import (
    NEG_INF,
    Outputs,
    accumulate_dtype,
    logit_grad_,
    row_chunks,
    softmax_stats_,
    transform_,
)
from lldfast.ops.dispatch import OPTIONS, Options, choose


class LogprobResult(NamedTuple):
    """Results per token, each of the labels' shape; what was not asked for is None. Ignored tokens hold 0 (argmax: -1).

    logprob: natural log, fp32 (fp64 for fp64 input). lse: logsumexp of the logits. argmax: id of the largest logit, the lowest
    one of a tie. max_logit: that logit (comes with argmax). entropy: of the predictive distribution, in nats.
    """

    logprob: Tensor
    lse: Tensor | None = None
    argmax: Tensor | None = None
    entropy: Tensor | None = None
    max_logit: Tensor | None = None

    @classmethod
    def shaped(
        cls, out: tuple[Tensor, ...], shape: Sequence[int], return_lse: bool, return_argmax: bool, return_entropy: bool
    ) -> "LogprobResult":
        """From an op's outputs (logprob, lse, argmax, entropy, max logit), each [T]."""
        logprob, lse, argmax, entropy, top = out
        return cls(
            logprob.reshape(shape),
            lse.reshape(shape) if return_lse else None,
            argmax.reshape(shape) if return_argmax else None,
            entropy.reshape(shape) if return_entropy else None,
            top.reshape(shape) if return_argmax else None,
        )


def reference(
    logits: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    valid_vocab: int | None = None,
    vocab_start: int = 0,
) -> LogprobResult:
    """The oracle: the formula of `logprob` in fp64, differentiable by plain autograd, with every field filled in."""
    z = logits.double() if bias is None else logits.double() + bias.double()
    z = z * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    if valid_vocab is not None:
        z = z[..., : max(valid_vocab - vocab_start, 0)]
    vocab = z.shape[-1]
    kept = labels != ignore_index
    local = labels.long() - vocab_start
    owned = (local >= 0) & (local < vocab)
    if vocab == 0:
        empty = torch.where(kept, NEG_INF, 0.0).double()
        return LogprobResult(empty, empty, torch.full_like(local, -1), torch.zeros_like(empty), empty)
    lse = torch.logsumexp(z, -1)
    z_y = z.gather(-1, local.clamp(0, vocab - 1).unsqueeze(-1)).squeeze(-1)
    zero = torch.zeros_like(lse)
    logprob = torch.where(kept, torch.where(owned, z_y - lse, NEG_INF), zero)
    top, argmax = z.max(-1)
    entropy = torch.special.entr(torch.softmax(z, -1)).sum(-1)
    return LogprobResult(
        logprob,
        torch.where(kept, lse, zero),
        torch.where(kept, argmax + vocab_start, -1),
        torch.where(kept, entropy, zero),
        torch.where(kept, top, zero),
    )


_INPUTS = f"Tensor logits, Tensor labels, Tensor? bias, {OPTIONS}"


@torch.library.custom_op(
    "lldfast::logprob",
    mutates_args=(),
    schema=f"({_INPUTS}, bool argmax, bool entropy) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _forward(logits: Tensor, labels: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    o, (argmax, entropy) = Options(*rest[:-2]), rest[-2:]
    dtype, vocab = accumulate_dtype(logits), o.vocab(logits.shape[1])
    out = Outputs.zeros(logits, len(logits), dtype, argmax, entropy)
    kept = o.kept(logits.shape[1], labels)
    every: slice | Tensor = slice(None) if kept is None else kept
    if len(logits) == 0 or (kept is not None and len(kept) == 0):
        return tuple(out)
    if vocab == 0:
        out.put_empty_shard(every)
        return tuple(out)
    y = labels.long() - o.vocab_start
    if o.backend == "cpp":
        native.logprob_fwd(logits, y, kept, vocab, bias, o.softcap, o.logit_scale, out)
        if argmax and o.vocab_start:
            out.argmax[every] += o.vocab_start
    elif o.backend == "cuda":
        part = Outputs(*(x[every].contiguous() if x.numel() else x for x in out))
        native.cuda_logprob_fwd(logits, y[every].contiguous(), kept, vocab, bias, o.softcap, o.logit_scale, part)
        out.put(every, part, o.vocab_start)
    elif o.backend == "triton":
        from lldfast_kernels.logprob import logprob_fwd

        # All rows: to leave some out would copy the logits of the others.
        stats = logprob_fwd(logits, y, **o.triton(vocab, bias), argmax=argmax, entropy=entropy)
        out.put(every, stats if kept is None else tuple(x[kept] if x.numel() else x for x in stats), o.vocab_start)
    else:
        offset = None if bias is None else bias[:vocab].to(dtype)
        for chunk in row_chunks(len(logits) if kept is None else len(kept), vocab, dtype, logits.device):
            rows = chunk if kept is None else kept[chunk]
            z = transform_(logits[rows, :vocab].to(dtype, copy=True), offset, o.softcap, o.logit_scale)
            out.put(rows, softmax_stats_(z, y[rows], o.shard(logits.shape[1]), argmax, entropy), o.vocab_start)
    return tuple(out)


@_forward.register_fake
def _(logits: Tensor, labels: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(Outputs.zeros(logits, logits.shape[0], accumulate_dtype(logits), *rest[-2:]))


@torch.library.custom_op(
    "lldfast::logprob_backward",
    mutates_args=(),
    schema=f"(Tensor g, Tensor h, Tensor logprob, Tensor lse, {_INPUTS}, bool need_logits, bool need_bias) -> (Tensor, Tensor)",
)
def _backward(
    g: Tensor, h: Tensor, logprob: Tensor, lse: Tensor, logits: Tensor, labels: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    o, (need_logits, need_bias) = Options(*rest[:-2]), rest[-2:]
    dtype, vocab = accumulate_dtype(logits), o.vocab(logits.shape[1])
    kept = (labels != o.ignore_index).nonzero()[:, 0]
    every = None if len(kept) == len(labels) else kept
    # The C++ kernels write every place that has a value; the others are 0.
    make = torch.empty_like if o.backend in ("cpp", "cuda") and every is None and vocab == logits.shape[1] else torch.zeros_like
    d_logits = make(logits, memory_format=torch.contiguous_format) if need_logits else logits.new_empty(0)
    d_bias = logits.new_zeros(logits.shape[1] if need_bias else 0, dtype=dtype)
    if len(kept) == 0 or vocab == 0:
        return d_logits, d_bias
    y, g, h = labels.long() - o.vocab_start, g.contiguous(), h.contiguous()
    if o.backend == "cpp":
        native.logprob_bwd(logits, y, every, vocab, bias, o.softcap, o.logit_scale, logprob, lse, g, h, d_logits, d_bias)
    elif o.backend == "cuda":
        y, lse, g, h = (x if every is None else x[every].contiguous() for x in (y, lse, g, h))
        native.cuda_logprob_bwd(logits, y, every, vocab, bias, o.softcap, o.logit_scale, lse, g, h, d_logits, d_bias)
    elif o.backend == "triton":
        from lldfast_kernels.logprob import logprob_bwd

        if every is not None:
            zero = labels == o.ignore_index
            y, lse, g, h = y.masked_fill(zero, -1), lse, g.masked_fill(zero, 0.0), h.masked_fill(zero, 0.0)
        needs = {"need_logits": need_logits, "need_bias": need_bias}
        d_logits, d_bias = logprob_bwd(g, h, logits, y, lse, **o.triton(vocab, bias), **needs)
        if every is not None and need_logits:
            d_logits[zero] = 0.0  # such rows may hold anything, also NaN
    else:
        offset = None if bias is None else bias[:vocab].to(dtype)
        for chunk in row_chunks(len(kept), vocab, dtype, logits.device):
            rows = kept[chunk]
            z = transform_(logits[rows, :vocab].to(dtype, copy=True), offset, o.softcap, o.logit_scale)
            at = (logprob[rows], lse[rows], g[rows], h[rows])
            dz = logit_grad_(z, y[rows], o.shard(logits.shape[1]), *at, o.softcap, o.logit_scale)
            if need_logits:
                d_logits[rows, :vocab] = dz.to(logits.dtype)
            if need_bias:
                d_bias[:vocab] += dz.sum(0)
    return d_logits, d_bias


@_backward.register_fake
def _(
    g: Tensor, h: Tensor, logprob: Tensor, lse: Tensor, logits: Tensor, labels: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    need_logits, need_bias = rest[-2:]
    d_logits = torch.empty_like(logits, memory_format=torch.contiguous_format) if need_logits else logits.new_empty(0)
    return d_logits, logits.new_empty(logits.shape[1] if need_bias else 0, dtype=accumulate_dtype(logits))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, labels, bias, *ctx.options = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(logits, labels, output[0], output[1], bias)


def _autograd(ctx: Any, g: Tensor | None, h: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    logits, labels, logprob, lse, bias = ctx.saved_tensors
    g = torch.zeros_like(lse) if g is None else g
    h = torch.zeros_like(lse) if h is None else h
    need_logits, _, need_bias = ctx.needs_input_grad[:3]
    d_logits, d_bias = _backward(g, h, logprob, lse, logits, labels, bias, *ctx.options[:-2], need_logits, need_bias)
    return (d_logits if need_logits else None, None, d_bias.to(bias.dtype) if need_bias else None, *[None] * 9)


_forward.register_autograd(_autograd, setup_context=_setup_context)


def logprob(
    logits: Tensor,
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
    """Log-likelihood of `labels` [...] under `logits` [..., V], in nats per token; differentiable in logprob and lse.

    The distribution is softmax(softcap(logit_scale * (logits + bias))) over the ids below `valid_vocab`; columns behind it may
    hold anything. A vocabulary shard passes its first id as `vocab_start` and the size of the whole vocabulary as
    `valid_vocab`: then lse covers the shard only, and a label of another shard scores -inf (see `merge_vocab_shards`).

    Args:
        logits: any float dtype, any strides; 16-bit logits are read as they are and computed with in fp32.
        labels: int32 or int64; `ignore_index` marks tokens to leave out.

    Raises:
        InputError: shapes, dtypes or devices do not fit, a label is out of range, an option or backend is unknown.
    """
    check_scoring({"logits": logits, "bias": bias}, labels, logits.shape[:-1], softcap, logit_scale, valid_vocab, vocab_start)
    check_precision(precision, (None, "fp32"))
    check_bias(bias, logits.shape[-1])
    options = Options(softcap, logit_scale, ignore_index, valid_vocab, vocab_start, precision, choose("logprob", backend, logits))
    flat = logits.reshape(-1, logits.shape[-1]) if logits.dim() != 2 else logits
    out = _forward(flat, labels.reshape(-1), bias, *options, return_argmax, return_entropy)
    return LogprobResult.shaped(out, labels.shape, return_lse, return_argmax, return_entropy)


def merge_vocab_shards(shards: Sequence[LogprobResult]) -> LogprobResult:
    """Combine the results of vocabulary shards (each with return_lse=True) into that of the whole vocabulary.

    argmax and entropy are merged where every shard has them. Differentiable in logprob and lse.
    """
    if not shards or any(s.lse is None for s in shards):
        raise InputError("merge_vocab_shards needs at least one result, each made with return_lse=True")
    lses = torch.stack([s.lse for s in shards if s.lse is not None])
    parts = torch.stack([s.logprob for s in shards])
    lse = torch.logsumexp(lses, 0)
    owned = ~parts.isneginf() & ~lses.isneginf()
    ignored = (parts == 0).all(0) & (lses == 0).all(0)
    # At most one shard owns the label, so the sum only picks that shard's logit.
    z_y = torch.where(owned, parts + lses, 0.0).sum(0)
    logprob = torch.where(ignored, 0.0, torch.where(owned.any(0), z_y - lse, NEG_INF))
    lse = torch.where(ignored, 0.0, lse)
    argmax = top = entropy = None
    if all(s.argmax is not None and s.max_logit is not None for s in shards):
        tops = torch.stack([s.max_logit for s in shards if s.max_logit is not None])
        top, first = tops.max(0)
        argmax = torch.stack([s.argmax for s in shards if s.argmax is not None]).gather(0, first[None])[0]
    if all(s.entropy is not None for s in shards):
        # No gradient: that of a shard's own entropy is not known.
        entropies = torch.stack([s.entropy.detach() for s in shards if s.entropy is not None])
        lses, whole = lses.detach(), lse.detach()
        share = (lses - torch.where(ignored, 0.0, whole)).exp()
        mean_logit = torch.where(share > 0, share * (lses - entropies), 0.0).sum(0)
        entropy = torch.where(ignored, 0.0, whole - mean_logit)
    return LogprobResult(logprob, lse, argmax, entropy, top)
