"""A model's head as the distillation ops multiply by it: block by block on a CPU, into a buffer that every chunk reuses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lldfast.ops.chunks import transform_
from lldfast.ops.grads import Grads
from lldfast.ops.head import product

# Rows of a head that are multiplied at a time on a CPU: a 16-bit head is widened no further, and the libraries' own packed copies
# stay small.
BLOCK_ROWS = 4096


class HeadOptions(NamedTuple):
    """What is done to h W^T + bias, and how it is multiplied; see `linear_logprob`."""

    softcap: float | None = None
    logit_scale: float = 1.0
    precision: str | None = None

    @classmethod
    def schema(cls, prefix: str = "") -> str:
        """The fields as torch.library's schemas want them."""
        return f"float? {prefix}softcap, float {prefix}logit_scale, str? {prefix}precision"


class BlockedHead:
    """A head's real rows for matrix products with fp32 sums, and a buffer of logits that every chunk reuses.

    A CPU takes it block by block: a widened or packed copy of a whole head would cost more than the logits.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, vocab: int, options: HeadOptions, dtype: torch.dtype
    ) -> None:
        self.options, self.dtype = options, dtype
        self.narrow = torch.bfloat16 if options.precision == "bf16" else None
        self.weight = weight[:vocab]
        self.bias = None if bias is None else bias[:vocab].to(self.dtype)
        kinds = {x.dtype if self.narrow is None else self.narrow for x in (hidden, weight)}
        # CUDA multiplies 16-bit factors into fp32; a CPU would round the logits to 16 bits, so it gets fp32 factors.
        wide = hidden.device.type == "cuda" and len(kinds) == 1 and next(iter(kinds)).itemsize == 2
        self.factor = next(iter(kinds)) if wide else self.dtype
        if hidden.device.type == "cuda":
            self.step, self.weight = len(self.weight), self.cast(self.weight)
        else:
            self.step = BLOCK_ROWS
        self.buffers: dict[torch.dtype, Tensor] = {}

    def cast(self, x: Tensor) -> Tensor:
        """Hidden states or rows of the weight as they are multiplied."""
        return (x if self.narrow is None else x.to(self.narrow)).to(self.factor)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        vocab = len(self.weight)
        for first in range(0, vocab, self.step):
            part = slice(first, min(first + self.step, vocab))
            yield part, self.cast(self.weight[part])

    def buffer(self, rows: int, dtype: torch.dtype) -> Tensor:
        """[rows, V] that the next chunk takes again; rows of whole cache lines, since GPU libraries are slow on others."""
        vocab, kept = len(self.weight), self.buffers.get(dtype)
        if kept is None or len(kept) < rows:
            kept = self.buffers[dtype] = self.weight.new_empty((rows, -(-vocab // 16) * 16), dtype=dtype)
        return kept[:rows, :vocab]

    def logits(self, h: Tensor) -> Tensor:
        """Logits [R, V] of rows h that were cast, which the caller may overwrite."""
        z = self.buffer(len(h), self.dtype)
        for part, w in self.blocks():
            product(h, w.T, z[:, part])
        return transform_(z, self.bias, self.options.softcap, self.options.logit_scale)

    def add_grads(self, dz: Tensor, h: Tensor, grads: Grads, rows: slice | Tensor) -> None:
        """dH[rows] = dz W, dW += dz^T h, dbias += sum dz; sums in fp32, dz in the dtype of the factors."""
        if grads.bias.numel():
            grads.bias[: len(self.weight)] += dz.sum(0)
        dz = dz.to(h.dtype)
        dh = grads.hidden.new_zeros(len(dz), self.weight.shape[1]) if grads.hidden.numel() else None
        for part, w in self.blocks():
            if dh is not None:
                product(dz[:, part], w, dh, add=True)
            if grads.weight.numel():
                product(dz[:, part].T, h, grads.weight[part], add=True)
        if dh is not None:
            grads.hidden[rows] = dh
