"""Weights from G and Delta under a constraint: a trust region in KL, and the simplex itself, in numpy.

Eq. (6) solves without constraints and hides negative entries in a softmax. `trust_region_weights` fixes how far its weights may
be from the prior; `fit_weights` looks for weights in the first place: `min |C (Delta - a (G w + drift))|^2` over the simplex.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lldfast.errors import InputError, renamed_arguments
from lldfast.weights.equations import HasGram, V, adjusted_direction, named_problem, regularised
from lldfast.weights.simplex import Array, Values, align, like, log_prior, simplex, softmax, with_floor

TIE_RIDGE = 1e-5  # of tr G / K: decides between equally good fits and moves no other
MAX_LOGIT = 700.0  # exp(-700) is still a normal number: no weight becomes exactly zero, which a geometric mean would keep


def check_radius(radius: float) -> None:
    if not isinstance(radius, (int, float, np.number)) or not 0 < radius < np.inf:
        raise InputError(f"radius must be > 0 and finite (nats), got {radius}")


def trust_region_tau(v: Array, radius: float, prior: Array | None = None) -> float:
    """The tau at which `softmax(log w0 + v / tau)` lies `radius` nats from the prior w0: KL(w || w0) falls as tau grows.

    Args:
        v: direction [K]; the answer has its unit.
        prior: w0 on the simplex [K]; uniform by default. Domains of prior weight 0 stay at 0 and do not count.

    Returns:
        tau > 0; inf where v is the same for all domains, whose weights are the prior at any tau. No weights are farther from
        the prior than those of the largest v: a radius past them gives ptp(v) / 700, which has all the weight there.

    Raises:
        InputError: a radius that is not > 0.
    """
    check_radius(radius)
    w0 = np.full(len(v), 1 / len(v)) if prior is None else prior
    x, log_w0 = v[w0 > 0], np.log(w0[w0 > 0])
    spread = float(np.ptp(x))
    if spread <= 1e-14 * float(np.abs(x).max()):
        return float("inf")
    x = (x - x.max()) / spread  # [-1, 0]; KL along w0 exp(b x) depends on b = spread / tau alone

    def divergence(b: float) -> float:
        w = softmax(log_w0 + b * x)
        top = float((log_w0 + b * x).max())
        return float(b * (w @ x)) - top - float(np.log(np.exp(log_w0 + b * x - top).sum()))

    low, high = np.log(1e-12), np.log(MAX_LOGIT)
    if divergence(MAX_LOGIT) <= radius:
        return spread / MAX_LOGIT
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if divergence(np.exp(middle)) < radius else (low, middle)
    return float(spread / np.exp((low + high) / 2))


@renamed_arguments(normalise="gram_scale")
def trust_region_weights(
    gram: ArrayLike | HasGram,
    delta: V,
    *,
    radius: float,
    prior: Values | None = None,
    gram_scale: str = "none",
    ridge: float | Literal["auto"] = "auto",
    floor: float = 0.0,
    domains: Sequence[str] | None = None,
) -> V:
    """Eq. (5) with its penalty as a constraint: `max <w, G^-1 Delta>` over weights with KL(w || w0) <= `radius`.

    The maximum is eq. (6) at the tau that puts it on the border, so the sharpness does not depend on the scale of G or Delta.

    Args:
        gram, ridge: as `adjusted_lld_weights`.
        radius: nats, > 0; what is past the farthest weights gives those, see `trust_region_tau`.
        gram_scale: as `adjusted_direction`; of its choices only "corr" changes the answer, the others being scales of one v.

    Returns:
        Weights on the simplex [K], in the form of `delta`; the prior where G^-1 Delta is the same for all domains. The radius
        is theirs before `floor`.

    Raises:
        InputError: as `adjusted_lld_weights`; radius <= 0.
    """
    check_radius(radius)
    names, g, d, ridge = named_problem(gram, delta, ridge, domains)
    contrast = adjusted_direction(g, d, gram_scale=gram_scale, ridge=ridge).contrast
    log_w0 = log_prior(prior, names)
    w = softmax(log_w0 + contrast / trust_region_tau(contrast, radius, softmax(log_w0)))
    return like(delta, names, with_floor(w, floor))


def nonnegative_least_squares(a: Array, b: Array) -> Array:
    """`argmin_{x >= 0} |a x - b|` [n] for a [m, n], by Lawson and Hanson's active set on columns of unit length."""
    norms = np.linalg.norm(a, axis=0)
    norms = np.where(norms > 0, norms, 1.0)
    a = a / norms
    n = a.shape[1]
    x, passive = np.zeros(n), np.zeros(n, dtype=bool)
    tolerance = 1e-14 * float(np.linalg.norm(b))
    gradient = a.T @ b
    for _ in range(10 * n + 10):  # each turn lowers the distance; it takes about n of them
        entering = int(np.argmax(np.where(passive, -np.inf, gradient)))
        if passive[entering] or gradient[entering] <= tolerance:
            break
        passive[entering] = True
        z = _least_squares(a, b, passive)
        if z[entering] <= 0:  # its gradient was rounding
            passive[entering], gradient[entering] = False, 0.0
            continue
        while (z[passive] <= 0).any():
            blocking = np.flatnonzero(passive & (z <= 0))
            part = x[blocking] / (x[blocking] - z[blocking])
            x = x + part.min() * (z - x)
            x[blocking[part.argmin()]] = 0.0
            passive &= x > 0
            z = _least_squares(a, b, passive)
        x = z
        gradient = a.T @ (b - a @ x)
    return x / norms


