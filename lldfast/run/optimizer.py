"""The optimizer of the training loop."""

from __future__ import annotations

import torch

from lldfast.models.gpt import GPT
from lldfast.run.config import TrainConfig


def make_optimizer(model: GPT, t: TrainConfig) -> torch.optim.AdamW:
    """AdamW with decay on matrices only (norms and biases are left alone), fused where torch has it."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": t.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=t.learning_rate, betas=(t.beta1, t.beta2), eps=t.eps, fused=True)
