"""The signed XOR-fold: a vector of P numbers, or the gradient b^T a of a linear layer for each sample, to a sketch of k numbers.

    out[J L + i] += sum_c s(c, J, i) x[c k + src(c, J) L + (i xor r(c, J)) - offset],    x[p] = g[p] scale[p]

with L = min(k, 4096), T = k / L tiles a chunk; signs s, masks r and tile permutations src are made of Philox4x32-10 by

    a, b      (0, 2, c, c >> 32)          src(c, J) = ((a | 1) J + b) mod T
    r         (J, 1, c, c >> 32)          first word mod L
    s         (32 J + q, 0, c, c >> 32)   i = 128 row + lane, q = lane div 4: bit `row` of word lane mod 4; 1 is minus

(counters; the key is the seed, c the global index of a chunk). Sums have one order: the terms of a block of 32 chunks in fp32,
ascending from 0, then the blocks onto the fp64 `out`. So `sketch_fold` gives the bits of any implementation with this order.
|x|^2 and the inner products are fp64 sums in an order that depends on n, offset and k alone.

A program owns one tile of one block: nothing is shared, nothing needs an atomic, and a bucket gets its terms in order. Of several
blocks each leaves a partial sum, and a second pass adds these in order, some 32 MiB at a time; one block goes to `out` at once.
A tensor of fewer tiles than the sketch has must not cost O(k): then there is a program for each tile of the TENSOR, which finds
the bucket tile it goes to by inverting the permutation. A bucket tile that two chunks reach belongs to the program of the first.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Arguments of a kernel have no Python type.

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lldfast_kernels import tuning
from lldfast_kernels.common import FLOATS, INTERPRETED, on_device

TILE, LANES, BLOCK = 4096, 128, 32
CHUNKS = tl.constexpr(BLOCK)
MINUS = tl.constexpr(0x80000000)


@triton.jit
def philox_words(c0, c1, chunk, seed_lo, seed_hi):
    """The four words of counter (c0, c1, chunk), uint32 of c0's shape, for a 64-bit chunk number."""
    low = (chunk & 0xFFFFFFFF).to(tl.uint32)
    high = ((chunk >> 32) & 0xFFFFFFFF).to(tl.uint32)
    k0 = seed_lo.to(tl.uint32, bitcast=True)
    k1 = seed_hi.to(tl.uint32, bitcast=True)
    return tl.philox_impl(c0.to(tl.uint32), c1.to(tl.uint32), low, high, k0, k1, 10)


@triton.jit
def _permutation(chunk, seed_lo, seed_hi):
    """a, b of src = a J + b."""
    zero = (chunk & 0).to(tl.uint32)
    a, b, _, _ = philox_words(zero, zero + 2, chunk, seed_lo, seed_hi)
    return a | 1, b


