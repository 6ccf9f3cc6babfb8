"""Chunks of rows of both models' logits through the kernel of a backend, and what the ops need to cut them."""

from __future__ import annotations

import torch
from torch import Tensor

from lldfast.ops import native
from lldfast.ops.chunks import accumulate_dtype, kept_rows, local_vocab, pieces
from lldfast.ops.distill import math as distill_math
from lldfast.ops.distill.spec import Spec

# A chunk of one model's logits. On a GPU each chunk also reads and writes the whole dW once, which many rows make cheap.
CHUNK_BYTES = {"cpu": 8 << 20, "cuda": 512 << 20}
# The torch path holds a dozen tensors of a piece's size.
PIECE_BYTES = {"cpu": 2 << 20, "cuda": 128 << 20}


def budget(spec: Spec, device: torch.device) -> int:
    """Bytes of a chunk of one model's logits."""
    return spec.chunk_bytes or CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"])


def vocabulary(spec: Spec, rows: int) -> int:
    """How many of a model's vocabulary rows are real."""
    return local_vocab(rows, spec.valid_vocab, 0)


def vocabularies(spec: Spec, student: int, teacher: int) -> tuple[int, int]:
    """`vocabulary` of both models."""
    return vocabulary(spec, student), vocabulary(spec, teacher)


def kept(spec: Spec, labels: Tensor | None, vocab: int) -> Tensor | None:
    """Indices of the tokens that count, None for all.

    Raises:
        InputError: a label that is not ignore_index lies outside [0, vocab).
    """
    return None if labels is None else kept_rows(labels, spec.ignore_index, vocab)


def run(
    spec: Spec,
    student: Tensor,
    teacher: Tensor,
    y: Tensor | None,
    g_divergence: Tensor | None,
    g_ce: Tensor | None,
    out: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(divergence [R], cross entropy [R]) of logits student [R, V_s] and teacher [R, V_t], all columns real, any float dtype.

    out [R, V_s], which may be `student` itself, gets the gradient of sum(g_divergence divergence + g_ce cross entropy); None: no
    gradient is wanted. y: labels [R], int64, needed where spec.ce. Sums and results are fp32 (fp64 with backend torch).
    """
    if spec.backend == "cpp":
        return native.distill_rows(student, teacher, y, spec, g_divergence, g_ce, out)
    if spec.backend == "triton":
        from lldfast_kernels.distill import distill_rows

        return distill_rows(student, teacher, y, spec, g_divergence, g_ce, out)
    dtype = accumulate_dtype(student, teacher)
    divergence, ce = (student.new_empty(len(student), dtype=dtype) for _ in range(2))
    most = PIECE_BYTES.get(student.device.type, PIECE_BYTES["cuda"])
    for piece in pieces(len(student), max(student.shape[1], teacher.shape[1]), dtype.itemsize, most):
        gs = (None if g is None else g[piece] for g in (g_divergence, g_ce))
        of_labels = None if y is None else y[piece]
        divergence[piece], ce[piece], dz = distill_math.rows(
            student[piece].to(dtype), teacher[piece].to(dtype), of_labels, spec, *gs
        )
        if out is not None:
            assert dz is not None
            out[piece] = dz.to(out.dtype)
    return divergence, ce
