"""Domain weights in numpy: from Delta (and G) to a mixture, along a run, and as a file."""

from lldfast.weights.equations import (
    AdjustedDirection,
    adjusted_direction,
    adjusted_lld_weights,
    aggregate_weights,
    align,
    bootstrap_deltas,
    check_tau,
    effective_domains,
    entropy,
    lld_weights,
    simplex,
    softmax,
    standard_errors,
    with_floor,
)

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
    "simplex",
    "softmax",
    "standard_errors",
    "with_floor",
]
