"""Signed XOR-fold: a vector of P numbers to k numbers, inner products kept in expectation. Linear, deterministic, without tables.

The flat parameter space is cut into chunks of k, a power of two, and chunks into tiles of L = min(k, 4096), of which a chunk has
T = k / L. Bucket j = J L + i (tile J, place i) of the sketch is

    out[j] = sum_c s(c, j) g[c k + src(c, J) L + (i xor r(c, J))],    src(c, J) = (a_c J + b_c) mod T, a_c odd

with random signs s, masks r, and tile permutations (a, b) that Philox4x32-10 makes of the key `seed` and these counters
(four 32-bit words; c is the GLOBAL index of the chunk, low word first):

    a, b      (0, 2, c, c >> 32)          a = first word | 1, b = second word
    r         (J, 1, c, c >> 32)          first word mod L
    s         (32 J + q, 0, c, c >> 32)   place i = 128 row + lane, q = lane div 4: bit `row` of word lane mod 4; 1 is minus

So one call gives 128 signs, those of four neighbouring lanes in all 32 rows of a tile: a thread that owns these lanes shares
nothing, and a vector of lanes takes its signs by one shift. Signs of different chunks are independent, and entries of one chunk
never meet, so E <fold(x), fold(y)> = <x, y>, with a variance of at most V0 / k, V0 = |x|^2 |y|^2 + <x, y>^2 - 2 sum x^2 y^2,
which is CountSketch's. Masks and permutations spread structure (one-hot rows, periods), so that no single vector is far from
that.

The terms of 32 consecutive chunks (c div 32) are summed in fp32, ascending from 0; these sums go onto the fp64 `out`, ascending.
Every backend and instruction set keeps this order, so equal calls give equal bits everywhere; and where these sums are exact
(integers up to 2^19, for one) the bits do not depend on how a vector was cut into calls either.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lldfast.errors import InputError
from lldfast.ops import native
from lldfast.ops.dispatch import choose
from lldfast.ops.sketch.philox import MASK, check_seed, philox

TILE = 4096
LANES = 128
MAX_DOTS = 2
BLOCK = 32  # chunks summed before their sum goes to the sketch
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_k(k: int) -> int:
    """Refuse a sketch size that is no power of two.

    Raises:
        InputError: naming k.
    """
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1 or k & (k - 1):
        raise InputError(f"k, the size of a sketch, must be a power of two, got {k!r}")
    return int(k)


def check_offset(offset: int) -> None:
    """Refuse what is no place of the flat parameter space.

    Raises:
        InputError: naming offset.
    """
    if isinstance(offset, bool) or not isinstance(offset, int) or not 0 <= offset < 2**62:
        raise InputError(f"offset must be an integer >= 0, got {offset!r}")


def tile_plan(first: int, count: int, k: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where tiles first .. first + count - 1 of the flat space go: chunk c, bucket tile J, mask r (int64 [count]) and signs
    (bool [count, L], true is minus)."""
    size = min(k, TILE)
    tiles = k // size
    f = torch.arange(first, first + count, device=device)
    c, source = f // tiles, f % tiles
    low, high = c & MASK, c >> 32
    a, b = philox((torch.zeros_like(c), torch.full_like(c, 2), low, high), seed)[:2]
    a = a | 1
    inverse = a  # Newton's iteration modulo 2^32: a is right to 3 bits, and each step doubles them
    for _ in range(4):
        inverse = inverse * (2 - a * inverse & MASK) & MASK
    target = inverse * (source - b & MASK) & (tiles - 1)
    r = philox((target, torch.ones_like(c), low, high), seed)[0] & (size - 1)
    rows, lanes = max(size // LANES, 1), min(size, LANES)
    q = torch.arange((lanes + 3) // 4, device=device)
    words = torch.stack(philox((32 * target[:, None] + q, torch.zeros_like(q), low[:, None], high[:, None]), seed), -1)
    words = words.reshape(count, 1, -1)[:, :, :lanes]
    signs = words >> torch.arange(rows, device=device)[:, None] & 1
    return c, target, r, signs.reshape(count, size).bool()


@torch.no_grad()
def reference(
    out: Tensor, g: Tensor, *, offset: int, seed: int, scale: Tensor | None = None, dots: Sequence[Tensor] = ()
) -> Tensor:
    """`fold` in plain torch, a few million numbers at a time: the oracle of the other backends, and the "torch" backend."""
    k, n = len(out), g.numel()
    size = min(k, TILE)
    tiles = k // size
    flat = g.reshape(-1)
    sums = [torch.zeros((), dtype=torch.float64, device=g.device) for _ in range(1 + len(dots))]
    step = max((1 << 21) // (BLOCK * k), 1) * BLOCK * tiles  # whole blocks of chunks
    place = torch.arange(size, device=g.device)
    table = out.view(tiles, size)
    first, last = offset // size, (offset + n - 1) // size
    while first <= last and n:
        stop = min(first - first % step + step, last + 1)
        begin, end = max(first * size, offset), min(stop * size, offset + n)
        x = flat[begin - offset : end - offset]
        for i, other in enumerate(dots):
            sums[1 + i] += (x.double() * other.reshape(-1)[begin - offset : end - offset].double()).sum()
        if scale is not None:
            x = x.to(torch.promote_types(x.dtype, torch.float32)) * scale.reshape(-1)[begin - offset : end - offset]
        sums[0] += x.double().square().sum()
        total = torch.promote_types(x.dtype, torch.float32)
        padded = torch.zeros((stop - first) * size, dtype=total, device=g.device)
        padded[begin - first * size : end - first * size] = x
        chunk, target, r, minus = tile_plan(first, stop - first, k, seed, g.device)
        values = padded.view(-1, size).gather(1, place ^ r[:, None])
        values = torch.where(minus, -values, values)
        touched, target = target.unique(return_inverse=True)
        block = chunk // BLOCK - int(chunk[0]) // BLOCK
        partial = torch.zeros(int(block[-1]) + 1, len(touched), size, dtype=total, device=g.device)
        for i in range(BLOCK):
            rows = (chunk % BLOCK == i).nonzero()[:, 0]
            partial[block[rows], target[rows]] += values[rows]
        for of_block in partial:
            table[touched] += of_block
        first = stop
    return torch.stack(sums)


def fold(
    out: Tensor,
    g: Tensor,
    *,
    offset: int,
    seed: int,
    scale: Tensor | None = None,
    dots: Sequence[Tensor] = (),
    backend: str = "auto",
) -> Tensor:
    """Add the signed XOR-fold of `g`, which lies at `offset` of the flat parameter space, to the sketch `out`, in place.

    Args:
        out: fp64 [k], contiguous, k a power of two.
        g: fp32, bf16, fp16 or fp64, any shape, taken in row-major order: entries offset .. offset + g.numel() - 1.
        offset: place of the first entry, >= 0; it may pass 2^31.
        seed: the key, in [0, 2^64).
        scale: fp32, as many entries as g: g * scale (rounded to fp32) is folded instead.
        dots: up to two tensors with as many entries as g, whose inner products with g (without scale) are wanted too; in fp32,
            or rounded to it where a kernel runs.
        backend: "auto", "torch", "cpp", "triton" or "cuda".

    Returns:
        fp64 [1 + len(dots)] on g's device: |g * scale|^2, then <g, dots[i]>; exact but for the rounding of fp64 sums. NaN and
        infinities come through, to it and to the sketch.

    Raises:
        InputError: a shape, dtype, device, k, offset or seed that is wrong, or a backend that cannot run here.
    """
    _check(out, g, offset, seed, scale, dots)
    name = choose("sketch", backend, g, scale)
    if g.numel() == 0:
        return torch.zeros(1 + len(dots), dtype=torch.float64, device=g.device)
    if name == "torch":
        return reference(out, g, offset=offset, seed=seed, scale=scale, dots=dots)
    with torch.no_grad():
        flat = g.detach().reshape(-1)
        factor = None if scale is None else scale.detach().reshape(-1)
        others = [other.detach().reshape(-1).float() for other in dots]
        if name == "triton":
            from lldfast_kernels.sketch import sketch_fold

            return sketch_fold(out, flat, offset, seed, factor, others)
        if name == "cuda":
            return native.cuda_sketch_fold(out, flat, offset, seed, factor, others)
        return native.sketch_fold(out, flat, offset, seed, factor, others)


def _check(out: Tensor, g: Tensor, offset: int, seed: int, scale: Tensor | None, dots: Sequence[Tensor]) -> None:
    if out.dim() != 1 or out.dtype != torch.float64 or not out.is_contiguous():
        raise InputError(f"out must be a contiguous fp64 vector, got {out.dtype} {tuple(out.shape)}")
    check_k(len(out))
    check_seed(seed)
    if g.dtype not in DTYPES:
        raise InputError(f"g must be fp32, bf16, fp16 or fp64, got {g.dtype}")
    check_offset(offset)
    if len(dots) > MAX_DOTS:
        raise InputError(f"fold takes at most {MAX_DOTS} tensors in dots, got {len(dots)}")
    if scale is not None and scale.dtype != torch.float32:
        raise InputError(f"scale must be fp32, got {scale.dtype}")
    for what, other in [("out", out), ("scale", scale), *(("dots", d) for d in dots)]:
        if other is None:
            continue
        if other.device != g.device:
            raise InputError(f"{what} is on {other.device}, g on {g.device}")
        if what != "out" and other.numel() != g.numel():
            raise InputError(f"{what} has {other.numel()} entries, g has {g.numel()}")
