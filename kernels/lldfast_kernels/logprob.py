"""Token log-likelihoods from given logits, one read of them: logprob_t = z_t[y_t] - logsumexp(z_t).

    z = softcap(logit_scale * (x + bias)),  softcap(a) = c tanh(a / c),  over the first `vocab` columns of x

logits x [T, V] (bf16, fp16, fp32), labels [T] (int32, int64; one outside [0, vocab) is another shard's: logprob -inf), bias [V]
-> logprob, lse, entropy, max_logit [T] fp32, argmax [T] int64 (lowest of a tie; without meaning in a row that holds a NaN).

Numerics. All in fp32, exponentials relative to the maximum, so that s >= 1, logprob = (z_y - m) - log s <= 0 to the last bit.
Lane q of a program runs an online softmax of its own over the columns that are congruent to q modulo BLOCK_V; lanes meet only at
the end of the split, in a sum of 64-bit integers, which has no order. That allows 16-byte loads also where V is odd: a row that
starts r elements behind a 16-byte boundary is read from that boundary on, which turns the lanes by r and changes no bit. The
splits depend on V alone. So a token's value depends on its logits and V: not on T, its place among the rows, or the strides.

The partial results [splits, T] of a row's splits are combined in a fixed order (common.py).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Arguments of a kernel have no Python type.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lldfast_kernels import tuning
from lldfast_kernels.common import (
    INT_MAX,
    LOG2E,
    Outputs,
    Partials,
    capability,
    check,
    column_sum_kernel,
    empty_vocabulary,
    local_label,
    logit_grad,
    on_device,
    per_token,
    transform,
)

# A lane's maximum before its first logit. Not -inf: inf - inf is NaN; and finfo.min, a usual mask value, must still count.
LOWEST = tl.constexpr(-3.4028234663852886e38)
# Fixed point of the sum over lanes: a split's sum is below 2^22, and what 2^-40 cuts off is nothing beside a sum of at least 1.
FIXED = tl.constexpr(float(2**40))


@triton.jit
def _lane_step(z, col, m, s, u, best, ARGMAX: tl.constexpr, ENTROPY: tl.constexpr):
    """One more logit per lane, with one exponential: e^-|z - m| scales the old sum down or is the new term.

    s = sum e^(z - m), u = sum (z - m) e^(z - m). z = -inf changes nothing; a NaN stays in s. Where e is 0, d may be infinite.
    """
    d = z - m
    up = d > 0
    e = tl.exp2(tl.abs(d) * -LOG2E)
    if ENTROPY:
        u = tl.where(e > 0, tl.where(up, (u - d * s) * e, u + e * d), tl.where(up, 0.0, u))
    s = tl.where(up, s * e + 1.0, s + e)
    if ARGMAX:
        best = tl.where(up, col, best)
    return tl.where(up, z, m), s, u, best


@triton.jit
def _tile_step(
    x, col, real, bias_ptr, softcap, scale, m, s, u, best,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, ARGMAX: tl.constexpr, ENTROPY: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One more tile of raw logits; where MASKED, only those that are `real` count."""
    x = x.to(tl.float32)
    b = x
    if HAS_BIAS:
        if MASKED:
            b = tl.load(bias_ptr + col, mask=real, other=0.0).to(tl.float32)
        else:
            b = tl.load(bias_ptr + col).to(tl.float32)
    z = transform(x, b, softcap, scale, HAS_BIAS, SOFTCAP)
    if MASKED:
        z = tl.where(real, z, float("-inf"))
    return _lane_step(z, col, m, s, u, best, ARGMAX, ENTROPY)


@triton.jit
def _exact_sum(x):
    """Sum of finite fp32 values, the same bits in whatever order: in fixed point."""
    return tl.sum((x * FIXED).to(tl.int64), 0).to(tl.float32) * (1.0 / FIXED)