def _least_squares(a: Array, b: Array, columns: NDArray[np.bool_]) -> Array:
    x = np.zeros(a.shape[1])
    x[columns] = np.linalg.lstsq(a[:, columns], b, rcond=None)[0]
    return x


@dataclass(frozen=True)
class SimplexFit:
    """Weights whose step would bring the base nearest to the target: see `simplex_fit`."""

    weights: Array  # [K] on the simplex
    step: float  # a: Delta over G's unit; 0 where no direction helps
    residual: float  # |C(Delta - a (G w + drift))|^2 / |C Delta|^2; 1 for no step at all, 0 where Delta has no contrast
    ridge: float  # added to the diagonal of G, in the unit of G


def check_fit_step(step: float | str) -> None:
    if step != "auto" and (not isinstance(step, (int, float, np.number)) or not 0 < step < np.inf):
        raise InputError(f"step must be 'auto', or > 0 and finite, got {step!r}")


def simplex_fit(
    gram: ArrayLike,
    delta: ArrayLike,
    *,
    step: float | Literal["auto"] = "auto",
    drift: ArrayLike | None = None,
    prior: Array | None = None,
    ridge: float | Literal["auto"] = "auto",
) -> SimplexFit:
    """`min |C (Delta - a (G w + drift))|^2` over w on the simplex: eq. (4) with a step a, in the part that eq. (2) sees.

    C = I - 1 1^T / K takes the mean over domains away: eq. (2) is a variance, blind to what is gained everywhere at once.
    With step="auto" a > 0 is free: u = a w >= 0 and `G w + drift = (G + drift 1^T) w` make it one non-negative least-squares
    problem. A fixed a is one too: on the simplex the residual is E w with E = C (a (G + drift 1^T) - Delta 1^T), and the u >= 0
    nearest to `E u = 0, 1^T u = 1` is a multiple of the w with the smallest |E w|.

    C G always has a null vector, so that several (a, w) may fit equally well. Of these a penalty
    `(1e-5 tr G / K)^2 sum_k u_k^2 / (K w0_k) = (...)^2 a^2 (1 + chi^2(w, w0)) / K` takes the smallest step and, among equal
    domains, the prior's proportions (with a fixed step: the smallest chi^2 distance to the prior).

    Args:
        gram, ridge: G [K, K] and what is added to its diagonal, as `adjusted_direction`.
        step: a in the unit of Delta / G (for a plain gradient step, the learning rate times the number of steps), or "auto".
        drift: change of l per unit of step that no choice of w alters [K], in the unit of G (AdamW's old momentum and decay).
        prior: w0 on the simplex [K]; uniform by default. Domains of prior weight 0 stay at 0.

    Raises:
        InputError: as `adjusted_direction`; a step that is not > 0, a drift that is not [K] finite numbers.
    """
    check_fit_step(step)
    d, values, vectors, amount = regularised(gram, delta, ridge)
    w0 = np.full(len(d), 1 / len(d)) if prior is None else prior
    unit = float(values.mean())  # of G; d.std() is that of Delta: all that is solved is free of units
    moves = (vectors * values) @ vectors.T / unit
    if drift is not None:
        moves = moves + align(drift, [str(k) for k in range(len(d))], "drift")[:, None] / unit
        if not np.isfinite(moves).all():
            raise InputError("drift has entries that are not finite")
    kept = w0 > 0
    moves = (moves - moves.mean(axis=0))[:, kept]  # C (G + drift 1^T)
    size = float(d.std())
    wanted = d - d.mean() if size > 1e-14 * float(np.abs(d).max()) else np.zeros(len(d))
    wanted = wanted / size if wanted.any() else wanted
    tie = TIE_RIDGE / np.sqrt(len(d) * w0[kept])
    zero = np.zeros(len(tie))
    if step == "auto":
        u = nonnegative_least_squares(np.vstack([moves, np.diag(tie)]), np.concatenate([wanted, zero]))
        a = float(u.sum())
    else:
        a = float(step) * unit / size if wanted.any() else 1.0  # without a contrast only the balance of G w counts
        tied = tie[:, None] * (np.eye(len(tie)) - w0[kept, None])
        e = np.vstack([a * moves - wanted[:, None], a * tied])
        e = np.vstack([e / max(float(np.linalg.norm(e, axis=0).max()), 1e-300), np.ones(len(tie))])
        u = nonnegative_least_squares(e, np.append(np.zeros(len(e) - 1), 1.0))
    weights = w0.copy()
    if u.sum() > 0:
        weights[kept] = u / u.sum()
    left = wanted - a * (moves @ weights[kept])
    residual = float(left @ left / (wanted @ wanted)) if wanted.any() else 0.0
    return SimplexFit(weights, a * size / unit if step == "auto" else float(step), residual, amount)


