"""Where a method's weights come from: known beforehand, estimated while it trains, or the recipe of a finished pass 1."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from lldfast.controller import LLDController
from lldfast.errors import InputError
from lldfast.models.language_model import LanguageModel
from lldfast.run.experiment import Experiment
from lldfast.run.folder import MethodFolder
from lldfast.run.methods import Method
from lldfast.run.place import resolve_location
from lldfast.schedule import estimation_steps
from lldfast.weights.file import Stage, WeightsFile, load_weights
from lldfast.weights.recipe import aggregation, combine, default_step_weights
from lldfast.weights.rules import Rule
from lldfast.weights.simplex import with_floor

Weights = dict[str, float]


class WeightPlan(Protocol):
    """Which weights a method trains on, step by step.

    Attributes:
        initial: the weights that are in force until `at` says otherwise.
    """

    initial: Weights

    def bind(self, model: LanguageModel, optimizer: torch.optim.Optimizer, say: Callable[[str], None]) -> None:
        """Give the plan the model in training, its optimizer, and where to say what it did; before the first step."""

    def at(self, step: int) -> Weights | None:
        """The weights that come into force before optimiser step `step`, or None to keep those that are."""

    def state_dict(self) -> dict[str, np.ndarray]:
        """What a checkpoint keeps of the plan."""

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Go on from a checkpoint."""

    def trained_on(self, drawn: Mapping[str, int]) -> Weights:
        """The mixture a model was trained on, after its last step; `drawn` counts the sequences of each domain."""

    def record(self, folder: MethodFolder) -> WeightsFile:
        """The weights as a file says them, after the last step; what belongs beside the file is written into `folder`."""


class FixedPlan:
    """Weights known beforehand: one mixture, or one for each stage.

    Args:
        stages: by their first step; the first is 0.
        origin: the pass 1 that they were computed from.
    """

    def __init__(self, stages: list[Stage], origin: WeightsFile | None = None) -> None:
        self.stages, self.origin = stages, origin
        self.initial = stages[0].weights

    def bind(self, model: LanguageModel, optimizer: torch.optim.Optimizer, say: Callable[[str], None]) -> None:
        """Nothing is estimated."""

    def at(self, step: int) -> Weights | None:
        return next((stage.weights for stage in self.stages if stage.from_step == step), None)

    def state_dict(self) -> dict[str, np.ndarray]:
        return {}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """The stages are a function of the step alone."""

    def trained_on(self, drawn: Mapping[str, int]) -> Weights:
        return self.initial if len(self.stages) == 1 else _shares(drawn)

    def record(self, folder: MethodFolder) -> WeightsFile:
        several = len(self.stages) > 1
        file = WeightsFile(self.initial, stages=self.stages if several else [])
        if self.origin is not None:
            pass1 = self.origin
            if pass1.rule:
                file.set_rule(pass1.made_by(), pass1.domains)
            # pass 1's errors are of its one recipe, not of a stage's
            file.weights_se = None if several else pass1.weights_se
            file.target = pass1.target
            file.pass1 = {
                "method": pass1.method,
                "rule": pass1.rule,
                "total_steps": pass1.total_steps,
                "target": pass1.target,
                "base": pass1.base,
                "seed": pass1.about.get("seed"),
            }
        return file


class EstimatedPlan:
    """Weights that a controller estimates at the steps of S, and the recipe they make (pass 1).

    Args:
        aggregate, step_weights: of the recipe, see `LLDController.aggregate`.
    """

    def __init__(self, controller: LLDController, *, aggregate: str, step_weights: str | None) -> None:
        self.controller, self.aggregate, self.step_weights = controller, aggregate, step_weights
        self.initial = {domain: 1 / len(controller.domains) for domain in controller.domains}
        self._model: tuple[LanguageModel, torch.optim.Optimizer] | None = None
        self._say: Callable[[str], None] = lambda text: None

    def bind(self, model: LanguageModel, optimizer: torch.optim.Optimizer, say: Callable[[str], None]) -> None:
        self._model, self._say = (model, optimizer), say

    def at(self, step: int) -> Weights | None:
        assert self._model is not None, "bind comes before the first step"
        weights = self.controller.step(step, *self._model)
        if weights is not None and self.controller.rule.needs_gram:
            self._say(self.controller.gram_line())
        return weights

    def state_dict(self) -> dict[str, np.ndarray]:
        return self.controller.state_dict()

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        self.controller.load_state_dict(state)

    def trained_on(self, drawn: Mapping[str, int]) -> Weights:
        return _shares(drawn)

    def record(self, folder: MethodFolder) -> WeightsFile:
        self.controller.save_replicates(folder.replicates)
        return self.controller.record(aggregate=self.aggregate, step_weights=self.step_weights)


