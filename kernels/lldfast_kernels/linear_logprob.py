"""Token log-likelihoods from hidden states and the head, with no [T, V] tensor: logprob_t = z_t[y_t] - logsumexp(z_t).

    z = softcap(logit_scale * (H W^T + bias)),  over the first `vocab` rows of W

hidden H [T, d] and weight W [V, d] in one dtype (bf16, fp16, fp32), labels [T] (one outside [0, vocab) is another shard's:
logprob -inf), bias [V] -> logprob, lse, entropy, max_logit [T] fp32, argmax [T] int64. Rows of W behind vocab are never read.

Numerics. Products accumulate in fp32; fp32 inputs are multiplied in full ("ieee", no TF32). z_y is read from the same accumulator
tile as the maximum and the sum, so logprob = (z_y - m) - log s is never above 0. The vocabulary is cut into splits, whose size
and tiles depend on V and d alone, and partial results [splits, T] are combined in a fixed order: a token's value depends neither
on T nor on its neighbours.

Two kernels for the forward: one with pointers, for any device and any row strides; and for 16-bit inputs on Hopper and later one
with tensor descriptors (TMA), persistent, where base and row stride are multiples of 16 bytes. Both walk the row tiles in groups,
so that what runs at one time shares the hidden states of few rows and few parts of W in the L2 cache.

The backward computes the logits again in chunks of rows and leaves the two products dH = dz W and dW += dz^T H to cuBLAS.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Arguments of a kernel have no Python type.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

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


@triton.jit
def _tile_of(pid, row_tiles, splits, GROUP_T: tl.constexpr):
    """Row tile and split of a program: groups of GROUP_T row tiles; within a group all row tiles of one split, then the next."""
    group = pid // (GROUP_T * splits)
    first = group * GROUP_T
    size = tl.minimum(row_tiles - first, GROUP_T)
    within = pid % (GROUP_T * splits)
    return first + within % size, within // size


@triton.jit
def _score_tile(
    acc, v0, y, bias_ptr, vocab, softcap, scale, m, s, u, best, z_y,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, ARGMAX: tl.constexpr, ENTROPY: tl.constexpr, BLOCK_V: tl.constexpr,
    BRANCHES: tl.constexpr,
):  # fmt: skip
    """The running values of BLOCK_T tokens after one more tile of products acc [BLOCK_T, BLOCK_V], columns v0 on.

    s = sum e^(z - m), u = sum (z - m) e^(z - m). A tile of -inf leaves m at -inf and s at 0; a NaN stays in s. With BRANCHES, the
    mask of the ragged end and the search for labels, some five instructions an element, are left out in tiles without either.
    """
    col = v0 + tl.arange(0, BLOCK_V)
    b = acc
    if HAS_BIAS:
        b = tl.load(bias_ptr + tl.minimum(col, vocab - 1)).to(tl.float32)[None, :]
    z = transform(acc, b, softcap, scale, HAS_BIAS, SOFTCAP)
    if BRANCHES:
        if v0 + BLOCK_V > vocab:
            z = tl.where(col[None, :] < vocab, z, float("-inf"))
        here = (y >= v0) & (y < v0 + BLOCK_V)
        if tl.max(here.to(tl.int32), 0) > 0:
            z_y = tl.maximum(z_y, tl.max(tl.where(col[None, :] == y[:, None], z, float("-inf")), 1))
    else:
        z = tl.where(col[None, :] < vocab, z, float("-inf"))
        z_y = tl.maximum(z_y, tl.max(tl.where(col[None, :] == y[:, None], z, float("-inf")), 1))
    top = tl.max(z, 1)
    if ARGMAX:
        first = tl.min(tl.where(z == top[:, None], col[None, :], INT_MAX), 1)
        best = tl.where(top > m, first, best)
    m_new = tl.maximum(m, top)
    base = tl.where(m_new == float("-inf"), 0.0, m_new)
    d = z - base[:, None]
    e = tl.exp2(d * LOG2E)
    fade = tl.exp2((m - base) * LOG2E)
    if ENTROPY:
        u = tl.where(fade > 0, (u + (m - base) * s) * fade, 0.0) + tl.sum(tl.where(e > 0, e * d, 0.0), 1)
    s = s * fade + tl.sum(e, 1)
    return m_new, s, u, best, z_y


@triton.jit
def _store_partials(
    m_ptr, s_ptr, u_ptr, best_ptr, zy_ptr, split_id, t, T, m, s, u, best, z_y, ARGMAX: tl.constexpr, ENTROPY: tl.constexpr
):
    at = split_id.to(tl.int64) * T + t
    on = t < T
    tl.store(m_ptr + at, m, mask=on)
    tl.store(s_ptr + at, s, mask=on)
    tl.store(zy_ptr + at, z_y, mask=on)
    if ENTROPY:
        tl.store(u_ptr + at, u, mask=on)
    if ARGMAX:
        tl.store(best_ptr + at, best, mask=on)


@triton.jit
def _product(h_ptrs, w_ptrs, D, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr):
    """H W^T of one tile, through pointers [BLOCK_T, BLOCK_D] and [BLOCK_V, BLOCK_D]; only the width can need a mask."""
    acc = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
    offs_d = tl.arange(0, BLOCK_D)
    for d0 in range(0, D, BLOCK_D):
        if EVEN_D:
            a = tl.load(h_ptrs + d0)
            w = tl.load(w_ptrs + d0)
        else:
            a = tl.load(h_ptrs + d0, mask=offs_d[None, :] < D - d0, other=0.0)
            w = tl.load(w_ptrs + d0, mask=offs_d[None, :] < D - d0, other=0.0)
        acc = tl.dot(a, tl.trans(w), acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["T", "vocab", "row_tiles", "splits", "split"])
def linear_logprob_fwd_kernel(
    h_ptr, w_ptr, bias_ptr, label_ptr, m_ptr, s_ptr, u_ptr, best_ptr, zy_ptr,
    T, vocab, D, row_tiles, splits, split, stride_ht, stride_wv, softcap, scale,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, ARGMAX: tl.constexpr, ENTROPY: tl.constexpr, EVEN_D: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP_T: tl.constexpr,
):  # fmt: skip
    """Partials of one row tile and one split, by pointers."""
    row_tile, split_id = _tile_of(tl.program_id(0), row_tiles, splits, GROUP_T)
    t = row_tile * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_d = tl.arange(0, BLOCK_D)
    # Behind the ends the last row is read once more instead of a masked one: no mask narrows a load, no padding is touched.
    t_read = tl.minimum(t, T - 1)
    h_ptrs = h_ptr + t_read.to(tl.int64)[:, None] * stride_ht + offs_d[None, :]
    y = local_label(tl.load(label_ptr + t_read), vocab)
    m = tl.full([BLOCK_T], float("-inf"), tl.float32)
    s = tl.zeros([BLOCK_T], tl.float32)
    u = tl.zeros([BLOCK_T], tl.float32)
    best = tl.zeros([BLOCK_T], tl.int32)
    z_y = tl.full([BLOCK_T], float("-inf"), tl.float32)
    for v0 in range(split_id * split, tl.minimum(split_id * split + split, vocab), BLOCK_V):
        v_read = tl.minimum(v0 + tl.arange(0, BLOCK_V), vocab - 1)
        w_ptrs = w_ptr + v_read.to(tl.int64)[:, None] * stride_wv + offs_d[None, :]
        acc = _product(h_ptrs, w_ptrs, D, BLOCK_T, BLOCK_V, BLOCK_D, EVEN_D)
        m, s, u, best, z_y = _score_tile(
            acc, v0, y, bias_ptr, vocab, softcap, scale, m, s, u, best, z_y, HAS_BIAS, SOFTCAP, ARGMAX, ENTROPY, BLOCK_V, True
        )
    _store_partials(m_ptr, s_ptr, u_ptr, best_ptr, zy_ptr, split_id, t, T, m, s, u, best, z_y, ARGMAX, ENTROPY)


@triton.jit(do_not_specialize=["T", "vocab", "row_tiles", "splits", "split"])
def linear_logprob_fwd_tma_kernel(
    h_desc, w_desc, bias_ptr, label_ptr, m_ptr, s_ptr, u_ptr, best_ptr, zy_ptr,
    T, vocab, D, row_tiles, splits, split, softcap, scale,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, ARGMAX: tl.constexpr, ENTROPY: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP_T: tl.constexpr, SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """As above, with tiles brought by the bulk copy engine, and persistent: each program takes every so many-th piece of work.

    Descriptors of H [T, d] and W [vocab, d] fill zeros behind their ends; columns behind vocab are masked as above. SPECIALIZE
    asks for warps that only load, which then run on through the exponentials. On sm_90 Triton 3.6 ignores the wish, in silence,
    where the loops hold a branch with tensors in it; hence the epilogue without branches.
    """
    for pid in tl.range(tl.program_id(0), row_tiles * splits, tl.num_programs(0)):
        row_tile, split_id = _tile_of(pid, row_tiles, splits, GROUP_T)
        t = row_tile * BLOCK_T + tl.arange(0, BLOCK_T)
        y = local_label(tl.load(label_ptr + tl.minimum(t, T - 1)), vocab)
        m = tl.full([BLOCK_T], float("-inf"), tl.float32)
        s = tl.zeros([BLOCK_T], tl.float32)
        u = tl.zeros([BLOCK_T], tl.float32)
        best = tl.zeros([BLOCK_T], tl.int32)
        z_y = tl.full([BLOCK_T], float("-inf"), tl.float32)
        for v0 in tl.range(split_id * split, tl.minimum(split_id * split + split, vocab), BLOCK_V):
            acc = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
            for d0 in tl.range(0, D, BLOCK_D, warp_specialize=SPECIALIZE):
                a = h_desc.load([row_tile * BLOCK_T, d0])
                w = w_desc.load([v0, d0])
                acc = tl.dot(a, tl.trans(w), acc, input_precision="ieee")
            m, s, u, best, z_y = _score_tile(
                acc, v0, y, bias_ptr, vocab, softcap, scale, m, s, u, best, z_y, HAS_BIAS, SOFTCAP, ARGMAX, ENTROPY, BLOCK_V,
                not SPECIALIZE,
            )  # fmt: skip
        _store_partials(m_ptr, s_ptr, u_ptr, best_ptr, zy_ptr, split_id, t, T, m, s, u, best, z_y, ARGMAX, ENTROPY)


@triton.jit(do_not_specialize=["T", "vocab", "row_tiles"])
def linear_logprob_dz_kernel(
    h_ptr, w_ptr, bias_ptr, label_ptr, lse_ptr, g_ptr, gh_ptr, out_ptr, part_ptr,
    T, vocab, D, row_tiles, stride_ht, stride_wv, stride_ot, softcap, scale,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, COLUMN_SUMS: tl.constexpr, EVEN_D: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP_T: tl.constexpr,
):  # fmt: skip
    """One tile of dz, in out's dtype; on request its fp32 column sums too, part [row_tiles, vocab], for the bias."""
    row_tile, v_tile = _tile_of(tl.program_id(0), row_tiles, tl.cdiv(vocab, BLOCK_V), GROUP_T)
    t = row_tile * BLOCK_T + tl.arange(0, BLOCK_T)
    col = v_tile * BLOCK_V + tl.arange(0, BLOCK_V)
    t_read = tl.minimum(t, T - 1)
    v_read = tl.minimum(col, vocab - 1)
    offs_d = tl.arange(0, BLOCK_D)
    h_ptrs = h_ptr + t_read.to(tl.int64)[:, None] * stride_ht + offs_d[None, :]
    w_ptrs = w_ptr + v_read.to(tl.int64)[:, None] * stride_wv + offs_d[None, :]
    acc = _product(h_ptrs, w_ptrs, D, BLOCK_T, BLOCK_V, BLOCK_D, EVEN_D)
    b = acc
    if HAS_BIAS:
        b = tl.load(bias_ptr + v_read).to(tl.float32)[None, :]
    z = transform(acc, b, softcap, scale, HAS_BIAS, SOFTCAP)
    y = local_label(tl.load(label_ptr + t_read), vocab)
    lse = tl.load(lse_ptr + t_read)
    g = tl.load(g_ptr + t_read)
    gh = tl.load(gh_ptr + t_read)
    dz = logit_grad(z, col[None, :] == y[:, None], lse[:, None], g[:, None], gh[:, None], softcap, scale, SOFTCAP)
    out_ptrs = out_ptr + t.to(tl.int64)[:, None] * stride_ot + col[None, :]
    out = dz.to(out_ptr.dtype.element_ty)
    if v_tile * BLOCK_V + BLOCK_V <= vocab:
        tl.store(out_ptrs, out, mask=t[:, None] < T)
    else:
        tl.store(out_ptrs, out, mask=(t[:, None] < T) & (col[None, :] < vocab))
    if COLUMN_SUMS:
        sums = tl.sum(tl.where(t[:, None] < T, dz, 0.0), 0)
        tl.store(part_ptr + row_tile.to(tl.int64) * vocab + col, sums, mask=col < vocab)


