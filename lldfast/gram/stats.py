"""Statistics of the Gram matrix G = J J^T, in numpy: the noise of finitely many texts taken out, and error bars on what is left.

The texts of domain d are split in groups b with n_b scored tokens and gradient sum g_b (of the total log-likelihood, nats);
gbar_b = g_b / n_b is a group's per-token mean, N_d = sum_b n_b, a_b = n_b / N_d, and J_d = sum_b g_b / N_d = sum_b a_b gbar_b.
Everything here starts from `products` [M, M], the inner products <g_b, g_b'> of the sums of all M groups, in fp64. Off its
diagonal it may come from a sketch; its diagonal is |g_b|^2, exact. `domain` [M] holds the domain of each group, 0 .. K-1, and
`tokens` [M] its n_b. G is in (nats per token)^2 per unit of parameter^2.

Two independent errors:
- texts: another draw of texts gives other g_b. Measured by jackknife over groups; shrunk on purpose by `auto_ridge`.
- sketch: inner products of dimension-k sketches have `Cov(e_ij, e_lm) = (P_il P_jm + P_im P_jl) / k` for a Gaussian sketch
  of vectors with Gram matrix P; the signed XOR-fold has at most that. Known by formula, needs no replicates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lldfast.errors import InputError
from lldfast.weights.equations import AUTO_RIDGE, MAX_CONDITION, adjusted_direction, check_tau
from lldfast.weights.simplex import Array, softmax

Mask = NDArray[np.bool_]
Ridge = float | Literal["auto"]
RIDGES = (0.0, 0.003, 0.01, 0.03, 0.1, 0.3)  # of tr G / K
BLOCKS = 8  # deleted one at a time by the jackknife, per domain


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
    groups = _Groups(products, domain, tokens, debias=debias)
    return groups.gram(), groups.naive, groups.debiased


def psd_clip(gram: ArrayLike) -> Array:
    """The nearest positive semidefinite matrix: eigenvalues of the symmetric part clipped at 0."""
    g = np.asarray(gram, dtype=np.float64)
    values, vectors = np.linalg.eigh((g + g.T) / 2)
    if values[0] >= 0:
        return (g + g.T) / 2
    clipped = (vectors * values.clip(0.0)) @ vectors.T
    return (clipped + clipped.T) / 2


class _Groups:
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
    scale s (the rules normalise v), summed over halves in both orders, r maximises

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
    groups = _Groups(products, domain, tokens, debias=debias)
    gram, k = psd_clip(groups.gram()), groups.size
    target = np.eye(k) - 1.0 / k if delta is None else np.outer(*[_vector(delta, k)] * 2)  # E Delta Delta^T
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


def effective_size(k: int, n_params: int) -> float:
    """`k / (1 - k / P)`, which stands for k in the formulas: entries of one chunk of k never meet; with P <= k none do (inf)."""
    return k / (1 - k / n_params) if n_params > k else float("inf")


def relative_error(n_domains: int, k: float) -> float:
    """`sqrt(E |dv|_G^2) / |v|_G = sqrt((K + 1) / k)` for v = G^-1 Delta from a sketch of size k, whatever G's conditioning is."""
    return float(np.sqrt((n_domains + 1) / _size(k)))


def rounding_error(gram: ArrayLike, variance: ArrayLike) -> float:
    """`sqrt(E |dv|_G^2 / E |v|_G^2)` for v = G^-1 Delta, entries of G having independent errors of `variance` [K, K].

    dv = -G^-1 E v, with v of covariance G^-1 (all directions alike in the norm of G):
    `sum_ij Var_ij (A_ii A_jj + A_ij^2) / K`, A = G^-1.
    """
    g = psd_clip(gram)
    inverse = np.linalg.inv(g + np.eye(len(g)) * max(float(np.trace(g)), 1e-300) / len(g) / MAX_CONDITION)
    each = np.outer(inverse.diagonal(), inverse.diagonal()) + inverse**2
    return float(np.sqrt(np.sum(np.asarray(variance) * each) / len(g)))


def size_for(n_domains: int, target_kl: float, spread: float = 1.0) -> int:
    """The least power of two k with `(K + 1) spread^2 / (2 k) <= target_kl`, and k >= 4 (K + 1).

    `expected_weight_kl` before G is known: for G ~ I and centred Delta, (Delta^T G^-1 Delta) tr(H G^-1) = |v|^2 tr H with
    |v|^2 = K (tau spread)^2 and tr H <= 1, and v^T H v = Var_w(v) ~ (tau spread)^2. For planning: an uneven G or a Delta far from
    centred costs more, so report `expected_weight_kl` after the estimate. The second bound keeps `relative_error` <= 1/2.

    Args:
        target_kl: E KL(w || w_hat) that is acceptable, in nats.
        spread: standard deviation over domains of the logits v / tau: std(Delta) / tau for normalise="spread".
    """
    if not target_kl > 0 or not np.isfinite(spread) or n_domains < 1:
        raise InputError(f"size_for needs target_kl > 0, a finite spread and K >= 1, got {target_kl}, {spread}, {n_domains}")
    half_bits = np.log2(max(abs(float(spread)), 1e-300)) - np.log2(2 * target_kl) / 2  # of a spread whose square may overflow
    needed = np.log2(n_domains + 1) + max(2 * half_bits, 2.0)
    return 1 << int(np.ceil(needed - 1e-12))


