"""Rules along a run: from Delta_t (and G_t) to weights w_t, estimate by estimate, and along a stored trajectory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from lldfast.errors import CorruptError, InputError, deprecated, renamed_arguments
from lldfast.weights.constrained import check_fit_step, check_radius, simplex_fit, trust_region_tau
from lldfast.weights.equations import GRAM_SCALES, adjusted_direction, check_tau
from lldfast.weights.options import RuleOptions
from lldfast.weights.simplex import Array, log, simplex, softmax, with_floor


class StepGram(NamedTuple):
    """G_t [K, K] of one estimate with what was found beside it, all in the unit of Delta_t and in the order of the domains.

    `ridge` is what `gram.estimate` chose for its diagonal, in the unit of G (None: it chose none, the rule of
    `adjusted_direction` decides); `drift` [K] is the change per unit of step that weights do not alter (None: zero), which only
    "adjusted-fit" with a fixed step reckons with.
    """

    matrix: Array
    ridge: float | None = None
    drift: Array | None = None


@renamed_arguments(normalise="gram_scale")
@dataclass(frozen=True)
class Rule(RuleOptions):
    """One rule from Delta_t (and G_t) to w_t; its options are keyword arguments, see `RuleOptions`.

    Attributes:
        name: "iterative" (eq. (7)); "adjusted" (eq. (6)); "spread" (eq. (7) with tau scaled by std(Delta_t));
            "adjusted-spread" (eq. (6) at the same sharpness as "spread"); "adjusted-trust" (eq. (5) as a constraint: eq. (6) at
            the tau where KL(w || prior) = `radius`); "adjusted-fit" (the weights whose step G w is nearest to the contrast of
            Delta_t, see `simplex_fit`); "mirror" (mirror descent with its state kept,
            `logits += step_size (Delta_t - mean) * (elapsed steps / total steps)`; appendix A.3's one step is eq. (7)).
        prior: w0 in the order of the domains; None is uniform.

    Raises:
        InputError: an unknown name, or an option that makes no sense (named).
    """

    name: str = "iterative"
    prior: tuple[float, ...] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.name not in RULES:
            raise InputError(f"unknown rule {self.name!r}; the rules are {', '.join(RULES)}")
        check_tau(self.tau)
        if self.tau_end is not None:
            check_tau(self.tau_end)
        for name in ("step_size", "floor", "ridge"):
            value = getattr(self, name)
            if not isinstance(value, (int, float, np.number)) and not (name == "ridge" and value == "auto"):
                raise InputError(f"{name} must be a number, got {value!r}")
        if not (self.step_size > 0 and np.isfinite(self.step_size)):
            raise InputError(f"step_size must be > 0 and finite, got {self.step_size}")
        if not 0 <= self.floor <= 1:
            raise InputError(f"floor must lie in [0, 1/K] for K domains, got {self.floor}")
        if self.gram_scale not in GRAM_SCALES:
            raise InputError(f"gram_scale must be one of {', '.join(GRAM_SCALES)}, got {self.gram_scale!r}")
        if self.ridge != "auto" and not 0 <= self.ridge < math.inf:
            raise InputError(f"ridge must be >= 0 and finite, or 'auto', got {self.ridge}")
        check_radius(self.radius)
        check_fit_step(self.fit_step)
        if isinstance(self.prior, Mapping):
            raise InputError("a rule's prior is a tuple of weights in the order of the domains, not a mapping")

    def to_json(self, domains: Sequence[str] = ()) -> dict[str, Any]:
        """The rule as fields of a weights file: an infinite tau is the string "inf", the prior an object by domain."""
        stored: dict[str, Any] = {"rule": self.name}
        for option in fields(RuleOptions):
            stored[STORED_AS.get(option.name, option.name)] = getattr(self, option.name)
            if option.name == "ridge":  # where the format has it
                stored["prior"] = None if self.prior is None else dict(zip(domains, self.prior, strict=True))
        return stored | {"tau": self.tau if math.isfinite(self.tau) else "inf"}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any], domains: Sequence[str]) -> Rule:
        """What `to_json` wrote; a field that an earlier version did not have takes its default.

        Raises:
            InputError: no rule is stored, or an option makes no sense.
            CorruptError: the prior is of other domains.
        """
        if not stored.get("rule"):
            raise InputError("these weights were not made by a rule")
        names = {STORED_AS.get(option.name, option.name): option.name for option in fields(RuleOptions)}
        options = {name: stored[key] for key, name in names.items() if key in stored}
        if options.get("tau") == "inf":
            options["tau"] = math.inf
        prior = stored.get("prior")
        if prior is not None and (not isinstance(prior, dict) or set(prior) != set(domains)):
            raise CorruptError("the prior of these weights does not have their domains")
        if prior is not None:
            simplex(prior, domains, "prior")
        by_order = None if prior is None else tuple(prior[name] for name in domains)
        return cls(stored["rule"], prior=by_order, **options)

    @property
    def normalise(self) -> str:
        """The former name of `gram_scale`."""
        deprecated("Rule.normalise", "Rule.gram_scale")
        return self.gram_scale

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
        direction = adjusted_direction(g.matrix, delta, gram_scale=self.gram_scale, ridge=self._ridge(g))
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
            direction = adjusted_direction(g.matrix, delta, gram_scale=self.gram_scale, ridge=self._ridge(g)).contrast
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
STORED_AS = {"gram_scale": "normalise"}  # the name that it had when the format of weights files was made
RULE_FIELDS = tuple(Rule().to_json())  # of a weights file: which rule made it, and its options


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
