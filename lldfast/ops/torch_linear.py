"""The torch path of linear_logprob: logits in row chunks of a fixed byte budget, in fp32, from any inputs.

Cross entropy computes its gradient in the same sweep as the loss, dH = (softmax(z) - 1_y) W and dW = (softmax(z) - 1_y)^T H:
three matrix products, as many as plain autograd.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lldfast.ops.chunks import (
    Outputs,
    logit_grad_,
    row_chunks,
    set_at_labels_,
    softmax_stats_,
    transform_,
)
from lldfast.ops.grads import Grads
from lldfast.ops.head import LEAST_ROWS, HeadProduct


def forward(
    head: HeadProduct, hidden: Tensor, labels: Tensor, kept: Tensor | None, shard: bool, softcap: float | None,
    logit_scale: float, vocab_start: int, out: Outputs,
) -> None:  # fmt: skip
    """Fills `out`. labels [T] are local to the shard; kept: the rows to score, None for all."""
    argmax, entropy = out.argmax.numel() > 0, out.entropy.numel() > 0
    tokens = len(labels) if kept is None else len(kept)
    for chunk in row_chunks(tokens, len(head.weight), head.dtype, hidden.device, LEAST_ROWS):
        rows = chunk if kept is None else kept[chunk]
        z = head.logits(head.rows(hidden, rows), softcap, logit_scale)
        out.put(rows, softmax_stats_(z, labels[rows], shard, argmax, entropy), vocab_start)


def backward(
    head: HeadProduct, g: Tensor, h: Tensor, logprob: Tensor, lse: Tensor, hidden: Tensor, labels: Tensor, kept: Tensor,
    shard: bool, softcap: float | None, logit_scale: float, grads: Grads,
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


def loss_and_grad(head: HeadProduct, softcap: float | None, logit_scale: float, needed: bool) -> LossAndGrad:
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
    head: HeadProduct, hidden: Tensor, labels: Tensor, kept: Tensor | None, run: LossAndGrad, grads: Grads, logprobs: Tensor
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