def direction_covariance(
    gram: ArrayLike, delta: ArrayLike, k: float, *, normalise: str = "none", ridge: Ridge = 0.0, sketched: ArrayLike | None = None
) -> Array:
    """Covariance [K, K] of v by a sketch of size k, to first order in 1/k; for v = G^-1 Delta `[(Delta^T v) G^-1 + v v^T] / k`.

    From dv = -G^-1 E v and `Cov(E v) = [(v^T S v) S + S v v^T S] / k`, S the Gram matrix of the vectors that were sketched,
    which is G if nothing was debiased. That of the weights is `H Cov(v) H / tau^2`, H = diag(w) - w w^T.

    Args:
        normalise, ridge: of `adjusted_direction`, whose v this is about. "spread" takes the part of dv along the contrast of v
            out, since rescaling to std(Delta) undoes it; "trace" takes the trace as known; "corr" includes the error of diag G.
        sketched: S [K, K]; `gram` by default. After debiasing, G with the naive diagonal: vectors were sketched with their
            text noise. (An upper bound for the diagonal, whose own norms are exact.)
    """
    direction, g = adjusted_direction(gram, delta, normalise=normalise, ridge=ridge), psd_clip(gram)
    d, s = _vector(delta, len(g)), g if sketched is None else np.asarray(sketched, dtype=np.float64)
    g = g + direction.ridge * np.eye(len(g))
    root = np.sqrt(g.diagonal()) if normalise == "corr" else np.ones(len(g))
    solve = root[:, None] * np.linalg.inv(g)
    u = np.linalg.solve(g, root * d)  # v = root u
    su = s @ u
    covariance = solve @ ((u @ su) * s + np.outer(su, su)) @ solve.T
    if normalise == "corr":  # dv = by_diagonal diag(E) - solve E u
        by_diagonal = (np.diag(root * u) + solve * (root * d)) / (2 * g.diagonal())
        both = by_diagonal @ (2 * s * su[:, None]) @ solve.T
        covariance += by_diagonal @ (2 * s**2) @ by_diagonal.T - both - both.T
    else:
        turn, c = np.eye(len(g)), direction.contrast
        if normalise == "spread" and c.any():
            turn -= np.outer(direction.v, c) / (c @ c)
        covariance = turn @ covariance @ turn.T * (direction.scale or 1.0) ** 2
    return covariance / _size(k)


def expected_weight_kl(
    gram: ArrayLike,
    delta: ArrayLike,
    k: float,
    tau: float,
    weights: ArrayLike | None = None,
    *,
    normalise: str = "none",
    ridge: Ridge = 0.0,
    sketched: ArrayLike | None = None,
) -> float:
    """E KL(w || w_hat) in nats, w_hat = softmax(v_hat / tau) from a sketch of size k, to first order in 1/k.

    `tr(H Cov(v)) / (2 tau^2)`, H = diag(w) - w w^T, the Hessian of the KL in the logits; for v = G^-1 Delta it is
    `[(Delta^T G^-1 Delta) tr(H G^-1) + v^T H v] / (2 k tau^2)`.

    Args:
        weights: w [K]; by default softmax(v / tau). Give them for another prior.
        normalise, ridge, sketched: see `direction_covariance`.
    """
    check_tau(tau)
    direction = adjusted_direction(gram, delta, normalise=normalise, ridge=ridge)
    w = softmax(direction.contrast / tau) if weights is None else _vector(weights, len(direction.v))
    covariance = direction_covariance(gram, delta, k, normalise=normalise, ridge=ridge, sketched=sketched)
    return float(np.sum((np.diag(w) - np.outer(w, w)) * covariance) / (2 * tau**2))


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
    groups = _Groups(products, domain, tokens, debias=debias, blocks=blocks)
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
        groups = _Groups(products, domain, tokens, debias=debias)
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
        sketch = np.sqrt(variance / _size(k))
    return GramErrors(np.hypot(text, sketch), text, sketch, found.dof)


def _vector(values: ArrayLike, size: int) -> Array:
    array = np.asarray(values, dtype=np.float64)
    if array.shape != (size,) or not np.isfinite(array).all():
        raise InputError(f"expected {size} finite numbers, one per domain, got {values!r:.100}")
    return array


def _size(k: float) -> float:
    if not k >= 1:
        raise InputError(f"the sketch size must be >= 1, got {k}")
    return k
