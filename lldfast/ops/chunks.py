"""What the torch paths of logprob and linear_logprob share: chunks of rows of logits z [R, V], worked on in place.

`transform_` makes the logits that are scored, `softmax_stats_` the results, `logit_grad_` the gradient: both ops score alike.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lldfast.errors import InputError

# A chunk of logits should stay in the CPU's last cache between the passes over it; on a GPU it should fill the device instead.
CHUNK_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}
NEG_INF = float("-inf")


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
    """`pieces` that fit the byte budget of the device."""
    return pieces(rows, vocab, dtype.itemsize, CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"]), least)


def pieces(rows: int, vocab: int, itemsize: int, budget: int, least: int = 1) -> Iterator[slice]:
    """Equal slices of at least `least` rows whose logits [R, V] fit `budget` bytes."""
    size = max(budget // (max(vocab, 1) * itemsize), least)
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
    z: Tensor, y: Tensor, shard: bool, logprob: Tensor, lse: Tensor, g: Tensor, h: Tensor, softcap: float | None,
    logit_scale: float,
) -> Tensor:  # fmt: skip
    """Gradient of sum(g logprob + h lse) by the logits before transform_, from z after it; overwrites z [R, V].

    The label's entry is g (1 - p) + h p from logprob: near p = 1 the difference of g and g exp(z - lse) would be rounding alone.
    """
    slope = None if softcap is None else logit_scale * (1 - (z / softcap).square_())
    dz = z.sub_(lse[:, None]).exp_().mul_((h - g)[:, None])
    set_at_labels_(dz, y, shard, h * logprob.exp() - g * torch.expm1(logprob))
    return dz.mul_(logit_scale if slope is None else slope)


def set_at_labels_(dz: Tensor, y: Tensor, shard: bool, value: Tensor) -> None:
    """dz[t, y_t] = value_t where y_t is in this shard."""
    index, foreign = local_labels(y, dz.shape[-1], shard)
    if foreign is not None:
        value = torch.where(foreign, dz.gather(-1, index)[:, 0], value)
    dz.scatter_(-1, index, value[:, None])


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
