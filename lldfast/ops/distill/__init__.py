"""Distillation losses of the alpha-mixture family, from hidden states and heads, from logits, and against a recorded top k.

The way of a call: options.py (which loss) -> loss.py (the public functions) -> spec.py (plain numbers) -> the custom ops, one
for each kind of teacher: linear.py (it runs), topk.py (it was recorded), logits.py (both models' logits are given). register.py,
sweep.py and head.py are what linear.py and topk.py share: the ops' frame, the chunks of tokens, the products with a head. rows.py
hands logits to a backend's kernel, math.py is the torch one, with the formulas; oracle.py is the fp64 truth of all.
"""

import importlib
from typing import Any

# Where the names of the room are; loaded when first used, since options.py and spec.py serve callers that need no torch.
_NAMES = {
    "distill_loss": "loss",
    "distill_loss_from_logits": "loss",
    "distill_loss_topk": "loss",
    "DistillTokens": "loss",
    "DistillOptions": "options",
    "reference": "oracle",
}

__all__ = list(_NAMES)


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
