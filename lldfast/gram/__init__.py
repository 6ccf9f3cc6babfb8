"""The Gram matrix G = J J^T of domain log-likelihood gradients, eqs. (4) and (6): exact, quantised or sketched, with its error.

Row k of J is the gradient of l_k, the mean log-likelihood per token of domain k. Every text belongs to one domain, so all of J
costs one forward and backward pass over the evaluation corpus (about 6 P N FLOPs against 2 P N for scoring); what grows with the
model are K rows of P numbers, which a sketch of k numbers each replaces (ops/sketch/fold.py).

`estimate` does it for a model and an evaluation corpus. `Collector` does it around any backward pass of yours, `Accumulator` from
gradients that you already have; `per_text` sketches the gradient of every single text; `fidelity` measures how well G predicts
what a step of your own optimiser does.

Names are loaded when they are first used, so that reading the options of an estimate does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_NAMES = {
    "Accumulator": "accumulator",
    "Collector": "collector",
    "Fidelity": "prediction",
    "GramEstimate": "result",
    "GramOptions": "options",
    "Layout": "collector",
    "PerTextSketches": "texts",
    "estimate": "estimation",
    "fidelity": "prediction",
    "per_text": "texts",
}

__all__ = list(_NAMES)


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(f"lldfast.gram.{_NAMES[name]}"), name)
    raise AttributeError(f"module 'lldfast.gram' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


# ruff: noqa: F401  (for type checkers and editors; at run time __getattr__ loads these)
if TYPE_CHECKING:
    from lldfast.gram.accumulator import Accumulator
    from lldfast.gram.collector import Collector, Layout
    from lldfast.gram.estimation import estimate
    from lldfast.gram.options import GramOptions
    from lldfast.gram.prediction import Fidelity, fidelity
    from lldfast.gram.result import GramEstimate
    from lldfast.gram.texts import PerTextSketches, per_text
