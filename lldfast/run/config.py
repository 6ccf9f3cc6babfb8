"""Configuration of a run: dataclasses with their defaults, a recipe over them, `--config FILE`, `--section.key value`.

A recipe (lldfast/recipes/*.yaml) is a diff from these defaults. `--print_config` shows the result.
"""

from __future__ import annotations

import dataclasses
import json
import math
from argparse import ArgumentError, ArgumentParser
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from lldfast.data.making.options import CorpusOptions
from lldfast.errors import InputError
from lldfast.run.methods import DistillConfig, parse_method
from lldfast.schedule import estimation_steps
from lldfast.terminal import option_help
from lldfast.weights.rules import Rule

DEFAULT_RECIPE = "demo"


@dataclass
class DataOrigin:
    """Where a run's data is from.

    Attributes:
        path: a folder made by `lldfast prepare`; when unset, `source` is prepared into OUT/data.
        source: "builtin", or files, folders and dataset ids as `lldfast prepare` takes them.
    """

    path: str | None = None
    source: list[str] = field(default_factory=lambda: ["builtin"])


@dataclass
class DataConfig(CorpusOptions, DataOrigin):  # a dataclass has the last base's fields first
    """Texts, tokenizer and evaluation corpus: where they are from, and the options of `lldfast prepare` they are made with."""


@dataclass
class ModelConfig:
    """The base model. `init` is a folder written by lldfast to continue from, its shape included; unset for random weights."""

    preset: str = "nano-124m"
    n_layer: int | None = None
    n_head: int | None = None
    n_embd: int | None = None
    block_size: int | None = None
    dropout: float | None = None
    init: str | None = None


@dataclass
class TargetConfig:
    """The target model, scored once.

    Attributes:
        model: an lldfast checkpoint folder, a Hugging Face folder or id, a .gguf file, "asset:demo-target" (shipped with
            lldfast), or "package:NAME/FILE" (a file inside an installed package; * matches). Unset to train without a target.
        mixture: train the target first, on these {domain: weight}, for `steps` steps with the rest of the configuration: the
            controlled experiment of section 4.2 on data of your own. Instead of `model`.
        weights: a weights file with the mixture the target was trained on, where known (only reported against); an lldfast
            checkpoint that records its own mixture needs none.
        licence: recorded with every weights file; found by itself for models that state theirs.
    """

    model: str | None = None
    mixture: dict[str, float] | None = None
    steps: int | None = None
    weights: str | None = None
    licence: str | None = None
    bos: Literal["auto", "native", "none"] = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"


@dataclass
class LLDConfig:
    """From Delta to weights; see lldfast.weights.rules.Rule.

    Attributes:
        tau: temperature, nats per token (a multiple of std(Delta) for the "spread" rules); `.inf` gives the prior.
        prior: "uniform", "proportional" (tokens per domain) or a weights file.
        normalize: what a domain's log-likelihood is divided by, eq. (3).
        every, dense_until: the step set S; unset is the paper's from 10,000 steps on, and its shape for shorter runs.
        aggregate: mean over steps for the aggregated methods; "adjusted-fit", whose weights have zeros, is averaged
            arithmetically by either.
        radius: of "adjusted-trust": KL of its weights from the prior, nats.
        fit_step: of "adjusted-fit": step in the unit of Delta / G, or "auto" to fit it with the weights.
        step_weights: "equal" (eq. (8)) or "elapsed" (time in force); unset: elapsed for mirror and two stages, else equal.
        bootstrap: replicates over texts for standard errors; 0 turns them off.
        weights: weights file of the method "fixed".
        pass1: weights file of an existing pass 1 for the aggregated and two-stage methods.
        min_texts: warn when a domain has fewer evaluation texts to estimate on.
    """

    tau: float = 1.0
    tau_end: float | None = None
    step_size: float = 4.0
    prior: str = "uniform"
    floor: float = 0.0
    normalise: Literal["spread", "trace", "corr", "none"] = "spread"
    ridge: float | Literal["auto"] = "auto"
    normalize: Literal["base_tokens", "bytes", "texts"] = "base_tokens"
    every: int | None = None
    dense_until: int | None = None
    aggregate: Literal["geometric", "arithmetic"] = "geometric"
    step_weights: Literal["equal", "elapsed"] | None = None
    split: float = 0.5
    bootstrap: int = 100
    weights: str | None = None
    pass1: str | None = None
    min_texts: int = 10
    radius: float = 0.1
    fit_step: float | Literal["auto"] = "auto"

    def rule(self, name: str, prior: tuple[float, ...] | None = None) -> Rule:
        """The named rule with these options; `prior` in the order of the domains.

        Raises:
            InputError: naming the option that makes no sense.
        """
        return Rule(
            name,
            tau=self.tau,
            tau_end=self.tau_end,
            step_size=self.step_size,
            floor=self.floor,
            normalise=self.normalise,
            ridge=self.ridge,
            prior=prior,
            radius=self.radius,
            fit_step=self.fit_step,
        )


