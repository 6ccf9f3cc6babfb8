"""Domain weights from log-likelihood differences: eqs. (4)-(9) of the LLD paper, in numpy (rules along a run: rules.py).

Notation: K domains, Delta_k = l_k(target) - l_k(base) in nats per token, tau a temperature in the same unit, w0 a prior on
the simplex (uniform unless given), G = J J^T the Gram matrix of the domain log-likelihood gradients.

Mappings {domain: value} and arrays are both accepted, and the answer has the form of what came in. Mixed calls are aligned
by NAME: two mappings with different keys are an error, never a silent reordering.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lldfast.errors import InputError

Array = NDArray[np.float64]
Values = Mapping[str, float] | ArrayLike
V = TypeVar("V", bound=Values)


@runtime_checkable
class HasGram(Protocol):
    """A Gram matrix by name with the ridge that was chosen for it, such as what `gram.estimate` returns."""

    @property
    def domains(self) -> Sequence[str]: ...

    @property
    def ridge(self) -> float | None:
        """Amount for the diagonal, in the unit of G; None where none was chosen."""

    def matrix(self, domains: Sequence[str]) -> Array:
        """G [K, K] with rows and columns in the order of `domains`."""


# ridge="auto": a G that is worse conditioned than this, or indefinite, is dominated by the noise of few texts.
MAX_CONDITION = 1e8
AUTO_RIDGE = 0.01  # of tr G / K
NORMALISE = ("spread", "trace", "corr", "none")


def align(values: Values, domains: Sequence[str], what: str = "values") -> Array:
    """Values in the order of `domains`, as float64 [K].

    Raises:
        InputError: a domain is missing, unknown or repeated, the length differs, or a value is NaN.
    """
    if not len(domains):
        raise InputError(f"{what}: there are no domains")
    if len(set(domains)) != len(domains):
        raise InputError(f"domains repeat a name: {list(domains)}")
    if isinstance(values, Mapping):
        unknown = [name for name in values if name not in set(domains)]
        if unknown:
            close = difflib.get_close_matches(str(unknown[0]), list(domains), n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; the domains are {list(domains)}"
            raise InputError(f"{what}: unknown domain {unknown[0]!r}{hint}")
        missing = [name for name in domains if name not in values]
        if missing:
            raise InputError(f"{what}: domain {missing[0]!r} is missing")
        array = _numbers([values[name] for name in domains], what)
    else:
        array = _numbers(values, what)
        if array.shape != (len(domains),):
            raise InputError(f"{what}: expected {len(domains)} values, one per domain, got shape {array.shape}")
    bad = np.flatnonzero(np.isnan(array))
    if len(bad):
        raise InputError(f"{what}: the value of domain {domains[int(bad[0])]!r} is NaN")
    return array


def _numbers(values: Any, what: str) -> Array:
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{what}: expected numbers, got {values!r:.100} ({error})") from None


def _names(values: Values, domains: Sequence[str] | None) -> list[str]:
    if isinstance(values, Mapping):
        return list(values) if domains is None else list(domains)
    if domains is not None:
        return list(domains)
    array = _numbers(values, "values")
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


def check_tau(tau: float) -> None:
    if not isinstance(tau, (int, float, np.number)) or not tau > 0:
        raise InputError(f"tau must be > 0 (inf gives the prior), got {tau}")


def _check_delta(delta: Array, domains: Sequence[str]) -> None:
    bad = np.flatnonzero(~np.isfinite(delta))
    if len(bad):
        raise InputError(f"delta: the value of domain {domains[int(bad[0])]!r} is {delta[bad[0]]}")


def lld_weights(
    delta: V, *, tau: float = 1.0, prior: Values | None = None, floor: float = 0.0, domains: Sequence[str] | None = None
) -> V:
    """Iterative-LLD, eq. (7): `w_k ~ w0_k exp(Delta_k / tau)`.

    Args:
        delta: l(target) - l(base) per domain [K], nats per token.
        tau: temperature in the unit of delta; inf returns the prior.
        prior: w0 [K]; uniform by default. Normalised here.
        floor: least weight of any domain, see `with_floor`.
        domains: names of the K entries when `delta` is an array and `prior` a mapping.

    Returns:
        Weights on the simplex [K], in the form of `delta`.

    Raises:
        InputError: tau <= 0, a delta that is not finite, names that do not match.
    """
    check_tau(tau)
    names = _names(delta, domains)
    d = align(delta, names, "delta")
    _check_delta(d, names)
    w = softmax(log_prior(prior, names) + (d - d.mean()) / tau)
    return like(delta, names, with_floor(w, floor))


def log_prior(prior: Values | None, names: Sequence[str]) -> Array:
    return np.zeros(len(names)) if prior is None else log(simplex(prior, names, "prior"))


@dataclass(frozen=True)
class AdjustedDirection:
    """`v = G^-1 Delta` and what it takes to read it: see `adjusted_direction`."""

    v: Array  # [K], after normalisation
    scale: float  # factor by which G^-1 Delta was multiplied; with "corr", whose v is no multiple of it, the ratio of spreads
    offset: float  # mean of v: eq. (6) ignores it after the softmax, yet it depends on a common offset of Delta
    contrast: Array  # v - offset [K]
    condition: float  # of the matrix solved: G with its ridge, or its correlation matrix
    ridge: float  # added to the diagonal of G, in the unit of G

    def effective_tau(self, tau: float) -> float:
        """The tau at which the literal eq. (6), normalise="none", gives the weights of this direction at `tau`.

        inf where every domain weighs the same. With normalise="corr", another direction than eq. (6)'s, it is the tau of the
        same spread of logits.
        """
        return tau / self.scale if self.scale > 0 else float("inf")


def regularised(gram: ArrayLike, delta: ArrayLike, ridge: float | Literal["auto"]) -> tuple[Array, Array, Array, float]:
    """Delta [K], eigenvalues [K] (>= 0, ridge included) and eigenvectors [K, K] of G, and the ridge that was added."""
    g, d = _numbers(gram, "gram"), _numbers(delta, "delta")
    if d.ndim != 1 or not len(d) or g.shape != (len(d), len(d)):
        raise InputError(f"gram must be [K, K] for delta [K], got {g.shape} and {d.shape}")
    if not np.isfinite(g).all():
        raise InputError("gram has entries that are not finite")
    if not np.allclose(g, g.T, rtol=1e-6, atol=1e-9 * max(float(np.abs(g).max(initial=0.0)), 1e-300)):
        raise InputError("gram is not symmetric")
    values, vectors = np.linalg.eigh((g + g.T) / 2)
    if values[-1] <= 0:
        raise InputError("gram has no positive eigenvalue")
    values = np.clip(values, 0.0, None)  # a debiased estimate can dip below zero
    if ridge == "auto":
        amount = 0.0 if values[-1] <= MAX_CONDITION * values[0] else AUTO_RIDGE * float(values.sum()) / len(values)
    else:
        amount = float(ridge)
        if not amount >= 0:
            raise InputError(f"ridge must be >= 0 or 'auto', got {ridge}")
        if values[0] + amount <= 0:
            raise InputError("gram is singular and ridge is 0: give a ridge or 'auto'")
    return d, values + amount, vectors, amount


def adjusted_direction(
    gram: ArrayLike, delta: ArrayLike, *, normalise: str = "spread", ridge: float | Literal["auto"] = "auto"
) -> AdjustedDirection:
    """Solve `G v = Delta` (eq. (4)'s unconstrained optimum) for symmetric, possibly singular G [K, K].

    Args:
        normalise: "spread" multiplies v so that std(v) = std(Delta), which keeps the meaning of tau; "trace" uses
            G K / tr G, so that G ~ I gives back eq. (7); "corr" solves in the correlation matrix D^-1/2 G D^-1/2, D = diag G,
            so that every diagonal G gives back eq. (7); "none" is the literal eq. (6).
        ridge: added to the diagonal, in the unit of G. "auto" adds nothing to a well-conditioned G, and 0.01 tr G / K to
            a singular or indefinite one (few texts), whose noise would otherwise decide v.

    Raises:
        InputError: shapes, a G that is not finite, not symmetric or zero, unknown `normalise`, negative ridge.
    """
    if normalise not in NORMALISE:
        raise InputError(f"normalise must be one of {', '.join(NORMALISE)}, got {normalise!r}")
    d, values, vectors, amount = regularised(gram, delta, ridge)
    v = vectors @ ((vectors.T @ d) / values)
    literal = float(v.std())
    scale = 1.0
    if normalise == "trace":
        scale = float(np.trace(np.asarray(gram, dtype=np.float64)) / len(d))
    elif normalise == "spread" and np.ptp(v) > 1e-12 * max(float(np.abs(v).max()), 1e-300):
        scale = float(d.std()) / literal
    if normalise == "corr":
        g = (vectors * values) @ vectors.T
        root = np.sqrt(g.diagonal())
        values, vectors = np.linalg.eigh(g / np.outer(root, root))
        values = np.clip(values, np.finfo(float).eps * values[-1], None)  # rounding of a nearly singular one
        v = vectors @ ((vectors.T @ d) / values)
        scale = float(v.std()) / literal if literal > 0 else 1.0
    else:
        v = v * scale
    return AdjustedDirection(v, scale, float(v.mean()), v - v.mean(), float(values[-1] / values[0]), amount)


def named_problem(
    gram: ArrayLike | HasGram, delta: Values, ridge: float | Literal["auto"], domains: Sequence[str] | None
) -> tuple[list[str], Array, Array, float | Literal["auto"]]:
    """Names, G [K, K] and Delta [K] in their order, and the ridge: "auto" is the one that was chosen with G, where one was."""
    if isinstance(gram, HasGram):
        domains = gram.domains if domains is None and not isinstance(delta, Mapping) else domains
        ridge = gram.ridge or "auto" if ridge == "auto" else ridge
        gram = gram.matrix(_names(delta, domains))
    names = _names(delta, domains)
    d = align(delta, names, "delta")
    _check_delta(d, names)
    return names, _numbers(gram, "gram"), d, ridge


def adjusted_lld_weights(
    gram: ArrayLike | HasGram,
    delta: V,
    *,
    tau: float = 1.0,
    prior: Values | None = None,
    normalise: str = "spread",
    ridge: float | Literal["auto"] = "auto",
    floor: float = 0.0,
    domains: Sequence[str] | None = None,
) -> V:
    """Adjusted-LLD, eq. (6): `w_k ~ w0_k exp((G^-1 Delta)_k / tau)`.

    Args:
        gram: G = J J^T [K, K] in the order of `delta` (of `domains` when given), or what `gram.estimate` returns, which is
            aligned by name.
        normalise, ridge: see `adjusted_direction`; the paper's literal rule is normalise="none", ridge=0. "auto" is the ridge
            that a GramEstimate has chosen, where it has.

    Returns:
        Weights on the simplex [K], in the form of `delta`.

    Raises:
        InputError: as `lld_weights` and `adjusted_direction`.
    """
    check_tau(tau)
    names, g, d, ridge = named_problem(gram, delta, ridge, domains)
    direction = adjusted_direction(g, d, normalise=normalise, ridge=ridge)
    w = softmax(log_prior(prior, names) + direction.contrast / tau)
    return like(delta, names, with_floor(w, floor))


def with_floor(weights: Array, floor: float) -> Array:
    """`(1 - K floor) w + floor`: every domain gets at least `floor`, the order of the others is kept."""
    k = weights.shape[-1]
    if not 0 <= floor * k <= 1:
        raise InputError(f"floor must lie in [0, 1/K] = [0, {1 / k:.4g}], got {floor}")
    return weights if floor == 0 else (1 - k * floor) * weights + floor


def aggregate_weights(
    weights: Sequence[Values] | Mapping[Any, Values] | NDArray[np.float64],
    *,
    method: str = "geometric",
    step_weights: ArrayLike | None = None,
    domains: Sequence[str] | None = None,
) -> Any:
    """Aggregated-LLD, eq. (8): the normalised geometric mean over steps, `wbar_k ~ prod_t w_{t,k}^{a_t}`, sum a = 1.

    It is `argmin_w sum_t a_t KL(w || w_t)` (eq. (9)); `method="arithmetic"` minimises the squared distance instead.

    Args:
        weights: S weight vectors: a sequence of mappings or arrays [K], a mapping {step: weights}, or an array [S, K].
        step_weights: a_t >= 0 [S], normalised here; equal by default (the paper).

    Returns:
        A mapping when the steps are mappings, else an array [K].

    Raises:
        InputError: no steps, names that differ between steps, or no domain has a positive geometric mean.
    """
    rows: list[Any] = list(weights.values()) if isinstance(weights, Mapping) else list(weights)
    if not rows:
        raise InputError("aggregate_weights: no steps to aggregate")
    names = _names(rows[0], domains)
    w = np.stack([simplex(row, names, f"weights of step {i}") for i, row in enumerate(rows)])  # [S, K]
    a = np.ones(len(rows)) if step_weights is None else np.asarray(step_weights, dtype=np.float64)
    if a.shape != (len(rows),) or not np.isfinite(a).all() or (a < 0).any() or a.sum() <= 0:
        raise InputError(f"step_weights must be {len(rows)} finite numbers >= 0 with a positive sum")
    a = a / a.sum()
    if method == "geometric":
        used = a > 0  # 0 * log 0 of a step that does not count would be NaN
        logits = (a[used, None] * log(w[used])).sum(axis=0)
        if not np.isfinite(logits).any():
            raise InputError("aggregate_weights: every domain has weight 0 at some step, so the geometric mean is 0")
        wbar = softmax(logits)
    elif method == "arithmetic":
        wbar = (a[:, None] * w).sum(axis=0)
    else:
        raise InputError(f"method must be 'geometric' or 'arithmetic', got {method!r}")
    return like(rows[0], names, wbar)


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
    simplex(weights, _names(weights, None))
    return float(np.exp(entropy(list(weights.values()) if isinstance(weights, Mapping) else weights)))


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
