"""What the kernels of token log-likelihoods share: the logits that are scored, the pass over partial results, the checks.

    z = softcap(logit_scale * (x + bias)),  softcap(a) = c tanh(a / c)
    d(g logprob + h lse) / dx = logit_scale (1 - (z / c)^2) ((h - g) e^(z - lse) + g [label])

A row's vocabulary is cut into splits. Each gives m (maximum), s = sum e^(z - m), u = sum (z - m) e^(z - m), best (argmax) and
z_y (the label's logit, -inf where it lies in another split), all [splits, T]. `Partials` holds them; `logprob_combine_kernel`
takes the splits one after another, so that the sums have one set of bits.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Arguments of a kernel have no Python type.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
INT_MAX = tl.constexpr(2147483647)

# As it was when the kernels below were made: one process cannot have both.
INTERPRETED = bool(triton.knobs.runtime.interpret)

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@triton.jit
def tanh(x):
    """Relative error about 2e-7; an exponential alone would lose the digits of a small x. The interpreter has no libdevice."""
    t = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    far = (1.0 - t) / (1.0 + t)
    x2 = x * x
    near = x + x * x2 * (-0.33333334 + x2 * (0.13333334 + x2 * (-0.053968254 + x2 * 0.021869488)))
    return tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0, -far, far))


@triton.jit
def transform(x, bias, softcap, scale, HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr):
    """The logits that are scored, from raw ones in fp32."""
    if HAS_BIAS:
        x = x + bias
    x = x * scale
    if SOFTCAP:
        x = softcap * tanh(x * (1.0 / softcap))
    return x


@triton.jit
def local_label(y, vocab):
    """A label as int32, -1 for another shard's."""
    return tl.where((y >= 0) & (y < vocab), y, -1).to(tl.int32)


@triton.jit
def logit_grad(z, hit, lse, g, h, softcap, scale, SOFTCAP: tl.constexpr):
    """Gradient of g logprob + h lse by the raw logits; `hit` marks the label."""
    dz = (h - g) * tl.exp2((z - lse) * LOG2E) + tl.where(hit, g, 0.0)
    if SOFTCAP:
        t = z * (1.0 / softcap)
        dz = dz * (1.0 - t * t)
    return dz * scale


@triton.jit(do_not_specialize=["T", "vocab", "splits"])
def logprob_combine_kernel(
    m_ptr, s_ptr, u_ptr, best_ptr, zy_ptr, label_ptr, logprob_ptr, lse_ptr, argmax_ptr, entropy_ptr, max_ptr,
    T, vocab, splits, ARGMAX: tl.constexpr, ENTROPY: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Results from partials [splits, T]; a lane per token takes the splits in order, so no layout can change the sum."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    on = t < T
    top = tl.full([BLOCK_T], float("-inf"), tl.float32)
    best = tl.zeros([BLOCK_T], tl.int32)
    z_y = tl.full([BLOCK_T], float("-inf"), tl.float32)
    at = t.to(tl.int64)
    for _ in range(splits):
        m = tl.load(m_ptr + at, mask=on, other=0.0)
        up = m > top
        top = tl.where(up, m, top)
        if ARGMAX:
            best = tl.where(up, tl.load(best_ptr + at, mask=on, other=0), best)
        z_y = tl.maximum(z_y, tl.load(zy_ptr + at, mask=on, other=0.0))
        at += T
    base = tl.where(top == float("-inf"), 0.0, top)
    s = tl.zeros([BLOCK_T], tl.float32)
    u = tl.zeros([BLOCK_T], tl.float32)
    at = t.to(tl.int64)
    for _ in range(splits):
        part = tl.load(s_ptr + at, mask=on, other=1.0)
        d = tl.load(m_ptr + at, mask=on, other=0.0) - base
        e = tl.exp2(d * LOG2E)
        s += part * e
        if ENTROPY:
            u += tl.where(e > 0, (tl.load(u_ptr + at, mask=on, other=0.0) + d * part) * e, 0.0)
        at += T
    log_s = tl.log(s)
    log_s = tl.where((s >= 1) & (log_s < 0), 0.0, log_s)  # an approximate log may miss 0 from below
    lse = tl.where(top == float("inf"), top, top + log_s)
    y = tl.load(label_ptr + t, mask=on, other=0)
    z_y = tl.where(z_y > top, top, z_y)
    logprob = tl.where((y >= 0) & (y < vocab), (z_y - top) - log_s, float("-inf"))
    tl.store(logprob_ptr + t, logprob, mask=on)
    tl.store(lse_ptr + t, lse, mask=on)
    tl.store(max_ptr + t, tl.where(lse == lse, top, lse), mask=on)
    if ARGMAX:
        tl.store(argmax_ptr + t, best.to(tl.int64), mask=on)
    if ENTROPY:
        tl.store(entropy_ptr + t, log_s - u / s, mask=on)


@triton.jit(do_not_specialize=["G", "V"])
def column_sum_kernel(part_ptr, out_ptr, G, V, ADD: tl.constexpr, BLOCK_V: tl.constexpr):
    """Second stage: out [V] (+)= sum of part [G, V] over its rows, one after another."""
    col = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    on = col < V
    acc = tl.zeros([BLOCK_V], tl.float32)
    if ADD:
        acc = tl.load(out_ptr + col, mask=on, other=0.0)
    at = col.to(tl.int64)
    for _ in range(G):
        acc += tl.load(part_ptr + at, mask=on, other=0.0)
        at += V
    tl.store(out_ptr + col, acc, mask=on)


def check(tensors: dict[str, Tensor | None], labels: Tensor, tokens: int, columns: int, vocab: int | None) -> int:
    """Refuse tensors that no kernel can take; gives the number of real columns. `tensors` are the floating-point ones."""
    for name, x in tensors.items():
        if x is None:
            continue
        if x.dtype not in FLOATS:
            raise ValueError(f"{name} must be float32, float16 or bfloat16, not {x.dtype}")
        if x.device != labels.device:
            raise ValueError(f"{name} is on {x.device}, labels are on {labels.device}")
    if labels.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"labels must be int32 or int64, not {labels.dtype}")
    if tuple(labels.shape) != (tokens,):
        raise ValueError(f"labels must have shape ({tokens},), not {tuple(labels.shape)}")
    if labels.device.type != "cuda" and not INTERPRETED:
        raise ValueError(f"tensors are on {labels.device}: kernels run on a CUDA device, or under TRITON_INTERPRET=1")
    bias = tensors.get("bias")
    if bias is not None and tuple(bias.shape) != (columns,):
        raise ValueError(f"bias must have shape ({columns},), not {tuple(bias.shape)}")
    real = columns if vocab is None else vocab
    if not 0 <= real <= columns:
        raise ValueError(f"vocab must lie in [0, {columns}], not {vocab}")
    if columns >= 2**31 - 2**16:  # column numbers, and a tile more, are int32
        raise ValueError(f"a vocabulary of {columns} is too large")
    return real