@dataclass
class GramConfig:
    """How the "adjusted" rules estimate G; see `lldfast.gram.estimate`. Other rules do not read it.

    Attributes:
        mode: "exact" keeps the K rows of J in fp32, "sharded" each rank's slice of them, "bf16", "int8" and "int4" rounded
            rows, "fold" a sketch of each row; "auto" takes the first of them that fits the budget.
        k: numbers per sketch, a power of two; "auto" is as few as keep the weights within target_kl. Modes auto and fold.
        groups: groups of texts per domain, from which the noise of finitely many texts is told and taken out.
        debias: take it out of the diagonal.
        precondition: "adamw" makes it J M^-1 J^T with the second moment of the run's optimizer, whose steps that describes.
        budget_mb: memory for rows or sketches, MiB; unset leaves the choice to `gram.estimate`.
        target_kl: of k "auto": expected KL between the weights of the true G and of the sketched one, nats.
        batch_tokens: tokens of a batch, whose activations the backward pass holds.
    """

    mode: Literal["auto", "exact", "sharded", "bf16", "int8", "int4", "fold"] = "auto"
    k: int | Literal["auto"] = "auto"
    groups: int = 8
    debias: bool = True
    precondition: Literal["none", "adamw"] = "none"
    budget_mb: float | None = None
    target_kl: float = 1e-4
    batch_tokens: int = 4096

    def check(self) -> None:
        """Raises InputError naming the parameter."""
        if self.k != "auto":
            if self.k < 1 or self.k & (self.k - 1):
                raise InputError(f"gram.k must be a power of two or auto, got {self.k}")
            if self.mode not in ("auto", "fold"):
                raise InputError(f"gram.k is the size of a sketch: mode {self.mode!r} has none (gram.mode fold has)")
        if self.groups < 1 or self.batch_tokens < 1:
            raise InputError("gram.groups and gram.batch_tokens must be >= 1")
        if self.debias and self.groups == 1:
            raise InputError("gram.debias compares groups of texts: gram.groups must be >= 2 (or gram.debias false)")
        if self.budget_mb is not None and not 0 < self.budget_mb < math.inf:
            raise InputError(f"gram.budget_mb must be > 0 and finite, or null, got {self.budget_mb}")
        if not 0 < self.target_kl < math.inf:
            raise InputError(f"gram.target_kl must be > 0 and finite, got {self.target_kl}")

    def options(self) -> dict[str, Any]:
        """Keyword arguments of `gram.estimate`; "adamw" stands for the optimizer that `LLDController.step` is given."""
        return {
            "mode": self.mode,
            "k": self.k,
            "groups": self.groups,
            "debias": self.debias,
            "precondition": None if self.precondition == "none" else self.precondition,
            "budget_bytes": None if self.budget_mb is None else int(self.budget_mb * 2**20),
            "target_kl": self.target_kl,
            "batch_tokens": self.batch_tokens,
        }


@dataclass
class TrainConfig:
    """The loop. Batch sizes count sequences of block_size tokens; `batch_size` is one optimiser step.

    Attributes:
        draw: what one draw of a domain fills: "sequence" (systematic sampling over the step), "micro_batch", or "step" (paper).
        warmup: share of the steps.
        dtype: "auto" is bfloat16 autocast on a GPU that has it and float32 elsewhere; "bfloat16" is refused where the
            hardware lacks it.
        threads: torch threads; unset leaves torch's choice.
    """

    steps: int = 10_000
    batch_size: int = 512
    micro_batch_size: int = 64
    learning_rate: float = 6e-4
    min_lr: float = 6e-5
    warmup: float = 0.1
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    grad_clip: float = 1.0
    draw: Literal["sequence", "micro_batch", "step"] = "sequence"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: bool = False
    device: str = "auto"
    threads: int | None = None
    checkpoint_every: int = 500


@dataclass
class MeasureConfig:
    """Measurements on the texts kept for them: at the steps of S, thinned to about `times`, and after the last step."""

    times: int = 20
    true_kl: bool = True
    batch_tokens: int = 16_384


