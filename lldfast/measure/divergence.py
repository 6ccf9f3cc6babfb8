"""Distances between models and between mixtures: eq. (2), true token-level KL, KL and Jensen-Shannon of weights.

Only numpy is imported here; `true_kl`, which runs both models, imports what it needs when called.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lldfast.errors import InputError
from lldfast.measure.comparable import check_comparable
from lldfast.measure.loglik import LoglikVector, check_same_texts
from lldfast.weights.simplex import Values, simplex

Array = NDArray[np.float64]


@dataclass(frozen=True)
class KL:
    """Eq. (2) between two models, in bits per byte, split by the law of total variance.

    Attributes:
        total: `1/2 Var_x(l_i(x) - l_j(x)) / (mean_bytes ln 2)`, population variance over texts.
        between: the part between domain means, which domain weights can steer.
        within: the part within domains; total = between + within.
        se: standard error of `total` over texts (asymptotic, from the fourth moment).
        nats_per_text: `total` before the division.
    """

    total: float
    between: float
    within: float
    se: float
    nats_per_text: float


def _same_texts(a: LoglikVector, b: LoglikVector, names: tuple[str, str] = ("one", "the other")) -> None:
    check_same_texts(a, b, names)
    if len(a) == 0:
        raise InputError("the vectors are empty")


def kl(a: LoglikVector, b: LoglikVector, *, allow_differences: bool = False) -> KL:
    """Eq. (2): `KL(p_i, p_j) ~ 1/2 Var_x(l_i(x) - l_j(x))` nats per text, here in bits per byte.

    A distance between models (symmetric), blind to a difference that is the same for every text; not a literal KL when the
    models are far apart. See `true_kl`.

    Args:
        allow_differences: neither warn of vectors that were not scored alike (`measure.comparable`) nor refuse them.

    Raises:
        InputError: the vectors were not scored on the same texts, or are nearer than what the way they were scored makes alone.
    """
    _same_texts(a, b)
    check_comparable((a, b), allow=allow_differences)
    difference = np.asarray(a.logprob, dtype=np.float64) - np.asarray(b.logprob, dtype=np.float64)
    names = np.asarray(a.domain, dtype=object)
    mean = difference.mean()
    variance = float(((difference - mean) ** 2).mean())
    between = 0.0
    for name in dict.fromkeys(names.tolist()):
        group = difference[names == name]
        between += len(group) / len(difference) * float((group.mean() - mean) ** 2)
    fourth = float(((difference - mean) ** 4).mean())
    se = math.sqrt(max(0.0, fourth - variance**2) / len(difference))
    unit = 2 * float(np.mean(a.n_bytes)) * math.log(2)
    return KL(variance / unit, between / unit, max(0.0, variance - between) / unit, se / unit, variance / 2)


def kl_matrix(vectors: Sequence[LoglikVector] | Mapping[str, LoglikVector], *, allow_differences: bool = False) -> Array:
    """Eq. (2) between every pair of M models, in bits per byte: [M, M] float64, symmetric, zero diagonal.

    Args:
        allow_differences: as in `kl`.

    Raises:
        InputError: the vectors were not scored on the same texts, or two of them are nearer than what the way they were scored
            makes alone.
    """
    rows = list(vectors.values()) if isinstance(vectors, Mapping) else list(vectors)
    names = list(vectors) if isinstance(vectors, Mapping) else [str(i) for i in range(len(rows))]
    if not rows:
        raise InputError("kl_matrix: no vectors")
    for name, row in zip(names, rows, strict=True):
        _same_texts(rows[0], row, (names[0], name))
    check_comparable(rows, names if isinstance(vectors, Mapping) else None, allow=allow_differences)
    stack = np.stack([np.asarray(row.logprob, dtype=np.float64) for row in rows])  # [M, N]
    out = np.zeros((len(rows), len(rows)))
    for i in range(len(rows)):
        out[i] = (stack - stack[i]).var(axis=1)
    unit = 2 * float(np.mean(rows[0].n_bytes)) * math.log(2)
    return (out + out.T) / (2 * unit)


def nll_gap(target: LoglikVector, base: LoglikVector, *, allow_differences: bool = False) -> float:
    """Mean log-likelihood of the target minus the base's, in bits per byte: the uniform shift that eq. (2) does not see.

    Args, Raises: as `kl`.
    """
    _same_texts(target, base)
    check_comparable((target, base), allow=allow_differences)
    return float((np.sum(target.logprob) - np.sum(base.logprob)) / (np.sum(target.n_bytes) * math.log(2)))


def true_kl(
    target: Any,
    base: Any,
    evalset: Any,
    *,
    by_domain: bool = False,
    batch_tokens: int = 16384,
    allow_differences: bool = False,
) -> float | dict[str, float]:
    """True token-level KL(target || base) on the evaluation texts, in bits per byte.

    `sum over tokens of sum_v p_target(v) log(p_target(v) / p_base(v))`, divided by the texts' bytes times ln 2. Exact where
    eq. (2) approximates, but defined only when both models share a tokenizer.

    Args:
        target, base: whatever `score` accepts (LanguageModel, checkpoint folder, model id).
        evalset: EvalSet or its path.
        by_domain: return {domain: bits per byte} instead of the corpus value.
        allow_differences: do not warn of models that compute in different dtypes.

    Raises:
        InputError: the tokenizers or the first-token rules differ (the message names both models).
    """
    from lldfast.measure.score import token_kl

    nats, evaluated = token_kl(target, base, evalset, batch_tokens=batch_tokens, allow_differences=allow_differences)
    n_bytes = np.asarray(evaluated.n_bytes, dtype=np.float64)
    if not by_domain:
        return float(nats.sum() / (n_bytes.sum() * math.log(2)))
    names = np.asarray(evaluated.domain, dtype=object)
    return {name: float(nats[names == name].sum() / (n_bytes[names == name].sum() * math.log(2))) for name in evaluated.domains}


def weight_kl(p: Values, q: Values) -> float:
    """KL(p || q) between domain weights, in nats; inf where p puts weight on a domain that q leaves out.

    The paper reports `weight_kl(uniform, ground_truth)` = 0.819. Mappings are aligned by name, both are normalised.
    """
    names = list(p) if isinstance(p, Mapping) else (list(q) if isinstance(q, Mapping) else [])
    if not names:
        names = [str(k) for k in range(len(np.asarray(p)))]
    a, b = simplex(p, names, "p"), simplex(q, names, "q")
    used = a > 0
    if (b[used] == 0).any():
        return math.inf
    return max(0.0, float((a[used] * np.log(a[used] / b[used])).sum()))


def finite(value: float) -> float | None:
    """`value`, or None for an infinite one, which JSON has no number for."""
    return value if math.isfinite(value) else None


def jsd_matrix(weights: Sequence[Values] | Mapping[Any, Values] | ArrayLike) -> Array:
    """Jensen-Shannon divergence between every two of S weight vectors, in nats (at most ln 2): [S, S] (Fig. 10).

    The vectors may come as a mapping {step or method: weights}; its order is that of the rows.

    Raises:
        InputError: no vectors, or names that differ.
    """
    rows: list[Any] = list(weights.values()) if isinstance(weights, Mapping) else list(weights)  # type: ignore[arg-type]
    if not rows:
        raise InputError("jsd_matrix: no weights")
    names = list(rows[0]) if isinstance(rows[0], Mapping) else [str(k) for k in range(len(rows[0]))]
    w = np.stack([simplex(row, names) for row in rows])  # [S, K]

    def h(x: Array) -> Array:
        return -np.where(x > 0, x * np.log(np.where(x > 0, x, 1.0)), 0.0).sum(axis=-1)

    mixed = h((w[:, None, :] + w[None, :, :]) / 2)
    own = h(w)
    return np.clip(mixed - (own[:, None] + own[None, :]) / 2, 0.0, math.log(2))
