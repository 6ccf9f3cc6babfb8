"""The sweep over the tokens that every loss from hidden states shares, whatever the teacher is.

A chunk's logits are a product of hidden states and head; a kernel turns them into their gradient in place, and two more products
give dH and dW, summed in fp32. So the student costs three matrix products, as few as there can be, and no [T, V] tensor is alive.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lldfast.ops.chunks import pieces
from lldfast.ops.distill.head import BlockedHead, HeadOptions
from lldfast.ops.distill.rows import budget, kept, vocabulary
from lldfast.ops.distill.spec import Spec
from lldfast.ops.grads import Grads
from lldfast.ops.head import LEAST_ROWS


class Student(NamedTuple):
    """hidden [T, d], weight [V, d] and bias [V], which gradients are wanted of; labels [T]."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor | None


# What the gradient of each token's divergence and of its cross entropy is multiplied by, [T] both.
Upstream = tuple[Tensor, Tensor]
# (student's logits [R, V], tokens of the rows, labels, g_divergence, g_ce, out) -> (divergence, ce), as `rows.run`
Rows = Callable[[Tensor, slice | Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None], tuple[Tensor, Tensor]]


def sweep(
    spec: Spec, student: Student, options: HeadOptions, rows: Rows, upstream: Upstream | None, grads: Grads | None, *,
    dtype: torch.dtype, columns: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(divergence [T], cross entropy [T]) of the student's logits, chunk by chunk through `rows`; 0 where ignored.

    With upstream, the gradients of the weighted sum are added to grads. dtype: of sums and results. columns: the most that one
    model's logits have, which bounds a chunk's rows.
    """
    hidden, labels = student.hidden, student.labels
    head = BlockedHead(hidden, student.weight, student.bias, vocabulary(spec, len(student.weight)), options, dtype)
    divergence, ce = hidden.new_zeros(len(hidden), dtype=dtype), hidden.new_zeros(len(hidden), dtype=dtype)
    counted = kept(spec, labels, len(head.weight))
    count, least = len(hidden) if counted is None else len(counted), 1 if spec.chunk_bytes else LEAST_ROWS
    for chunk in pieces(count, columns, dtype.itemsize, budget(spec, hidden.device), least):
        at = chunk if counted is None else counted[chunk]
        x = head.cast(hidden[at])
        z = head.logits(x)
        y = None if labels is None else labels[at].long()
        if grads is None or upstream is None:
            divergence[at], ce[at] = rows(z, at, y, None, None, None)
            continue
        slope = None if options.softcap is None else (z / options.softcap).square_().neg_().add_(1)
        # In the products' own dtype at once, where nothing else is done to it; else in place.
        plain = options.softcap is None and options.logit_scale == 1.0 and not grads.bias.numel()
        dz = head.buffer(len(x), head.factor) if plain and head.factor != dtype else z
        divergence[at], ce[at] = rows(z, at, y, upstream[0][at], upstream[1][at], dz)
        if slope is not None:
            dz.mul_(slope)
        if options.logit_scale != 1.0:
            dz.mul_(options.logit_scale)
        head.add_grads(dz, x, grads, at)
    return divergence, ce
