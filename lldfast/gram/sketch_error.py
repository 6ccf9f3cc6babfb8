"""What G's being sketched (or rounded) instead of exact does to v = G^-1 Delta and to the weights.

Inner products of dimension-k sketches have `Cov(e_ij, e_lm) = (P_il P_jm + P_im P_jl) / k` for a Gaussian sketch of vectors with
Gram matrix P; the signed XOR-fold has at most that. So the error is known before the estimate (`relative_error`, `size_for`), to
first order in 1/k after it (`direction_covariance`, `expected_weight_kl`), and by simulation for rules that are no formula
(`simulated_errors`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from lldfast.errors import InputError
from lldfast.gram.debias import finite_per_domain, psd_clip
from lldfast.weights.equations import MAX_CONDITION, adjusted_direction, check_tau
from lldfast.weights.simplex import Array, softmax

Ridge = float | Literal["auto"]
DRAWS = 100  # simulated sketches


def effective_size(k: int, n_params: int) -> float:
    """`k / (1 - k / P)`, which stands for k in the formulas: entries of one chunk of k never meet; with P <= k none do (inf)."""
    return k / (1 - k / n_params) if n_params > k else float("inf")


def relative_error(n_domains: int, k: float) -> float:
    """`sqrt(E |dv|_G^2) / |v|_G = sqrt((K + 1) / k)` for v = G^-1 Delta from a sketch of size k, whatever G's conditioning is."""
    return float(np.sqrt((n_domains + 1) / check_size(k)))


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
        spread: standard deviation over domains of the logits v / tau: std(Delta) / tau for gram_scale="spread".
    """
    if not target_kl > 0 or not np.isfinite(spread) or n_domains < 1:
        raise InputError(f"size_for needs target_kl > 0, a finite spread and K >= 1, got {target_kl}, {spread}, {n_domains}")
    half_bits = np.log2(max(abs(float(spread)), 1e-300)) - np.log2(2 * target_kl) / 2  # of a spread whose square may overflow
    needed = np.log2(n_domains + 1) + max(2 * half_bits, 2.0)
    return 1 << int(np.ceil(needed - 1e-12))


def direction_covariance(
    gram: ArrayLike,
    delta: ArrayLike,
    k: float,
    *,
    gram_scale: str = "none",
    ridge: Ridge = 0.0,
    sketched: ArrayLike | None = None,
) -> Array:
    """Covariance [K, K] of v by a sketch of size k, to first order in 1/k; for v = G^-1 Delta `[(Delta^T v) G^-1 + v v^T] / k`.

    From dv = -G^-1 E v and `Cov(E v) = [(v^T S v) S + S v v^T S] / k`, S the Gram matrix of the vectors that were sketched,
    which is G if nothing was debiased. That of the weights is `H Cov(v) H / tau^2`, H = diag(w) - w w^T.

    Args:
        gram_scale, ridge: of `adjusted_direction`, whose v this is about. "spread" takes the part of dv along the contrast of v
            out, since rescaling to std(Delta) undoes it; "trace" takes the trace as known; "corr" includes the error of diag G.
        sketched: S [K, K]; `gram` by default. After debiasing, G with the naive diagonal: vectors were sketched with their
            text noise. (An upper bound for the diagonal, whose own norms are exact.)
    """
    direction, g = adjusted_direction(gram, delta, gram_scale=gram_scale, ridge=ridge), psd_clip(gram)
    d, s = finite_per_domain(delta, len(g)), g if sketched is None else np.asarray(sketched, dtype=np.float64)
    g = g + direction.ridge * np.eye(len(g))
    root = np.sqrt(g.diagonal()) if gram_scale == "corr" else np.ones(len(g))
    solve = root[:, None] * np.linalg.inv(g)
    u = np.linalg.solve(g, root * d)  # v = root u
    su = s @ u
    covariance = solve @ ((u @ su) * s + np.outer(su, su)) @ solve.T
    if gram_scale == "corr":  # dv = by_diagonal diag(E) - solve E u
        by_diagonal = (np.diag(root * u) + solve * (root * d)) / (2 * g.diagonal())
        both = by_diagonal @ (2 * s * su[:, None]) @ solve.T
        covariance += by_diagonal @ (2 * s**2) @ by_diagonal.T - both - both.T
    else:
        turn, c = np.eye(len(g)), direction.contrast
        if gram_scale == "spread" and c.any():
            turn -= np.outer(direction.v, c) / (c @ c)
        covariance = turn @ covariance @ turn.T * (direction.scale or 1.0) ** 2
    return covariance / check_size(k)


def expected_weight_kl(
    gram: ArrayLike,
    delta: ArrayLike,
    k: float,
    tau: float,
    weights: ArrayLike | None = None,
    *,
    gram_scale: str = "none",
    ridge: Ridge = 0.0,
    sketched: ArrayLike | None = None,
) -> float:
    """E KL(w || w_hat) in nats, w_hat = softmax(v_hat / tau) from a sketch of size k, to first order in 1/k.

    `tr(H Cov(v)) / (2 tau^2)`, H = diag(w) - w w^T, the Hessian of the KL in the logits; for v = G^-1 Delta it is
    `[(Delta^T G^-1 Delta) tr(H G^-1) + v^T H v] / (2 k tau^2)`.

    Args:
        weights: w [K]; by default softmax(v / tau). Give them for another prior.
        gram_scale, ridge, sketched: see `direction_covariance`.
    """
    check_tau(tau)
    direction = adjusted_direction(gram, delta, gram_scale=gram_scale, ridge=ridge)
    w = softmax(direction.contrast / tau) if weights is None else finite_per_domain(weights, len(direction.v))
    covariance = direction_covariance(gram, delta, k, gram_scale=gram_scale, ridge=ridge, sketched=sketched)
    return float(np.sum((np.diag(w) - np.outer(w, w)) * covariance) / (2 * tau**2))


def simulated_errors(
    statistic: Callable[[Array], Array], gram: Array, naive: Array, k: int, rng: np.random.Generator
) -> Array | None:
    """Standard errors of `statistic(G)` by a sketch of size k: its spread over simulated sketches.

    Rows were sketched with the noise of their texts, so their Gram matrix S is G with its naive diagonal. Of a Gaussian sketch it
    comes back as S^1/2 W S^1/2 with W ~ Wishart_K(k, I) / k; the fold's varies at most as much.

    Args:
        gram, naive: G [K, K] and the diagonal [K] that it had before text noise was taken out.

    Returns:
        In the shape of the statistic; None where G is noise alone: half of the sketches leave nothing positive.
    """
    taken_out = np.diag(naive - gram.diagonal())
    eigenvalues, vectors = np.linalg.eigh(gram + taken_out)
    root = vectors * np.sqrt(np.clip(eigenvalues, 0.0, None))
    found = []
    for _ in range(DRAWS):
        half = root @ _bartlett(rng, len(gram), k)
        drawn = half @ half.T / k - taken_out
        if np.linalg.eigvalsh(drawn)[-1] > 0:
            found.append(statistic(drawn))
    return np.stack(found).std(axis=0, ddof=1) if len(found) > DRAWS // 2 else None


def _bartlett(rng: np.random.Generator, size: int, k: int) -> Array:
    """A [size, min(size, k)] with A A^T ~ Wishart(k, I): Bartlett's triangle of chi and normal variables."""
    if k < size:
        return rng.normal(size=(size, k))
    lower = np.tril(rng.normal(size=(size, size)), -1)
    return lower + np.diag(np.sqrt(rng.chisquare(k - np.arange(size))))


def check_size(k: float) -> float:
    """
    Raises:
        InputError: k < 1 or NaN.
    """
    if not k >= 1:
        raise InputError(f"the sketch size must be >= 1, got {k}")
    return k
