"""The torch path of linear_logprob: logits in row chunks of a fixed byte budget, in fp32, from any inputs.

Cross entropy computes its gradient in the same sweep as the loss, dH = (softmax(z) - 1_y) W and dW = (softmax(z) - 1_y)^T H:
three matrix products, as many as plain autograd.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lldfast.ops.chunks import (
    Outputs,
    accumulate_dtype,
    logit_grad_,
    row_chunks,
    set_at_labels_,
    softmax_stats_,
    transform_,
)

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


class Head:
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

    def add_grads(self, dz: Tensor, h: Tensor, grads: "Grads", rows: slice | Tensor) -> None:
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


def forward(
    head: Head, hidden: Tensor, labels: Tensor, kept: Tensor | None, shard: bool, softcap: float | None, logit_scale: float,
    vocab_start: int, out: Outputs,
) -> None:  # fmt: skip
    """Fills `out`. labels [T] are local to the shard; kept: the rows to score, None for all."""
    argmax, entropy = out.argmax.numel() > 0, out.entropy.numel() > 0
    tokens = len(labels) if kept is None else len(kept)
    for chunk in row_chunks(tokens, len(head.weight), head.dtype, hidden.device, LEAST_ROWS):
        rows = chunk if kept is None else kept[chunk]
        z = head.logits(head.rows(hidden, rows), softcap, logit_scale)
        out.put(rows, softmax_stats_(z, labels[rows], shard, argmax, entropy), vocab_start)


def backward(
    head: Head, g: Tensor, h: Tensor, logprob: Tensor, lse: Tensor, hidden: Tensor, labels: Tensor, kept: Tensor, shard: bool,
    softcap: float | None, logit_scale: float, grads: Grads,
) -> None:  # fmt: skip
    """Adds the gradients of sum(g logprob + h lse) to `grads`; the logits are computed again."""
    for chunk in row_chunks(len(kept), len(head.weight), head.dtype, hidden.device, LEAST_ROWS):
        rows = kept[chunk]
        h_rows = head.rows(hidden, rows)
        z = head.logits(h_rows, softcap, logit_scale)
        dz = logit_grad_(z, labels[rows], shard, logprob[rows], lse[rows], g[rows], h[rows], softcap, logit_scale)
        head.add_grads(dz, h_rows, grads, rows)


# (products h W^T, labels) -> (logprob, dz), dz in place of the products
LossAndGrad = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def loss_and_grad(head: Head, softcap: float | None, logit_scale: float, needed: bool) -> LossAndGrad:
    def run(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = transform_(z, head.bias, softcap, logit_scale)
        slope = 1 - (z / softcap).square_() if softcap is not None and needed else None
        logprob, *_, dz = softmax_stats_(z, y, shard=False)
        if needed:
            set_at_labels_(dz, y, False, torch.expm1(logprob))
            if slope is not None:
                dz.mul_(slope)
            if logit_scale != 1.0:
                dz.mul_(logit_scale)
        return logprob, dz

    return run


def cross_entropy(
    head: Head, hidden: Tensor, labels: Tensor, kept: Tensor | None, run: LossAndGrad, grads: Grads, logprobs: Tensor
) -> None:
    """Fills `logprobs` [T] and adds the gradients of the summed loss to `grads`."""
    needed = any(x.numel() for x in grads)
    tokens = len(labels) if kept is None else len(kept)
    for chunk in row_chunks(tokens, len(head.weight), head.dtype, hidden.device, LEAST_ROWS):
        rows = chunk if kept is None else kept[chunk]
        h = head.rows(hidden, rows)
        logprobs[rows], dz = run(head.products(h), labels[rows])
        if needed:
            head.add_grads(dz, h, grads, rows)