@triton.jit
def _plan(
    p, n, offset, first_block, first_tile, tiles, seed_lo, seed_hi,
    SOURCE: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """What program p does: its block, bucket tile J, the block's chunks lo .. hi - 1 (numbered from 0) that it adds, whether it
    owns J, and for each of the 32 chunks the start of J's source tile, from the tensor's first entry (int64), and its mask.
    """
    size = ROWS * LANES
    first = offset // size
    last = (offset + n - 1) // size
    if SOURCE:
        block = first_block
        tile = first_tile + p
        mine = tile // tiles
        a, b = _permutation(mine, seed_lo, seed_hi)
        inverse = a  # Newton's iteration modulo 2^32: a is right to 3 bits, and each step doubles them
        for _ in tl.static_range(4):
            inverse = inverse * (2 - a * inverse)
        J = inverse * ((tile % tiles).to(tl.uint32) - b) & (tiles - 1).to(tl.uint32)
    else:
        block = first_block + p // tiles
        mine = block * CHUNKS
        J = (p % tiles).to(tl.uint32)
    i = tl.arange(0, CHUNKS)
    chunk = block * CHUNKS + i
    a, b = _permutation(chunk, seed_lo, seed_hi)
    source = (a * J + b) & (tiles - 1).to(tl.uint32)
    one = (i * 0 + 1).to(tl.uint32)
    r, _, _, _ = philox_words(one * J, one, chunk, seed_lo, seed_hi)
    r = (r & (size - 1)).to(tl.int32)
    at = chunk * tiles + source.to(tl.int64)
    lo = tl.maximum(first // tiles - block * CHUNKS, 0).to(tl.int32)
    hi = tl.minimum(last // tiles - block * CHUNKS + 1, CHUNKS).to(tl.int32)
    owner = True
    if SOURCE:
        owner = tl.min(tl.where((at >= first) & (at <= last), i, CHUNKS), 0) == (mine - block * CHUNKS).to(tl.int32)
        hi = tl.where(owner, hi, lo)
    return block, J, lo, hi, owner, at * size - offset, r


@triton.jit
def _pick(x, i):
    """Element i of a vector of 32."""
    return tl.sum(tl.where(tl.arange(0, CHUNKS) == i, x, 0), 0)


@triton.jit
def _signed(x, J, chunk, seed_lo, seed_hi, ROWS: tl.constexpr, LANES: tl.constexpr):
    """x [LANES, ROWS], fp32, with the signs of tile J. A thread that has a lane in all rows takes one call for them all."""
    lane = tl.arange(0, LANES)
    w0, w1, w2, w3 = philox_words(J * 32 + (lane // 4).to(tl.uint32), (lane * 0).to(tl.uint32), chunk, seed_lo, seed_hi)
    j = lane & 3
    word = tl.where(j == 0, w0, tl.where(j == 1, w1, tl.where(j == 2, w2, w3)))
    shift = (31 - tl.arange(0, ROWS)).to(tl.uint32)
    flip = (word[:, None] << shift[None, :]) & MINUS
    return (x.to(tl.uint32, bitcast=True) ^ flip).to(tl.float32, bitcast=True)


@triton.jit
def _read(ptr, start, at, n, SIZE: tl.constexpr, BRANCH: tl.constexpr):
    """Entries start + at of n, 0 outside, in fp32. Only the tensor's two ends need a masked load, but where two or more tensors
    are read, a branch makes the compiler run out of registers."""
    inside = False
    if BRANCH:
        inside = (start >= 0) & (start + SIZE <= n)
    if inside:
        x = tl.load(ptr + start + at).to(tl.float32)
    else:
        lo = tl.minimum(tl.maximum(-start, 0), SIZE).to(tl.int32)
        hi = tl.maximum(tl.minimum(n - start, SIZE), 0).to(tl.int32)
        x = tl.load(ptr + start + at, mask=(at >= lo) & (at < hi), other=0.0).to(tl.float32)
    return x


@triton.jit
def _write(
    sketch_ptr, partial_ptr, acc, sample, J, block, blocks, owner, tiles, place, PARTIAL: tl.constexpr, SIZE: tl.constexpr
):
    # Said not to be contiguous, or wide stores would give a thread two lanes and its rows to another warp, in all of the kernel.
    at = tl.max_contiguous(J.to(tl.int64) * SIZE + place, (1, 1))
    k = tl.cast(tiles, tl.int64) * SIZE
    if PARTIAL:
        tl.store(partial_ptr + (sample * blocks + block) * k + at, acc)
    else:
        old = tl.load(sketch_ptr + sample * k + at, mask=owner, other=0.0)
        tl.store(sketch_ptr + sample * k + at, old + acc.to(tl.float64), mask=owner)


_NUMBERS = [
    "n", "offset", "first_block", "first_tile", "tiles", "blocks", "programs", "sums_at", "sums_stride", "seed_lo", "seed_hi",
    "T", "width", "stride_an", "stride_at", "stride_bn", "stride_bt",
]  # fmt: skip


@triton.jit(do_not_specialize=_NUMBERS[:11])
def sketch_fold_kernel(
    x_ptr, scale_ptr, dot0_ptr, dot1_ptr, sketch_ptr, partial_ptr, sums_ptr,
    n, offset, first_block, first_tile, tiles, blocks, programs, sums_at, sums_stride, seed_lo, seed_hi,
    HAS_SCALE: tl.constexpr, DOTS: tl.constexpr, SOURCE: tl.constexpr, PARTIAL: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One bucket tile of a block: onto the sketch, or to partial [blocks, k]. Its |x|^2 and inner products go to sums."""
    SIZE: tl.constexpr = ROWS * LANES
    p = tl.program_id(0)
    n = tl.cast(n, tl.int64)
    offset = tl.cast(offset, tl.int64)
    first_block = tl.cast(first_block, tl.int64)
    block, J, lo, hi, owner, starts, masks = _plan(
        p, n, offset, first_block, tl.cast(first_tile, tl.int64), tiles, seed_lo, seed_hi, SOURCE, ROWS, LANES
    )
    place = tl.arange(0, LANES)[:, None] + tl.arange(0, ROWS)[None, :] * LANES
    acc = tl.zeros([LANES, ROWS], tl.float32)
    square = tl.zeros([LANES], tl.float64)
    dot0 = tl.zeros([LANES], tl.float64)
    dot1 = tl.zeros([LANES], tl.float64)
    for i in range(lo, hi):
        start = _pick(starts, i)
        at = place ^ _pick(masks, i)
        x = _read(x_ptr, start, at, n, SIZE, not HAS_SCALE and DOTS == 0)
        if DOTS > 0:
            dot0 += tl.sum(x.to(tl.float64) * _read(dot0_ptr, start, at, n, SIZE, False).to(tl.float64), 1)
        if DOTS > 1:
            dot1 += tl.sum(x.to(tl.float64) * _read(dot1_ptr, start, at, n, SIZE, False).to(tl.float64), 1)
        if HAS_SCALE:
            x = x * _read(scale_ptr, start, at, n, SIZE, False)
        value = _signed(x, J, block * CHUNKS + i, seed_lo, seed_hi, ROWS, LANES)
        acc += value
        wide = value.to(tl.float64)
        square += tl.sum(wide * wide, 1)
    _write(sketch_ptr, partial_ptr, acc, 0, J, block - first_block, blocks, owner, tiles, place, PARTIAL, SIZE)
    sums_ptr += tl.cast(sums_at, tl.int64) + p
    tl.store(sums_ptr, tl.sum(square, 0))
    if DOTS > 0:
        tl.store(sums_ptr + tl.cast(sums_stride, tl.int64), tl.sum(dot0, 0))
    if DOTS > 1:
        tl.store(sums_ptr + 2 * tl.cast(sums_stride, tl.int64), tl.sum(dot1, 0))


@triton.jit(do_not_specialize=_NUMBERS)
def sketch_outer_kernel(
    a_ptr, b_ptr, scale_ptr, sketch_ptr, partial_ptr, sums_ptr,
    n, offset, first_block, first_tile, tiles, blocks, programs, sums_at, sums_stride, seed_lo, seed_hi,
    T, width, stride_an, stride_at, stride_bn, stride_bt,
    HAS_SCALE: tl.constexpr, SOURCE: tl.constexpr, PARTIAL: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """As `sketch_fold_kernel` of W = b^T a, row-major [O, width], of a sample; partial [samples, blocks, k].

    4096 neighbouring entries of W lie in few of its rows, or in one: there is no product of matrices in them that tensor cores
    could take without computing most of it in vain. So every entry is its own sum over t, with the operands out of L1.
    """
    SIZE: tl.constexpr = ROWS * LANES
    p = tl.program_id(0) % programs
    sample = (tl.program_id(0) // programs).to(tl.int64)
    n = tl.cast(n, tl.int64)
    first_block = tl.cast(first_block, tl.int64)
    block, J, lo, hi, owner, starts, masks = _plan(
        p, n, tl.cast(offset, tl.int64), first_block, tl.cast(first_tile, tl.int64), tiles, seed_lo, seed_hi, SOURCE, ROWS, LANES
    )
    a_ptr += sample * stride_an
    b_ptr += sample * stride_bn
    place = tl.arange(0, LANES)[:, None] + tl.arange(0, ROWS)[None, :] * LANES
    acc = tl.zeros([LANES, ROWS], tl.float32)
    square = tl.zeros([LANES], tl.float64)
    for i in range(lo, hi):
        start = _pick(starts, i)
        at = place ^ _pick(masks, i)
        # Row and column of an entry, counted from the row of the tile's first: 32-bit divisions. Entries that are not there (the
        # whole tile, it may be) take the place of one that is, and become 0 below.
        begin = tl.minimum(tl.maximum(start, 0), n - 1)
        row = begin // width
        ahead = (begin - row * width).to(tl.int32)
        skipped = tl.minimum(begin - start, SIZE).to(tl.int32)
        real = (at >= skipped) & (at < tl.maximum(tl.minimum(n - start, SIZE), 0).to(tl.int32))
        e = tl.where(real, at - skipped + ahead, ahead)
        o = e // width
        column = e - o * width
        a_row = a_ptr
        b_row = b_ptr + row
        w = tl.zeros([LANES, ROWS], tl.float32)
        for _ in range(T):
            w += tl.load(b_row + o).to(tl.float32) * tl.load(a_row + column).to(tl.float32)
            a_row += stride_at
            b_row += stride_bt
        w = tl.where(real, w, 0.0)
        if HAS_SCALE:
            w = w * _read(scale_ptr, start, at, n, SIZE, False)
        value = _signed(w, J, block * CHUNKS + i, seed_lo, seed_hi, ROWS, LANES)
        acc += value
        wide = value.to(tl.float64)
        square += tl.sum(wide * wide, 1)
    _write(sketch_ptr, partial_ptr, acc, sample, J, block - first_block, blocks, owner, tiles, place, PARTIAL, SIZE)
    tl.store(sums_ptr + sample * sums_stride + sums_at + p, tl.sum(square, 0))


@triton.jit(do_not_specialize=["k", "blocks"])
def sketch_combine_kernel(partial_ptr, sketch_ptr, k, blocks, WIDTH: tl.constexpr, AHEAD: tl.constexpr):
    """sketch [N, k] += partial [N, blocks, k], one block after another; AHEAD loads are under way at a time."""
    k = tl.cast(k, tl.int64)
    at = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    sample = at // k
    from_ptr = partial_ptr + sample * (blocks - 1) * k + at
    total = tl.load(sketch_ptr + at)
    for _ in range(blocks // AHEAD):
        parts = ()
        for j in tl.static_range(AHEAD):
            parts = parts + (tl.load(from_ptr + j * k),)  # type: ignore[assignment]  # noqa: RUF005
        for j in tl.static_range(AHEAD):
            total += parts[j].to(tl.float64)
        from_ptr += AHEAD * k
    for _ in range(blocks % AHEAD):
        total += tl.load(from_ptr).to(tl.float64)
        from_ptr += k
    tl.store(sketch_ptr + at, total)


@triton.jit(do_not_specialize=["count"])
def sketch_sum_kernel(sums_ptr, total_ptr, count, WIDTH: tl.constexpr):
    """total [rows] of sums [rows, count], in an order that depends on count alone."""
    lane = tl.arange(0, WIDTH)
    row = tl.program_id(0).to(tl.int64) * count
    acc = tl.zeros([WIDTH], tl.float64)
    for i in range(0, count, WIDTH):
        acc += tl.load(sums_ptr + row + i + lane, mask=i + lane < count, other=0.0)
    tl.store(total_ptr + tl.program_id(0), tl.sum(acc, 0))


class Launch(NamedTuple):
    """Blocks first_block .. first_block + blocks - 1 of the flat space, by bucket tiles or by the tensor's from first_tile on."""

    first_block: int
    blocks: int
    first_tile: int
    programs: int
    by_source: bool


def launches(n: int, offset: int, k: int, most: int) -> list[Launch]:
    """How n entries at `offset` are cut into launches, of at most `most` blocks (and one at least)."""
    size = min(k, TILE)
    tiles = k // size
    first, last = offset // size, (offset + n - 1) // size
    per_block = BLOCK * tiles
    found = []
    block, end = first // per_block, last // per_block + 1
    if last - first + 1 < tiles:  # two chunks at most
        for b in range(block, end):
            lo, hi = max(first, b * per_block), min(last, (b + 1) * per_block - 1)
            found.append(Launch(b, 1, lo, hi - lo + 1, True))
        return found
    for b in range(block, end, most):
        blocks = min(most, end - b)
        found.append(Launch(b, blocks, 0, blocks * tiles, False))
    return found


def _run(
    kernel: Any, pointers: Sequence[Any], out: Tensor, samples: int, rows: int, n: int, offset: int, seed: int,
    extra: Sequence[int], warps: int, flags: dict[str, Any],
) -> Tensor:  # fmt: skip
    """Launch `kernel` for n entries of each of the samples, and the second passes; gives the sums, fp64 [samples * rows]."""
    k = out.numel() // samples
    size = min(k, TILE)
    plan = launches(n, offset, k, max(tuning.SKETCH_PARTIAL_BYTES // (4 * k * samples), 1))
    count = sum(launch.programs for launch in plan)
    sums = out.new_empty(samples * rows * count)
    blocks = max(launch.blocks for launch in plan)
    partials = out.new_empty(samples * k * blocks if blocks > 1 else 0, dtype=torch.float32)
    halves = [half - (half >> 31 << 32) for half in (seed & 0xFFFFFFFF, seed >> 32)]  # as int32
    lanes = min(size, LANES)
    warps = max(min(warps, size // 32), 1)
    at = 0
    with on_device(out):
        for launch in plan:
            partial = launch.blocks > 1
            kernel[(launch.programs * samples,)](
                *pointers, out, partials, sums, n, offset, launch.first_block, launch.first_tile, k // size, launch.blocks,
                launch.programs, at, count, *halves, *extra,
                SOURCE=launch.by_source, PARTIAL=partial, ROWS=size // lanes, LANES=lanes, num_warps=warps, **flags,
            )  # fmt: skip
            at += launch.programs
            if partial:
                width = min(k, tuning.SKETCH_COMBINE_WIDTH)
                sketch_combine_kernel[(samples * k // width,)](
                    partials, out, k, launch.blocks, WIDTH=width, AHEAD=tuning.SKETCH_COMBINE_AHEAD, num_warps=1
                )
        if count == 1:
            return sums
        total = out.new_empty(samples * rows)
        sketch_sum_kernel[(samples * rows,)](sums, total, count, WIDTH=256, num_warps=4)
    return total


def _check(out: Tensor, k: int, offset: int, tensors: dict[str, Tensor | None], sizes: dict[str, int]) -> None:
    if out.dtype != torch.float64 or not out.is_contiguous():
        raise ValueError(f"out must be contiguous float64, not {out.dtype} with strides {out.stride()}")
    if k < 1 or k & (k - 1):
        raise ValueError(f"a sketch of {k} numbers: must be a power of two")
    if offset < 0:
        raise ValueError(f"offset must be >= 0, not {offset}")
    for name, x in tensors.items():
        if x is None:
            continue
        if x.dtype not in (FLOATS if name not in sizes else (torch.float32,)):
            raise ValueError(f"{name} must not be {x.dtype}")
        if x.device != out.device:
            raise ValueError(f"{name} is on {x.device}, out on {out.device}")
        if name in sizes and (tuple(x.shape) != (sizes[name],) or not x.is_contiguous()):
            raise ValueError(f"{name} must be a contiguous vector of {sizes[name]} numbers, not {tuple(x.shape)}")
    if out.device.type != "cuda" and not INTERPRETED:
        raise ValueError(f"tensors are on {out.device}: kernels run on a CUDA device, or under TRITON_INTERPRET=1")


def sketch_fold(out: Tensor, g: Tensor, offset: int, seed: int, scale: Tensor | None, dots: Sequence[Tensor]) -> Tensor:
    """Fold g, entries offset .. offset + n - 1 of the flat space, into out, in place.

    out fp64 [k]; g fp32, bf16 or fp16 [n]; scale fp32 [n] or None: g * scale, rounded to fp32, is folded; 0 to 2 dots, fp32 [n].

    Returns:
        fp64 [1 + len(dots)]: |g * scale|^2, and <g, dots[i]> without scale.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    dots = list(dots)
    if out.dim() != 1 or g.dim() != 1 or not g.is_contiguous():
        raise ValueError(f"out and g must be vectors, g contiguous, not {tuple(out.shape)} and {tuple(g.shape)}")
    if len(dots) > 2:
        raise ValueError(f"at most 2 inner products at a time, not {len(dots)}")
    n = len(g)
    vectors = {"scale": scale, **{f"dots[{i}]": x for i, x in enumerate(dots)}}
    _check(out, len(out), offset, {"g": g, **vectors}, dict.fromkeys(vectors, n))
    if n == 0:
        return out.new_zeros(1 + len(dots))
    pointers = (g, scale, *dots, *[None] * (2 - len(dots)))
    flags = {"HAS_SCALE": scale is not None, "DOTS": len(dots)}
    return _run(sketch_fold_kernel, pointers, out, 1, 1 + len(dots), n, offset, seed, (), tuning.SKETCH_WARPS, flags)


def sketch_outer(out: Tensor, a: Tensor, b: Tensor, offset: int, seed: int, scale: Tensor | None) -> Tensor:
    """Fold W_n[o, i] = sum_t b[n, t, o] a[n, t, i], which lies at offset + o I + i, into out[n], in place; W_n is never stored.

    out fp64 [N, k]; a [N, T, I] and b [N, T, O] fp32, bf16 or fp16; scale fp32 [O I] or None: W * scale is folded. W is summed in
    fp32, over t in order, so it agrees with another computation to rounding only. The cost is T fused multiply-adds an entry on
    operands out of L1, no tensor cores: meant for few tokens a sample (tens); with many, fold a product of matrices instead.

    Returns:
        fp64 [N]: |W_n * scale|^2.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    if out.dim() != 2 or a.dim() != 3 or b.dim() != 3 or a.shape[:2] != b.shape[:2] or len(out) != len(a):
        raise ValueError(f"out, a, b must be [N, k], [N, T, I], [N, T, O], not {[tuple(x.shape) for x in (out, a, b)]}")
    samples, tokens, width = a.shape
    n = width * b.shape[2]
    _check(out, out.shape[1], offset, {"a": a, "b": b, "scale": scale}, {"scale": n})
    if max(width, b.shape[2]) >= 2**31 - TILE:  # row and column numbers, and a tile more, are int32
        raise ValueError(f"a weight of {b.shape[2]} x {width} is too large")
    if samples == 0 or n == 0 or tokens == 0:
        return out.new_zeros(samples)
    a, b = (x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous() for x in (a, b))
    extra = (tokens, width, a.stride(0), a.stride(1), b.stride(0), b.stride(1))
    flags = {"HAS_SCALE": scale is not None}
    return _run(sketch_outer_kernel, (a, b, scale), out, samples, 1, n, offset, seed, extra, tuning.SKETCH_OUTER_WARPS, flags)
