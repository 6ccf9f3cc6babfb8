"""AdamW's preconditioner: G_M = J M^-1 J^T, and the part of a step that does not depend on the weights.

A step of AdamW from moments m, v of the loss's gradient, t steps so far, changes the parameters by

    -lr [ (b1 m - (1 - b1) J^T w) / ((1 - b1^(t+1)) (sqrt(v_hat) + eps)) + decay theta ]

where J^T w is the gradient of the mixture's log-likelihood. So l changes by eta (G_M w + drift), with M = sqrt(v_hat) + eps and

    eta = lr (1 - b1) / (1 - b1^(t+1)),    drift = -J [ b1 / (1 - b1) M^-1 m + decay (1 - b1^(t+1)) / (1 - b1) theta ]

v_hat is v / (1 - b2^t), as it is before the step: the step's own gradient is left out of M, as if frozen. Before the first step v
is 0 and M would be the first batch's own |gradient| + eps; then v_hat is the mean over groups of the squared gradients of the
evaluation texts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from lldfast.errors import InputError


@dataclass
class Preconditioner:
    """By parameter name: scale = M^(-1/2), and dot, whose inner product with a gradient of l is its drift. eta: step size."""

    scale: dict[str, Tensor]
    dot: dict[str, Tensor]
    eta: float
    source: str


class SecondMoments:
    """A collector's sink: mean over groups of the squared per-token gradient. Set `tokens` before every group."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.total, self.groups, self.tokens = torch.zeros(size, device=device), 0, 1.0

    def add(
        self, domain: str, group: int, offset: int, tensor: Tensor, scale: Tensor | None = None, dot: Tensor | None = None
    ) -> float:
        flat = tensor.reshape(-1).float() / self.tokens
        self.total[offset : offset + len(flat)].addcmul_(flat, flat)
        return float(flat.double().square().sum())

    def count(self, domain: str, index: int, tokens: float) -> None:
        self.groups += 1


def of_optimizer(module: nn.Module, optimizer: torch.optim.Optimizer, moments: SecondMoments | None = None) -> Preconditioner:
    """The preconditioner of an Adam or AdamW optimiser of `module`.

    Args:
        moments: second moments to use where the optimiser has no state yet.

    Raises:
        InputError: no Adam-like optimiser, a trainable parameter that it does not have, or no state and no `moments`.
    """
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    names = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    for name, p in names:
        if id(p) not in groups:
            raise InputError(f"precondition: the optimiser does not have parameter {name!r}")
    if any("betas" not in group or "eps" not in group for group in optimizer.param_groups):
        raise InputError(f"precondition: {type(optimizer).__name__} has no betas and eps; it takes Adam and AdamW")
    top = max(float(group["lr"]) for group in optimizer.param_groups)
    scale: dict[str, Tensor] = {}
    dot: dict[str, Tensor] = {}
    eta, offset, fresh = 0.0, 0, False
    for name, p in names:
        group, state = groups[id(p)], optimizer.state.get(p, {})
        (b1, b2), eps, lr = group["betas"], float(group["eps"]), float(group["lr"])
        steps = int(state.get("step", 0))
        first = (1 - b1 ** (steps + 1)) / (1 - b1)
        decay = float(group.get("weight_decay", 0.0)) if _decoupled(optimizer, group) else 0.0
        if steps:
            v = state["max_exp_avg_sq"] if group.get("amsgrad") else state["exp_avg_sq"]
            root = (v.float() / (1 - b2**steps)).sqrt_()
        elif moments is not None:
            root = (moments.total[offset : offset + p.numel()].view(p.shape) / max(moments.groups, 1)).sqrt_()
            fresh = True
        else:
            raise InputError(f"precondition: the optimiser has no second moment of {name!r} yet")
        relative = lr / top if top > 0 else 1.0  # parameter groups with learning rates of their own
        inverse = root.add_(eps).reciprocal_().mul_(relative)
        drift = p.detach().float() * (-decay * first * relative)
        if steps:
            drift.addcmul_(state["exp_avg"].float(), inverse, value=-b1 / (1 - b1))
        scale[name], dot[name] = inverse.sqrt_().flatten(), drift.flatten()
        eta, offset = top / first, offset + p.numel()
    return Preconditioner(scale, dot, eta, "evaluation gradients" if fresh else "optimiser state")


def _decoupled(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> bool:
    """Whether weight decay shrinks the parameters (AdamW), instead of adding to the gradient (Adam)."""
    return bool(group.get("decoupled_weight_decay", isinstance(optimizer, torch.optim.AdamW)))


def has_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimiser has taken a step with every trainable parameter."""
    return all(int(optimizer.state.get(p, {}).get("step", 0)) > 0 for p in module.parameters() if p.requires_grad)
