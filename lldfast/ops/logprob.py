"""Token log-likelihoods from given logits: `logprob_t = z_t[y_t] - logsumexp(z_t)`, the inner term of eq. (1).

The logits that are scored are `z = softcap(logit_scale * (logits + bias))` with `softcap(a) = c tanh(a / c)`, cut to the first
`valid_vocab` ids of the vocabulary. `reference()` is the fp64 truth; `logprob()` works through row chunks in fp32 (fp64 for fp64
input), so that no second [T, V] tensor is alive, and has a backward for logits and bias.

The chunk functions here (`transform_`, `softmax_stats_`, `logit_grad_`) serve ops/linear_logprob.py too: both ops score alike.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lldfast.backends import resolve
from lldfast.errors import InputError

# A chunk of logits should stay in the CPU's last cache between the passes over it; on a GPU it should fill the device instead.
CHUNK_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}
NEG_INF = float("-inf")


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


def check_inputs(
    inputs: dict[str, Tensor | None],
    labels: Tensor,
    rows: Sequence[int],
    softcap: float | None,
    valid_vocab: int | None,
    vocab_start: int,
    precision: str | None,
) -> None:
    """Refuse what cannot be scored, with a message that names the argument. `rows` is the shape that labels must have."""
    for name, tensor in [*inputs.items(), ("labels", labels)]:
        if tensor is None:
            continue
        if hasattr(tensor, "placements") and hasattr(tensor, "device_mesh"):
            raise InputError(f"{name} is a DTensor: pass its local part (to_local()), with vocab_start for a vocabulary shard")
        if name != "labels" and not tensor.is_floating_point():
            raise InputError(f"{name} must be a floating-point tensor, not {tensor.dtype}")
        if tensor.device != labels.device:
            raise InputError(f"{name} is on {tensor.device} but labels are on {labels.device}")
    if labels.dtype not in (torch.int32, torch.int64):
        raise InputError(f"labels must be int32 or int64, not {labels.dtype}")
    if tuple(labels.shape) != tuple(rows):
        raise InputError(f"labels have shape {tuple(labels.shape)}, the inputs have {tuple(rows)} tokens")
    if softcap is not None and not softcap > 0:
        raise InputError(f"softcap must be positive, not {softcap}")
    if vocab_start < 0 or (valid_vocab is not None and valid_vocab < 1):
        raise InputError(f"vocab_start must be >= 0 and valid_vocab >= 1, not {vocab_start} and {valid_vocab}")
    if precision not in (None, "fp32"):
        raise InputError(f"precision={precision!r}: the torch backend only accumulates in fp32 (None or 'fp32')")


def check_bias(bias: Tensor | None, vocab: int) -> None:
    if bias is not None and tuple(bias.shape) != (vocab,):
        raise InputError(f"bias has shape {tuple(bias.shape)}, the vocabulary dimension has {vocab}")


def accumulate_dtype(*tensors: Tensor) -> torch.dtype:
    """fp32, or fp64 when an input is fp64 (gradient checks)."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def local_vocab(rows: int, valid_vocab: int | None, vocab_start: int) -> int:
    """How many of this shard's vocabulary rows are real: padding behind valid_vocab is never read."""
    return rows if valid_vocab is None else max(min(rows, valid_vocab - vocab_start), 0)


def kept_rows(labels: Tensor, ignore_index: int, vocab: int) -> Tensor | None:
    """Indices of the tokens to score, or None when that is all of them.

    Raises:
        InputError: a label that is not ignore_index lies outside [0, vocab).
    """
    if labels.numel() == 0:
        return None
    if not 0 <= ignore_index < vocab:
        low, high = labels.aminmax()  # the usual case in one pass: all scored, none out of range
        if int(low) >= 0 and int(high) < vocab:
            return None
    kept = labels != ignore_index
    bad = kept & ((labels < 0) | (labels >= vocab))
    if bool(bad.any()):
        at = int(bad.nonzero()[0, 0])
        raise InputError(f"label {int(labels[at])} of token {at} is outside the vocabulary [0, {vocab})")
    return None if bool(kept.all()) else kept.nonzero()[:, 0]


