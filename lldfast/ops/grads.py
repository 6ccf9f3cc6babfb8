"""Gradients by hidden states, head and bias that come from the sweep that gives the loss, and what backward makes of them."""

from typing import NamedTuple

import torch
from torch import Tensor


class Grads(NamedTuple):
    """fp32 gradients [T, d], [V, d], [V], zero at first; of size 0 where not needed."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor

    @classmethod
    def zeros(
        cls, hidden: Tensor, weight: Tensor, dtype: torch.dtype, need_hidden: bool, need_weight: bool, need_bias: bool
    ) -> "Grads":
        return cls(
            hidden.new_zeros(hidden.shape if need_hidden else (0,), dtype=dtype),
            hidden.new_zeros(weight.shape if need_weight else (0,), dtype=dtype),
            hidden.new_zeros(weight.shape[0] if need_bias else 0, dtype=dtype),
        )


@torch.library.custom_op("lldfast::linear_cross_entropy_backward", mutates_args=())
def scale_grads(
    g: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, dh: Tensor, dw: Tensor, db: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the sum times the upstream g, in the inputs' dtypes.

    An op of its own, and given the inputs, because it has no autograd formula: a second derivative raises instead of being 0.
    """
    return (dh * g).to(hidden.dtype), (dw * g).to(weight.dtype), (db * g).to(db.dtype if bias is None else bias.dtype)


@scale_grads.register_fake
def _(
    g: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, dh: Tensor, dw: Tensor, db: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dtypes = (hidden.dtype, weight.dtype, db.dtype if bias is None else bias.dtype)
    return tuple(torch.empty_like(x, dtype=t) for x, t in zip((dh, dw, db), dtypes, strict=True))  # type: ignore[return-value]
