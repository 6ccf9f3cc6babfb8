"""Weights files: a mixture with everything needed to judge it, recompute it, and disclose where it came from.

The file is JSON. `weights` is {domain: weight}; `trajectory` holds Delta_t (and G_t) of every estimate, so that tau, the
rule, the steps and the aggregation can be changed after the run at no cost: see `lldfast.weights.recompute`. A plain
{domain: weight} JSON object written by hand is read as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lldfast.errors import CorruptError, InputError, naming
from lldfast.files import read_json, write_json
from lldfast.weights.rules import RULE_FIELDS, STORED_AS, Rule, StepGram
from lldfast.weights.simplex import Array, effective_domains, mixture, numbers

FORMAT, VERSION = "lldfast-weights", 1

Named = dict[str, float]


@dataclass(frozen=True)
class Estimate:
    """One entry of a trajectory: Delta_t by domain at a step of S, and the weights that followed.

    Attributes:
        step: optimiser steps done before the estimate.
        delta: Delta_t, nats per token (per byte, per text).
        weights: w_t.
        delta_se: standard errors of Delta_t over texts; None for a domain of one text, which resampling cannot vary.
        gram: G_t as a list of K rows in the order of the file's domains; None for rules without G.
        gram_info: how G_t was estimated, see `lldfast.gram.step.StepEstimate`.
        about: what else a file says of the estimate.
    """

    step: int
    delta: Named
    weights: Named
    delta_se: dict[str, float | None] | None = None
    gram: list[list[float]] | None = None
    gram_info: dict[str, Any] | None = None
    about: dict[str, Any] = field(default_factory=dict)

    def step_gram(self, domains: Sequence[str]) -> StepGram | None:
        """G_t [K, K] in the order of `domains` of the file, with the ridge and the drift stored beside it."""
        return None if self.gram is None else step_gram(self.gram, self.gram_info, domains)

    def to_json(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "delta": self.delta,
            "delta_se": self.delta_se,
            "weights": self.weights,
            "gram": self.gram,
            "gram_info": self.gram_info,
            "effective_domains": effective_domains(self.weights),
            **self.about,
        }

    @classmethod
    def from_json(cls, value: Any, domains: Sequence[str], after: int) -> Estimate:
        """Check one entry of a file whose domains and step before are known.

        Raises:
            CorruptError: what is wrong with it.
        """
        if not isinstance(value, Mapping):
            raise CorruptError("its trajectory is not a list of estimates")
        rest = dict(value)
        step, gram, info, errors = (rest.pop(key, None) for key in ("step", "gram", "gram_info", "delta_se"))
        rest.pop("effective_domains", None)
        if not isinstance(step, int) or step <= after:
            raise CorruptError(f"the step {step!r} of its trajectory is not an integer after {after}")
        for key in ("delta", "weights"):
            _check_named(rest.get(key), domains, f"{key} of step {step}")
        if errors is not None:
            _check_named(errors, domains, f"delta_se of step {step}", empty=True)
        if gram is not None:
            _check_gram(gram, domains, f"gram of step {step}")
        if info is not None:
            _check_gram_info(info, domains, f"gram_info of step {step}")
        return cls(step, dict(rest.pop("delta")), dict(rest.pop("weights")), errors, gram, info, rest)


def _check_named(values: Any, domains: Sequence[str], what: str, *, empty: bool = False) -> None:
    if not isinstance(values, Mapping) or sorted(values) != sorted(domains):
        raise CorruptError(f"{what} does not have its domains")
    for name, value in values.items():
        if value is None and empty:
            continue
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise CorruptError(f"{what} is {value!r} for domain {name!r}")


def _check_gram(gram: Any, domains: Sequence[str], what: str) -> None:
    try:
        matrix = numbers(gram, what)
    except InputError:  # of words, or rows of different lengths
        matrix = np.zeros(0)
    if matrix.shape != (len(domains), len(domains)):
        raise CorruptError(f"{what} does not have a row and a column for each domain")
    if not np.isfinite(matrix).all():
        raise CorruptError(f"{what} has an entry that is not finite")


def _check_gram_info(info: Any, domains: Sequence[str], what: str) -> None:
    """The entries that a rule computes with; the others are only shown."""
    if not isinstance(info, Mapping):
        raise CorruptError(f"{what} is not an object")
    ridge, drift = info.get("ridge"), info.get("drift")
    if ridge is not None and (not isinstance(ridge, (int, float)) or not 0 <= ridge < math.inf):
        raise CorruptError(f"{what} has the ridge {ridge!r}")
    if drift is None:
        return
    if not isinstance(drift, Mapping) or sorted(drift) != sorted(domains):
        raise CorruptError(f"{what} has a drift that does not have its domains")
    for name, value in drift.items():
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise CorruptError(f"{what} has the drift {value!r} for domain {name!r}")


def step_gram(gram: Any, info: Mapping[str, Any] | None, domains: Sequence[str]) -> StepGram:
    """G_t [K, K] of one estimate with the ridge and the drift of its "gram_info" (None in files that have none)."""
    info = info or {}
    drift = info.get("drift")
    values = None if drift is None else np.array([drift[name] for name in domains], dtype=np.float64)
    return StepGram(np.asarray(gram, dtype=np.float64), info.get("ridge"), values)


@dataclass(frozen=True)
class Stage:
    """Weights of a recipe from one step on."""

    from_step: int
    weights: Named


@dataclass
class WeightsFile:
    """The content of a weights file.

    Attributes:
        weights: the mixture; of a pass 1 the fixed recipe of eq. (8), of two stages the first.
        method, objective: of the run that made it: the method's name, "ce", "distill" or "distill+ce".
        rule: the rule's name, None for weights that were not estimated. `rule_fields` has its options as JSON; `made_by` reads
            both as a Rule.
        trajectory: the estimates, by step; empty for weights that were fixed.
        weights_se: standard errors of `weights` over texts, where they were estimated.
        total_steps: length of the run in optimiser steps.
        per: what log-likelihoods were divided by, eq. (3): "base_tokens", "bytes" or "texts".
        base, target: identities of the models.
        about: other provenance: corpus_hash, evalset_hash, tokenizer, seed, versions, and what else a file holds.
        aggregate, step_weights: how the recipe was averaged over the trajectory.
        last_weights, last_weights_se: those of the last estimate.
        stages: the mixtures of a two-stage recipe.
        pass1: which run an aggregated recipe was made from.
        disclosure: what to publish with the weights. distillation: settings and teacher of a distilled method.
        folder: where the file lies; bootstrap replicates lie beside it.
    """

    weights: Named
    method: str | None = None
    rule: str | None = None
    rule_fields: dict[str, Any] = field(default_factory=dict)
    trajectory: list[Estimate] = field(default_factory=list)
    weights_se: Named | None = None
    total_steps: int | None = None
    per: str | None = None
    objective: str | None = None
    base: dict[str, Any] | None = None
    target: dict[str, Any] | None = None
    about: dict[str, Any] = field(default_factory=dict)
    aggregate: str | None = None
    step_weights: str | None = None
    last_weights: Named | None = None
    last_weights_se: Named | None = None
    stages: list[Stage] = field(default_factory=list)
    pass1: dict[str, Any] | None = None
    disclosure: str | None = None
    distillation: dict[str, Any] | None = None
    folder: Path | None = None

    @property
    def domains(self) -> list[str]:
        """The order of the rows and columns of every G_t."""
        return list(self.weights)

    def set_rule(self, rule: Rule, domains: Sequence[str]) -> None:
        """Say that `rule` made the weights; `domains` name the entries of its prior."""
        fields = rule.to_json(domains)
        self.rule, self.rule_fields = fields.pop("rule"), fields

    def made_by(self) -> Rule:
        """The rule that made the weights, with its options.

        Raises:
            InputError: none did, or its options make no sense.
            CorruptError: its prior is of other domains.
        """
        return Rule.from_json({"rule": self.rule, **self.rule_fields}, self.domains)

    def arrays(self) -> tuple[list[int], Array, list[StepGram | None]]:
        """Steps [S], Delta_t [S, K] and G_t of the trajectory, in the order of `domains`.

        Raises:
            InputError: there is no trajectory (the weights were not estimated).
        """
        if not self.trajectory:
            raise InputError("these weights have no stored Delta_t: they were fixed, not estimated")
        names = self.domains
        deltas = np.array([[estimate.delta[name] for name in names] for estimate in self.trajectory])
        return [e.step for e in self.trajectory], deltas, [e.step_gram(names) for e in self.trajectory]

    def to_json(self) -> dict[str, Any]:
        """The file's content; what is not known is left out, but for the fields that say whether there was an estimate."""
        content: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "weights": self.weights,
            "effective_domains": effective_domains(self.weights),
            "domains": self.domains,
            "method": self.method,
            "rule": self.rule,
            "trajectory": [estimate.to_json() for estimate in self.trajectory],
            "weights_se": self.weights_se,
            "total_steps": self.total_steps,
            "normalize": self.per,
            "objective": self.objective,
            "base": self.base,
            "target": self.target,
            **self.about,
            **self.rule_fields,
        }
        if self.aggregate is not None:
            content |= {"aggregate": self.aggregate, "step_weights": self.step_weights}
        if self.last_weights is not None:
            content |= {"last_weights": self.last_weights, "last_weights_se": self.last_weights_se}
        if self.stages:
            content["stages"] = [{"from_step": stage.from_step, "weights": stage.weights} for stage in self.stages]
        others = {"pass1": self.pass1, "disclosure": self.disclosure, "distillation": self.distillation}
        return content | {key: value for key, value in others.items() if value is not None}

    @classmethod
    def from_json(cls, value: Any) -> WeightsFile:
        """Check and take the content of a file: the one place that does.

        Raises:
            InputError: it holds no weights.
            CorruptError: another format or version, a trajectory that is not one, or a field of another kind.
        """
        if not isinstance(value, dict):
            raise InputError(f"expected a JSON object of weights by domain, found {type(value).__name__}")
        if "format" not in value:
            if not value or not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in value.values()):
                raise InputError("neither an lldfast weights file nor a plain {domain: weight} object")
            return cls(weights=dict(value))
        rest = dict(value)
        found = rest.pop("format"), rest.pop("version", None)
        if found != (FORMAT, VERSION):
            raise CorruptError(f"expected {FORMAT} version {VERSION}, found {found[0]!r} version {found[1]!r}")
        weights = rest.pop("weights", None)
        if not isinstance(weights, dict) or not weights:
            raise InputError("it holds no weights")
        for name, weight in weights.items():
            if not isinstance(weight, (int, float)) or not math.isfinite(weight):
                raise InputError(f"the weight of domain {name!r} is {weight!r}, not a finite number >= 0")
        rest.pop("effective_domains", None)
        names = rest.pop("domains", list(weights))
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise CorruptError(f"its domains are not a list of names but {names!r:.100}")
        if sorted(names) != sorted(weights):
            odd = sorted(set(names) ^ set(weights)) or [name for name in weights if names.count(name) > 1]
            raise CorruptError(f"its domains are not those of its weights (see {', '.join(map(repr, odd[:3]))})")
        for key, (kind, title) in _KINDS.items():
            if rest.get(key) is not None and not isinstance(rest[key], kind):
                raise CorruptError(f"its {key} is {rest[key]!r:.100}, not {title}")
        entries = rest.pop("trajectory", [])
        if not isinstance(entries, list):
            raise CorruptError("its trajectory is not a list of estimates")
        trajectory: list[Estimate] = []
        for entry in entries:
            trajectory.append(Estimate.from_json(entry, names, trajectory[-1].step if trajectory else -1))
        total = rest.get("total_steps")
        if trajectory and (not isinstance(total, int) or total <= trajectory[-1].step):
            raise CorruptError(f"total_steps is {total!r}, with an estimate at step {trajectory[-1].step}")
        for key in ("weights_se", "last_weights", "last_weights_se"):
            if rest.get(key) is not None:
                _check_named(rest[key], names, key)
        stages = []
        for stage in rest.pop("stages", None) or ():
            if not isinstance(stage, Mapping) or not isinstance(stage.get("from_step"), int):
                raise CorruptError("its stages are not a list of steps and weights")
            _check_named(stage.get("weights"), names, f"the stage from step {stage['from_step']}")
            stages.append(Stage(stage["from_step"], dict(stage["weights"])))
        plain = {key: rest.pop(key) for key in _PLAIN if key in rest}
        return cls(
            weights={name: weights[name] for name in names},  # G_t is in the order of "domains"
            trajectory=trajectory,
            stages=stages,
            per=rest.pop("normalize", None),
            rule_fields={key: rest.pop(key) for key in RULE_FIELDS if key != "rule" and key in rest},
            about=rest,
            **plain,
        )

    def save(self, path: str | Path) -> Path:
        """Write the file, atomically.

        Raises:
            InputError: a value cannot be JSON (NaN, infinity).
            WriteError: the file cannot be written.
        """
        write_json(path, self.to_json())
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> WeightsFile:
        """Read a weights file, or a plain {domain: weight} object.

        Raises:
            InputError: no such file, or it holds no weights; CorruptError: it is damaged. Both name the file.
        """
        value = read_json(path)
        with naming(path):
            file = cls.from_json(value)
        file.folder = Path(path).parent
        return file


