"""Evaluation mode for a while, and every submodule's own mode back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.nn as nn


@contextlib.contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) inside; afterwards each submodule has the mode that it had, also when the block raises.

    A trainer may hold parts of a training model in evaluation mode (frozen layers, batch statistics), which
    `module.train()` alone would end.
    """
    modes = [(part, part.training) for part in module.modules()]
    root = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(root)  # a class may do more than set a flag, for instance take merged weights apart
        for part, training in modes:
            part.training = training