def _inputs(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, vocab: int | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, int]:
    """Checked inputs with column stride 1, and the number of real rows of weight."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden must be [T, d] and weight [V, d], not {tuple(hidden.shape)} and {tuple(weight.shape)}")
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden and weight must have one dtype, not {hidden.dtype} and {weight.dtype}")
    vocab = check({"hidden": hidden, "weight": weight, "bias": bias}, labels, len(hidden), len(weight), vocab)
    hidden, weight = (x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous() for x in (hidden, weight))
    return hidden, weight, None if bias is None else bias.contiguous(), labels.contiguous(), vocab


def _tile(hidden: Tensor) -> tuning.Tile:
    return tuning.tile("linear_logprob", capability(hidden), hidden.dtype, hidden.shape[1])


def has_tma_path(hidden: Tensor, weight: Tensor) -> bool:
    """Whether tensor descriptors can take these: a device that has them, rows of whole 16 bytes, 16-bit numbers."""
    device = capability(hidden)
    return (device is None or device[0] in (9, 10)) and all(
        x.itemsize == 2 and x.data_ptr() % 16 == 0 and x.stride(0) * x.itemsize % 16 == 0 and x.stride(0) >= x.shape[1] > 0
        for x in (hidden, weight)
    )


def _slots(x: Tensor, per_sm: int) -> int:
    """Programs of a persistent kernel; two under the interpreter, so that each has more than one piece of work."""
    return per_sm * torch.cuda.get_device_properties(x.device).multi_processor_count if x.device.type == "cuda" else 2


def linear_logprob_fwd(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab: int | None = None,
    argmax: bool = False,
    entropy: bool = False,
    tma: bool | None = None,
) -> Outputs:
    """(logprob, lse, argmax, entropy, max_logit), each [T], of size 0 where not asked for.

    No row of W (vocab = 0): lse, logprob and max -inf, argmax -1, entropy 0. `tma` chooses the path; None: descriptors where
    they can be used, except under the interpreter.

    Raises:
        ValueError: a shape, dtype or device does not fit, or tma=True where there is no such path.
    """
    hidden, weight, bias, labels, vocab = _inputs(hidden, weight, labels, bias, vocab)
    if tma and not has_tma_path(hidden, weight):
        raise ValueError("tma=True, but the device, dtype or alignment of hidden and weight rules tensor descriptors out")
    tokens, width = hidden.shape
    if tokens == 0 or vocab == 0:
        return empty_vocabulary(labels, argmax, entropy)
    if tma is None:
        tma = hidden.device.type == "cuda" and has_tma_path(hidden, weight)
    tile = _tile(hidden)
    splits, row_tiles = triton.cdiv(vocab, tile.split), triton.cdiv(tokens, tile.BLOCK_T)
    partials = Partials(labels, splits, argmax, entropy)
    flags = {"HAS_BIAS": bias is not None, "SOFTCAP": softcap is not None, "ARGMAX": argmax, "ENTROPY": entropy}
    blocks = {"BLOCK_T": tile.BLOCK_T, "BLOCK_V": tile.BLOCK_V, "BLOCK_D": tile.BLOCK_D, "GROUP_T": tuning.GROUP_T}
    sizes, numbers = (tokens, vocab, width, row_tiles, splits, tile.split), (float(softcap or 1.0), float(logit_scale))
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    with on_device(hidden):
        if tma:
            h_desc = TensorDescriptor(hidden, [tokens, width], [hidden.stride(0), 1], [tile.BLOCK_T, tile.BLOCK_D])
            w_desc = TensorDescriptor(weight, [vocab, width], [weight.stride(0), 1], [tile.BLOCK_V, tile.BLOCK_D])
            linear_logprob_fwd_tma_kernel[(min(row_tiles * splits, _slots(hidden, tile.per_sm)),)](
                h_desc, w_desc, bias, labels, *partials.buffers, *sizes, *numbers,
                **flags, **blocks, SPECIALIZE=tile.specialize, maxnreg=tile.max_registers, **options,
            )  # fmt: skip
        else:
            linear_logprob_fwd_kernel[(row_tiles * splits,)](
                hidden, weight, bias, labels, *partials.buffers, *sizes, hidden.stride(0), weight.stride(0), *numbers,
                EVEN_D=width % tile.BLOCK_D == 0, **flags, **blocks, **options,
            )  # fmt: skip
        return partials.combine(vocab)


def _dz(
    hidden: Tensor, weight: Tensor, labels: Tensor, lse: Tensor, g: Tensor, h: Tensor, bias: Tensor | None, softcap: float | None,
    logit_scale: float, vocab: int, out: Tensor, d_bias: Tensor | None,
) -> None:  # fmt: skip
    """dz of checked inputs into out; adds its column sums to d_bias."""
    tokens, width = hidden.shape
    tile = _tile(hidden)
    row_tiles = triton.cdiv(tokens, tile.BLOCK_T)
    parts = hidden.new_empty((row_tiles, vocab) if d_bias is not None else (0,), dtype=torch.float32)
    with on_device(hidden):
        linear_logprob_dz_kernel[(row_tiles * triton.cdiv(vocab, tile.BLOCK_V),)](
            hidden, weight, bias, labels, lse, g, h, out, parts,
            tokens, vocab, width, row_tiles, hidden.stride(0), weight.stride(0), out.stride(0),
            float(softcap or 1.0), float(logit_scale),
            HAS_BIAS=bias is not None, SOFTCAP=softcap is not None, COLUMN_SUMS=d_bias is not None,
            EVEN_D=width % tile.BLOCK_D == 0, BLOCK_T=tile.BLOCK_T, BLOCK_V=tile.BLOCK_V, BLOCK_D=tile.BLOCK_D,
            GROUP_T=tuning.GROUP_T, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        if d_bias is not None:
            column_sum_kernel[(triton.cdiv(vocab, 1024),)](parts, d_bias, row_tiles, vocab, ADD=True, BLOCK_V=1024)


def linear_logprob_dz(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    lse: Tensor,
    g: Tensor,
    h: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab: int | None = None,
    out: Tensor,
) -> Tensor:
    """Gradient of sum(g logprob + h lse) by H W^T, for these rows: fills and returns out [R, vocab], in out's dtype.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    hidden, weight, bias, labels, vocab = _inputs(hidden, weight, labels, bias, vocab)
    lse, g, h = (per_token(name, x, labels) for name, x in (("lse", lse), ("g", g), ("h", h)))
    if tuple(out.shape) != (len(hidden), vocab) or out.device != hidden.device or (vocab > 1 and out.stride(1) != 1):
        raise ValueError(f"out must be [{len(hidden)}, {vocab}] with column stride 1, not {tuple(out.shape)} {out.stride()}")
    if len(hidden) and vocab:
        _dz(hidden, weight, labels, lse, g, h, bias, softcap, logit_scale, vocab, out, None)
    return out


