"""Weights files: a mixture with everything needed to judge it, recompute it, and disclose where it came from.

The file is JSON. `weights` is {domain: weight}; `trajectory` holds Delta_t (and G_t) of every estimate, so that tau, the
rule, the steps and the aggregation can be changed after the run at no cost: see `recompute`. A plain {domain: weight} JSON
object written by hand is read as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lldfast.errors import CorruptError, InputError
from lldfast.files import read_json, write_json
from lldfast.weights.equations import Array, aggregate_weights, effective_domains, simplex, standard_errors
from lldfast.weights.rules import Rule, StepGram, aggregation, elapsed_weights, replay, two_stage_weights

FORMAT = "lldfast-weights"


def disclosure(rule: str | None, target: dict[str, Any] | None) -> str:
    """The statement that the paper's ethics section asks practitioners to publish with a mixture."""
    if rule is None or target is None:
        return "These domain weights were not estimated from a target model."
    licence = target.get("licence") or "not stated: check the target's terms of use before using these weights"
    return (
        f"These domain weights were estimated with reference to the target model {target.get('name', 'unnamed')!r} "
        f"(licence: {licence}), by log-likelihood differences ({rule} rule). Training with them is target-dependent even though "
        "the target is not used again; publish this statement with any model trained on them."
    )


def distillation_disclosure(teacher: dict[str, Any]) -> str:
    """What is to be published with a model that was distilled, behind `disclosure`."""
    licence = teacher.get("licence") or "not stated: check its terms of use before using the model"
    name = teacher.get("name", "unnamed")
    return f" The model was trained on the output distribution of the teacher {name!r} (licence: {licence})."


def save_weights(path: str | Path, weights: dict[str, float], **fields: Any) -> Path:
    """Write a weights file atomically. `fields` are provenance: rule, tau, trajectory, base, target, corpus_hash, seed, ..."""
    if not isinstance(weights, dict):
        raise InputError(f"{path}: weights must be {{domain: weight}}, got {type(weights).__name__}")
    names = list(weights)
    normalised = simplex(weights, names)
    write_json(
        path,
        {
            "format": FORMAT,
            "version": 1,
            "weights": dict(zip(names, normalised.tolist(), strict=True)),
            "effective_domains": effective_domains(normalised),
            "domains": names,
            **fields,
        },
    )
    return Path(path)


def read_weights_file(path: str | Path) -> dict[str, Any]:
    """The whole weights file as a dict with at least "weights", "domains" and "trajectory".

    Raises:
        InputError: no such file, or it holds no weights.
        CorruptError: not JSON, another version, or a trajectory that is not one.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object of weights by domain, found {type(value).__name__}")
    if "format" not in value:
        if not value or not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in value.values()):
            raise InputError(f"{path} is neither an lldfast weights file nor a plain {{domain: weight}} object")
        value = {"format": FORMAT, "version": 1, "weights": value}
    if value["format"] != FORMAT or value.get("version") != 1:
        raise CorruptError(f"{path}: expected {FORMAT} version 1, found {value['format']!r} version {value.get('version')!r}")
    if not isinstance(value.get("weights"), dict) or not value["weights"]:
        raise InputError(f"{path} holds no weights")
    value = {"domains": list(value["weights"]), "trajectory": [], **value}
    problem = _wrong_trajectory(value)
    if problem:
        raise CorruptError(f"{path}: {problem}")
    return value


def _wrong_trajectory(file: dict[str, Any]) -> str:
    """What is wrong with a file's domains and trajectory, or "" (such files are also edited by hand)."""
    names, entries, before = file["domains"], file["trajectory"], -1
    if not isinstance(names, list) or sorted(map(str, names)) != sorted(file["weights"]):
        return "its domains are not those of its weights"
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        return "its trajectory is not a list of estimates"
    for entry in entries:
        step, gram = entry.get("step"), entry.get("gram")
        if not isinstance(step, int) or step <= before:
            return f"the step {step!r} of its trajectory is not an integer after {before}"
        for key in ("delta", "weights"):
            values = entry.get(key)
            if not isinstance(values, dict) or sorted(values) != sorted(names):
                return f"{key} of step {step} does not have its domains"
            bad = next((n for n, v in values.items() if not isinstance(v, (int, float)) or not math.isfinite(v)), None)
            if bad is not None:
                return f"{key} of step {step} is {values[bad]!r} for domain {bad!r}"
        if gram is not None and np.shape(gram) != (len(names), len(names)):
            return f"gram of step {step} does not have a row and a column for each domain"
        problem = _wrong_gram_info(entry.get("gram_info"), names)
        if problem:
            return f"gram_info of step {step} {problem}"
        before = step
    total = file.get("total_steps")
    if entries and (not isinstance(total, int) or total <= before):
        return f"total_steps is {total!r}, with an estimate at step {before}"
    return ""


