"""G_t of one estimate along a run: in the unit of Delta, with what is kept about it and the errors that a sketch causes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from lldfast.data.evalset import EvalSet
from lldfast.errors import InputError
from lldfast.gram.estimation import estimate
from lldfast.gram.options import GramOptions
from lldfast.gram.sketch_error import simulated_errors
from lldfast.measure.divergence import finite
from lldfast.models.language_model import LanguageModel
from lldfast.weights.rules import Rule, StepGram
from lldfast.weights.simplex import Array

# What the caller of `estimate_step` may choose of an estimate: delta and tau are those of the step.
GRAM_OPTIONS = (*GramOptions().keywords(), "seed", "ridge")


class StepEstimate(NamedTuple):
    """G_t and what is kept of its estimate.

    Attributes:
        gram: in the unit of Delta, in the order of the evaluation set's domains.
        info: JSON-able, the "gram_info" of a trajectory:
            "mode"; "k" (None without a sketch); "expected_error": relative, of v = G^-1 Delta, by the sketch or rounding;
            "ridge": chosen with it, in the unit of G (None where it chose none), and "drift" ({domain: value} or None), which
            `replay` needs; "debiased": the number of domains whose diagonal was; what `Rule.reading` reads; "weights_se":
            standard errors of the weights by the sketch ({domain: value}; None without one, without an error of it, or where G is
            noise alone).
        seconds: what the estimate took.
    """

    gram: StepGram
    info: dict[str, Any]
    seconds: float


def estimate_step(
    model: LanguageModel,
    evalset: EvalSet,
    rule: Rule,
    delta: Array,
    unit: Array,
    *,
    step: int,
    progress: float,
    seed: int,
    options: Mapping[str, Any],
    optimizer: torch.optim.Optimizer | None = None,
) -> StepEstimate:
    """Estimate G at step t for a rule that needs it.

    Gradients are of log-likelihoods per token. With u = `unit`, tokens per unit of Delta, G becomes U G U and the drift U drift;
    the ridge stays the same share of tr G.

    Args:
        delta: Delta_t [K] in the order of `evalset.domains`.
        unit: tokens per unit of Delta [K]: ones where it is per token.
        progress: t as a share of the run, in [0, 1].
        seed: of the simulated sketches behind "weights_se", and of G's where `options` has none. That of step t is seed + t: the
            errors of sketches average out over steps.
        options: keyword arguments of `gram.estimate`, out of GRAM_OPTIONS; precondition "adamw" stands for `optimizer`.

    Raises:
        InputError: precondition is "adamw" and there is no optimizer; see also `gram.estimate`.
    """
    options = {**options, "seed": options.get("seed", seed) + step}
    if options.get("precondition") == "adamw":
        if optimizer is None:
            raise InputError("gram_options has precondition 'adamw': give LLDController.step the optimizer of the run")
        options["precondition"] = optimizer
    domains = list(evalset.domains)
    per_token = delta / unit
    # only std(delta) / tau counts, which must not change with the unit
    tau = rule.planned_tau(delta, progress) * (float(per_token.std()) / (float(delta.std()) or 1.0) or 1.0)
    found = estimate(model, evalset, delta=per_token, tau=tau, **options)

    def ordered(values: Array) -> Array:
        by_name = dict(zip(found.domains, values.tolist(), strict=True))
        return np.array([by_name[name] for name in domains])

    matrix = found.matrix(domains)
    scaled = matrix * np.outer(unit, unit)
    ridge = None if found.ridge is None else float(found.ridge * scaled.trace() / matrix.trace())
    drift = None if found.drift is None else ordered(found.drift) * unit
    gram = StepGram(scaled, ridge, drift)

    def named(values: Array | None) -> dict[str, float] | None:
        return None if values is None else dict(zip(domains, values.tolist(), strict=True))

    def weights_of(drawn: Array) -> Array:
        logits = rule.logits(delta, gram._replace(matrix=drawn), progress, 0.0, np.zeros(len(delta)))
        return rule.weights(logits)

    info: dict[str, Any] = {
        "mode": found.mode,
        "k": found.k,
        "ridge": ridge,
        "drift": named(drift),
        "expected_error": finite(found.expected_error),
        "debiased": int(sum(found.debiased)),
    }
    reading = rule.reading(delta, gram, progress)
    info |= {key: None if value is None else finite(value) for key, value in reading.items()}
    errors = None
    if found.k is not None and found.expected_error != 0:  # a sketch of as many numbers as parameters has no error
        naive = ordered(found.naive_diagonal) * unit**2
        errors = simulated_errors(weights_of, scaled, naive, found.k, np.random.default_rng([seed, step]))
    return StepEstimate(gram, info | {"weights_se": named(errors)}, float(found.seconds))


def info_line(info: Mapping[str, Any], n_domains: int, seconds: float) -> str:
    """`StepEstimate.info` in one line: how G was made, and how far v = G^-1 Delta may be off for it."""
    size = "" if info["k"] is None else f" k {info['k']:,}"
    wrong = info["expected_error"]
    error = "unknown" if wrong is None else f"{100 * wrong:.2g} %"
    shape = "" if info["condition"] is None else f", condition {info['condition']:.1e}"
    return (
        f"{info['mode']}{size}, expected error of v {error}{shape}, "
        f"ridge {info['ridge_used']:.2g}, {info['debiased']}/{n_domains} domains debiased, {seconds:.1f} s"
    )