def _mm(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """out (+)= a b with out in fp32. On a CPU (interpreter) no 16-bit product has an fp32 result, so the inputs are widened."""
    if a.dtype == torch.float32 or a.device.type != "cuda":
        a, b = a.float(), b.float()
        torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    elif add:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)


def linear_logprob_bwd(
    g: Tensor,
    h: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    lse: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab: int | None = None,
    need_hidden: bool = True,
    need_weight: bool = True,
    need_bias: bool = False,
    chunk_bytes: int = 256 << 20,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of sum(g logprob + h lse) in fp32: by hidden [T, d], weight [V, d] (0 behind vocab) and bias [V].

    Size 0 where not needed. dz is rounded to the dtype of 16-bit inputs before the products, as a layer in that dtype would have
    it; the bias gradient sums it in fp32. `chunk_bytes` bounds the buffer of dz; the chunks follow each other, so the result is
    the same bits at every call.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    hidden, weight, bias, labels, vocab = _inputs(hidden, weight, labels, bias, vocab)
    lse, g, h = (per_token(name, x, labels) for name, x in (("lse", lse), ("g", g), ("h", h)))
    tokens = len(hidden)
    dh = hidden.new_zeros(hidden.shape if need_hidden else (0,), dtype=torch.float32)
    dw = hidden.new_zeros(weight.shape if need_weight else (0,), dtype=torch.float32)
    db = hidden.new_zeros(len(weight) if need_bias else 0, dtype=torch.float32)
    if tokens == 0 or vocab == 0 or not (need_hidden or need_weight or need_bias):
        return dh, dw, db
    tile_rows = _tile(hidden).BLOCK_T
    rows = max(chunk_bytes // (vocab * hidden.itemsize) // tile_rows, 1) * tile_rows
    # Rows of dz of whole 16 bytes: cuBLAS is slow on others, and so are the stores.
    buffer = hidden.new_empty((min(rows, tokens), -(-vocab // 8) * 8))
    for start in range(0, tokens, rows):
        at = slice(start, min(start + rows, tokens))
        x, dz = hidden[at], buffer[: at.stop - start, :vocab]
        _dz(x, weight, labels[at], lse[at], g[at], h[at], bias, softcap, logit_scale, vocab, dz, db if need_bias else None)
        if need_hidden:
            _mm(dz, weight[:vocab], dh[at])
        if need_weight:
            _mm(dz.T, x, dw[:vocab], add=start > 0)
    return dh, dw, db