def row_chunks(rows: int, vocab: int, dtype: torch.dtype, device: torch.device, least: int = 1) -> Iterator[slice]:
    """Equal slices of at least `least` rows whose logits [R, V] fit the byte budget of the device."""
    budget = CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"])
    size = max(budget // (max(vocab, 1) * dtype.itemsize), least)
    count = -(-rows // size)
    for i in range(count):
        yield slice(rows * i // count, rows * (i + 1) // count)


def transform_(z: Tensor, bias: Tensor | None, softcap: float | None, logit_scale: float) -> Tensor:
    """Bias, scale and softcap, in place on a buffer of our own."""
    if bias is not None:
        z.add_(bias)
    if logit_scale != 1.0:
        z.mul_(logit_scale)
    if softcap is not None:
        z.div_(softcap).tanh_().mul_(softcap)
    return z


def local_labels(y: Tensor, vocab: int, shard: bool) -> tuple[Tensor, Tensor | None]:
    """[R, 1] column indices of labels y, and which of them belong to another shard (None: none can)."""
    if not shard:
        return y[:, None], None
    return y.clamp(0, vocab - 1)[:, None], (y < 0) | (y >= vocab)


def softmax_stats_(z: Tensor, y: Tensor, shard: bool, argmax: bool = False, entropy: bool = False) -> tuple[Tensor, ...]:
    """logprob, lse, argmax, entropy, max logit of rows z [R, V], whose buffer is overwritten, and softmax(z).

    y holds shard-local labels; one outside [0, V) belongs to another shard and scores -inf. softmax() is the fastest fused pass
    torch has, but its own sum runs serially in fp32 and loses the tail of a large vocabulary (6e-6 at 49,152 ids, always the same
    way). So sum exp(z - max) is read off its result, where sum() adds pairwise; it is >= 1 and logprob <= 0 to the last bit.
    """
    top, best = z.max(-1) if argmax else (z.amax(-1), y.new_empty(0))
    index, foreign = local_labels(y, z.shape[-1], shard)
    z_y = z.gather(-1, index)[:, 0]
    if foreign is not None:
        z_y.masked_fill_(foreign, NEG_INF)
    # Each element is written after its row was read, so the CPU kernel may work in place; other devices promise nothing.
    p = torch.softmax(z, -1, out=z) if z.device.type == "cpu" else torch.softmax(z, -1)
    log_sum = (p.sum(-1) / p.amax(-1)).log()
    lse = torch.where(top.isinf(), top, top + log_sum)
    spread = torch.special.entr(p).sum(-1) if entropy else z.new_empty(0)
    return (z_y - top) - log_sum, lse, best, spread, top, p


def logit_grad_(
    z: Tensor, y: Tensor, shard: bool, lse: Tensor, g: Tensor, h: Tensor, softcap: float | None, logit_scale: float
) -> Tensor:
    """Gradient of sum(g logprob + h lse) by the logits before transform_, from z after it; overwrites z [R, V]."""
    slope = None if softcap is None else logit_scale * (1 - (z / softcap).square_())
    dz = z.sub_(lse[:, None]).exp_().mul_((h - g)[:, None])
    add_at_labels_(dz, y, shard, g)
    return dz.mul_(logit_scale if slope is None else slope)


def add_at_labels_(dz: Tensor, y: Tensor, shard: bool, value: Tensor) -> None:
    """dz[t, y_t] += value_t where y_t is in this shard."""
    index, foreign = local_labels(y, dz.shape[-1], shard)
    value = value if foreign is None else value.masked_fill(foreign, 0.0)
    dz.scatter_add_(-1, index, value[:, None])


def is_shard(rows: int, valid_vocab: int | None, vocab_start: int) -> bool:
    """Whether a valid label can lie outside these vocabulary rows."""
    return vocab_start > 0 or (valid_vocab is not None and valid_vocab > rows)


class Outputs(NamedTuple):
    """Result buffers over all T tokens, filled chunk by chunk; ignored tokens keep the initial value."""

    logprob: Tensor
    lse: Tensor
    argmax: Tensor
    entropy: Tensor
    top: Tensor

    @classmethod
    def zeros(cls, like: Tensor, tokens: int, dtype: torch.dtype, argmax: bool, entropy: bool) -> "Outputs":
        def make(on: bool) -> Tensor:
            return like.new_zeros(tokens if on else 0, dtype=dtype)

        best = like.new_full((tokens if argmax else 0,), -1, dtype=torch.int64)
        return cls(make(True), make(True), best, make(entropy), make(argmax))

    def put(self, rows: slice | Tensor, stats: tuple[Tensor, ...], vocab_start: int) -> None:
        logprob, lse, best, entropy, top = stats[:5]
        self.logprob[rows], self.lse[rows] = logprob, lse
        if self.argmax.numel():
            self.argmax[rows], self.top[rows] = best + vocab_start, top
        if self.entropy.numel():
            self.entropy[rows] = entropy

    def put_empty_shard(self, rows: slice | Tensor) -> None:
        for field in (self.logprob, self.lse, self.top):
            if field.numel():
                field[rows] = NEG_INF


@torch.library.custom_op("lldfast::logprob", mutates_args=())
def _forward(
    logits: Tensor,
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
    dtype = accumulate_dtype(logits)
    tokens, vocab = logits.shape[0], local_vocab(logits.shape[1], valid_vocab, vocab_start)
    out = Outputs.zeros(logits, tokens, dtype, argmax, entropy)
    kept = kept_rows(labels, ignore_index, vocab_start + logits.shape[1] if valid_vocab is None else valid_vocab)
    offset = None if bias is None else bias[:vocab].to(dtype)
    shard = is_shard(logits.shape[1], valid_vocab, vocab_start)
    for chunk in row_chunks(tokens if kept is None else len(kept), vocab, dtype, logits.device):
        rows = chunk if kept is None else kept[chunk]
        if vocab == 0:
            out.put_empty_shard(rows)
            continue
        z = transform_(logits[rows, :vocab].to(dtype, copy=True), offset, softcap, logit_scale)
        out.put(rows, softmax_stats_(z, labels[rows].long() - vocab_start, shard, argmax, entropy), vocab_start)
    return tuple(out)  # type: ignore[return-value]


@_forward.register_fake
def _(
    logits: Tensor,
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
    return tuple(Outputs.zeros(logits, logits.shape[0], accumulate_dtype(logits), argmax, entropy))  # type: ignore[return-value]


@torch.library.custom_op("lldfast::logprob_backward", mutates_args=())
def _backward(
    g: Tensor,
    h: Tensor,
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    valid_vocab: int | None,
    vocab_start: int,
    need_logits: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor]:
    dtype, vocab = accumulate_dtype(logits), local_vocab(logits.shape[1], valid_vocab, vocab_start)
    d_logits = torch.zeros_like(logits) if need_logits else logits.new_empty(0)
    d_bias = logits.new_zeros(logits.shape[1] if need_bias else 0, dtype=dtype)
    kept = (labels != ignore_index).nonzero()[:, 0]
    offset = None if bias is None else bias[:vocab].to(dtype)
    shard = is_shard(logits.shape[1], valid_vocab, vocab_start)
    for chunk in row_chunks(len(kept), vocab, dtype, logits.device):
        rows = kept[chunk]
        if vocab == 0:
            continue
        z = transform_(logits[rows, :vocab].to(dtype, copy=True), offset, softcap, logit_scale)
        y = labels[rows].long() - vocab_start
        dz = logit_grad_(z, y, shard, lse[rows], g[rows], h[rows], softcap, logit_scale)
        if need_logits:
            d_logits[rows, :vocab] = dz.to(logits.dtype)
        if need_bias:
            d_bias[:vocab] += dz.sum(0)
    return d_logits, d_bias


@_backward.register_fake
def _(
    g: Tensor,
    h: Tensor,
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    valid_vocab: int | None,
    vocab_start: int,
    need_logits: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor]:
    d_logits = torch.empty_like(logits) if need_logits else logits.new_empty(0)
    return d_logits, logits.new_empty(logits.shape[1] if need_bias else 0, dtype=accumulate_dtype(logits))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, labels, bias, *ctx.options = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(logits, labels, output[1], bias)


def _autograd(ctx: Any, g: Tensor | None, h: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    logits, labels, lse, bias = ctx.saved_tensors
    g = torch.zeros_like(lse) if g is None else g
    h = torch.zeros_like(lse) if h is None else h
    need_logits, _, need_bias = ctx.needs_input_grad[:3]
    softcap, logit_scale, ignore_index, valid_vocab, vocab_start = ctx.options[:5]
    d_logits, d_bias = _backward(
        g, h, logits, labels, lse, bias, softcap, logit_scale, ignore_index, valid_vocab, vocab_start, need_logits, need_bias
    )
    return (d_logits if need_logits else None, None, d_bias.to(bias.dtype) if need_bias else None, *[None] * 7)


_forward.register_autograd(_autograd, setup_context=_setup_context)


def shape_result(
    out: tuple[Tensor, ...], shape: Sequence[int], return_lse: bool, return_argmax: bool, return_entropy: bool
) -> LogprobResult:
    logprob, lse, argmax, entropy, top = out
    return LogprobResult(
        logprob.reshape(shape),
        lse.reshape(shape) if return_lse else None,
        argmax.reshape(shape) if return_argmax else None,
        entropy.reshape(shape) if return_entropy else None,
        top.reshape(shape) if return_argmax else None,
    )


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
    check_inputs({"logits": logits, "bias": bias}, labels, logits.shape[:-1], softcap, valid_vocab, vocab_start, precision)
    check_bias(bias, logits.shape[-1])
    resolve("logprob", backend, logits.device.type)
    out = _forward(
        logits.reshape(-1, logits.shape[-1]) if logits.dim() != 2 else logits, labels.reshape(-1), bias, softcap, logit_scale,
        ignore_index, valid_vocab, vocab_start, return_argmax, return_entropy,
    )  # fmt: skip
    return shape_result(out, labels.shape, return_lse, return_argmax, return_entropy)


def merge_vocab_shards(shards: Sequence[LogprobResult]) -> LogprobResult:
    """Combine the results of vocabulary shards (each with return_lse=True) into that of the whole vocabulary.

    argmax and entropy are merged where every shard has them. Differentiable, as its parts are.
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
        entropies = torch.stack([s.entropy for s in shards if s.entropy is not None])
        share = (lses - torch.where(ignored, 0.0, lse)).exp()
        mean_logit = torch.where(share > 0, share * (lses - entropies), 0.0).sum(0)
        entropy = torch.where(ignored, 0.0, lse - mean_logit)
    return LogprobResult(logprob, lse, argmax, entropy, top)
