"""The ridge for G's diagonal: how far the noise of the texts lets G be inverted, told by split halves.

`products` [M, M], `domain` [M] and `tokens` [M] are those of debias.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from lldfast.errors import InputError
from lldfast.gram.debias import GroupProducts, finite_per_domain, psd_clip
from lldfast.weights.equations import AUTO_RIDGE, MAX_CONDITION

RIDGES = (0.0, 0.003, 0.01, 0.03, 0.1, 0.3)  # of tr G / K


def auto_ridge(
    products: ArrayLike,
    domain: ArrayLike,
    tokens: ArrayLike,
    delta: ArrayLike | None = None,
    *,
    debias: bool = True,
    grid: Sequence[float] = RIDGES,
) -> float:
    """The ridge to add to G's diagonal before `G v = Delta` is solved, in the unit of G, chosen by split halves.

    Halves A and B of every domain's groups have independent text noise. For v_A = (G_A + r)^-1 Delta from one half,
    `|s v_A - v|_G^2 = s^2 v_A^T G v_A - 2 s v_A^T Delta + const` is linear in the unknown G, so the other half's G_B in its
    place is unbiased: no penalty for B's own noise, which |Delta - s G_B v_A|^2 has (it shrinks far too much). With the best
    scale s (the rules scale v), summed over halves in both orders, r maximises

        (sum v_A^T Delta)^2 / sum v_A^T G_B v_A,  or averaged over Delta ~ N(0, C):  (sum tr C R_A)^2 / sum tr C R_A G_B R_A

    with R_A = (G_A + r)^-1, C = I - 11^T/K. Without noise the maximum is at r = 0. A half (odd groups, even groups of a domain)
    has twice the noise of the whole, so candidate r is tried there as 2 r.

    Sketch noise is common to both halves, and not seen here: `relative_error` bounds what it does to v. A domain in one group
    cannot be split: both halves share it, and its noise is not seen either.

    Args:
        delta: Delta [K]; None averages over contrasts.
        grid: candidates, as fractions of tr G / K.

    Returns:
        A number >= 0; > 0 if G is singular, indefinite or worse conditioned than `MAX_CONDITION`.
    """
    fractions = np.unique(np.asarray(grid, dtype=np.float64))
    if not len(fractions) or not np.isfinite(fractions).all() or fractions[0] < 0:
        raise InputError(f"grid must hold finite numbers >= 0, got {grid}")
    groups = GroupProducts(products, domain, tokens, debias=debias)
    gram, k = psd_clip(groups.gram()), groups.size
    target = np.eye(k) - 1.0 / k if delta is None else np.outer(*[finite_per_domain(delta, k)] * 2)  # E Delta Delta^T
    values, unit = np.linalg.eigvalsh(gram), float(np.trace(gram)) / k
    if not values[-1] > 0:
        raise InputError("gram has no positive eigenvalue")
    singular = values[-1] > MAX_CONDITION * values[0]
    if singular:
        fractions = fractions[fractions > 0] if fractions[-1] > 0 else np.array([AUTO_RIDGE])
    if groups.alone.all() or not target.any():
        return AUTO_RIDGE * unit if singular else 0.0
    odd = groups.number % 2 == 1
    halves = groups.gram(odd | groups.alone), groups.gram(~odd | groups.alone)
    gain, cost = np.zeros(len(fractions)), np.zeros(len(fractions))
    for train, test in (halves, halves[::-1]):
        lam, q = np.linalg.eigh(train)
        lam = lam.clip(0.0)
        inverse = 1.0 / np.maximum(lam + 2 * fractions[:, None] * lam.mean(), unit / MAX_CONDITION)  # [candidates, K]
        rotated, seen = q.T @ target @ q, q.T @ test @ q
        gain += inverse @ rotated.diagonal()
        cost += np.einsum("ri,ij,rj->r", inverse, rotated * seen, inverse)
    # A cost <= 0 comes from an indefinite G_B: v_A then lies in noise alone, so this r is too small.
    score = np.where(cost > 0, gain**2 / np.where(cost > 0, cost, 1.0), 0.0)
    best = np.flatnonzero(score >= score.max() * (1 - 1e-9))[0] if score.any() else -1  # of equals the least
    return float(fractions[best] * unit)