def _wrong_gram_info(info: Any, names: list[str]) -> str:
    """What is wrong with those entries of an estimate's "gram_info" that its rule computes with, or ""."""
    if info is None:
        return ""  # no G, or a file of before ridges were chosen
    if not isinstance(info, dict):
        return "is not an object"
    ridge, drift = info.get("ridge"), info.get("drift")
    if ridge is not None and (not isinstance(ridge, (int, float)) or not 0 <= ridge < math.inf):
        return f"has the ridge {ridge!r}"
    if drift is None:
        return ""
    if not isinstance(drift, dict) or sorted(drift) != sorted(names):
        return "has a drift that does not have its domains"
    bad = next((n for n, v in drift.items() if not isinstance(v, (int, float)) or not math.isfinite(v)), None)
    return "" if bad is None else f"has the drift {drift[bad]!r} for domain {bad!r}"


def load_weights(path: str | Path, domains: Sequence[str] | None = None) -> dict[str, float]:
    """Weights {domain: weight}, normalised; with `domains`, checked against them and in their order.

    Raises:
        InputError: an unknown or missing domain (named, with the file), a negative or non-finite weight.
    """
    weights = read_weights_file(path)["weights"]
    names = list(weights) if domains is None else list(domains)
    return dict(zip(names, simplex(weights, names, str(path)).tolist(), strict=True))


def step_gram(gram: Any, info: dict[str, Any] | None, domains: Sequence[str]) -> StepGram | None:
    """G_t [K, K] of one estimate with the ridge and the drift stored in its "gram_info" (None in files that have none)."""
    if gram is None:
        return None
    info = info or {}
    drift = info.get("drift")
    values = None if drift is None else np.array([drift[name] for name in domains], dtype=np.float64)
    return StepGram(np.asarray(gram, dtype=np.float64), info.get("ridge"), values)


def trajectory_arrays(file: dict[str, Any]) -> tuple[list[int], Array, list[StepGram | None]]:
    """Steps, Delta_t [S, K] and G_t of a weights file, in the order of its "domains".

    Raises:
        InputError: the file holds no trajectory (its weights were not estimated).
    """
    if not file["trajectory"]:
        raise InputError("these weights have no stored Delta_t: they were fixed, not estimated")
    names = file["domains"]
    steps = [int(entry["step"]) for entry in file["trajectory"]]
    deltas = np.array([[entry["delta"][name] for name in names] for entry in file["trajectory"]])
    grams = [step_gram(entry.get("gram"), entry.get("gram_info"), names) for entry in file["trajectory"]]
    return steps, deltas, grams


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