# Fields of a file that are attributes of WeightsFile under the same name, and need no reading of their own.
_PLAIN = (
    "method", "rule", "weights_se", "total_steps", "objective", "base", "target", "aggregate", "step_weights", "last_weights",
    "last_weights_se", "pass1", "disclosure", "distillation",
)  # fmt: skip

# What fields that are computed with, or shown by their entries, have to be where they are there at all.
_KINDS: dict[str, tuple[type, str]] = (
    dict.fromkeys(("method", "rule", "normalize", "objective", "aggregate", "step_weights", "disclosure"), (str, "a string"))
    | dict.fromkeys(("base", "target", "pass1", "distillation"), (dict, "an object"))
    | {"total_steps": (int, "an integer"), "stages": (list, "a list of steps and weights")}
)
_PYTHON_NAMES = {"per": "normalize", **STORED_AS}  # names of Python's that a file has another name for


def save_weights(path: str | Path, weights: Named, **fields: Any) -> Path:
    """Write a weights file atomically; the weights are normalised.

    Args:
        fields: what the file is to say beside them, by its names in docs/FORMATS.md: rule, tau, trajectory, total_steps, base,
            target, corpus_hash, seed, ... A controller writes all it knows by `LLDController.save`.

    Raises:
        InputError: the weights are not {domain: weight}, or a field cannot be JSON.
        CorruptError: the trajectory is not one.
    """
    if not isinstance(weights, dict):
        raise InputError(f"{path}: weights must be {{domain: weight}}, got {type(weights).__name__}")
    for name in _PYTHON_NAMES.keys() & fields.keys():
        raise InputError(f"{path}: weights files say {_PYTHON_NAMES[name]!r} for {name!r}")
    normalised = mixture(weights, list(weights), str(path))
    with naming(path):
        file = WeightsFile.from_json({"format": FORMAT, "version": VERSION, "weights": normalised, **fields})
    return file.save(path)


def load_weights(path: str | Path, domains: Sequence[str] | None = None) -> Named:
    """Weights {domain: weight}, normalised; with `domains`, checked against them and in their order.

    Raises:
        InputError: an unknown or missing domain (named, with the file), a negative or non-finite weight.
    """
    weights = WeightsFile.load(path).weights
    return mixture(weights, list(weights) if domains is None else list(domains), str(path))
