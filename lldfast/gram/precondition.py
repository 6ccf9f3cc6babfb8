"""AdamW's preconditioner: G_M = J M^-1 J^T, and the part of a step that does not depend on the weights.

A step of AdamW from moments m, v of the loss's gradient, t steps so far, changes the parameters by

    -lr [ (b1 m - (1 - b1) J^T w) / ((1 - b1^(t+1)) M) + decay theta ],    M = sqrt(v' / (1 - b2^(t+1))) + eps

where J^T w is the gradient of the mixture's log-likelihood. So l changes by eta (G_M w + drift), with

    eta = lr (1 - b1) / (1 - b1^(t+1)),    drift = -J [ b1 / (1 - b1) M^-1 m + decay (1 - b1^(t+1)) / (1 - b1) theta ]

and for Adam, whose decay is part of the gradient, `decay M^-1 theta` in the last term's place. v' = b2 v + (1 - b2) g^2 holds the
step's own gradient g, which for a domain that training has hardly seen is far above v: left out, it would make M^-1 too large by
orders. g^2 depends on the weights that are to be found; the mean over domains of J_k^2 stands in. So one formula serves before
the first step too, where v = 0 and M = |g| + eps.
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
    """A collector's sink: the mean over domains of J_k^2, in the flat parameter space. Two numbers per parameter."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.total, self._row = torch.zeros(2, size, device=device)
        self.domains = 0

    def add(
        self, domain: str, group: int, offset: int, tensor: Tensor, scale: Tensor | None = None, dot: Tensor | None = None
    ) -> float:
        flat = tensor.reshape(-1)
        self._row[offset : offset + len(flat)] += flat
        return float(torch.linalg.vector_norm(flat, dtype=torch.float64)) ** 2

    def finish(self, domain: str, tokens: float) -> None:
        """All groups of the domain, of so many tokens, have been added."""
        self.total += self._row.div_(tokens).square_()
        self._row.zero_()
        self.domains += 1

    def mean(self) -> Tensor:
        return self.total / max(self.domains, 1)


def check_optimizer(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """
    Raises:
        InputError: not an Adam or AdamW optimiser, or one that lacks a trainable parameter.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InputError(f"precondition takes an optimiser, got {optimizer!r:.100}")
    name, known = type(optimizer).__name__, isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW))
    foreign = not type(optimizer).__module__.startswith("torch.optim")  # fused ones of other packages keep the same state
    if not known and not (foreign and all("betas" in g and "eps" in g for g in optimizer.param_groups)):
        raise InputError(f"precondition takes Adam or AdamW, whose steps it describes, not {name}")
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for parameter, p in module.named_parameters():
        if p.requires_grad and id(p) not in own:
            raise InputError(f"precondition: the optimiser does not have parameter {parameter!r}")
        state = optimizer.state.get(p, {})
        if p.requires_grad and state and not {"step", "exp_avg", "exp_avg_sq"} <= state.keys():
            raise InputError(f"precondition: {name} keeps no step, exp_avg and exp_avg_sq for {parameter!r}")


def of_optimizer(module: nn.Module, optimizer: torch.optim.Optimizer, own: Tensor) -> Preconditioner:
    """The preconditioner of an Adam or AdamW optimiser of `module`.

    Args:
        own: what stands in for the step's own squared gradient, in the flat parameter space [P].

    Raises:
        InputError: see `check_optimizer`.
    """
    check_optimizer(module, optimizer)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    names = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    idle = not any(float(group["lr"]) > 0 for group in optimizer.param_groups)  # in a warm-up: all alike

    def first(p: nn.Parameter) -> float:  # (1 - b1^(t+1)) / (1 - b1)
        b1 = float(groups[id(p)]["betas"][0])
        return (1 - b1 ** (int(optimizer.state.get(p, {}).get("step", 0)) + 1)) / (1 - b1)

    etas = {name: (1.0 if idle else float(groups[id(p)]["lr"])) / first(p) for name, p in names}
    top, offset, fresh = max(etas.values()), 0, 0
    scale: dict[str, Tensor] = {}
    dot: dict[str, Tensor] = {}
    for name, p in names:
        group, state = groups[id(p)], optimizer.state.get(p, {})
        b1, b2 = (float(b) for b in group["betas"])
        steps, decay = int(state.get("step", 0)), float(group.get("weight_decay", 0.0))
        v = own[offset : offset + p.numel()].view(p.shape) * (1 - b2)
        offset += p.numel()
        if steps:
            v.add_(state["max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"].float(), alpha=b2)
        else:
            fresh += 1
        relative = etas[name] / top  # parameter groups with rates and betas of their own
        inverse = v.div_(1 - b2 ** (steps + 1)).sqrt_().add_(float(group["eps"])).reciprocal_().mul_(relative)
        theta = p.detach().float()
        if _decoupled(optimizer, group):
            drift = theta * (-decay * first(p) * relative)
        else:
            drift = theta * inverse * -decay
        if steps:
            drift.addcmul_(state["exp_avg"].float(), inverse, value=-b1 / (1 - b1))
        scale[name], dot[name] = inverse.sqrt_().flatten(), drift.flatten()
    source = "evaluation gradients" if fresh == len(names) else "optimiser state"
    return Preconditioner(
        scale, dot, 0.0 if idle else top, source + (" and evaluation gradients" if 0 < fresh < len(names) else "")
    )


def _decoupled(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> bool:
    """Whether weight decay shrinks the parameters (AdamW), instead of adding to the gradient (Adam)."""
    return bool(group.get("decoupled_weight_decay", isinstance(optimizer, torch.optim.AdamW)))
