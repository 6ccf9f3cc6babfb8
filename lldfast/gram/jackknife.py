"""Error bars by the noise of the texts, of anything that is made from G: a jackknife over groups of texts.

`products` [M, M], `domain` [M] and `tokens` [M] are those of debias.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from lldfast.errors import InputError
from lldfast.gram.debias import GroupProducts
from lldfast.gram.sketch_error import check_size
from lldfast.weights.simplex import Array

BLOCKS = 8  # deleted one at a time, per domain


@dataclass(frozen=True)
class Jackknife:
    """What `jackknife` found of one statistic; arrays have the statistic's shape.

    Attributes:
        value: of all groups.
        se: standard error by the noise of texts.
        dof: degrees of freedom of `se` (Welch-Satterthwaite), for `interval`.
        bias: estimated E[value] - truth, of order 1/n: nonlinear statistics have it. Not subtracted.
        unmeasured: domains in one block, whose noise `se` lacks: it is a lower bound if there are any.
    """

    value: Array
    se: Array
    dof: Array
    bias: Array
    unmeasured: list[int]

    def interval(self, level: float = 0.95) -> tuple[Array, Array]:
        """(low, high) by Student's t with `dof` degrees of freedom."""
        half = t_quantile(level, self.dof) * self.se
        return self.value - half, self.value + half


def jackknife(
    products: ArrayLike,
    domain: ArrayLike,
    tokens: ArrayLike,
    statistic: Callable[[Array], ArrayLike],
    *,
    debias: bool = True,
    blocks: int = BLOCKS,
) -> Jackknife:
    """Stratified delete-one-block jackknife of `statistic(G)` over the texts.

    One block of ONE domain is left out at a time: theta_(d,b), M statistics in all, and

        se^2 = sum_d V_d,  V_d = (B_d - 1) / B_d sum_b (theta_(d,b) - mean_b theta_(d,b))^2,
        dof = (sum_d V_d)^2 / sum_d V_d^2 / (B_d - 1).

    Texts of different domains are independent, so variances add. Leaving block j of all domains out at once measures the same
    with B - 1 degrees of freedom; v and w, which every domain moves, have up to sum_d (B_d - 1) here.

    Delta is held fixed: `weights.bootstrap_deltas` resamples it. Products from a sketch add some of its noise to se, on the safe
    side; so does a domain in two groups.

    Args:
        statistic: of G [K, K]: debiased where the whole is, possibly indefinite.
        blocks: at most this many per domain; group i of a domain is in block i mod `blocks`.
    """
    groups = GroupProducts(products, domain, tokens, debias=debias, blocks=blocks)
    value = np.asarray(statistic(groups.gram()), dtype=np.float64)
    every = np.arange(len(groups.domain))
    variance, squares, bias = np.zeros_like(value), np.zeros_like(value), np.zeros_like(value)
    for k in range(groups.size):
        index = np.flatnonzero(groups.domain == k)
        if len(index) < 2:
            continue
        left = np.stack([np.asarray(statistic(groups.gram(every != b)), dtype=np.float64) for b in index])
        part = (len(index) - 1) * left.var(axis=0)
        variance += part
        squares += part**2 / (len(index) - 1)
        bias += (len(index) - 1) * (left.mean(axis=0) - value)
    dof = np.where(squares > 0, variance**2 / np.where(squares > 0, squares, 1.0), 1.0)
    return Jackknife(value, np.sqrt(variance), dof, bias, sorted(set(groups.domain[groups.alone].tolist())))


def t_quantile(level: float, dof: ArrayLike) -> Array:
    """The half-width t with P(|T| <= t) = level, for Student's T with `dof` >= 1 degrees of freedom (not only integers).

    With T = sqrt(dof) tan(theta), the density of theta is proportional to cos(theta)^(dof - 1).
    """
    if not 0 < level < 1:
        raise InputError(f"level must lie in (0, 1), got {level}")
    n = np.clip(np.asarray(dof, dtype=np.float64), 1.0, 1e3)  # beyond: normal
    theta = np.linspace(0.0, np.pi / 2, 2049)
    density = np.cos(theta) ** (n.reshape(-1, 1) - 1)
    mass = np.cumsum(np.pad(density[:, 1:] + density[:, :-1], ((0, 0), (1, 0))), axis=1)
    angle = np.array([np.interp(level * m[-1], m, theta) for m in mass])
    return np.sqrt(n) * np.tan(angle).reshape(n.shape)


class GramErrors(NamedTuple):
    """Standard errors of G's entries [K, K]; NaN where a domain in one group is involved."""

    total: Array  # total^2 = text^2 + sketch^2
    text: Array
    sketch: Array
    dof: Array  # of `text`, for `t_quantile`


def gram_standard_errors(
    products: ArrayLike,
    domain: ArrayLike,
    tokens: ArrayLike,
    k: float | None = None,
    *,
    debias: bool = True,
    blocks: int = BLOCKS,
) -> GramErrors:
    """Standard errors of what `domain_gram` returns: texts by jackknife, sketch of size k by formula.

    Off the diagonal `Var = (|J_d|^2 |J_d'|^2 + <J_d, J_d'>^2) / k`, with naive norms: vectors were sketched with their noise.
    On it the sum runs over pairs of different groups, `sum_{b != b'} <g_b, g_b'> / c = tr(A P)`, P the domain's products,
    A = (11^T - I) / c, c = sum_{b != b'} n_b n_b' (N^2 if not debiased), and `Var = 2 tr(A P A P) / k`.

    The text noise of a domain in one group is not measured: NaN in its row and column, not a number that is too small.

    Args:
        k: size of the sketch that G's products come from; None if they are exact.
    """
    found = jackknife(products, domain, tokens, lambda gram: gram, debias=debias, blocks=blocks)
    text = found.se.copy()
    text[found.unmeasured, :] = text[:, found.unmeasured] = np.nan
    sketch = np.zeros_like(text)
    if k is not None:
        groups = GroupProducts(products, domain, tokens, debias=debias)
        gram = groups.gram()
        np.fill_diagonal(gram, groups.naive)
        variance = np.outer(groups.naive, groups.naive) + gram**2
        total = groups.sum(groups.tokens)
        scale = np.where(groups.debiased, total**2 - groups.sum(groups.squares), total**2)
        for d in range(groups.size):
            index = np.flatnonzero(groups.domain == d)
            own = groups.cross[np.ix_(index, index)] + np.diag(groups.own[index])
            rows = own.sum(axis=1)
            variance[d, d] = 2 * max(rows.sum() ** 2 - 2 * rows @ rows + np.sum(own**2), 0.0) / scale[d] ** 2
        sketch = np.sqrt(variance / check_size(k))
    return GramErrors(np.hypot(text, sketch), text, sketch, found.dof)