@triton.jit(do_not_specialize=["T", "vocab", "splits", "split", "lead"])
def logprob_fwd_kernel(
    x_ptr, bias_ptr, label_ptr, m_ptr, s_ptr, u_ptr, best_ptr, zy_ptr,
    T, vocab, splits, split, lead, stride_xt, softcap, scale,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, ARGMAX: tl.constexpr, ENTROPY: tl.constexpr,
    BLOCK_V: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Partial m, s, u, best, z_y of one row and split. x_ptr is 16-byte aligned and row 0 starts `lead` elements behind it."""
    row = tl.program_id(0) // splits
    part = tl.program_id(0) % splits
    lo = part * split
    hi = tl.minimum(lo + split, vocab)
    row_start = lead + row.to(tl.int64) * stride_xt
    start = (row_start + lo) // VEC * VEC  # VEC elements are 16 bytes: the compiler sees that the address is a multiple of them
    r = (row_start + lo - start).to(tl.int32)
    x_ptrs = x_ptr + start + tl.arange(0, BLOCK_V)
    lane = tl.arange(0, BLOCK_V)
    col = lo - r + lane
    n = hi - lo + r
    full = n // BLOCK_V

    m = tl.full([BLOCK_V], LOWEST, tl.float32)
    s = tl.zeros([BLOCK_V], tl.float32)
    u = tl.zeros([BLOCK_V], tl.float32)
    best = tl.full([BLOCK_V], INT_MAX, tl.int32)
    real = lane >= r
    if full > 0:
        # The first r elements belong to another row or split. They are in memory, since x_ptr is aligned, and a mask would narrow
        # the load: so they are read and thrown away.
        x0 = tl.load(x_ptrs)
        m, s, u, best = _tile_step(
            x0, col, real, bias_ptr, softcap, scale, m, s, u, best, HAS_BIAS, SOFTCAP, ARGMAX, ENTROPY, True
        )
    # Four tiles at a time, written out, so that loads can start before they are needed. To carry loads from one turn of a loop to
    # the next is no way: Triton 3.6 takes 16-bit vectors apart for that, which doubles the instructions of an element.
    quads = tl.maximum(full - 1, 0) // 4
    for i in range(quads):
        at = BLOCK_V * (1 + 4 * i)
        c = col + at
        x0 = tl.load(x_ptrs + at)
        x1 = tl.load(x_ptrs + at + BLOCK_V)
        x2 = tl.load(x_ptrs + at + 2 * BLOCK_V)
        x3 = tl.load(x_ptrs + at + 3 * BLOCK_V)
        m, s, u, best = _tile_step(
            x0, c, real, bias_ptr, softcap, scale, m, s, u, best, HAS_BIAS, SOFTCAP, ARGMAX, ENTROPY, False
        )
        m, s, u, best = _tile_step(
            x1, c + BLOCK_V, real, bias_ptr, softcap, scale, m, s, u, best, HAS_BIAS, SOFTCAP, ARGMAX, ENTROPY, False
        )
        m, s, u, best = _tile_step(
            x2, c + 2 * BLOCK_V, real, bias_ptr, softcap, scale, m, s, u, best, HAS_BIAS, SOFTCAP, ARGMAX, ENTROPY, False
        )
        m, s, u, best = _tile_step(
            x3, c + 3 * BLOCK_V, real, bias_ptr, softcap, scale, m, s, u, best, HAS_BIAS, SOFTCAP, ARGMAX, ENTROPY, False
        )
    for i in range(tl.minimum(1 + 4 * quads, full), full):
        x0 = tl.load(x_ptrs + BLOCK_V * i)
        m, s, u, best = _tile_step(
            x0, col + BLOCK_V * i, real, bias_ptr, softcap, scale, m, s, u, best, HAS_BIAS, SOFTCAP, ARGMAX, ENTROPY, False
        )
    if full * BLOCK_V < n:  # the ragged end, which alone needs a masked load
        at = full * BLOCK_V + lane
        real = (at >= r) & (at < n)
        x0 = tl.load(x_ptrs + full * BLOCK_V, mask=real, other=0.0)
        m, s, u, best = _tile_step(
            x0, col + full * BLOCK_V, real, bias_ptr, softcap, scale, m, s, u, best, HAS_BIAS, SOFTCAP, ARGMAX, ENTROPY, True
        )

    out = part.to(tl.int64) * T + row
    top = tl.max(m, 0)
    e = tl.exp2((m - top) * LOG2E)
    if ENTROPY:
        u = tl.where(e > 0, (u + (m - top) * s) * e, 0.0)
        tl.store(u_ptr + out, _exact_sum(tl.where(u == u, u, 0.0)))
    s = s * e
    broken = tl.max((s != s).to(tl.int32), 0)  # an integer cannot carry a NaN
    total = tl.where(broken > 0, float("nan"), _exact_sum(tl.where(s == s, s, 0.0)))
    tl.store(s_ptr + out, total)
    tl.store(m_ptr + out, tl.where(total == 0, float("-inf"), top))
    if ARGMAX:
        first = tl.min(tl.where(m == top, best, INT_MAX), 0)
        tl.store(best_ptr + out, tl.where(first == INT_MAX, lo, first))  # nothing but -inf: all tie, the lowest wins
    y = tl.load(label_ptr + row).to(tl.int64)
    mine = (y >= lo) & (y < hi)
    x_y = tl.load(x_ptr + row_start + y, mask=mine, other=0.0).to(tl.float32)
    b_y = x_y
    if HAS_BIAS:
        b_y = tl.load(bias_ptr + y, mask=mine, other=0.0).to(tl.float32)
    tl.store(zy_ptr + out, tl.where(mine, transform(x_y, b_y, softcap, scale, HAS_BIAS, SOFTCAP), float("-inf")))


@triton.jit(do_not_specialize=["V", "vocab", "parts", "split", "lead_x", "lead_o"])
def logprob_bwd_kernel(
    x_ptr, out_ptr, bias_ptr, label_ptr, lse_ptr, g_ptr, h_ptr,
    V, vocab, parts, split, lead_x, lead_o, stride_xt, stride_ot, softcap, scale,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, SAME: tl.constexpr, BLOCK_V: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Gradient of one row and one part of its V columns, 0 behind vocab; every element is read before it is written.

    Tiles start at 16-byte boundaries of the output; SAME says that those of the input then do too, as in place.
    """
    row = tl.program_id(0) // parts
    lo = tl.program_id(0) % parts * split
    hi = tl.minimum(lo + split, V)
    out_row = lead_o + row.to(tl.int64) * stride_ot + lo
    out_start = out_row // VEC * VEC
    r = (out_row - out_start).to(tl.int32)
    x_start = lead_x + row.to(tl.int64) * stride_xt + lo - r
    if SAME:
        x_start = x_start // VEC * VEC  # changes nothing, but says so to the compiler
    lane = tl.arange(0, BLOCK_V)
    x_ptrs = x_ptr + x_start + lane
    out_ptrs = out_ptr + out_start + lane
    col = lo - r + lane
    lse = tl.load(lse_ptr + row)
    g = tl.load(g_ptr + row)
    h = tl.load(h_ptr + row)
    y = local_label(tl.load(label_ptr + row), vocab)
    end = tl.minimum(hi, vocab) - lo + r
    whole = end // BLOCK_V
    b = tl.zeros([BLOCK_V], tl.float32)
    for i in range(tl.where(r > 0, 1, 0), whole):
        c = col + i * BLOCK_V
        x = tl.load(x_ptrs + i * BLOCK_V).to(tl.float32)
        if HAS_BIAS:
            b = tl.load(bias_ptr + c).to(tl.float32)
        z = transform(x, b, softcap, scale, HAS_BIAS, SOFTCAP)
        dz = logit_grad(z, c == y, lse, g, h, softcap, scale, SOFTCAP)
        tl.store(out_ptrs + i * BLOCK_V, dz.to(out_ptr.dtype.element_ty))
    # The ragged ends: the first tile of a row that starts between boundaries, the last real one, and the padding.
    tiles = tl.cdiv(hi - lo + r, BLOCK_V)
    for i in range(tiles):
        if (i == 0 and r > 0) or i >= whole:
            c = col + i * BLOCK_V
            real = (c >= lo) & (c < tl.minimum(hi, vocab))
            x = tl.load(x_ptrs + i * BLOCK_V, mask=real, other=0.0).to(tl.float32)
            if HAS_BIAS:
                b = tl.load(bias_ptr + c, mask=real, other=0.0).to(tl.float32)
            z = transform(x, b, softcap, scale, HAS_BIAS, SOFTCAP)
            dz = tl.where(real, logit_grad(z, c == y, lse, g, h, softcap, scale, SOFTCAP), 0.0)
            tl.store(out_ptrs + i * BLOCK_V, dz.to(out_ptr.dtype.element_ty), mask=(c >= lo) & (c < hi))


@triton.jit(do_not_specialize=["T", "V", "vocab"])
def logprob_bias_kernel(
    x_ptr, bias_ptr, label_ptr, lse_ptr, g_ptr, h_ptr, part_ptr,
    T, V, vocab, stride_xt, softcap, scale,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, ROWS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """First stage of the bias gradient: part [ceil(T / ROWS), V], the sum of the gradients of ROWS tokens, one after another."""
    col = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    group = tl.program_id(1)
    real = col < vocab
    b = tl.zeros([BLOCK_V], tl.float32)
    if HAS_BIAS:
        b = tl.load(bias_ptr + col, mask=real, other=0.0).to(tl.float32)
    acc = tl.zeros([BLOCK_V], tl.float32)
    for row in range(group * ROWS, tl.minimum(group * ROWS + ROWS, T)):
        x = tl.load(x_ptr + tl.cast(row, tl.int64) * stride_xt + col, mask=real, other=0.0).to(tl.float32)
        z = transform(x, b, softcap, scale, HAS_BIAS, SOFTCAP)
        y = local_label(tl.load(label_ptr + row), vocab)
        g = tl.load(g_ptr + row)
        h = tl.load(h_ptr + row)
        dz = logit_grad(z, col == y, tl.load(lse_ptr + row), g, h, softcap, scale, SOFTCAP)
        # Nothing is asked of an ignored token: 0 times its NaN, or times its e^z against no lse, must not enter the sum.
        acc += tl.where((g == 0) & (h == 0), 0.0, dz)
    tl.store(part_ptr + group.to(tl.int64) * V + col, tl.where(real, acc, 0.0), mask=col < V)


def even_splits(vocab: int, most: int) -> tuple[int, int]:
    """Number and size of the splits of a vocabulary: as even as 16-byte boundaries allow, none empty."""
    count = -(-vocab // most)
    size = -(-vocab // (count * 16)) * 16
    return -(-vocab // size), size


def _aligned(x: Tensor) -> tuple[Tensor, int, int]:
    """A 16-byte aligned start in x's memory, how many elements before x[0, 0] it lies, and elements per 16 bytes.

    Memory that is itself not aligned (no allocator of torch's gives such) is read element by element: (x, 0, 1).
    """
    vec = 16 // x.itemsize
    lead, odd = divmod(x.data_ptr() % 16, x.itemsize)
    if odd or lead > x.storage_offset():
        return x, 0, 1
    return (x.as_strided((1,), (1,), x.storage_offset() - lead) if lead else x), lead, vec


def _inputs(logits: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if logits.dim() != 2:
        raise ValueError(f"logits must be [T, V], not {tuple(logits.shape)}")
    if logits.stride(1) != 1 and logits.shape[1] > 1:
        logits = logits.contiguous()
    return logits, None if bias is None else bias.contiguous()


def logprob_fwd(
    logits: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab: int | None = None,
    argmax: bool = False,
    entropy: bool = False,
) -> Outputs:
    """(logprob, lse, argmax, entropy, max_logit), each [T], of size 0 where not asked for.

    No column (vocab = 0): lse, logprob and max -inf, argmax -1, entropy 0.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    logits, bias = _inputs(logits, bias)
    tokens, columns = logits.shape
    vocab = check({"logits": logits, "bias": bias}, labels, tokens, columns, vocab)
    if tokens == 0 or vocab == 0:
        return empty_vocabulary(labels, argmax, entropy)
    labels = labels.contiguous()
    tile = tuning.tile("logprob", capability(logits), logits.dtype)
    splits, split = even_splits(vocab, tile.split)
    partials = Partials(labels, splits, argmax, entropy)
    base, lead, vec = _aligned(logits)
    with on_device(logits):
        logprob_fwd_kernel[(tokens * splits,)](
            base, bias, labels, *partials.buffers,
            tokens, vocab, splits, split, lead, logits.stride(0), float(softcap or 1.0), float(logit_scale),
            HAS_BIAS=bias is not None, SOFTCAP=softcap is not None, ARGMAX=argmax, ENTROPY=entropy,
            BLOCK_V=tile.BLOCK_V, VEC=vec, num_warps=tile.num_warps,
        )  # fmt: skip
        return partials.combine(vocab)


def logprob_bwd(
    g: Tensor,
    h: Tensor,
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab: int | None = None,
    need_logits: bool = True,
    need_bias: bool = False,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of sum(g logprob + h lse): by the logits, in their dtype and 0 behind vocab, and by the bias, fp32 [V].

    Size 0 where not needed. `out` takes the first; it may be `logits`, which are then gone. A token with g = h = 0 adds nothing
    to the bias gradient, whatever its logits hold; a NaN among them stays in its row of the first.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    given = logits
    logits, bias = _inputs(logits, bias)
    tokens, columns = logits.shape
    vocab = check({"logits": logits, "bias": bias}, labels, tokens, columns, vocab)
    g, h, lse = (per_token(name, x, labels) for name, x in (("g", g), ("h", h), ("lse", lse)))
    labels = labels.contiguous()
    if out is None and need_logits:
        out = torch.empty((tokens, columns), dtype=logits.dtype, device=logits.device)
    elif out is None:
        out = logits.new_empty(0)
    elif out.shape != logits.shape or out.dtype != logits.dtype or out.device != logits.device:
        raise ValueError(f"out must be {logits.dtype} {tuple(logits.shape)} like logits, not {out.dtype} {tuple(out.shape)}")
    if need_logits and out.stride(1) != 1 and columns > 1:
        raise ValueError(f"out must have column stride 1, not {out.stride(1)}" + (": nor its logits" if out is given else ""))
    d_bias = logits.new_empty(columns if need_bias else 0, dtype=torch.float32)
    tile = tuning.tile("logprob", capability(logits), logits.dtype)
    options = (float(softcap or 1.0), float(logit_scale))
    flags = {"HAS_BIAS": bias is not None, "SOFTCAP": softcap is not None, "BLOCK_V": tile.BLOCK_V, "num_warps": tile.num_warps}
    with on_device(logits):
        if need_bias and columns:  # before the logits, which may be overwritten
            groups = -(-tokens // tuning.BIAS_ROWS)
            blocks = triton.cdiv(columns, tile.BLOCK_V)
            parts = logits.new_empty((groups, columns), dtype=torch.float32)
            if groups:
                logprob_bias_kernel[(blocks, groups)](
                    logits, bias, labels, lse, g, h, parts, tokens, columns, vocab, logits.stride(0), *options,
                    ROWS=tuning.BIAS_ROWS, **flags,
                )  # fmt: skip
            column_sum_kernel[(blocks,)](parts, d_bias, groups, columns, ADD=False, BLOCK_V=tile.BLOCK_V)
        if need_logits and tokens and columns:
            count, split = even_splits(columns, tile.split)
            base, lead, vec = _aligned(logits)
            out_base, out_lead, out_vec = _aligned(out)
            same = lead == out_lead and (logits.stride(0) - out.stride(0)) % vec == 0 and vec == out_vec
            logprob_bwd_kernel[(tokens * count,)](
                base, out_base, bias, labels, lse, g, h,
                columns, vocab, count, split, lead, out_lead, logits.stride(0), out.stride(0), *options,
                SAME=same, VEC=out_vec, **flags,
            )  # fmt: skip
    return out if need_logits else logits.new_empty(0), d_bias
