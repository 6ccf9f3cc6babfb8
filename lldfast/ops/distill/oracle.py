"""The truth that every backend of the distillation losses is held against: textbook formulas in fp64 under plain autograd."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lldfast.ops.distill.options import DistillOptions


def reference(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None, *, preset: str | None = None,
    token_weights: Tensor | None = None, ignore_index: int = -100, valid_vocab: int | None = None, reduction: str = "mean",
    **given: Any,
) -> Tensor:  # fmt: skip
    """The oracle of `distill_loss_from_logits`: textbook formulas in fp64 under plain autograd, finite logits only."""
    options = DistillOptions.of(preset, **given)
    lam, alpha, temperature = float(options.lam), float(options.alpha), options.temperature
    zs, zt = (z.double()[..., :valid_vocab] for z in (student_logits, teacher_logits.detach()))
    vocab = max(zs.shape[-1], zt.shape[-1])
    q, p = (
        torch.nn.functional.pad(torch.log_softmax(z / temperature, -1), (0, vocab - z.shape[-1]), value=-1e30) for z in (zs, zt)
    )
    a = (1 - alpha) / 2
    if lam in (0.0, 1.0):
        r = p if lam else q
    elif math.isinf(alpha):
        r = torch.maximum(p, q) if alpha < 0 else torch.minimum(p, q)
    elif a == 0:
        r = lam * p + (1 - lam) * q
    else:
        r = torch.logaddexp(math.log(lam) + a * p, math.log(1 - lam) + a * q) / a
    r = torch.log_softmax(r, -1)
    r = r.detach() if options.detach_assistant else r
    first, second = ({"p": p, "q": q, "r": r}[name] for name in options.order)
    loss = _divergence(first, second, options)
    if options.ce_weight:
        assert labels is not None
        index = labels.clamp(0, zs.shape[-1] - 1)[..., None].long()
        loss = loss - options.ce_weight * torch.log_softmax(zs, -1).gather(-1, index)[..., 0]
    kept = torch.ones_like(loss) if labels is None else (labels != ignore_index).double()
    weights = kept if token_weights is None else torch.where(kept > 0, token_weights.double(), 0.0)
    loss = torch.where(kept > 0, weights * loss, 0.0)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / torch.where(weights.sum() != 0, weights.sum(), 1.0)


def _divergence(a: Tensor, b: Tensor, options: DistillOptions) -> Tensor:
    kind = options.kind
    if kind == "rkl":
        a, b, kind = b, a, "kl"
    if kind == "kl":
        return (a.exp() * (a - b)).sum(-1)
    if kind == "js":
        beta = options.beta
        m = torch.logaddexp(math.log(beta) + a, math.log(1 - beta) + b)
        return (beta * a.exp() * (a - m) + (1 - beta) * b.exp() * (b - m)).sum(-1)
    if kind == "alpha":
        alpha = options.alpha if options.divergence_alpha is None else options.divergence_alpha
        x, y = (1 - alpha) / 2, (1 + alpha) / 2
    else:
        x, y = options.ab
    if x == 0 and y == 0:
        return ((a - b).square() / 2).sum(-1)
    if x == 0 or y == 0:
        a, b, x = (a, b, x) if y == 0 else (b, a, y)
        return (((x * a).exp() * x * (a - b) - (x * a).exp() + (x * b).exp()) / x**2).sum(-1)
    if x + y == 0:
        return (((x * (a - b)).exp() - 1 - x * (a - b)) / x**2).sum(-1)
    s = x + y
    return (-((x * a + y * b).exp() - x / s * (s * a).exp() - y / s * (s * b).exp()) / (x * y)).sum(-1)
