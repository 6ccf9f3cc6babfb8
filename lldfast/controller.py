"""LLDController: when to estimate, from which Delta, and which weights follow.

It knows no training loop: whoever has one calls `step` before each optimiser step, and gives the mixture what comes back.

controller = LLDController(evalset, target, steps=10_000, rule="iterative")
for step in range(10_000):
    weights = controller.step(step, model)
    if weights is not None:
        mixture.set_weights(weights)
    ...                                      # the optimiser step
controller.save("recipe.json")               # eq. (8)'s recipe for pass 2, and where it comes from
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lldfast.backends import versions
from lldfast.data.evalset import EvalSet
from lldfast.data.tokenizer import Tokenizer
from lldfast.errors import InputError, deprecated, listed, naming, renamed_arguments
from lldfast.files import atomic_path
from lldfast.gram.options import GramOptions
from lldfast.gram.step import GRAM_OPTIONS, estimate_step, info_line
from lldfast.measure.comparable import check_comparable
from lldfast.measure.loglik import LoglikVector, check_per, check_same_texts, counts_per, delta
from lldfast.measure.score import score
from lldfast.models.gpt import GPT
from lldfast.models.language_model import LanguageModel
from lldfast.schedule import estimation_steps
from lldfast.weights.bootstrap import bootstrap_deltas, standard_errors
from lldfast.weights.disclosure import disclosure
from lldfast.weights.file import Estimate, WeightsFile, step_gram
from lldfast.weights.recipe import aggregation, combine, default_step_weights, recipe_errors
from lldfast.weights.recompute import REPLICATES
from lldfast.weights.rules import Rule, StepGram, replay
from lldfast.weights.simplex import Array


@renamed_arguments(normalize="per")
class LLDController:
    """Algorithm 1's estimates: Delta_t = l(target) - l(base at t) at the steps of S, and the weights a rule makes of them.

    Attributes:
        estimated_at: steps of the estimates made so far, S of them.
        total_steps: length of the run.
        deltas: Delta_t, S arrays [K] in nats per token, in the order of `domains`.
        weights: w_t, S arrays [K].
        grams: G_t, S arrays [K, K] in the unit of Delta_t squared per unit of parameter^2 (None for rules without G).
        gram_info: about each G_t (see `lldfast.gram.step.StepEstimate`), S dicts or None.
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
        per: str = "base_tokens",
        at: Sequence[int] | None = None,
        bootstrap: int = 0,
        seed: int = 0,
        batch_tokens: int = 16_384,
        gram_options: Mapping[str, Any] | None = None,
        allow_differences: bool = False,
    ) -> None:
        """
        Args:
            evalset: texts to estimate on. Where it has a part "estimate", only that part is used.
            target: the target's log-likelihoods of these texts (or of the whole evalset); the target is not needed again.
            steps: length of the run.
            rule: a rule's name, or a `Rule` with its options.
            tokenizer: needed when `step` is given a bare GPT instead of a LanguageModel.
            per: "base_tokens", "bytes" or "texts": what log-likelihoods are divided by, eq. (3).
            at: the step set S; `estimation_steps(steps)` by default.
            bootstrap: replicates over texts for standard errors; 0 for none.
            gram_options: keyword arguments of `gram.estimate` for rules that need G: mode, k, groups, debias, budget_bytes,
                target_kl, ridge, batch_tokens, seed (that of step t is seed + t: the errors of sketches average out over
                steps), and precondition, where "adamw" stands for the optimizer given to `step`.
            allow_differences: neither warn of a target that was not scored as the base is (`measure.comparable`) nor refuse it.

        Raises:
            InputError: an unknown entry of gram_options; target and evalset do not cover the same texts, or there are no texts;
                an unknown `per`.
        """
        if "estimate" in evalset.part:
            evalset = evalset.select("estimate")
        if len(evalset) == 0:
            raise InputError("there are no evaluation texts to estimate on")
        if len(target) != len(evalset) and "estimate" in target.part:
            target = target.select("estimate")
        check_same_texts(target, evalset, ("the target's scores", "the controller's evaluation texts"))
        check_per(per)
        if bootstrap == 1 or bootstrap < 0:
            raise InputError(f"bootstrap must be 0 or at least 2, got {bootstrap}")
        self.gram_options = dict(gram_options or {})
        unknown = sorted(set(self.gram_options) - set(GRAM_OPTIONS))
        if unknown:
            raise InputError(f"gram_options has no entry {unknown[0]!r}; it takes {', '.join(GRAM_OPTIONS)}")
        self.evalset, self.target, self.tokenizer = evalset, target, tokenizer
        self.domains = list(evalset.domains)
        self.total_steps = steps
        self.rule = Rule(rule) if isinstance(rule, str) else rule
        if self.rule.prior is not None and len(self.rule.prior) != len(self.domains):
            raise InputError(f"the rule's prior has {len(self.rule.prior)} entries for {len(self.domains)} domains")
        self.at = set(estimation_steps(steps) if at is None else at)
        self.per, self.bootstrap, self.seed, self.batch_tokens = per, bootstrap, seed, batch_tokens
        self.estimated_at: list[int] = []
        self.deltas: list[Array] = []
        self.weights: list[Array] = []
        self.grams: list[Array | None] = []
        self.gram_info: list[dict[str, Any] | None] = []
        self.replicates: list[Array] = []
        self.gram_seconds = 0.0  # what the last estimate of G took
        self._logits = np.zeros(len(self.domains))
        self._compared = allow_differences  # whether the two vectors' conditions have been told, or need not be
        self._base: dict[str, Any] | None = None  # identity of the model that was scored first

    def step(
        self, step: int, model: LanguageModel | GPT, optimizer: torch.optim.Optimizer | None = None
    ) -> dict[str, float] | None:
        """Call before optimiser step `step`. Returns the new weights {domain: weight}, or None when S has no such step.

        Args:
            optimizer: the run's, needed only when gram_options has precondition "adamw". Its state may still be empty.

        Raises:
            InputError: steps go backwards, a bare model came without a tokenizer, or "adamw" without an optimizer; at the first
                estimate also a base that is nearer to the target than what the way the two were scored makes alone.
        """
        if step not in self.at:
            return None
        if self.estimated_at and step <= self.estimated_at[-1]:
            raise InputError(f"step {step} comes after an estimate at step {self.estimated_at[-1]}")
        lm = self._language_model(model)
        base = score(lm, self.evalset, batch_tokens=self.batch_tokens)
        self._compare(base)
        by_domain, _ = delta(self.target, base, per=self.per, allow_differences=True)
        values = np.array([by_domain[name] for name in self.domains])
        progress = step / self.total_steps
        gram: StepGram | None = None
        info: dict[str, Any] | None = None
        if self.rule.needs_gram:
            gram, info, self.gram_seconds = estimate_step(
                lm,
                self.evalset,
                self.rule,
                values,
                self._tokens_per_unit(base),
                step=step,
                progress=progress,
                seed=self.seed,
                options={"batch_tokens": min(GramOptions.batch_tokens, self.batch_tokens), **self.gram_options},
                optimizer=optimizer,
            )
        elapsed = (step - self.estimated_at[-1]) / self.total_steps if self.estimated_at else 0.0
        logits = self.rule.logits(values, gram, progress, elapsed, self._logits)
        weights = self.rule.weights(logits)
        replicates = self._replicates(base) if self.bootstrap else None
        # Nothing is kept before all of it stands: a caller may catch an error and go on.
        if not self.estimated_at:
            self._base = base.meta["model"]  # the model that weights were estimated for first
        self._logits = logits
        self.estimated_at.append(step)
        self.deltas.append(values)
        self.grams.append(None if gram is None else gram.matrix)
        self.gram_info.append(info)
        self.weights.append(weights)
        if replicates is not None:
            self.replicates.append(replicates)
        return self._named(weights)

    @property
    def steps(self) -> list[int]:
        """Deprecated name of `estimated_at`."""
        deprecated("LLDController.steps", "estimated_at")
        return self.estimated_at

    def gram_line(self) -> str:
        """The last estimate of G in one line: how it was made, and how far v = G^-1 Delta may be off for it.

        Raises:
            InputError: the rule needs no G, or there is no estimate yet.
        """
        info = self.gram_info[-1] if self.gram_info else None
        if info is None:
            raise InputError("there is no estimate of G")
        return f"G at step {self.estimated_at[-1]}: {info_line(info, len(self.domains), self.gram_seconds)}"

    def _compare(self, base: LoglikVector) -> None:
        """Warn once of a target that was scored differently; a run that has begun goes on whatever the distance becomes."""
        if not self._compared and not self.estimated_at:
            check_comparable((self.target, base), stacklevel=4)
        self._compared = True

    def _named(self, values: Array) -> dict[str, float]:
        return dict(zip(self.domains, values.tolist(), strict=True))

    def _step_grams(self) -> list[StepGram | None]:
        return [step_gram(gram, info, self.domains) for gram, info in zip(self.grams, self.gram_info, strict=True)]

    def _language_model(self, model: LanguageModel | GPT) -> LanguageModel:
        if isinstance(model, LanguageModel):
            return model
        model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
        if not isinstance(model, GPT):
            raise InputError(
                f"LLDController.step takes a GPT or a LanguageModel: wrap the {type(model).__name__} once, "
                "by load_model(model, tokenizer=...)"
            )
        if self.tokenizer is None:
            raise InputError("LLDController.step was given a bare model: pass tokenizer= to the controller, or a LanguageModel")
        return LanguageModel.from_gpt(model, self.tokenizer)

    def _tokens_per_unit(self, base: LoglikVector) -> Array:
        """Base tokens per token, byte or text of each domain [K]; ones for "base_tokens"."""
        counts, in_domain = counts_per(base, self.per), [base.domain == name for name in self.domains]
        return np.array([base.n_tokens[rows].sum() / counts[rows].sum() for rows in in_domain])

    def _replicates(self, base: LoglikVector) -> Array:
        difference = self.target.logprob - base.logprob
        return bootstrap_deltas(
            difference, counts_per(base, self.per), self.evalset.domain, self.domains, n=self.bootstrap, seed=self.seed
        )

    def aggregate(self, *, method: str = "geometric", step_weights: str | None = None) -> dict[str, float]:
        """The fixed recipe wbar of eq. (8): "equal" step weights (the paper), or "elapsed" ones (default for mirror).

        The geometric mean of "adjusted-fit", whose weights have zeros, is replaced by the arithmetic one (see
        `lldfast.weights.recipe.aggregation`).
        """
        if not self.estimated_at:
            raise InputError("there is no estimate to aggregate: LLDController.step was never called at a step of S")
        recipe = combine(
            self.estimated_at,
            self.total_steps,
            np.stack(self.weights),
            aggregate=aggregation(self.rule.name, method),
            step_weights=step_weights or default_step_weights(self.rule.name),
        )
        return self._named(recipe[0][1])

    def aggregate_errors(self, *, method: str = "geometric", step_weights: str | None = None) -> dict[str, float] | None:
        """Standard errors of `aggregate` over texts; None without bootstrap."""
        if not self.replicates:
            return None
        how = step_weights or default_step_weights(self.rule.name)
        stack = np.stack(self.replicates)  # [S, B, K]
        mean = aggregation(self.rule.name, method)
        errors = recipe_errors(
            self.rule, self.estimated_at, self.total_steps, stack, self._step_grams(), aggregate=mean, step_weights=how
        )
        return self._named(errors)

    def trajectory(self) -> list[dict[str, Any]]:
        """One JSON-able entry per estimate: step, delta, delta_se, weights, gram, gram_info, effective_domains.

        "gram_info" is None for rules without G; else see `lldfast.gram.step.StepEstimate`.
        """
        return [estimate.to_json() for estimate in self.estimates()]

    def estimates(self) -> list[Estimate]:
        """The estimates made so far, as a weights file holds them."""
        return [
            Estimate(
                step=step,
                delta=self._named(self.deltas[i]),
                weights=self._named(self.weights[i]),
                delta_se=self._delta_errors(i),
                gram=None if gram is None else gram.tolist(),
                gram_info=self.gram_info[i],
            )
            for i, (step, gram) in enumerate(zip(self.estimated_at, self.grams, strict=True))
        ]

    def record(self, *, aggregate: str = "geometric", step_weights: str | None = None) -> WeightsFile:
        """The fixed recipe with its trajectory, and all that the controller knows about where it comes from.

        Args:
            aggregate, step_weights: as `aggregate`'s method and step_weights.

        Raises:
            InputError: there is no estimate yet.
        """
        how = step_weights or default_step_weights(self.rule.name)
        mean = aggregation(self.rule.name, aggregate)
        target = self.target.meta.get("model")
        file = WeightsFile(
            self.aggregate(method=mean, step_weights=how),
            trajectory=self.estimates(),
            weights_se=self.aggregate_errors(method=mean, step_weights=how),
            total_steps=self.total_steps,
            per=self.per,
            base=self._base,
            target=target,
            about={"evalset_hash": self.evalset.hash, "seed": self.seed, "versions": versions()},
            aggregate=mean,
            step_weights=how,
            last_weights=self._named(self.weights[-1]),
            last_weights_se=self.last_errors(),
            disclosure=disclosure(self.rule.name, target),
        )
        file.set_rule(self.rule, self.domains)
        return file

    def save(self, path: str | Path, *, aggregate: str = "geometric", step_weights: str | None = None, **about: Any) -> Path:
        """Write `record` as a weights file, and beside it, in STEM.delta_bootstrap.npz, the replicates of its error bars.

        Args:
            aggregate, step_weights: as `aggregate`'s method and step_weights.
            about: further provenance: corpus_hash, tokenizer, method, ...

        Raises:
            InputError: there is no estimate yet, `about` has a field of the estimates or of the rule, which are the controller's
                to say, or a value of it cannot be JSON.
            WriteError: the file cannot be written.
        """
        file = self.record(aggregate=aggregate, step_weights=step_weights)
        own = file.to_json()
        free = {*file.about, "method", "objective", "base", "target", "disclosure"}
        for name in (own.keys() - free) & about.keys():
            raise InputError(f"LLDController.save: {name!r} is what the controller has estimated, and cannot be given")
        with naming(path):
            file = WeightsFile.from_json(own | about)
        if "disclosure" not in about:
            file.disclosure = disclosure(self.rule.name, file.target)
        beside = Path(path).with_name(f"{Path(path).stem}.{REPLICATES}")  # two recipes may stand in one folder
        file.about["replicates"] = beside.name if self.replicates else None
        self.save_replicates(beside)
        return file.save(path)

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
        kept = self._step_grams()
        errors = standard_errors(stack, lambda deltas: replay(self.rule, self.estimated_at, self.total_steps, deltas, kept)[-1])
        return self._named(errors)

    def save_replicates(self, path: str | Path) -> None:
        """Bootstrap replicates as .npz (steps [S], deltas [S, B, K]): offline recomputation takes its error bars from them."""
        if self.replicates:
            with atomic_path(path) as temporary, temporary.open("wb") as file:
                np.savez_compressed(
                    file, steps=np.array(self.estimated_at), deltas=np.stack(self.replicates), domains=np.array(self.domains)
                )

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on, as numpy arrays; give it to `load_state_dict` of a controller made the same way."""
        k = len(self.domains)
        made = [i for i, g in enumerate(self.grams) if g is not None]
        return {
            "domains": np.array(self.domains),
            "steps": np.array(self.estimated_at, dtype=np.int64),
            "deltas": np.array(self.deltas).reshape(len(self.estimated_at), k),
            "weights": np.array(self.weights).reshape(len(self.estimated_at), k),
            "grams": np.array([self.grams[i] for i in made]).reshape(len(made), k, k),
            "replicates": np.array(self.replicates).reshape(len(self.replicates), -1, k)
            if self.replicates
            else np.zeros((0, 0, k)),
            "gram_info": np.array(json.dumps(self.gram_info)),
            "logits": self._logits.copy(),
            "base": np.array(json.dumps(self._base)),
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
            before, now = listed(map(repr, stored)), listed(map(repr, self.domains))
            raise InputError(f"the state is of the domains [{before}], in this order; the controller has [{now}]")
        steps = [int(step) for step in state["steps"]]
        grams = list(state["grams"]) if len(state["grams"]) else [None] * len(steps)
        # a state of before ridges were stored has no such entry: its rules go by their own ridge
        infos = json.loads(str(state["gram_info"])) if "gram_info" in state else [None] * len(steps)
        base = json.loads(str(state["base"])) if "base" in state else None  # a state of before it was stored
        deltas, weights, replicates, logits = (list(state[key]) for key in ("deltas", "weights", "replicates", "logits"))
        # all of it has been read: from here on nothing fails
        self.estimated_at, self.deltas, self.weights, self.replicates = steps, deltas, weights, replicates
        self.grams, self.gram_info, self._logits, self._base = grams, infos, np.array(logits), base
