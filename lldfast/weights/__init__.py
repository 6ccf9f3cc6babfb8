"""Domain weights, in numpy alone: from Delta (and G) to a mixture, along a run, and as a file.

simplex.py has points of the simplex, equations.py eqs. (4)-(9), constrained.py weights under a constraint, options.py and
rules.py the rules along a run, recipe.py what stands for a whole run, bootstrap.py standard errors over texts, file.py and
recompute.py weights files. The names below are loaded when first used, so that the options cost nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_NAMES = {
    "AdjustedDirection": "equations",
    "adjusted_direction": "equations",
    "adjusted_lld_weights": "equations",
    "aggregate_weights": "equations",
    "align": "simplex",
    "bootstrap_deltas": "bootstrap",
    "check_tau": "equations",
    "effective_domains": "simplex",
    "entropy": "simplex",
    "lld_weights": "equations",
    "regularised": "equations",
    "simplex": "simplex",
    "softmax": "simplex",
    "standard_errors": "bootstrap",
    "with_floor": "simplex",
}

__all__ = list(_NAMES)


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(f"lldfast.weights.{_NAMES[name]}"), name)
    raise AttributeError(f"module 'lldfast.weights' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


# ruff: noqa: F401  (for type checkers and editors; at run time __getattr__ loads these)
if TYPE_CHECKING:
    from lldfast.weights.bootstrap import bootstrap_deltas, standard_errors
    from lldfast.weights.equations import (
        AdjustedDirection,
        adjusted_direction,
        adjusted_lld_weights,
        aggregate_weights,
        check_tau,
        lld_weights,
        regularised,
    )
    from lldfast.weights.simplex import align, effective_domains, entropy, simplex, softmax, with_floor
