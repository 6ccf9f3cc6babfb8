"""Another rule, temperature, set of steps or aggregation on the Delta_t that a run has stored: offline, at no cost."""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lldfast.errors import CorruptError, InputError, listed, naming
from lldfast.weights.disclosure import disclosure
from lldfast.weights.file import Named, Stage, WeightsFile
from lldfast.weights.recipe import aggregation, combine, default_step_weights, recipe_errors
from lldfast.weights.rules import Rule, replay
from lldfast.weights.simplex import Array

# Beside a weights file: bootstrap replicates of Delta_t, steps [S], deltas [S, B, K], domains [K]. A weights file with a field
# "replicates" says another name, or null for none.
REPLICATES = "delta_bootstrap.npz"


def recompute(
    path: str | Path,
    *,
    rule: Rule | None = None,
    aggregate: str = "geometric",
    step_weights: str | None = None,
    steps: Sequence[int] | None = None,
    stages: int = 1,
    split: float = 0.5,
) -> WeightsFile:
    """Recompute a weights file offline from its stored Delta_t: any tau, rule, subset of steps and aggregation.

    Args:
        rule: the rule of the file by default. Another rule is applied along the trajectory of the run that was made.
        aggregate: "geometric" (arithmetic for "adjusted-fit", see `aggregation`), "arithmetic", or "none" (the last estimate).
        step_weights: "equal" or "elapsed"; by default equal, and elapsed for mirror and for two stages.
        steps: use these estimates only.

    Returns:
        The new file, provenance kept; with two stages, `stages` has both and `weights` is the first.

    Raises:
        InputError: no such file, no stored Delta_t, no estimate at one of `steps`, a rule that needs G where none is stored.
        CorruptError: the file is damaged.
    """
    file = WeightsFile.load(path)
    with naming(path):
        at, deltas, grams = file.arrays()
        rule = rule or file.made_by()
    aggregate = aggregation(rule.name, aggregate)
    estimates = file.trajectory
    if steps is not None:
        unknown = sorted(set(steps) - set(at))
        if unknown:
            raise InputError(f"{path}: no estimate at step {unknown[0]}; there are estimates at [{listed(at)}]")
        keep = [i for i, step in enumerate(at) if step in set(steps)]
        at, deltas = [at[i] for i in keep], deltas[keep]
        grams, estimates = [grams[i] for i in keep], [estimates[i] for i in keep]
    if rule.needs_gram and any(gram is None for gram in grams):
        step = at[grams.index(None)]
        raise InputError(f"{path}: rule {rule.name!r} needs a Gram matrix at every step, and none is stored at step {step}")
    assert file.total_steps is not None  # as a file with a trajectory has been checked to say
    total, names = file.total_steps, file.domains
    step_weights = step_weights or default_step_weights(rule.name, stages)
    weights = replay(rule, at, total, deltas, grams)
    recipe = combine(at, total, weights, aggregate=aggregate, step_weights=step_weights, stages=stages, split=split)
    errors = None
    if aggregate != "none" and stages == 1:
        beside = file.about.get("replicates", REPLICATES)
        if beside is not None and (not isinstance(beside, str) or not beside or Path(beside).name != beside):
            raise CorruptError(f"{path}: its replicates are {beside!r}, not the name of a file beside it")
        drawn = None if beside is None else _replicates(Path(path).with_name(beside), at, names)
        if drawn is not None:
            errors = recipe_errors(rule, at, total, drawn, grams, aggregate=aggregate, step_weights=step_weights)

    def named(values: Array) -> Named:
        return dict(zip(names, values.tolist(), strict=True))

    made = dataclasses.replace(
        file,
        weights=named(recipe[-1][1] if aggregate == "none" else recipe[0][1]),
        weights_se=None if errors is None else named(errors),
        # the weights of every step follow the rule too: a two-stage pass 2 is made from them
        trajectory=[dataclasses.replace(e, weights=named(w)) for e, w in zip(estimates, weights, strict=True)],
        last_weights=named(weights[-1]),
        last_weights_se=None,
        disclosure=disclosure(rule.name, file.target) if file.target else file.disclosure,
        aggregate=aggregate,
        step_weights=step_weights,
        stages=[Stage(step, named(w)) for step, w in recipe] if stages == 2 else [],
    )
    made.set_rule(rule, names)
    return made


def _replicates(path: Path, steps: Sequence[int], domains: Sequence[str]) -> Array | None:
    """Bootstrap replicates of Delta at these steps [S, B, K], in the order of `domains`; None where none are stored.

    Raises:
        CorruptError: the file is damaged, lacks one of the steps, or has other domains.
    """
    if not path.exists():
        return None
    try:
        with np.load(path) as arrays:
            stored, deltas = arrays["steps"].tolist(), arrays["deltas"]
            named = arrays["domains"].tolist() if "domains" in arrays else list(domains)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise CorruptError(f"{path} is not a readable file of bootstrap replicates ({error})") from None
    rows = [i for i, step in enumerate(stored) if step in set(steps)]
    if len(rows) != len(steps) or len(deltas) != len(stored):
        raise CorruptError(f"{path} does not have the steps [{listed(steps)}] of the estimates beside it")
    if sorted(named) != sorted(domains) or deltas.shape[-1] != len(named):
        raise CorruptError(
            f"{path} has the domains [{listed(map(repr, named))}]; the weights beside it have [{listed(map(repr, domains))}]"
        )
    return np.asarray(deltas[rows][:, :, [named.index(name) for name in domains]])