@dataclass
class LogConfig:
    every: int = 10
    progress: bool = True
    tensorboard: bool = False
    wandb: str | None = None
    report: bool = True
    map: Literal["pca", "tsne"] = "pca"


@dataclass
class Config:
    """Everything a run needs. `methods` names what is trained, one after the other: see `parse_method`."""

    out: str = "runs/lldfast"
    methods: list[str] = field(default_factory=lambda: ["uniform", "iterative", "aggregated"])
    seed: int = 0
    recipe: str | None = None
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    target: TargetConfig = field(default_factory=TargetConfig)
    lld: LLDConfig = field(default_factory=LLDConfig)
    gram: GramConfig = field(default_factory=GramConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def check(self) -> None:
        """Refuse values that could only fail later.

        Raises:
            InputError: naming the parameter.
        """
        t, lld = self.train, self.lld
        if not self.out:
            raise InputError("out is empty: name the folder of the run")
        for name in ("steps", "batch_size", "micro_batch_size"):
            if getattr(t, name) < 1:
                raise InputError(f"train.{name} must be >= 1, got {getattr(t, name)}")
        if t.batch_size % t.micro_batch_size:
            raise InputError(f"train.micro_batch_size {t.micro_batch_size} does not divide train.batch_size {t.batch_size}")
        if not 0 <= t.warmup <= 1:
            raise InputError(f"train.warmup is a share of the steps, got {t.warmup}")
        if not (0 < t.learning_rate < math.inf and 0 <= t.min_lr < math.inf):
            raise InputError(f"train.learning_rate must be > 0 and train.min_lr >= 0, got {t.learning_rate} and {t.min_lr}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(t, name) < 1:
                raise InputError(f"train.{name} must be in [0, 1), got {getattr(t, name)}")
        for name in ("weight_decay", "eps", "grad_clip"):  # a negative grad_clip would climb the loss
            if not 0 <= getattr(t, name) < math.inf:
                raise InputError(f"train.{name} must be >= 0 and finite, got {getattr(t, name)}")
        if t.threads is not None and t.threads < 1:
            raise InputError(f"train.threads must be >= 1, or null for torch's choice, got {t.threads}")
        if not 0 <= self.seed < 2**62:
            raise InputError(f"seed must be in [0, 2^62), got {self.seed}")
        if self.measure.times < 1 or self.measure.batch_tokens < 1:
            raise InputError("measure.times and measure.batch_tokens must be >= 1")
        if self.target.steps is not None and self.target.steps < 1:
            raise InputError(f"target.steps must be >= 1, got {self.target.steps}")
        if not 0 < lld.split < 1:
            raise InputError(f"lld.split must lie between 0 and 1, got {lld.split}")
        if t.checkpoint_every < 1 or self.log.every < 1:
            raise InputError("train.checkpoint_every and log.every must be >= 1")
        if self.lld.bootstrap == 1 or self.lld.bootstrap < 0:
            raise InputError(f"lld.bootstrap must be 0 or at least 2, got {self.lld.bootstrap}")
        if self.target.model and self.target.mixture:
            raise InputError("give target.model or target.mixture, not both (`--target.mixture null` takes a recipe's away)")
        if self.model.init:
            for name in ("n_layer", "n_head", "n_embd", "block_size", "dropout"):
                if getattr(self.model, name) is not None:
                    raise InputError(f"model.{name} cannot be changed: the shape is that of model.init {self.model.init}")
        self.gram.check()
        if not self.methods:
            raise InputError("methods is empty: nothing to train")
        if len(set(self.methods)) != len(self.methods):
            raise InputError(f"methods repeats a name: {self.methods}")
        parsed = [parse_method(name) for name in self.methods]
        self.distill.check(parsed)
        has_target = bool(self.target.model or self.target.mixture)
        for spec in parsed:
            if spec.rule and not has_target and not (lld.pass1 and spec.passes == 2):
                raise InputError(f"method {spec.name!r} needs target.model (or target.mixture)")
            if spec.distilled and not (has_target or self.distill.teacher or self.distill.cache):
                raise InputError(f"method {spec.name!r} needs a teacher: target.model, target.mixture, distill.teacher or .cache")
            if spec.rule:  # now, not after the methods before it
                lld.rule(spec.rule)
                estimation_steps(t.steps, every=lld.every, dense_until=lld.dense_until)
            if spec.stages == 2 and max(1, round(t.steps * lld.split)) >= t.steps:
                raise InputError(f"method {spec.name!r}: train.steps {t.steps} at lld.split {lld.split} leaves no second stage")
            if spec.mixture == "fixed" and lld.weights is None:
                raise InputError(f"method {spec.name!r} needs lld.weights, a weights file")

    def to_yaml(self) -> str:
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)


def with_defaults(stored: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run that an earlier version wrote, with the defaults of those it did not have: what the run used."""
    return _over(dataclasses.asdict(Config()), stored)


def _over(defaults: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """`given` over `defaults`, section by section; a dict that is a value (target.mixture) is taken as it is."""
    merged = dict(defaults)
    for key, value in given.items():
        section = isinstance(value, dict) and isinstance(defaults.get(key), dict)
        merged[key] = _over(defaults[key], value) if section else value
    return merged


def recipe_path(name: str) -> Path:
    """A shipped recipe's file, or a path given as such.

    Raises:
        InputError: no such recipe; the message lists those there are.
    """
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise InputError(f"recipe file {name} does not exist")
        return Path(name)
    folder = Path(str(resources.files("lldfast") / "recipes"))
    path = folder / f"{name}.yaml"
    if not path.is_file():
        raise InputError(f"unknown recipe {name!r}: choose from {', '.join(sorted(p.stem for p in folder.glob('*.yaml')))}")
    return path


def parse_config(argv: list[str], prog: str = "lldfast train") -> Config:
    """Defaults < `--recipe NAME` (demo unless --config is given) < `--config FILE` < `--section.key value`.

    Raises:
        InputError: an unknown option or key, or a value that makes no sense.
    """
    import jsonargparse

    args: list[str] = []
    recipe: str | None = None
    rest = iter(argv)
    for arg in rest:
        key, equals, value = arg.partition("=")
        if not arg or (key.startswith("--") and equals and not value):
            # "--data.path=$UNSET" would otherwise mean null, and train on something else
            raise InputError(f"{key or (args[-1] if args else 'an option')} needs a value (null unsets an option)")
        if key in ("--recipe", "--method", "--methods"):
            value = value or next(rest, "")
            if not value or value.startswith("--"):
                raise InputError(f"{key} needs a value")
            if key == "--recipe":
                recipe = value
            else:
                names = value.strip("[] ").split(",")
                args.append("--methods=[" + ", ".join(name.strip().strip("'\"") for name in names) + "]")
        elif key in ("--data.source", "--lld.tau", "--lld.tau_end", "--distill.alpha"):
            value = value or next(rest, "")
            if key == "--data.source" and not value.startswith("["):
                value = json.dumps([value])  # a single file needs no brackets
            args.append(
                f"{key}={'.inf' if value == 'inf' else '-.inf' if value == '-inf' else value}"
            )  # YAML spells it with a dot, people do not
        else:
            args.append(arg)
    if recipe is None and not any(arg.split("=")[0] == "--config" for arg in args):
        recipe = DEFAULT_RECIPE
    if recipe is not None:
        args = [f"--config={recipe_path(recipe)}", f"--recipe={recipe}", *args]
    about = "Train with a designed domain mixture: Algorithm 1, pass 2 and the baselines."
    parser = jsonargparse.ArgumentParser(prog=prog, description=about, exit_on_error=False)
    parser.add_argument("--config", action="config", help="a YAML file, over the recipe")
    parser.add_class_arguments(Config)
    _explain(parser)
    try:
        parsed = parser.parse_args(args)
        for f in dataclasses.fields(Config):
            if dataclasses.is_dataclass(f.default_factory) and not isinstance(parsed[f.name], jsonargparse.Namespace):
                raise InputError(f"{f.name} is a section of the configuration, got {parsed[f.name]!r}")
        values = parser.instantiate(parsed)
    except ArgumentError as error:
        raise InputError(f"{' '.join(str(error).split())} ({prog} --help lists the options)") from None
    config = Config(**{f.name: values[f.name] for f in dataclasses.fields(Config)})
    config.check()
    return config


def _explain(parser: ArgumentParser) -> None:
    """Give every option the help text of its field; jsonargparse does it only where docstring_parser is installed."""
    sections = {name: type(value) for name, value in vars(Config()).items() if dataclasses.is_dataclass(value)}
    meaning = {f"{name}.{key}": text for name, section in sections.items() for key, text in option_help(section).items()}
    for action in parser._actions:
        if action.dest in meaning:
            action.help = meaning[action.dest].replace("%", "%%")
