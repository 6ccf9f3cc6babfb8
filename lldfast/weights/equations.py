"""Domain weights from log-likelihood differences: eqs. (4)-(9) of the LLD paper, in numpy (rules along a run: rules.py).

Notation: K domains, Delta_k = l_k(target) - l_k(base) in nats per token, tau a temperature in the same unit, w0 a prior on
the simplex (uniform unless given), G = J J^T the Gram matrix of the domain log-likelihood gradients.

Mappings {domain: value} and arrays are both accepted, and the answer has the form of what came in. Mixed calls are aligned
by NAME: two mappings with different keys are an error, never a silent reordering.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lldfast.errors import InputError, renamed_arguments
from lldfast.weights.simplex import Array, Values, align, like, log, log_prior, names_of, numbers, simplex, softmax, with_floor

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
GRAM_SCALES = ("spread", "trace", "corr", "none")


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
    names = names_of(delta, domains)
    d = align(delta, names, "delta")
    _check_delta(d, names)
    w = softmax(log_prior(prior, names) + (d - d.mean()) / tau)
    return like(delta, names, with_floor(w, floor))


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
        """The tau at which the literal eq. (6), gram_scale="none", gives the weights of this direction at `tau`.

        inf where every domain weighs the same. With gram_scale="corr", another direction than eq. (6)'s, it is the tau of the
        same spread of logits.
        """
        return tau / self.scale if self.scale > 0 else float("inf")


def regularised(gram: ArrayLike, delta: ArrayLike, ridge: float | Literal["auto"]) -> tuple[Array, Array, Array, float]:
    """Delta [K], eigenvalues [K] (>= 0, ridge included) and eigenvectors [K, K] of G, and the ridge that was added."""
    g, d = numbers(gram, "gram"), numbers(delta, "delta")
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


@renamed_arguments(normalise="gram_scale")
def adjusted_direction(
    gram: ArrayLike, delta: ArrayLike, *, gram_scale: str = "spread", ridge: float | Literal["auto"] = "auto"
) -> AdjustedDirection:
    """Solve `G v = Delta` (eq. (4)'s unconstrained optimum) for symmetric, possibly singular G [K, K].

    Args:
        gram_scale: "spread" multiplies v so that std(v) = std(Delta), which keeps the meaning of tau; "trace" uses
            G K / tr G, so that G ~ I gives back eq. (7); "corr" solves in the correlation matrix D^-1/2 G D^-1/2, D = diag G,
            so that every diagonal G gives back eq. (7); "none" is the literal eq. (6).
        ridge: added to the diagonal, in the unit of G. "auto" adds nothing to a well-conditioned G, and 0.01 tr G / K to
            a singular or indefinite one (few texts), whose noise would otherwise decide v.

    Raises:
        InputError: shapes, a G that is not finite, not symmetric or zero, unknown `gram_scale`, negative ridge.
    """
    if gram_scale not in GRAM_SCALES:
        raise InputError(f"gram_scale must be one of {', '.join(GRAM_SCALES)}, got {gram_scale!r}")
    d, values, vectors, amount = regularised(gram, delta, ridge)
    v = vectors @ ((vectors.T @ d) / values)
    literal = float(v.std())
    scale = 1.0
    if gram_scale == "trace":
        scale = float(np.trace(np.asarray(gram, dtype=np.float64)) / len(d))
    elif gram_scale == "spread" and np.ptp(v) > 1e-12 * max(float(np.abs(v).max()), 1e-300):
        scale = float(d.std()) / literal
    if gram_scale == "corr":
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
        gram = gram.matrix(names_of(delta, domains))
    names = names_of(delta, domains)
    d = align(delta, names, "delta")
    _check_delta(d, names)
    return names, numbers(gram, "gram"), d, ridge


@renamed_arguments(normalise="gram_scale")
def adjusted_lld_weights(
    gram: ArrayLike | HasGram,
    delta: V,
    *,
    tau: float = 1.0,
    prior: Values | None = None,
    gram_scale: str = "spread",
    ridge: float | Literal["auto"] = "auto",
    floor: float = 0.0,
    domains: Sequence[str] | None = None,
) -> V:
    """Adjusted-LLD, eq. (6): `w_k ~ w0_k exp((G^-1 Delta)_k / tau)`.

    Args:
        gram: G = J J^T [K, K] in the order of `delta` (of `domains` when given), or what `gram.estimate` returns, which is
            aligned by name.
        gram_scale, ridge: see `adjusted_direction`; the paper's literal rule is gram_scale="none", ridge=0. "auto" is the ridge
            that a GramEstimate has chosen, where it has.

    Returns:
        Weights on the simplex [K], in the form of `delta`.

    Raises:
        InputError: as `lld_weights` and `adjusted_direction`.
    """
    check_tau(tau)
    names, g, d, ridge = named_problem(gram, delta, ridge, domains)
    direction = adjusted_direction(g, d, gram_scale=gram_scale, ridge=ridge)
    w = softmax(log_prior(prior, names) + direction.contrast / tau)
    return like(delta, names, with_floor(w, floor))


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
    names = names_of(rows[0], domains)
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