def per_token(name: str, x: Tensor, like: Tensor) -> Tensor:
    """A fp32 vector with one value per token; upstream gradients often come expanded."""
    if x.shape != like.shape or x.device != like.device:
        raise ValueError(f"{name} must have shape {tuple(like.shape)} on {like.device}, not {tuple(x.shape)} on {x.device}")
    return x.to(torch.float32).contiguous()


def capability(x: Tensor) -> tuple[int, int] | None:
    """The compute capability of a tensor's device; None under the interpreter."""
    return torch.cuda.get_device_capability(x.device) if x.device.type == "cuda" else None


def on_device(x: Tensor) -> torch.cuda.device:
    """Launches go to the current device: make it the tensors'."""
    return torch.cuda.device(x.device if x.device.type == "cuda" else -1)


class Partials:
    """Buffers [splits, T] of the partial results, and the launch that combines them."""

    def __init__(self, labels: Tensor, splits: int, argmax: bool, entropy: bool) -> None:
        def make(on: bool, dtype: torch.dtype = torch.float32) -> Tensor:
            return labels.new_empty((splits, len(labels)) if on else (0,), dtype=dtype)

        self.labels, self.splits, self.argmax, self.entropy = labels, splits, argmax, entropy
        self.buffers = (make(True), make(True), make(entropy), make(argmax, torch.int32), make(True))

    def combine(self, vocab: int) -> Outputs:
        out = empty_outputs(self.labels, self.argmax, self.entropy)
        tokens = len(self.labels)
        logprob_combine_kernel[(triton.cdiv(tokens, 128),)](
            *self.buffers, self.labels, *out, tokens, vocab, self.splits,
            ARGMAX=self.argmax, ENTROPY=self.entropy, BLOCK_T=128, num_warps=4,
        )  # fmt: skip
        return out


def empty_outputs(labels: Tensor, argmax: bool, entropy: bool) -> Outputs:
    """Result buffers, of size 0 where not asked for: logprob, lse, argmax, entropy, max logit."""

    def make(on: bool, dtype: torch.dtype = torch.float32) -> Tensor:
        return labels.new_empty(len(labels) if on else 0, dtype=dtype)

    return make(True), make(True), make(argmax, torch.int64), make(entropy), make(True)


def empty_vocabulary(labels: Tensor, argmax: bool, entropy: bool) -> Outputs:
    """Results of a shard without a column, which are those of T = 0 too."""
    out = empty_outputs(labels, argmax, entropy)
    for x, value in zip(out, (float("-inf"), float("-inf"), -1, 0.0, float("-inf"))):
        x.fill_(value)
    return out
