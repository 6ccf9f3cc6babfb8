"""Configuration of a run: dataclasses with their defaults. Recipes (lldfast/recipes/*.yaml) are diffs from them (parsing.py)."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field, fields
from typing import Literal

import yaml

from lldfast.data.making.options import CorpusOptions
from lldfast.errors import InputError
from lldfast.gram.options import GramOptions
from lldfast.run.distill import DistillConfig
from lldfast.run.methods import Method, parse_method
from lldfast.schedule import estimation_steps
from lldfast.weights.options import RuleOptions
from lldfast.weights.rules import Rule


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
    """The base model.

    Attributes:
        preset: a shape by name: demo-330k, nano-124m, ...
        n_layer, n_head, n_embd, block_size, dropout: in place of the preset's.
        init: a folder written by lldfast to continue from, its shape included; unset for random weights.
    """

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
        steps: length of the target's training, for `mixture`; unset: train.steps.
        licence: recorded with every weights file; found by itself for models that state theirs.
        bos: token before each text: one always (auto), what its tokenizer does (native), none.
        dtype: of its weights.
    """

    model: str | None = None
    mixture: dict[str, float] | None = None
    steps: int | None = None
    weights: str | None = None
    licence: str | None = None
    bos: Literal["auto", "native", "none"] = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True, kw_only=True)
class LLDConfig(RuleOptions):
    """From Delta to weights: the options of the rules, and when and on what they work.

    Attributes:
        prior: "uniform", "proportional" (tokens per domain) or a weights file.
        per: what a domain's log-likelihood is divided by, eq. (3): the base model's tokens, bytes or texts.
        every, dense_until: the step set S; unset is the paper's from 10,000 steps on, and its shape for shorter runs.
        aggregate: mean over steps for the aggregated methods; "adjusted-fit", whose weights have zeros, is averaged
            arithmetically by either.
        step_weights: "equal" (eq. (8)) or "elapsed" (time in force); unset: elapsed for mirror and two stages, else equal.
        split: where the second stage of a two-stage recipe begins, as a share of the run.
        bootstrap: replicates over texts for standard errors; 0 turns them off.
        weights: weights file of the method "fixed".
        pass1: weights file of an existing pass 1 for the aggregated and two-stage methods.
        min_texts: warn when a domain has fewer evaluation texts to estimate on.
    """

    prior: str = "uniform"
    per: Literal["base_tokens", "bytes", "texts"] = "base_tokens"
    every: int | None = None
    dense_until: int | None = None
    aggregate: Literal["geometric", "arithmetic"] = "geometric"
    step_weights: Literal["equal", "elapsed"] | None = None
    split: float = 0.5
    bootstrap: int = 100
    weights: str | None = None
    pass1: str | None = None
    min_texts: int = 10

    def rule(self, name: str, prior: tuple[float, ...] | None = None) -> Rule:
        """The named rule with these options; `prior` in the order of the domains.

        Raises:
            InputError: naming the option that makes no sense.
        """
        return Rule(name, prior=prior, **{option.name: getattr(self, option.name) for option in fields(RuleOptions)})


@dataclass
class GramConfig(GramOptions):
    """How the "adjusted" rules estimate G; see `lldfast.gram.estimate`. Other rules do not read it."""


@dataclass
class TrainConfig:
    """The loop. Batch sizes count sequences of block_size tokens; `batch_size` is one optimiser step.

    Attributes:
        steps: optimiser steps.
        batch_size: sequences of an optimiser step.
        micro_batch_size: sequences of a forward and backward pass; divides batch_size.
        learning_rate: at the end of the warmup; it falls by a cosine to min_lr.
        min_lr: learning rate at the last step.
        weight_decay, beta1, beta2, eps: of AdamW.
        grad_clip: largest norm of a gradient; 0 for none.
        draw: what one draw of a domain fills: "sequence" (systematic sampling over the step), "micro_batch", or "step" (paper).
        warmup: share of the steps.
        dtype: "auto" is bfloat16 autocast on a GPU that has it and float32 elsewhere; "bfloat16" is refused where the
            hardware lacks it.
        compile: run the model through torch.compile.
        device: auto (cuda where there is one, else cpu), cpu, cuda, cuda:1, ...
        threads: torch threads; unset leaves torch's choice.
        checkpoint_every: steps between checkpoints.
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
    """Measurements on the texts kept for them: at the steps of S, thinned to about `times`, and after the last step.

    Attributes:
        times: about how many.
        true_kl: the token-level KL too, where target and base share a tokenizer.
        batch_tokens: most tokens of an evaluation batch.
        allow_differences: go on with a target whose scores were not made as the base's are, also where it is nearer than what
            that makes alone.
    """

    times: int = 20
    true_kl: bool = True
    batch_tokens: int = 16_384
    allow_differences: bool = False


@dataclass
class LogConfig:
    """What a run says while it goes on, and after it.

    Attributes:
        every: steps between records of the log.
        progress: show a progress bar.
        tensorboard: write event files for TensorBoard too.
        wandb: project at Weights & Biases to write to; unset for none.
        report: write report.html.
        map: of models in the report: pca or tsne.
    """

    every: int = 10
    progress: bool = True
    tensorboard: bool = False
    wandb: str | None = None
    report: bool = True
    map: Literal["pca", "tsne"] = "pca"


@dataclass
class Config:
    """Everything a run needs.

    Attributes:
        out: the run folder.
        methods: what is trained, one after the other: see `parse_method`.
        seed: of the weights at the start, of the data's order and of resampling.
        recipe: a shipped recipe or a .yaml file that the other settings are over.
    """

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
        self.gram.check("gram.")
        if not self.methods:
            raise InputError("methods is empty: nothing to train")
        if len(set(self.methods)) != len(self.methods):
            raise InputError(f"methods repeats a name: {self.methods}")
        parsed = self.parsed_methods()
        self.distill.check(parsed)
        has_target = bool(self.target.model or self.target.mixture)
        for method in parsed:
            if method.rule and not has_target and not (lld.pass1 and method.passes == 2):
                raise InputError(f"method {method.name!r} needs target.model (or target.mixture)")
            if method.distilled and not (has_target or self.distill.teacher or self.distill.cache):
                raise InputError(
                    f"method {method.name!r} needs a teacher: target.model, target.mixture, distill.teacher or .cache"
                )
            if method.rule:  # now, not after the methods before it
                lld.rule(method.rule)
                estimation_steps(t.steps, every=lld.every, dense_until=lld.dense_until)
            if method.stages == 2 and max(1, round(t.steps * lld.split)) >= t.steps:
                raise InputError(f"method {method.name!r}: train.steps {t.steps} at lld.split {lld.split} leaves no second stage")
            if method.mixture == "fixed" and lld.weights is None:
                raise InputError(f"method {method.name!r} needs lld.weights, a weights file")

    def parsed_methods(self) -> list[Method]:
        """`methods` with what their names mean.

        Raises:
            InputError: an unknown name.
        """
        return [parse_method(name) for name in self.methods]

    def to_yaml(self) -> str:
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)
