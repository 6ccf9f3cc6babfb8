"""Rules along a run: from the trajectory of Delta_t (and G_t) to weights w_t, and how long each estimate was in force."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from lldfast.errors import InputError
from lldfast.weights import NORMALISE, Array, adjusted_direction, aggregate_weights, check_tau, log, softmax, with_floor


@dataclass(frozen=True)
class Rule:
    """One rule from Delta_t (and G_t) to w_t, with every option that can be changed after the run.

    Attributes:
        name: "iterative" (eq. (7)); "adjusted" (eq. (6)); "spread" (eq. (7) with tau scaled by std(Delta_t));
            "adjusted-spread" (eq. (6) at the same sharpness as "spread"); "mirror" (mirror descent with its state kept,
            `logits += step_size (Delta_t - mean) * (elapsed steps / total steps)`; appendix A.3's one step is eq. (7)).
        tau: nats per token; a pure number for the two "spread" rules; unused by "mirror".
        tau_end: temperature at the last step; tau moves there geometrically. None keeps tau.
        prior: w0 in the order of the domains; None is uniform.
    """

    name: str = "iterative"
    tau: float = 1.0
    tau_end: float | None = None
    step_size: float = 4.0
    floor: float = 0.0
    normalise: str = "spread"
    ridge: float | Literal["auto"] = "auto"
    prior: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.name not in RULES:
            raise InputError(f"unknown rule {self.name!r}; the rules are {', '.join(RULES)}")
        check_tau(self.tau)
        if self.tau_end is not None:
            check_tau(self.tau_end)
        if not (self.step_size > 0 and np.isfinite(self.step_size)):
            raise InputError(f"step_size must be > 0 and finite, got {self.step_size}")
        if not 0 <= self.floor <= 1:
            raise InputError(f"floor must lie in [0, 1/K] for K domains, got {self.floor}")
        if self.normalise not in NORMALISE:
            raise InputError(f"normalise must be one of {', '.join(NORMALISE)}, got {self.normalise!r}")
        if self.ridge != "auto" and not float(self.ridge) >= 0:
            raise InputError(f"ridge must be >= 0 or 'auto', got {self.ridge}")
        if isinstance(self.prior, Mapping):
            raise InputError("a rule's prior is a tuple of weights in the order of the domains, not a mapping")

    @property
    def needs_gram(self) -> bool:
        return self.name.startswith("adjusted")

    def temperature(self, progress: float) -> float:
        """tau at `progress` in [0, 1] of the run."""
        if self.tau_end is None or self.tau_end == self.tau:
            return self.tau
        return float(self.tau ** (1 - progress) * self.tau_end**progress)

    def logits(self, delta: Array, gram: Array | None, progress: float, elapsed: float, state: Array) -> Array:
        """Log of the unnormalised weights relative to the prior [K]. `elapsed` is the part of the run since the last
        estimate, `state` what this method returned then (zeros before the first)."""
        tau = self.temperature(progress)
        if self.name == "mirror":
            return state + self.step_size * (delta - delta.mean()) * elapsed
        if self.needs_gram:
            if gram is None:
                raise InputError(f"rule {self.name!r} needs a Gram matrix at every step")
            direction = adjusted_direction(gram, delta, normalise=self.normalise, ridge=self.ridge).contrast
        else:
            direction = delta - delta.mean()
        if self.name.endswith("spread"):
            sigma = float(direction.std())
            direction = direction / sigma if sigma > 0 else direction
        return direction / tau

    def weights(self, logits: Array) -> Array:
        """Weights [K] of `logits`, with prior and floor."""
        prior = 0.0 if self.prior is None else log(np.asarray(self.prior, dtype=np.float64))
        return with_floor(softmax(logits + prior), self.floor)


RULES = ("iterative", "spread", "mirror", "adjusted", "adjusted-spread")


def replay(rule: Rule, steps: Sequence[int], total: int, deltas: ArrayLike, grams: Sequence[Array | None] | None = None) -> Array:
    """The weights [S, K] that `rule` gives along stored Delta_t [S, K] of a run of `total` steps.

    For the rule of the run itself this is what the run used; for any other it is the answer on the same trajectory.
    """
    d = np.asarray(deltas, dtype=np.float64)
    if d.ndim != 2 or len(d) != len(steps):
        raise InputError(f"deltas must be [S, K] for {len(steps)} steps, got {d.shape}")
    state = np.zeros(d.shape[1])
    rows = []
    for i, step in enumerate(steps):
        elapsed = (step - steps[i - 1]) / total if i else 0.0
        state = rule.logits(d[i], None if grams is None else grams[i], step / total, elapsed, state)
        rows.append(rule.weights(state))
    return np.stack(rows) if rows else np.zeros((0, d.shape[1]))


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