def recompute(
    path: str | Path,
    *,
    rule: Rule | None = None,
    aggregate: str = "geometric",
    step_weights: str | None = None,
    steps: Sequence[int] | None = None,
    stages: int = 1,
    split: float = 0.5,
) -> dict[str, Any]:
    """Recompute a weights file offline from its stored Delta_t: any tau, rule, subset of steps and aggregation.

    Args:
        rule: the rule of the file by default. Another rule is applied along the trajectory of the run that was made.
        aggregate: "geometric" (arithmetic for "adjusted-fit", see `aggregation`), "arithmetic", or "none" (the last estimate).
        step_weights: "equal" or "elapsed"; by default equal, and elapsed for mirror and for two stages.
        steps: use these estimates only.

    Returns:
        A weights file's content, provenance kept; with two stages, "stages" lists both and "weights" is the first.
    """
    file = read_weights_file(path)
    at, deltas, grams = trajectory_arrays(file)
    if rule is None:
        rule = rule_of(file)
    aggregate = aggregation(rule.name, aggregate)
    if steps is not None:
        unknown = sorted(set(steps) - set(at))
        if unknown:
            raise InputError(f"{path}: no estimate at step {unknown[0]}; there are estimates at {at}")
        keep = [i for i, step in enumerate(at) if step in set(steps)]
        at, deltas, grams = [at[i] for i in keep], deltas[keep], [grams[i] for i in keep]
    total = int(file["total_steps"])
    names = file["domains"]
    step_weights = step_weights or default_step_weights(rule.name, stages)
    weights = replay(rule, at, total, deltas, grams)
    plan = combine(at, total, weights, aggregate=aggregate, step_weights=step_weights, stages=stages, split=split)
    final = plan[-1][1] if aggregate == "none" else plan[0][1]
    # the weights of every step follow the rule too: a two-stage pass 2 is made from them
    stored = {int(entry["step"]): entry for entry in file["trajectory"]}
    trajectory = [
        {**stored[step], "weights": dict(zip(names, w.tolist(), strict=True)), "effective_domains": effective_domains(w)}
        for step, w in zip(at, weights, strict=True)
    ]
    replicates = Path(path).with_name("delta_bootstrap.npz")
    errors = None
    if replicates.exists() and aggregate != "none" and stages == 1:
        with np.load(replicates) as arrays:
            rows = [i for i, step in enumerate(arrays["steps"].tolist()) if step in set(at)]
            drawn = arrays["deltas"][rows]  # [S, B, K]
        errors = recipe_errors(rule, at, total, drawn, grams, aggregate=aggregate, step_weights=step_weights)
    return {
        **file,
        "weights": dict(zip(names, final.tolist(), strict=True)),
        "effective_domains": effective_domains(final),
        "weights_se": None if errors is None else dict(zip(names, errors.tolist(), strict=True)),
        **rule_fields(rule, names),
        "trajectory": trajectory,
        "last_weights": dict(zip(names, weights[-1].tolist(), strict=True)),
        "last_weights_se": None,
        "disclosure": disclosure(rule.name, file["target"]) if file.get("target") else file.get("disclosure"),
        "aggregate": aggregate,
        "step_weights": step_weights,
        "stages": [{"from_step": s, "weights": dict(zip(names, w.tolist(), strict=True))} for s, w in plan]
        if stages == 2
        else None,
    }


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


def default_step_weights(rule: str, stages: int = 1) -> str:
    """Equal for the paper's rules (eq. (8)); elapsed for mirror, whose logits grow with time, and for two stages, each of which
    counts the estimates that were in force in it."""
    return "elapsed" if rule == "mirror" or stages == 2 else "equal"


def rule_fields(rule: Rule, domains: Sequence[str] = ()) -> dict[str, Any]:
    """A rule as JSON fields of a weights file (an infinite tau is the string "inf"); `domains` name the entries of its prior."""
    return {
        "rule": rule.name,
        "tau": rule.tau if math.isfinite(rule.tau) else "inf",
        "tau_end": rule.tau_end,
        "step_size": rule.step_size,
        "floor": rule.floor,
        "normalise": rule.normalise,
        "ridge": rule.ridge,
        "prior": None if rule.prior is None else dict(zip(domains, rule.prior, strict=True)),
        "radius": rule.radius,
        "fit_step": rule.fit_step,
    }


def rule_of(file: dict[str, Any]) -> Rule:
    """The rule a weights file was made with.

    Raises:
        InputError: none made them, or its options make no sense.
        CorruptError: its prior is of other domains.
    """
    if not file.get("rule"):
        raise InputError("these weights were not made by a rule")
    prior, tau = file.get("prior"), file.get("tau", 1.0)
    if prior is not None and (not isinstance(prior, dict) or set(prior) != set(file["domains"])):
        raise CorruptError("the prior of these weights does not have their domains")
    return Rule(
        name=file["rule"],
        tau=math.inf if tau == "inf" else tau,
        tau_end=file.get("tau_end"),
        step_size=file.get("step_size", 4.0),
        floor=file.get("floor", 0.0),
        normalise=file.get("normalise", "spread"),
        ridge=file.get("ridge", "auto"),
        prior=None if prior is None else tuple(prior[name] for name in file["domains"]),
        radius=file.get("radius", 0.1),
        fit_step=file.get("fit_step", "auto"),
    )
