"""Points of the simplex: one value per domain, aligned by name, normalised, compared.

Mappings {domain: value} and arrays are both accepted, and the answer has the form of what came in. Mixed calls are aligned
by NAME: two mappings with different keys are an error, never a silent reordering.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lldfast.errors import InputError, listed

Array = NDArray[np.float64]
Values = Mapping[str, float] | ArrayLike


def align(values: Values, domains: Sequence[str], what: str = "values") -> Array:
    """Values in the order of `domains`, as float64 [K].

    Raises:
        InputError: a domain is missing, unknown or repeated, the length differs, or a value is NaN.
    """
    if not len(domains):
        raise InputError(f"{what}: there are no domains")
    if len(set(domains)) != len(domains):
        raise InputError(f"domains repeat a name: [{listed(map(repr, domains))}]")
    if isinstance(values, Mapping):
        unknown = [name for name in values if name not in set(domains)]
        if unknown:
            close = difflib.get_close_matches(str(unknown[0]), list(domains), n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; the domains are [{listed(map(repr, domains))}]"
            raise InputError(f"{what}: unknown domain {unknown[0]!r}{hint}")
        missing = [name for name in domains if name not in values]
        if missing:
            raise InputError(f"{what}: domain {missing[0]!r} is missing")
        array = numbers([values[name] for name in domains], what)
    else:
        array = numbers(values, what)
        if array.shape != (len(domains),):
            raise InputError(f"{what}: expected {len(domains)} values, one per domain, got shape {array.shape}")
    bad = np.flatnonzero(np.isnan(array))
    if len(bad):
        raise InputError(f"{what}: the value of domain {domains[int(bad[0])]!r} is NaN")
    return array


def numbers(values: Any, what: str) -> Array:
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{what}: expected numbers, got {values!r:.100} ({error})") from None


def names_of(values: Values, domains: Sequence[str] | None) -> list[str]:
    if isinstance(values, Mapping):
        return list(values) if domains is None else list(domains)
    if domains is not None:
        return list(domains)
    array = numbers(values, "values")
    if array.ndim != 1:
        raise InputError(f"expected one value per domain, got shape {array.shape}")
    return [str(k) for k in range(len(array))]


def like(values: Values, names: Sequence[str], array: Array) -> Any:
    return dict(zip(names, array.tolist(), strict=True)) if isinstance(values, Mapping) else array


def simplex(values: Values, domains: Sequence[str], what: str = "weights") -> Array:
    """Weights in the order of `domains`, normalised to sum 1 (Table 4 of the paper sums to 0.99903: rounding is forgiven).

    Raises:
        InputError: an entry is negative or not finite, or all are zero.
    """
    array = align(values, domains, what)
    bad = np.flatnonzero(~np.isfinite(array) | (array < 0))
    if len(bad):
        raise InputError(f"{what}: the weight of domain {domains[int(bad[0])]!r} is {array[bad[0]]}, not a finite number >= 0")
    with np.errstate(over="ignore"):
        total = array.sum()
    if total <= 0:
        raise InputError(f"{what}: all weights are zero")
    if not np.isfinite(total):
        raise InputError(f"{what}: the sum of the weights is not finite")
    return array / total


def mixture(weights: Values, domains: Sequence[str], what: str = "weights") -> dict[str, float]:
    """`simplex` by name, {domain: weight} in the order of `domains`.

    Raises:
        InputError: as `simplex`.
    """
    return dict(zip(domains, simplex(weights, domains, what).tolist(), strict=True))


def softmax(logits: Array) -> Array:
    """Softmax over the last axis; -inf entries get weight 0."""
    top = logits.max(axis=-1, keepdims=True)
    if not np.isfinite(top).all():
        raise InputError("softmax: the largest logit is not finite")
    weights = np.exp(logits - top)
    return weights / weights.sum(axis=-1, keepdims=True)


def log(weights: Array) -> Array:
    with np.errstate(divide="ignore"):
        return np.log(weights)


def log_prior(prior: Values | None, names: Sequence[str]) -> Array:
    return np.zeros(len(names)) if prior is None else log(simplex(prior, names, "prior"))


def with_floor(weights: Array, floor: float) -> Array:
    """`(1 - K floor) w + floor`: every domain gets at least `floor`, the order of the others is kept."""
    k = weights.shape[-1]
    if not 0 <= floor * k <= 1:
        raise InputError(f"floor must lie in [0, 1/K] = [0, {1 / k:.4g}], got {floor}")
    return weights if floor == 0 else (1 - k * floor) * weights + floor


def entropy(weights: ArrayLike) -> float:
    """Entropy of weights [K], in nats."""
    w = np.asarray(weights, dtype=np.float64)
    w = w[w > 0] / w.sum()
    return float(-(w * np.log(w)).sum())


def effective_domains(weights: Values) -> float:
    """Effective number of domains, exp(H(w)): K for uniform weights, 1 for a single domain.

    Raises:
        InputError: as `simplex`.
    """
    simplex(weights, names_of(weights, None))
    return float(np.exp(entropy(list(weights.values()) if isinstance(weights, Mapping) else weights)))
