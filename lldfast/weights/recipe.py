"""The fixed recipe of a run: which weights stand for its whole trajectory, eq. (8), in one stage or two."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lldfast.errors import InputError
from lldfast.weights.bootstrap import standard_errors
from lldfast.weights.equations import aggregate_weights
from lldfast.weights.rules import Rule, StepGram, replay
from lldfast.weights.simplex import Array


def aggregation(rule: str | None, asked: str) -> str:
    """How the weights of `rule` are averaged when `asked` is "geometric", "arithmetic" or "none".

    "adjusted-fit" gives weights of exactly 0, one of which would keep a domain's geometric mean, eq. (8), at 0 for good. Its
    weights are averaged arithmetically: the mixture the run saw, and `argmin_w sum_t a_t KL(w_t || w)`, eq. (9) with its
    arguments exchanged.
    """
    return "arithmetic" if rule == "adjusted-fit" and asked == "geometric" else asked


def default_step_weights(rule: str, stages: int = 1) -> str:
    """Equal for the paper's rules (eq. (8)); elapsed for mirror, whose logits grow with time, and for two stages, each of which
    counts the estimates that were in force in it."""
    return "elapsed" if rule == "mirror" or stages == 2 else "equal"


def elapsed_weights(steps: Sequence[int], total: int) -> Array:
    """Share of the run that each estimate was in force [S]: S is dense early, and equal step weights would count the first
    hundred steps as more than half of the run."""
    ends = [*steps[1:], total]
    return np.array([end - start for start, end in zip(steps, ends, strict=True)], dtype=np.float64) / total


def two_stage_weights(
    steps: Sequence[int], total: int, weights: Array, *, method: str = "geometric", elapsed: bool = True, split: float = 0.5
) -> tuple[int, Array, Array]:
    """Appendix C.2: one mixture for each half of the run. Returns (first step of the second stage, w of stage 1, of stage 2).

    Estimates in force in a stage count for the time they were in force there (`elapsed=True`), or once each when they were
    taken in that stage.
    """
    if not 0 < split < 1:
        raise InputError(f"split must lie between 0 and 1, got {split}")
    boundary = max(1, round(total * split))
    if boundary >= total:
        raise InputError(f"a run of {total} steps split at {split} has no second stage")
    s = np.asarray(steps)
    ends = np.append(s[1:], total)
    first = np.clip(np.minimum(ends, boundary) - s, 0, None).astype(float)
    second = np.clip(ends - np.maximum(s, boundary), 0, None).astype(float)
    if not elapsed:
        first, second = (s < boundary).astype(float), (s >= boundary).astype(float)
        if second.sum() == 0:
            raise InputError(f"no estimate at or after step {boundary}: nothing to aggregate for the second stage")
    one = aggregate_weights(weights, method=method, step_weights=first)
    two = aggregate_weights(weights, method=method, step_weights=second)
    return boundary, one, two


def combine(
    steps: Sequence[int], total: int, weights: Array, *, aggregate: str, step_weights: str, stages: int = 1, split: float = 0.5
) -> list[tuple[int, Array]]:
    """The fixed recipe of a trajectory of weights [S, K]: [(first step, weights)], one entry per stage.

    `aggregate="none"` keeps the iterates instead, one entry per estimate.
    """
    if aggregate == "none":
        return list(zip(steps, weights, strict=True))
    if step_weights not in ("equal", "elapsed"):
        raise InputError(f"step_weights must be 'equal' or 'elapsed', got {step_weights!r}")
    if stages == 2:
        boundary, one, two = two_stage_weights(
            steps, total, weights, method=aggregate, elapsed=step_weights == "elapsed", split=split
        )
        return [(0, one), (boundary, two)]
    a = elapsed_weights(steps, total) if step_weights == "elapsed" else None
    return [(0, aggregate_weights(weights, method=aggregate, step_weights=a))]


def recipe_errors(
    rule: Rule,
    steps: Sequence[int],
    total: int,
    replicates: Array,
    grams: Sequence[Array | StepGram | None],
    *,
    aggregate: str,
    step_weights: str,
) -> Array:
    """Standard errors [K] of an aggregated recipe, by the bootstrap over texts: replicates of Delta_t [S, B, K], the same G_t."""

    def fixed(deltas: Array) -> Array:
        w = replay(rule, steps, total, deltas, grams)
        return combine(steps, total, w, aggregate=aggregate, step_weights=step_weights)[0][1]

    return standard_errors(replicates.transpose(1, 0, 2), fixed)
