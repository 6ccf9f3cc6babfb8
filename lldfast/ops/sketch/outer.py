"""Gradients of single samples folded into sketches of their own, as fold.py specifies the fold, without being stored.

`fold_outer`: a linear layer y = x W^T has for sample n the weight gradient

    W_n[o, i] = sum_t b[n, t, o] a[n, t, i]

of its inputs a and the gradients b of its outputs. W_n is computed a piece at a time and added to out[n] from there: memory does
not depend on the number of samples. The C++ kernel holds a strip of W_n in cache; the Triton kernel a tile of it in registers,
without tensor cores, so samples of more than SHORT tokens go by products of matrices of some rows, which the fold's kernel reads.

`fold_rows`: rows of numbers with a place each in the flat space: biases, norms, the rows of an embedding that a sample uses.

Sums over t are in fp32 (fp64 for fp64 inputs), in an order of the backend's own: results agree to rounding, not to the bit. Equal
calls give equal bits, whatever the number of threads and of other samples.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lldfast.errors import InputError
from lldfast.ops import native
from lldfast.ops.dispatch import choose
from lldfast.ops.sketch import fold as sketch
from lldfast.ops.sketch.fold import DTYPES, LANES, TILE, check_k, check_offset
from lldfast.ops.sketch.philox import MASK, check_seed, philox

BLOCK_ENTRIES = 1 << 22  # of W_n at a time, where it is a product of matrices
ROW_ENTRIES = 1 << 20  # of rows at a time in plain torch
SHORT = 64  # tokens of a sample up to which the Triton kernel is the faster way


def reference(
    out: Tensor, a: Tensor, b: Tensor, *, offset: int, seed: int, scale: Tensor | None = None, dtype: torch.dtype = torch.float64
) -> Tensor:
    """`fold_outer` in plain torch, products summed in `dtype`: the oracle of the other backends, and the "torch" backend."""
    return _by_blocks(out, a, b, offset, seed, scale, dtype, sketch.reference)


def _by_blocks(
    out: Tensor,
    a: Tensor,
    b: Tensor,
    offset: int,
    seed: int,
    scale: Tensor | None,
    dtype: torch.dtype,
    fold: Callable[..., Tensor],
) -> Tensor:
    width, rows = a.shape[2], b.shape[2]
    step = max(BLOCK_ENTRIES // max(width, 1), 1)
    squares = torch.zeros(len(a), dtype=torch.float64, device=a.device)
    factor = None if scale is None else scale.reshape(-1)
    for n in range(len(a) if width else 0):
        x = a[n].to(dtype)
        for row in range(0, rows, step):
            w = b[n, :, row : row + step].to(dtype).T @ x
            part = None if factor is None else factor[row * width :][: w.numel()]
            squares[n] += fold(out[n], w, offset=offset + row * width, seed=seed, scale=part)[0]
    return squares


def fold_outer(
    out: Tensor, a: Tensor, b: Tensor, *, offset: int, seed: int, scale: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """Add the signed XOR-fold of W_n = b_n^T a_n to the sketch out[n], in place, for every sample n.

    Args:
        out: fp64 [N, k], contiguous, k a power of two.
        a: [N, T, I], the layer's inputs; fp32, bf16, fp16 or fp64. For a weight that is kept as [in, out], swap a and b.
        b: [N, T, O], gradients of the layer's outputs; its dtype may differ.
        offset: place of W_n[0, 0] in the flat parameter space, where the weight lies row after row.
        seed: the key, in [0, 2^64).
        scale: fp32, O I entries: W_n * scale is folded.
        backend: "auto", "torch", "cpp" or "triton".

    Returns:
        fp64 [N]: |W_n * scale|^2. NaN and infinities come through, to it and to the sketch.

    Raises:
        InputError: a shape, dtype, device, k, offset or seed that is wrong, or a backend that cannot run here.
    """
    _check_out(out, seed, a)
    for what, x in (("a", a), ("b", b)):
        if x.dim() != 3 or x.dtype not in DTYPES:
            raise InputError(f"{what} must be [N, T, columns] in fp32, bf16, fp16 or fp64, got {x.dtype} {tuple(x.shape)}")
    if a.shape[:2] != b.shape[:2] or len(out) != len(a):
        raise InputError(f"out, a and b must agree in N, a and b in T: {[tuple(x.shape) for x in (out, a, b)]}")
    check_offset(offset)
    if b.device != a.device or (scale is not None and scale.device != a.device):
        raise InputError("a, b and scale must be on one device")
    size = a.shape[2] * b.shape[2]
    if scale is not None and (scale.dtype != torch.float32 or scale.numel() != size):
        raise InputError(f"scale must be fp32 with {size} entries, got {scale.dtype} with {scale.numel()}")
    name = choose("sketch_outer", backend, a, b)
    if a.numel() == 0 or b.numel() == 0:
        return torch.zeros(len(a), dtype=torch.float64, device=a.device)
    with torch.no_grad():
        a, b, scale = a.detach(), b.detach(), None if scale is None else scale.detach().reshape(-1).contiguous()
        if name == "cpp":
            return native.sketch_outer(out, a, b, offset, seed, scale)
        if name == "triton" and a.shape[1] <= SHORT:
            from lldfast_kernels.sketch import sketch_outer

            return sketch_outer(out, a, b, offset, seed, scale)
        dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
        return _by_blocks(out, a, b, offset, seed, scale, dtype, sketch.fold if name == "triton" else sketch.reference)


def fold_rows(out: Tensor, rows: Tensor, sample: Tensor, place: Tensor, *, seed: int, backend: str = "auto") -> None:
    """Add rows[r] [width], whose first entry lies at place[r] of the flat space, to the sketch out[sample[r]], in place.

    Args:
        out: fp64 [N, k], contiguous, k a power of two.
        rows: [R, width] in fp32, bf16, fp16 or fp64.
        sample: int64 [R], in ascending order.
        place: int64 [R], >= 0.
        seed: the key, in [0, 2^64).
        backend: as for `fold_outer`. On a GPU these few numbers are folded by torch, whatever the backend.

    Raises:
        InputError: a shape, dtype, device, k, sample, place or seed that is wrong, or a backend that cannot run here.
    """
    _check_out(out, seed, rows)
    if rows.dim() != 2 or rows.dtype not in DTYPES:
        raise InputError(f"rows must be [R, width] in fp32, bf16, fp16 or fp64, got {rows.dtype} {tuple(rows.shape)}")
    for what, x in (("sample", sample), ("place", place)):
        if x.shape != rows.shape[:1] or x.dtype != torch.int64 or x.device != rows.device:
            raise InputError(f"{what} must be int64 [{len(rows)}] on {rows.device}, got {x.dtype} {tuple(x.shape)} on {x.device}")
    name = choose("sketch_outer", backend, rows)
    if rows.numel() == 0:
        return
    if int(sample[0]) < 0 or int(sample[-1]) >= len(out) or bool((sample.diff() < 0).any()):
        raise InputError(f"sample must ascend within [0, {len(out)})")
    if int(place.min()) < 0:
        raise InputError(f"place must be >= 0, got {int(place.min())}")
    with torch.no_grad():
        if name == "cpp":
            native.sketch_rows(out, rows.detach().float().contiguous(), sample, place.contiguous(), seed)
        else:
            rows_reference(out, rows.detach(), sample, place, seed=seed)


def rows_reference(out: Tensor, rows: Tensor, sample: Tensor, place: Tensor, *, seed: int) -> None:
    """`fold_rows` in plain torch, entry by entry. Sums are fp64 on `out`."""
    width, k = rows.shape[1], out.shape[1]
    flat = out.view(-1)
    step = max(ROW_ENTRIES // max(width, 1), 1)
    columns = torch.arange(width, device=rows.device)
    for first in range(0, len(rows), step):
        part = slice(first, first + step)
        bucket, minus = _buckets(place[part, None] + columns, k, seed)
        x = rows[part].double()
        # accumulate sorts on a GPU, so the order of the sums is the same every time
        flat.index_put_((sample[part, None] * k + bucket,), torch.where(minus, -x, x), accumulate=True)


def _buckets(at: Tensor, k: int, seed: int) -> tuple[Tensor, Tensor]:
    """For places of the flat space: the bucket of each, and whether it is subtracted."""
    size = min(k, TILE)
    tiles = k // size
    chunk, source, within = at // k, at % k // size, at % size
    low, high, zero = chunk & MASK, chunk >> 32, torch.zeros_like(at)
    a, b = philox((zero, zero + 2, low, high), seed)[:2]
    a = a | 1
    inverse = a  # Newton's iteration modulo 2^32
    for _ in range(4):
        inverse = inverse * (2 - a * inverse & MASK) & MASK
    target = inverse * (source - b & MASK) & (tiles - 1)
    i = within ^ (philox((target, zero + 1, low, high), seed)[0] & (size - 1))
    lane, row = i % LANES, i // LANES
    words = torch.stack(philox((32 * target + lane // 4, zero, low, high), seed), -1)
    word = words.gather(-1, (lane % 4)[..., None])[..., 0]
    return target * size + i, (word >> row & 1).bool()


def _check_out(out: Tensor, seed: int, x: Tensor) -> None:
    if out.dim() != 2 or out.dtype != torch.float64 or not out.is_contiguous():
        raise InputError(f"out must be contiguous, fp64 [N, k], got {out.dtype} {tuple(out.shape)}")
    check_k(out.shape[1])
    check_seed(seed)
    if out.device != x.device:
        raise InputError(f"out is on {out.device}, the numbers to fold on {x.device}")
