"""LLDController: when to estimate, from which Delta, and which weights follow. Every trainer's adapter wraps this object.

controller = LLDController(evalset, target, steps=10_000, rule="iterative")
for step in range(10_000):
    weights = controller.step(step, model)
    if weights is not None:
        mixture.set_weights(weights)
    ...                                      # the optimiser step
fixed = controller.aggregate()               # eq. (8), the recipe for pass 2
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lldfast import gram as grams
from lldfast.data.evalset import EvalSet
from lldfast.data.tokenizer import Tokenizer
from lldfast.errors import InputError
from lldfast.files import atomic_path
from lldfast.loglik import LoglikVector, delta, score
from lldfast.models.gpt import GPT
from lldfast.models.scorer import Scorer
from lldfast.rules import Rule, replay
from lldfast.schedule import estimation_steps
from lldfast.weights import Array, bootstrap_deltas, effective_domains, standard_errors
from lldfast.weightsfile import combine, default_step_weights, recipe_errors


class LLDController:
    """Algorithm 1's estimates: Delta_t = l(target) - l(base at t) at the steps of S, and the weights a rule makes of them.

    Attributes:
        steps: estimates made so far, S.
        deltas: Delta_t, S arrays [K] in nats per token, in the order of `domains`.
        weights: w_t, S arrays [K].
        replicates: bootstrap replicates of Delta_t, S arrays [B, K] (empty with bootstrap=0).
    """

    def __init__(
        self,
        evalset: EvalSet,
        target: LoglikVector,
        *,
        steps: int,
        rule: str | Rule = "iterative",
        tokenizer: Tokenizer | None = None,
        normalize: str = "base_tokens",
        at: Sequence[int] | None = None,
        bootstrap: int = 0,
        seed: int = 0,
        batch_tokens: int = 16_384,
    ) -> None:
        """
        Args:
            evalset: texts to estimate on. Where it has a part "estimate", only that part is used.
            target: the target's log-likelihoods of these texts (or of the whole evalset); the target is not needed again.
            steps: length of the run.
            rule: a rule's name, or a `Rule` with its options.
            tokenizer: needed when `step` is given a bare GPT instead of a Scorer.
            normalize: "base_tokens", "bytes" or "texts", eq. (3).
            at: the step set S; `estimation_steps(steps)` by default.
            bootstrap: replicates over texts for standard errors; 0 for none.

        Raises:
            InputError: target and evalset do not cover the same texts, or there are no texts.
        """
        if "estimate" in evalset.part:
            evalset = evalset.select("estimate")
        if len(evalset) == 0:
            raise InputError("there are no evaluation texts to estimate on")
        if len(target) != len(evalset) and "estimate" in target.part:
            target = target.select("estimate")
        if len(target) != len(evalset) or not np.array_equal(target.n_bytes, evalset.n_bytes):
            raise InputError(
                f"the target was scored on other texts than the controller's: {len(target)} and {len(evalset)} texts"
            )
        if bootstrap == 1 or bootstrap < 0:
            raise InputError(f"bootstrap must be 0 or at least 2, got {bootstrap}")
        self.evalset, self.target, self.tokenizer = evalset, target, tokenizer
        self.domains = list(evalset.domains)
        self.total = steps
        self.rule = Rule(rule) if isinstance(rule, str) else rule
        if self.rule.prior is not None and len(self.rule.prior) != len(self.domains):
            raise InputError(f"the rule's prior has {len(self.rule.prior)} entries for {len(self.domains)} domains")
        self.at = set(estimation_steps(steps) if at is None else at)
        self.normalize, self.bootstrap, self.seed, self.batch_tokens = normalize, bootstrap, seed, batch_tokens
        self.steps: list[int] = []
        self.deltas: list[Array] = []
        self.weights: list[Array] = []
        self.grams: list[Array | None] = []
        self.replicates: list[Array] = []
        self._logits = np.zeros(len(self.domains))

    def step(self, step: int, model: Scorer | GPT) -> dict[str, float] | None:
        """Call before optimiser step `step`. Returns the new weights {domain: weight}, or None when S has no such step.

        Raises:
            InputError: steps go backwards, or a bare model came without a tokenizer.
        """
        if step not in self.at:
            return None
        if self.steps and step <= self.steps[-1]:
            raise InputError(f"step {step} comes after an estimate at step {self.steps[-1]}")
        scorer = self._scorer(model)
        base = score(scorer, self.evalset, batch_tokens=self.batch_tokens)
        by_domain, _ = delta(self.target, base, normalize=self.normalize)
        values = np.array([by_domain[name] for name in self.domains])
        gram = None
        if self.rule.needs_gram:
            gram = grams.estimate(scorer, self.evalset, mode="exact", batch_tokens=min(4096, self.batch_tokens)).matrix(
                self.domains
            )
            unit = self._tokens_per_unit(base)  # G's rows are per token: into the unit of Delta
            gram = gram * np.outer(unit, unit)
        elapsed = (step - self.steps[-1]) / self.total if self.steps else 0.0
        self._logits = self.rule.logits(values, gram, step / self.total, elapsed, self._logits)
        self.steps.append(step)
        self.deltas.append(values)
        self.grams.append(gram)
        self.weights.append(self.rule.weights(self._logits))
        if self.bootstrap:
            self.replicates.append(self._replicates(base))
        return dict(zip(self.domains, self.weights[-1].tolist(), strict=True))

    def _scorer(self, model: Scorer | GPT) -> Scorer:
        if isinstance(model, Scorer):
            return model
        model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
        if not isinstance(model, GPT):
            raise InputError(
                f"LLDController.step takes a GPT or a Scorer: wrap the {type(model).__name__} once, "
                "by load_scorer(model, tokenizer=...)"
            )
        if self.tokenizer is None:
            raise InputError("LLDController.step was given a bare model: pass tokenizer= to the controller, or a Scorer")
        return Scorer.from_gpt(model, self.tokenizer)

    def _counts(self, base: LoglikVector) -> Array:
        """What a text counts in the denominator of eq. (3) [N]."""
        counts = {"base_tokens": base.n_tokens, "bytes": base.n_bytes, "texts": np.ones(len(base))}[self.normalize]
        return counts.astype(np.float64)

    def _tokens_per_unit(self, base: LoglikVector) -> Array:
        """Base tokens per token, byte or text of each domain [K]; ones for "base_tokens"."""
        counts, in_domain = self._counts(base), [base.domain == name for name in self.domains]
        return np.array([base.n_tokens[rows].sum() / counts[rows].sum() for rows in in_domain])

    def _replicates(self, base: LoglikVector) -> Array:
        difference = self.target.logprob - base.logprob
        return bootstrap_deltas(
            difference, self._counts(base), self.evalset.domain, self.domains, n=self.bootstrap, seed=self.seed
        )

    def aggregate(self, *, method: str = "geometric", step_weights: str | None = None) -> dict[str, float]:
        """The fixed recipe wbar of eq. (8): "equal" step weights (the paper), or "elapsed" ones (default for mirror)."""
        if not self.steps:
            raise InputError("there is no estimate to aggregate: LLDController.step was never called at a step of S")
        plan = combine(
            self.steps,
            self.total,
            np.stack(self.weights),
            aggregate=method,
            step_weights=step_weights or default_step_weights(self.rule.name),
        )
        return dict(zip(self.domains, plan[0][1].tolist(), strict=True))

    def aggregate_errors(self, *, method: str = "geometric", step_weights: str | None = None) -> dict[str, float] | None:
        """Standard errors of `aggregate` over texts; None without bootstrap."""
        if not self.replicates:
            return None
        how = step_weights or default_step_weights(self.rule.name)
        stack = np.stack(self.replicates)  # [S, B, K]
        errors = recipe_errors(self.rule, self.steps, self.total, stack, self.grams, aggregate=method, step_weights=how)
        return dict(zip(self.domains, errors.tolist(), strict=True))

    def trajectory(self) -> list[dict[str, Any]]:
        """One JSON-able entry per estimate: step, delta, delta_se, weights, gram, effective_domains."""

        def named(values: Array) -> dict[str, float]:
            return dict(zip(self.domains, values.tolist(), strict=True))

        entries = []
        for i, step in enumerate(self.steps):
            gram = self.grams[i]
            entries.append(
                {
                    "step": step,
                    "delta": named(self.deltas[i]),
                    "delta_se": self._delta_errors(i),
                    "weights": named(self.weights[i]),
                    "gram": None if gram is None else gram.tolist(),
                    "effective_domains": effective_domains(self.weights[i]),
                }
            )
        return entries

    def _delta_errors(self, i: int) -> dict[str, float | None] | None:
        """Standard errors of Delta at the i-th estimate; None for a domain of one text, which resampling cannot vary."""
        if not self.replicates:
            return None
        counts = self.evalset.counts()
        errors = self.replicates[i].std(axis=0, ddof=1).tolist()
        return {name: value if counts[name] > 1 else None for name, value in zip(self.domains, errors, strict=True)}

    def last_errors(self) -> dict[str, float] | None:
        """Standard errors of the last weights over texts (the path of states is resampled with them)."""
        if not self.replicates:
            return None
        stack = np.stack(self.replicates).transpose(1, 0, 2)  # [B, S, K]
        errors = standard_errors(stack, lambda deltas: replay(self.rule, self.steps, self.total, deltas, self.grams)[-1])
        return dict(zip(self.domains, errors.tolist(), strict=True))

    def save_replicates(self, path: str | Path) -> None:
        """Bootstrap replicates as .npz (steps [S], deltas [S, B, K]): offline recomputation takes its error bars from them."""
        if self.replicates:
            with atomic_path(path) as temporary, temporary.open("wb") as file:
                np.savez_compressed(
                    file, steps=np.array(self.steps), deltas=np.stack(self.replicates), domains=np.array(self.domains)
                )

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on, as numpy arrays; give it to `load_state_dict` of a controller made the same way."""
        k = len(self.domains)
        made = [i for i, g in enumerate(self.grams) if g is not None]
        return {
            "domains": np.array(self.domains),
            "steps": np.array(self.steps, dtype=np.int64),
            "deltas": np.array(self.deltas).reshape(len(self.steps), k),
            "weights": np.array(self.weights).reshape(len(self.steps), k),
            "grams": np.array([self.grams[i] for i in made]).reshape(len(made), k, k),
            "replicates": np.array(self.replicates).reshape(len(self.replicates), -1, k)
            if self.replicates
            else np.zeros((0, 0, k)),
            "logits": self._logits.copy(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`.

        Raises:
            InputError: the state is of other domains, or of the same in another order.
        """
        if state["logits"].shape != (len(self.domains),):
            raise InputError(f"the state is of {len(state['logits'])} domains, the controller has {len(self.domains)}")
        stored = np.asarray(state.get("domains", self.domains)).tolist()
        if stored != self.domains:
            raise InputError(f"the state is of the domains {stored}, in this order; the controller has {self.domains}")
        self.steps = [int(step) for step in state["steps"]]
        self.deltas, self.weights = list(state["deltas"]), list(state["weights"])
        self.grams = list(state["grams"]) if len(state["grams"]) else [None] * len(self.steps)
        self.replicates = list(state["replicates"])
        self._logits = state["logits"].copy()
