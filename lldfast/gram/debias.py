"""G from the products of groups of texts, with the noise of finitely many texts taken out of its diagonal.

The texts of domain d are split in groups b with n_b scored tokens and gradient sum g_b (of the total log-likelihood, nats);
gbar_b = g_b / n_b is a group's per-token mean, N_d = sum_b n_b, a_b = n_b / N_d, and J_d = sum_b g_b / N_d = sum_b a_b gbar_b.
Everything starts from `products` [M, M], the inner products <g_b, g_b'> of the sums of all M groups, in fp64. Off its
diagonal it may come from a sketch; its diagonal is |g_b|^2, exact. `domain` [M] holds the domain of each group, 0 .. K-1, and
`tokens` [M] its n_b. G is in (nats per token)^2 per unit of parameter^2.

Two independent errors are left:
- texts: another draw of texts gives other g_b. Measured by the jackknife over groups (jackknife.py); shrunk on purpose by the
  ridge (ridge.py).
- sketch: known by formula, needs no replicates (sketch_error.py).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lldfast.errors import InputError
from lldfast.weights.simplex import Array

Mask = NDArray[np.bool_]


def debiased_diagonal(naive: ArrayLike, own: ArrayLike, share: ArrayLike) -> tuple[Array, Mask]:
    """U-statistic `G_kk = (|J_k|^2 - sum_b a_b^2 |gbar_b|^2) / (1 - sum_b a_b^2)`.

    With the units cleared it is `sum_{b != b'} <g_b, g_b'> / sum_{b != b'} n_b n_b'`.

    |J_k|^2 is too large by sum_b a_b^2 tr Cov(gbar_b), the noise of the texts. Products of different groups have no such
    term: whatever the lengths and the covariances are, the quotient is unbiased given the lengths if groups are independent
    and a token's mean gradient does not depend on the length of its text (E gbar_b = mu_k for all b). If it does depend,
    numerator and denominator are unbiased each, and the quotient has a ratio estimator's bias, O(1 / number of groups).

    Args:
        naive: |J_k|^2 [K].
        own: sum_b a_b^2 |gbar_b|^2 = sum_b |g_b|^2 / N_k^2 [K].
        share: sum_b a_b^2 [K]; 1 for a domain in one group, which cannot be debiased.

    Returns:
        The diagonal [K], and where it was debiased [K]: not in one group, and not where the unbiased value is <= 0, which no
        squared norm is. There the naive value, an upper bound, is kept.
    """
    naive, own, share = (np.asarray(x, dtype=np.float64) for x in (naive, own, share))
    possible = share < 1 - 1e-12
    value = (naive - own) / np.where(possible, 1 - share, 1.0)
    debiased = possible & (value > 0)
    return np.where(debiased, value, naive), debiased


def domain_gram(products: ArrayLike, domain: ArrayLike, tokens: ArrayLike, *, debias: bool = True) -> tuple[Array, Array, Mask]:
    """G [K, K] from the products of groups: `G_dd' = sum_bb' <g_b, g_b'> / (N_d N_d')`, diagonal by `debiased_diagonal`.

    Of sketched products the naive diagonal is exact own norms plus sketched products of different groups; the debiased one
    uses the latter alone. The result can be indefinite: see `psd_clip`.

    Returns:
        (G, naive diagonal [K], debiased [K]).
    """
    groups = GroupProducts(products, domain, tokens, debias=debias)
    return groups.gram(), groups.naive, groups.debiased


def psd_clip(gram: ArrayLike) -> Array:
    """The nearest positive semidefinite matrix: eigenvalues of the symmetric part clipped at 0."""
    g = np.asarray(gram, dtype=np.float64)
    values, vectors = np.linalg.eigh((g + g.T) / 2)
    if values[0] >= 0:
        return (g + g.T) / 2
    clipped = (vectors * values.clip(0.0)) @ vectors.T
    return (clipped + clipped.T) / 2


class GroupProducts:
    """Checked products, in blocks of groups, from which G of any subset of blocks is cheap."""

    def __init__(
        self, products: ArrayLike, domain: ArrayLike, tokens: ArrayLike, *, debias: bool = True, blocks: int | None = None
    ) -> None:
        """Group i of a domain goes to the domain's block i mod `blocks`; None makes one block of each group."""
        p, n, d = np.asarray(products, dtype=np.float64), np.asarray(tokens, dtype=np.float64), np.asarray(domain)
        if d.ndim != 1 or not len(d) or p.shape != (len(d), len(d)) or n.shape != d.shape:
            raise InputError(f"expected products [M, M], domain [M] and tokens [M], got {p.shape}, {d.shape} and {n.shape}")
        if not np.issubdtype(d.dtype, np.integer) or d.min() < 0 or len(np.unique(d)) != d.max() + 1:
            raise InputError(f"domain must hold the integers 0 .. K-1, each at least once, got {np.unique(d)}")
        if not np.isfinite(p).all():
            raise InputError(f"products of group {int(np.flatnonzero(~np.isfinite(p).all(axis=1))[0])} are not finite")
        if not (np.isfinite(n) & (n >= 0)).all():
            raise InputError("tokens must be finite numbers >= 0")
        if blocks is not None and blocks < 2:
            raise InputError(f"blocks must be >= 2, got {blocks}")
        self.size = int(d.max()) + 1
        scored = n > 0  # a group without tokens has no gradient, and says nothing about the noise of one
        p, n, d = p[np.ix_(scored, scored)], n[scored], d[scored].astype(np.int64)
        count = np.bincount(d, minlength=self.size)
        if not count.all():
            raise InputError(f"the texts of domain {int(np.flatnonzero(count == 0)[0])} have no scored token")
        width = count if blocks is None else np.minimum(count, blocks)
        self.domain = np.repeat(np.arange(self.size), width)
        self.number = np.concatenate([np.arange(w) for w in width])  # of a block within its domain
        order = np.concatenate([np.flatnonzero(d == k)[i :: width[k]] for k in range(self.size) for i in range(width[k])])
        sizes = [len(range(i, count[k], width[k])) for k in range(self.size) for i in range(width[k])]
        starts = np.cumsum([0, *sizes[:-1]])
        p, n = p[np.ix_(order, order)], n[order]
        # Own norms are kept apart from sums over different groups: the U-statistic must not see their rounded difference.
        cross = (p + p.T) / 2 - np.diag(p.diagonal())
        self.cross = np.add.reduceat(np.add.reduceat(cross, starts, axis=0), starts, axis=1)  # [blocks, blocks]
        self.own, self.tokens, self.squares = (np.add.reduceat(x, starts) for x in (p.diagonal(), n, n**2))
        self.groups = np.array(sizes, dtype=np.float64)
        self.alone = (width == 1)[self.domain]
        self.debiased = np.zeros(self.size, dtype=bool)  # until the whole is known; `gram` is naive meanwhile
        self.naive = self.gram().diagonal().copy()
        total = self.sum(self.tokens)
        value, possible = debiased_diagonal(self.naive, self.sum(self.own) / total**2, self.sum(self.squares) / total**2)
        self.debiased = possible & debias
        self.noise = (self.naive - value) * total  # sigma^2, where the noise of n tokens is sigma^2 / n

    def sum(self, values: Array, keep: Mask | None = None) -> Array:
        return np.bincount(self.domain, values if keep is None else values * keep, self.size).astype(np.float64)

    def gram(self, keep: Mask | None = None) -> Array:
        """G of the blocks in `keep`, which must leave every domain some tokens.

        A domain is debiased where the whole is, so that a statistic of subsets is that of the whole: no switching at 0. One
        group alone has no pairs: the whole domain's noise, sigma^2 / n for n tokens, is subtracted from its |gbar_b|^2.
        """
        indicator = (self.domain == np.arange(self.size)[:, None]) * (1.0 if keep is None else keep)
        sums = indicator @ self.cross @ indicator.T  # [K, K], over pairs of different groups
        total, own = self.sum(self.tokens, keep), self.sum(self.own, keep)
        gram = sums / np.outer(total, total)
        diagonal = gram.diagonal() + own / total**2
        if self.debiased.any():
            pairs = total**2 - self.sum(self.squares, keep)  # sum_{b != b'} n_b n_b'
            paired = self.sum(self.groups, keep) > 1
            unbiased = np.where(paired, sums.diagonal() / np.where(paired, pairs, 1.0), diagonal - self.noise / total)
            diagonal = np.where(self.debiased, unbiased, diagonal)
        np.fill_diagonal(gram, diagonal)
        return gram


def finite_per_domain(values: ArrayLike, size: int) -> Array:
    """Values as fp64 [size].

    Raises:
        InputError: another shape, or a value that is not finite.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.shape != (size,) or not np.isfinite(array).all():
        raise InputError(f"expected {size} finite numbers, one per domain, got {values!r:.100}")
    return array
