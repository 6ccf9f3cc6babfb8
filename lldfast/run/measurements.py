"""Measurements of the base on its way: eq. (2), true KL, NLL gap, on the texts kept for them."""

from __future__ import annotations

from typing import Any

import numpy as np

from lldfast.measure.comparable import check_comparable, find_differences
from lldfast.measure.divergence import finite, kl, nll_gap, true_kl, weight_kl
from lldfast.measure.score import score
from lldfast.models.language_model import LanguageModel
from lldfast.run.experiment import Experiment
from lldfast.run.folder import MethodFolder
from lldfast.schedule import estimation_steps
from lldfast.terminal import note


def measured_steps(exp: Experiment) -> set[int]:
    """Steps of S thinned to about `measure.times`; empty without a target."""
    if exp.target is None:
        return set()
    c = exp.config
    steps = estimation_steps(c.train.steps, every=c.lld.every, dense_until=c.lld.dense_until)
    picks = np.linspace(0, len(steps) - 1, min(len(steps), max(1, c.measure.times)))
    return {steps[round(i)] for i in picks}


def measure(
    exp: Experiment, base: LanguageModel, step: int, folder: MethodFolder, weights: dict[str, float]
) -> dict[str, Any] | None:
    """Distance of the base to the target after `step` steps; its log-likelihoods go to a Parquet file.

    Returns:
        One record of metrics.jsonl, in bits per byte; None without a target. "conditions" is there only where target and base
        were not scored alike.

    Raises:
        InputError: at step 0, the base is nearer to the target than what the way they are scored makes alone.
    """
    if exp.target is None:
        return None
    texts = exp.evalset.select("measure")
    vector = score(base, texts, batch_tokens=exp.config.measure.batch_tokens)
    target = exp.target.select("measure")
    finding = find_differences(target, vector, ("the target", "the base"))
    if finding is not None and step == 0 and not exp.compared:
        if exp.config.measure.allow_differences:
            note(f"warning: {finding}")
        else:
            check_comparable((target, vector), finding.names)
    exp.compared = True
    distance = kl(target, vector, allow_differences=True)
    path = folder.loglik(step)
    vector.save(path)
    exact = None
    if exp.target_model is not None:
        exact = true_kl(exp.target_model, base, texts, batch_tokens=exp.config.measure.batch_tokens, allow_differences=True)
    record = {
        "step": step,
        "kl": distance.total,
        "kl_between": distance.between,
        "kl_within": distance.within,
        "kl_se": distance.se,
        "true_kl": exact,
        "nll_gap": nll_gap(target, vector, allow_differences=True),
        "weight_kl": None if exp.ground_truth is None else finite(weight_kl(weights, exp.ground_truth)),
        "loglik": str(path.relative_to(folder.path)),
    }
    return record if finding is None else record | {"conditions": finding.to_json()}
