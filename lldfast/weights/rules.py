"""Rules along a run: from the trajectory of Delta_t (and G_t) to weights w_t, and how long each estimate was in force."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from lldfast.errors import InputError
from lldfast.weights.constrained import check_fit_step, check_radius, simplex_fit, trust_region_tau
from lldfast.weights.equations import NORMALISE, Array, adjusted_direction, aggregate_weights, check_tau, log, softmax, with_floor


class StepGram(NamedTuple):
    """G_t [K, K] of one estimate with what was found beside it, all in the unit of Delta_t and in the order of the domains.

    `ridge` is what `gram.estimate` chose for its diagonal, in the unit of G (None: it chose none, the rule of
    `adjusted_direction` decides); `drift` [K] is the change per unit of step that weights do not alter (None: zero), which only
    "adjusted-fit" with a fixed step reckons with.
    """

    matrix: Array
    ridge: float | None = None
    drift: Array | None = None


@dataclass(frozen=True)
class Rule:
    """One rule from Delta_t (and G_t) to w_t, with every option that can be changed after the run.

    Attributes:
        name: "iterative" (eq. (7)); "adjusted" (eq. (6)); "spread" (eq. (7) with tau scaled by std(Delta_t));
            "adjusted-spread" (eq. (6) at the same sharpness as "spread"); "adjusted-trust" (eq. (5) as a constraint: eq. (6) at
            the tau where KL(w || prior) = `radius`); "adjusted-fit" (the weights whose step G w is nearest to the contrast of
            Delta_t, see `simplex_fit`); "mirror" (mirror descent with its state kept,
            `logits += step_size (Delta_t - mean) * (elapsed steps / total steps)`; appendix A.3's one step is eq. (7)).
        tau: nats per token; a pure number for the two "spread" rules; unused by "mirror", "adjusted-trust", "adjusted-fit".
        tau_end: temperature at the last step; tau moves there geometrically. None keeps tau.
        ridge: see `adjusted_direction`; "auto" is the ridge that the estimate of G chose, where it chose one.
        prior: w0 in the order of the domains; None is uniform.
        radius: of "adjusted-trust", nats.
        fit_step: a of "adjusted-fit", or "auto" to fit it.
    """

    name: str = "iterative"
    tau: float = 1.0
    tau_end: float | None = None
    step_size: float = 4.0
    floor: float = 0.0
    normalise: str = "spread"
    ridge: float | Literal["auto"] = "auto"
    prior: tuple[float, ...] | None = None
    radius: float = 0.1
    fit_step: float | Literal["auto"] = "auto"

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
        check_radius(self.radius)
        check_fit_step(self.fit_step)
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

    def logits(self, delta: Array, gram: Array | StepGram | None, progress: float, elapsed: float, state: Array) -> Array:
        """Log of the unnormalised weights relative to the prior [K]; -inf for a weight of 0, which only "adjusted-fit" gives.

        `elapsed` is the part of the run since the last estimate, `state` what this method returned then (zeros before the
        first).

        Raises:
            InputError: the rule needs G and there is none.
        """
        if self.name == "mirror":
            return state + self.step_size * (delta - delta.mean()) * elapsed
        if self.name == "adjusted-fit":
            return log(self._fit(delta, gram)[0])
        direction, tau = self._softmax(delta, gram, progress)
        return direction / tau

    def reading(self, delta: Array, gram: Array | StepGram | None, progress: float) -> dict[str, float | None]:
        """What one estimate's G did to the weights, for rules that need it: numbers to report, not to compute with.

        Returns:
            "ridge_used" (unit of G); "condition" of the matrix solved, "offset" (mean of v: what eq. (6) ignores) and
            "effective_tau" (see `AdjustedDirection.effective_tau`) of the softmax rules; "fit_step" (a) and "fit_residual"
            (share of the contrast of Delta that its step leaves) of "adjusted-fit". Else None.
        """
        g = self._gram(gram)
        found: dict[str, float | None] = dict.fromkeys(
            ("ridge_used", "condition", "offset", "effective_tau", "fit_step", "fit_residual")
        )
        if self.name == "adjusted-fit":
            _, found["ridge_used"], found["fit_step"], found["fit_residual"] = self._fit(delta, gram)
            return found
        direction = adjusted_direction(g.matrix, delta, normalise=self.normalise, ridge=self._ridge(g))
        tau = self._softmax(delta, gram, progress)[1]
        if self.name.endswith("spread"):  # which divides the contrast by its spread: a temperature once more
            tau *= float(direction.contrast.std()) or 1.0
        found["effective_tau"] = direction.effective_tau(tau)
        return found | {"ridge_used": direction.ridge, "condition": direction.condition, "offset": direction.offset}

    def planned_tau(self, delta: Array, progress: float) -> float:
        """The tau that makes std(Delta) / tau the spread of this rule's logits, as far as it is known before G is: what
        `gram.estimate` plans the size of a sketch with."""
        sigma = float(delta.std()) or 1.0
        if self.name == "adjusted-trust":
            return sigma / float(np.sqrt(2 * self.radius))  # KL ~ variance of the logits / 2
        if self.name == "adjusted-fit":
            return sigma
        return self.temperature(progress) * (sigma if self.name.endswith("spread") else 1.0)

    def _gram(self, gram: Array | StepGram | None) -> StepGram:
        if gram is None:
            raise InputError(f"rule {self.name!r} needs a Gram matrix at every step")
        return gram if isinstance(gram, StepGram) else StepGram(gram)

    def _ridge(self, gram: StepGram) -> float | Literal["auto"]:
        return self.ridge if self.ridge != "auto" else gram.ridge or "auto"

    def _prior(self) -> Array | None:
        prior = None if self.prior is None else np.asarray(self.prior, dtype=np.float64)
        return None if prior is None else prior / prior.sum()

    def _softmax(self, delta: Array, gram: Array | StepGram | None, progress: float) -> tuple[Array, float]:
        """Direction [K] and temperature of the rules that are a softmax."""
        tau = self.temperature(progress)
        direction = delta - delta.mean()
        if self.needs_gram:
            g = self._gram(gram)
            direction = adjusted_direction(g.matrix, delta, normalise=self.normalise, ridge=self._ridge(g)).contrast
        if self.name.endswith("spread"):
            sigma = float(direction.std())
            direction = direction / sigma if sigma > 0 else direction
        elif self.name == "adjusted-trust":
            tau = trust_region_tau(direction, self.radius, self._prior())
        return direction, tau

    def _fit(self, delta: Array, gram: Array | StepGram | None) -> tuple[Array, float, float, float]:
        """w / w0 [K] (1 where both are 0), ridge, step and residual of "adjusted-fit"."""
        g, prior = self._gram(gram), self._prior()
        # momentum lasts about 1 / (1 - beta1) steps: a step that is fitted reaches further, and would multiply it
        drift = None if self.fit_step == "auto" else g.drift
        fit = simplex_fit(g.matrix, delta, step=self.fit_step, drift=drift, prior=prior, ridge=self._ridge(g))
        w0 = np.full(len(delta), 1 / len(delta)) if prior is None else prior
        return np.where(w0 > 0, fit.weights / np.where(w0 > 0, w0, 1.0), 1.0), fit.ridge, fit.step, fit.residual

    def weights(self, logits: Array) -> Array:
        """Weights [K] of `logits`, with prior and floor."""
        prior = 0.0 if self.prior is None else log(np.asarray(self.prior, dtype=np.float64))
        return with_floor(softmax(logits + prior), self.floor)


RULES = ("iterative", "spread", "mirror", "adjusted", "adjusted-spread", "adjusted-trust", "adjusted-fit")


def aggregation(rule: str | None, asked: str) -> str:
    """How the weights of `rule` are averaged when `asked` is "geometric", "arithmetic" or "none".

    "adjusted-fit" gives weights of exactly 0, one of which would keep a domain's geometric mean, eq. (8), at 0 for good. Its
    weights are averaged arithmetically: the mixture the run saw, and `argmin_w sum_t a_t KL(w_t || w)`, eq. (9) with its
    arguments exchanged.
    """
    return "arithmetic" if rule == "adjusted-fit" and asked == "geometric" else asked


def replay(
    rule: Rule, steps: Sequence[int], total: int, deltas: ArrayLike, grams: Sequence[Array | StepGram | None] | None = None
) -> Array:
    """The weights [S, K] that `rule` gives along stored Delta_t [S, K] of a run of `total` steps.

    `grams` holds G_t, as a `StepGram` where a ridge or a drift was stored with it. For the rule of the run itself this is what
    the run used; for any other it is the answer on the same trajectory.
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
