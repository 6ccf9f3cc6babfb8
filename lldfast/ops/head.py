"""A head as the torch paths multiply by it: products with fp32 sums, the logits of a chunk of rows, their gradients."""

import torch
from torch import Tensor

from lldfast.ops.chunks import accumulate_dtype, transform_
from lldfast.ops.grads import Grads

# Fewer rows than this and a chunk's matrix product is bound by reading W.
LEAST_ROWS = 256


def product(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """out (+)= a b, out in fp32 (fp64). 16-bit factors have such a product on CUDA only; elsewhere they are widened."""
    if a.dtype == out.dtype or a.device.type != "cuda":
        a, b = a.to(out.dtype), b.to(out.dtype)
        out.addmm_(a, b) if add else torch.mm(a, b, out=out)
    elif add:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


class HeadProduct:
    """The head's real rows, ready for matrix products, and a logits buffer that every chunk reuses (fresh pages are slow)."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, vocab: int, precision: str | None) -> None:
        self.dtype = accumulate_dtype(hidden, weight)
        # bf16x3 is there for speed that torch cannot give: it gets the fp32 that it stands for.
        self.narrow = torch.bfloat16 if precision == "bf16" else None
        weight = weight[:vocab] if self.narrow is None else weight[:vocab].to(self.narrow)
        factor = hidden.dtype if self.narrow is None else self.narrow
        # CUDA multiplies 16-bit inputs into fp32 logits; the CPU would round the logits to 16 bits, so it gets fp32 inputs.
        self.wide = hidden.device.type == "cuda" and factor == weight.dtype and factor.itemsize == 2
        self.weight = weight if self.wide else weight.to(self.dtype)
        self.bias = None if bias is None else bias[:vocab].to(self.dtype)
        self.buffer: Tensor | None = None

    def rows(self, hidden: Tensor, rows: slice | Tensor) -> Tensor:
        h = hidden[rows] if self.narrow is None else hidden[rows].to(self.narrow)
        return h if self.wide else h.to(self.dtype)

    def products(self, h: Tensor) -> Tensor:
        """h W^T [R, V] in the buffer, which the caller may overwrite."""
        if self.buffer is None or len(self.buffer) < len(h):
            self.buffer = h.new_empty((len(h), len(self.weight)), dtype=self.dtype)
        z = self.buffer[: len(h)]
        product(h, self.weight.T, z)
        return z

    def logits(self, h: Tensor, softcap: float | None, logit_scale: float) -> Tensor:
        return transform_(self.products(h), self.bias, softcap, logit_scale)

    def add_grads(self, dz: Tensor, h: Tensor, grads: Grads, rows: slice | Tensor) -> None:
        """dH[rows] = dz W, dW += dz^T h, dbias += sum dz: the sums in fp32, dz in the dtype of 16-bit factors on CUDA."""
        vocab = len(self.weight)
        if grads.bias.numel():
            grads.bias[:vocab] += dz.sum(0)
        dz = dz.to(h.dtype)
        if grads.hidden.numel():
            if isinstance(rows, slice):
                product(dz, self.weight, grads.hidden[rows])
            else:
                part = grads.hidden.new_empty(len(dz), self.weight.shape[1])
                product(dz, self.weight, part)
                grads.hidden[rows] = part
        if grads.weight.numel():
            product(dz.T, h, grads.weight[:vocab], add=True)
