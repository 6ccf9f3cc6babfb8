"""Standard errors over texts: Delta, and whatever follows from it, on resampled evaluation texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from lldfast.errors import InputError
from lldfast.weights.simplex import Array


def bootstrap_deltas(
    difference: ArrayLike, counts: ArrayLike, domain: ArrayLike, domains: Sequence[str], *, n: int = 200, seed: int = 0
) -> Array:
    """Bootstrap replicates of Delta over texts [n, K]: the texts of each domain are drawn with replacement.

    Args:
        difference: target minus base log-likelihood per text [N], nats.
        counts: what a domain's sum is divided by, per text [N] (base tokens, bytes or ones).

    The same seed draws the same texts whatever the differences are, so replicate b of two steps of one run belongs to one
    resampled corpus, and standard errors of aggregated weights come out right.
    """
    diff, count = np.asarray(difference, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    names = np.asarray(domain, dtype=object)
    out = np.empty((n, len(domains)))
    for k, name in enumerate(domains):
        index = np.flatnonzero(names == name)
        if not len(index):
            raise InputError(f"domain {name!r} has no evaluation texts")
        rng = np.random.default_rng([seed, k])
        picks = index[rng.integers(0, len(index), (n, len(index)))]
        out[:, k] = diff[picks].sum(axis=1) / count[picks].sum(axis=1)
    return out


def standard_errors(replicates: Array, rule: Callable[[Array], Array]) -> Array:
    """Standard error of `rule(replicate)` over the first axis of `replicates`."""
    return np.stack([rule(replicate) for replicate in replicates]).std(axis=0, ddof=1)