def fit_weights(
    gram: ArrayLike | HasGram,
    delta: V,
    *,
    step: float | Literal["auto"] = "auto",
    drift: Values | None = None,
    prior: Values | None = None,
    ridge: float | Literal["auto"] = "auto",
    floor: float = 0.0,
    domains: Sequence[str] | None = None,
) -> V:
    """The simplex-constrained direction: weights whose step G w is nearest to the contrast of Delta, see `simplex_fit`.

    Unlike eq. (6) it solves for weights that are weights: no inverse whose negative entries a softmax then has to hide, no tau.
    Domains that do not help get exactly 0; `floor` lifts them.

    Args:
        gram, ridge: as `adjusted_lld_weights`.
        step: a > 0 in the unit of Delta / G, or "auto" to fit it with the weights, which then depend on the direction of Delta
            and not on its size.
        drift: as `simplex_fit`, by name when it is a mapping. That of a GramEstimate is not taken by itself: AdamW's momentum
            lasts about 1 / (1 - beta1) steps, and a fitted step reaches further.

    Returns:
        Weights on the simplex [K], in the form of `delta`; the prior where no direction helps (step="auto").

    Raises:
        InputError: as `adjusted_lld_weights` and `simplex_fit`.
    """
    names, g, d, ridge = named_problem(gram, delta, ridge, domains)
    moved = None if drift is None else align(drift, names, "drift")
    w0 = None if prior is None else simplex(prior, names, "prior")
    w = simplex_fit(g, d, step=step, drift=moved, prior=w0, ridge=ridge).weights
    return like(delta, names, with_floor(w, floor))