def _shares(drawn: Mapping[str, int]) -> Weights:
    return {name: n / sum(drawn.values()) for name, n in drawn.items()}


def make_plan(exp: Experiment, method: Method) -> WeightPlan:
    """The plan of a method: fixed weights, a controller for pass 1, or the recipe of a finished pass 1 for pass 2.

    Raises:
        InputError: no ground truth is known, a weights file names other domains.
    """
    lld = exp.config.lld
    if method.mixture == "uniform":
        return FixedPlan([Stage(0, {domain: 1 / len(exp.domains) for domain in exp.domains})])
    if method.mixture == "proportional":
        return FixedPlan([Stage(0, exp.shards.proportions())])
    if method.mixture == "fixed":
        return FixedPlan([Stage(0, load_weights(resolve_location(str(lld.weights)), exp.domains))])
    if method.mixture == "ground-truth":
        if exp.ground_truth is None:
            raise InputError(f"method {method.name!r}: the target's own mixture is not known; give target.weights")
        return FixedPlan([Stage(0, exp.ground_truth)])
    if method.passes == 1:
        controller = make_controller(exp, method)
        return EstimatedPlan(controller, aggregate=lld.aggregate, step_weights=lld.step_weights)
    return second_pass(exp, method)


def make_controller(exp: Experiment, method: Method) -> LLDController:
    """The controller of a pass 1, with the options of the configuration."""
    assert method.rule is not None
    config, lld = exp.config, exp.config.lld
    evalset, target = exp.estimation()
    return LLDController(
        evalset,
        target,
        steps=config.train.steps,
        rule=make_rule(exp, method.rule, evalset.domains),
        per=lld.per,
        at=estimation_steps(config.train.steps, every=lld.every, dense_until=lld.dense_until),
        bootstrap=lld.bootstrap,
        seed=config.seed,
        batch_tokens=config.measure.batch_tokens,
        gram_options=config.gram.keywords(),
        allow_differences=True,  # measure tells them, once for all methods
    )


def make_rule(exp: Experiment, name: str, domains: list[str]) -> Rule:
    """The named rule with the options of the configuration, its prior in the order of `domains`."""
    lld = exp.config.lld
    prior = None
    if lld.prior == "proportional":
        prior = exp.shards.proportions()
    elif lld.prior != "uniform":
        prior = load_weights(lld.prior, exp.domains)
    with_floor(np.full(len(domains), 1 / len(domains)), lld.floor)  # raises where it is too much for so many domains
    return lld.rule(name, None if prior is None else tuple(prior[domain] for domain in domains))


def second_pass(exp: Experiment, method: Method) -> FixedPlan:
    """The recipe of the method's pass 1: eq. (8), or one mixture for each of two stages, stretched to the length of this run.

    Raises:
        InputError: the weights file names other domains, or holds no trajectory for two stages.
    """
    assert method.rule is not None
    config, lld = exp.config, exp.config.lld
    path = Path(lld.pass1) if lld.pass1 else exp.folder.method(method.rule).weights
    file = WeightsFile.load(path)
    one = load_weights(path, exp.domains)  # checks the names for both kinds
    if method.stages == 1:
        return FixedPlan([Stage(0, one)], origin=file)
    if not file.trajectory or file.total_steps is None:
        raise InputError(f"{path} holds no trajectory of weights: a two-stage recipe cannot be made from it")
    parts = combine(
        [estimate.step for estimate in file.trajectory],
        file.total_steps,
        np.array([[estimate.weights[name] for name in exp.domains] for estimate in file.trajectory]),
        aggregate=aggregation(file.rule, lld.aggregate),
        step_weights=lld.step_weights or default_step_weights(method.rule, stages=2),
        stages=2,
        split=lld.split,
    )
    scale = config.train.steps / file.total_steps
    return FixedPlan(
        [Stage(round(step * scale), dict(zip(exp.domains, w.tolist(), strict=True))) for step, w in parts], origin=file
    )
