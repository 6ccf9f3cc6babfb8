"""Domain weights, in numpy alone: from Delta (and G) to a mixture, along a run, and as a file.

simplex.py has points of the simplex, equations.py eqs. (4)-(9), constrained.py weights under a constraint, rules.py those along a
run, recipe.py what stands for a whole run, bootstrap.py standard errors over texts, file.py and recompute.py weights files.
"""

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

__all__ = [
    "AdjustedDirection",
    "adjusted_direction",
    "adjusted_lld_weights",
    "aggregate_weights",
    "align",
    "bootstrap_deltas",
    "check_tau",
    "effective_domains",
    "entropy",
    "lld_weights",
    "regularised",
    "simplex",
    "softmax",
    "standard_errors",
    "with_floor",
]
