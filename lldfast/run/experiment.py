"""What all methods of a run share: data, target scores, the base model, measurements, provenance.

The target is scored once and its log-likelihoods kept in OUT/target.parquet. It is loaded again only to measure the true
token-level KL, which exists only when it shares the base's tokenizer; no method trains on it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import platform
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from lldfast import __version__
from lldfast.backends import describe_device, pick_device
from lldfast.data.evalset import EvalSet
from lldfast.data.making.prepare import prepare
from lldfast.data.shards import TokenShards
from lldfast.data.tokenizer import Tokenizer
from lldfast.distill.cache import TeacherCache
from lldfast.distill.objective import teacher_identity
from lldfast.errors import InputError
from lldfast.files import atomic_path, read_json, write_json
from lldfast.measure.divergence import finite, kl, nll_gap, true_kl, weight_kl
from lldfast.measure.loglik import LoglikVector, score
from lldfast.models.gpt import GPT, PRESETS, GPTConfig, read_gpt_json
from lldfast.models.scorer import Scorer, load_scorer
from lldfast.run.config import Config, with_defaults
from lldfast.run.methods import parse_method
from lldfast.run.place import pick_dtype, resolve_location
from lldfast.schedule import estimation_steps
from lldfast.terminal import note
from lldfast.weights.equations import simplex
from lldfast.weights.file import disclosure, distillation_disclosure, load_weights

# Configuration that may change between two calls on one run folder without making its results incomparable.
FREE_SETTINGS = ("out", "methods", "log", "recipe")


@dataclasses.dataclass
class Experiment:
    """An open run folder. Make it with `Experiment.open`."""

    config: Config
    out: Path
    shards: TokenShards
    evalset: EvalSet
    tokenizer: Tokenizer
    target: LoglikVector | None
    target_scorer: Scorer | None  # only where true KL can be measured
    target_identity: dict[str, Any] | None
    ground_truth: dict[str, float] | None
    base_identity: dict[str, Any]
    device: torch.device
    dtype: torch.dtype
    _teacher: Scorer | TeacherCache | None = None

    @classmethod
    def open(cls, config: Config, methods: list[str]) -> Experiment:
        """Prepare or open the data, score the target once, write config.yaml and experiment.json. The caller holds the lock.

        Raises:
            InputError: the folder belongs to another configuration, tokenizers differ, a domain lacks evaluation texts.
        """
        out = Path(config.out)
        check_same_run(out, config)
        if config.train.threads:
            torch.set_num_threads(config.train.threads)
        device = pick_device(config.train.device, "train.device")
        dtype = pick_dtype(config.train.dtype, device)
        note(f"device: {describe_device(device, dtype)}")
        shards, evalset, tokenizer = open_data(config)
        target = identity = target_scorer = None
        ground_truth = load_weights(config.target.weights, shards.domains) if config.target.weights else None
        if config.target.model:
            target_scorer = load_scorer(
                resolve_location(config.target.model), device=str(device), dtype=config.target.dtype, bos=config.target.bos
            )
            identity = dict(target_scorer.identity)
            if config.target.licence:
                identity["licence"] = config.target.licence
            target = score_target(out, target_scorer, evalset, config)
            own = (identity.get("extra") or {}).get("domain_weights")
            if ground_truth is None and own and set(own) == set(shards.domains):
                ground_truth = dict(zip(shards.domains, simplex(own, shards.domains).tolist(), strict=True))
            shared = target_scorer.tokenizer.hash == tokenizer.hash and config.measure.true_kl
            # the true KL compares next-token distributions in the same context, so under the base's first-token rule
            target_scorer = target_scorer.with_bos("auto") if shared else None
        exp = cls(config, out, shards, evalset, tokenizer, target, target_scorer, identity, ground_truth, {}, device, dtype)
        exp.base_identity = exp.describe_base()
        write_json(out / "experiment.json", exp.describe(with_finished(out, methods)))
        with atomic_path(out / "config.yaml") as temporary:
            temporary.write_text(config.to_yaml(), encoding="utf-8")
        exp.warn_small_domains()
        return exp

    @property
    def domains(self) -> list[str]:
        return list(self.shards.domains)

    @property
    def tokens_per_step(self) -> int:
        return self.config.train.batch_size * self.model_config().block_size

    def model_config(self) -> GPTConfig:
        """GPTConfig of the base: that of `init`, or preset, overrides, vocabulary of the tokenizer padded to a multiple of 64."""
        m = self.config.model
        if m.init is not None:
            return GPTConfig(**read_gpt_json(Path(resolve_location(m.init)))["config"])
        if m.preset not in PRESETS:
            raise InputError(f"model.preset {m.preset!r} is unknown; choose from {', '.join(PRESETS)}")
        changes: dict[str, Any] = {
            name: getattr(m, name)
            for name in ("n_layer", "n_head", "n_embd", "block_size", "dropout")
            if getattr(m, name) is not None
        }
        vocabulary = self.tokenizer.vocab_size
        return dataclasses.replace(PRESETS[m.preset], vocab_size=-(-vocabulary // 64) * 64, valid_vocab=vocabulary, **changes)

    def new_model(self) -> GPT:
        """The base model at theta_0: the same weights for every method of a seed."""
        if self.config.model.init is None:
            return GPT(self.model_config(), seed=self.config.seed).to(self.device)
        folder = resolve_location(self.config.model.init)
        model = GPT.load(folder)
        stored = read_gpt_json(Path(folder)).get("tokenizer")
        if stored is not None:
            self.shards.check_tokenizer(stored, f"model.init {folder}")
        if model.config.valid_vocab < self.tokenizer.vocab_size:
            raise InputError(
                f"model.init {folder} has a vocabulary of {model.config.valid_vocab}, the shards' tokenizer "
                f"{self.tokenizer.name!r} one of {self.tokenizer.vocab_size}"
            )
        return model.train().to(self.device)

    def estimation(self) -> tuple[EvalSet, LoglikVector]:
        """Texts and target log-likelihoods that weights are estimated on."""
        assert self.target is not None
        return self.evalset.select("estimate"), self.target.select("estimate")

    def teacher(self) -> Scorer | TeacherCache:
        """The teacher of the distilled methods, opened once: the target unless the configuration names another.

        Raises:
            InputError: another tokenizer than the data's (both are named), a context shorter than the student's, or a cache of
                other data.
        """
        d, block_size = self.config.distill, self.model_config().block_size
        if self._teacher is not None:
            return self._teacher
        if d.cache:
            self._teacher = cache = TeacherCache(resolve_location(d.cache))
            cache.check(self.shards, block_size)
            return cache
        spec = d.teacher or self.config.target.model
        assert spec is not None  # Config.check asked
        device = self.device if d.device is None else pick_device(d.device, "distill.device")
        scorer = self.target_scorer
        if scorer is None or d.teacher or device != self.device or d.dtype != self.config.target.dtype:
            scorer = load_scorer(resolve_location(spec), device=device, dtype=d.dtype)
        self.shards.check_tokenizer(scorer.tokenizer.describe(), f"teacher {scorer.name}")
        if scorer.context_length < block_size:
            raise InputError(
                f"teacher {scorer.name} has a context of {scorer.context_length} tokens and model.block_size is {block_size}: it "
                "must see what the student sees"
            )
        self._teacher = scorer
        return scorer

    def taught_by(self, methods: list[str]) -> dict[str, Any] | None:
        """Identity of the distilled methods' teacher; finished ones name theirs in their files, since it may be gone."""
        folders = [self.out / "methods" / name for name in methods]
        if all((folder / "result.json").exists() for folder in folders):
            return read_json(folders[0] / "weights.json")["distillation"]["teacher"] if folders else None
        return teacher_identity(self.teacher())

    def measured_steps(self) -> set[int]:
        """Steps of S thinned to about `measure.times`; empty without a target."""
        if self.target is None:
            return set()
        c = self.config
        steps = estimation_steps(c.train.steps, every=c.lld.every, dense_until=c.lld.dense_until)
        picks = np.linspace(0, len(steps) - 1, min(len(steps), max(1, c.measure.times)))
        return {steps[round(i)] for i in picks}

    def measure(self, scorer: Scorer, step: int, folder: Path, weights: dict[str, float]) -> dict[str, Any] | None:
        """Distance of the base to the target on the texts kept for measuring; its log-likelihoods go to a Parquet file."""
        if self.target is None:
            return None
        texts = self.evalset.select("measure")
        vector = score(scorer, texts, batch_tokens=self.config.measure.batch_tokens)
        target = self.target.select("measure")
        distance = kl(target, vector)
        name = f"loglik/step-{step:06d}.parquet"
        vector.save(folder / name)
        exact = None
        if self.target_scorer is not None:
            exact = true_kl(self.target_scorer, scorer, texts, batch_tokens=self.config.measure.batch_tokens)
        return {
            "step": step,
            "kl": distance.total,
            "kl_between": distance.between,
            "kl_within": distance.within,
            "kl_se": distance.se,
            "true_kl": exact,
            "nll_gap": nll_gap(target, vector),
            "weight_kl": None if self.ground_truth is None else finite(weight_kl(weights, self.ground_truth)),
            "loglik": name,
        }

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        if self.dtype == torch.float32:
            yield
        else:
            with torch.autocast(self.device.type, self.dtype):
                yield

    def warn_small_domains(self) -> None:
        if self.target is None:
            return
        counts = self.evalset.select("estimate").counts()
        few = {name: n for name, n in counts.items() if n < self.config.lld.min_texts}
        if few:
            listed = ", ".join(f"{name} ({n})" for name, n in few.items())
            warning = f"few texts to estimate Delta on: {listed}; read their standard errors before their weights"
            print(f"warning: {warning}", file=sys.stderr)

    def describe_base(self) -> dict[str, Any]:
        m = self.config.model
        if m.init is not None:
            info = read_gpt_json(Path(resolve_location(m.init)))
            name = (info.get("extra") or {}).get("name", m.init)
            return {"name": name, "init": m.init, "hash": info["sha256"], "config": info["config"]}
        return {
            "name": f"{m.preset}, random",
            "init": "random",
            "seed": self.config.seed,
            "config": dataclasses.asdict(self.model_config()),
        }

    def provenance(self) -> dict[str, Any]:
        """What every weights file records about where it comes from."""
        return {
            "base": self.base_identity,
            "target": self.target_identity,
            "corpus_hash": self.shards.corpus_hash,
            "evalset_hash": self.evalset.hash,
            "tokenizer": self.tokenizer.describe(),
            "seed": self.config.seed,
            "versions": versions(),
        }

    def describe(self, methods: list[str]) -> dict[str, Any]:
        """experiment.json."""
        parsed = [parse_method(name) for name in methods]
        estimated, taught = any(m.rule for m in parsed), self.taught_by([m.name for m in parsed if m.distilled])
        prepared = Path(self.shards.path)
        provenance = next((p for p in (prepared / "prepare.json", prepared.parent / "prepare.json") if p.exists()), None)
        return {
            "format": "lldfast-run",
            "version": 1,
            "name": self.out.name,
            "recipe": self.config.recipe,
            "seed": self.config.seed,
            "steps": self.config.train.steps,
            "tokens_per_step": self.tokens_per_step,
            "domains": self.domains,
            "base": self.base_identity,
            "target": self.target_identity,
            "corpus": {
                "hash": self.shards.corpus_hash,
                "evalset_hash": self.evalset.hash,
                "n_texts": len(self.evalset),
                "mean_bytes": float(np.mean(self.evalset.n_bytes)),
                "sources": None if provenance is None else read_json(provenance)["arguments"]["inputs"],
            },
            "ground_truth": self.ground_truth,
            "shared_tokenizer": self.target_scorer is not None,
            "delta_normalize": self.config.lld.normalize,
            "tau": self.config.lld.tau if np.isfinite(self.config.lld.tau) else "inf",
            "methods": methods,
            "versions": versions(),
            "device": f"{self.device}, {self.dtype}".replace("torch.", ""),
            "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "disclosure": disclosure("log-likelihood difference" if estimated else None, self.target_identity)
            + ("" if taught is None else distillation_disclosure(taught)),
        }


def open_data(config: Config) -> tuple[TokenShards, EvalSet, Tokenizer]:
    """The prepared data of a run, made in OUT/data first when `data.path` is unset."""
    d = config.data
    if d.path is not None:
        folder = Path(d.path)
    else:
        folder = prepare(
            "builtin" if d.source == ["builtin"] else d.source,
            Path(config.out) / "data",
            **d.corpus_options() | {"tokenizer": resolve_location(d.tokenizer)},
            progress=config.log.progress,
        )
    shards = TokenShards(folder)
    folder = shards.path.parent  # data.path may name the folder or its shards
    if d.domains is not None and d.path is not None and set(d.domains) != set(shards.domains):
        raise InputError(f"data.domains names {sorted(d.domains)}, {folder} holds {sorted(shards.domains)}")
    evalset = EvalSet.load(folder / "eval.parquet")
    for name in shards.domains:
        for part in ("estimate", "measure"):
            if not ((evalset.domain == name) & (evalset.part == part)).any():
                raise InputError(f"domain {name!r} has no evaluation texts in part {part!r} of {folder / 'eval.parquet'}")
    unknown = [name for name in evalset.domains if name not in shards.domains]
    if unknown:
        raise InputError(f"{folder / 'eval.parquet'} has texts of domain {unknown[0]!r}, which has no shard")
    return shards, evalset, shards.load_tokenizer()


def score_target(out: Path, scorer: Scorer, evalset: EvalSet, config: Config) -> LoglikVector:
    """l(target) on the whole evaluation corpus, from OUT/target.parquet when the same model scored the same texts there."""
    path = out / "target.parquet"
    if path.exists():
        stored = LoglikVector.load(path)
        same_model = stored.meta.get("model", {}).get("hash") == scorer.identity.get("hash")
        if same_model and stored.meta.get("evalset_hash") == evalset.hash:
            return stored
        raise InputError(f"{path} was scored with another target or other texts; use another --out")
    vector = score(scorer, evalset, batch_tokens=config.measure.batch_tokens, progress=config.log.progress)
    vector.save(path)
    return vector


def with_finished(out: Path, methods: list[str]) -> list[str]:
    """`methods` after those that an earlier call on this folder finished: they stay in its summary and report."""
    before = read_json(out / "experiment.json")["methods"] if (out / "experiment.json").exists() else []
    kept = [name for name in before if name not in methods and (out / "methods" / name / "result.json").exists()]
    return kept + methods


def check_same_run(out: Path, config: Config) -> None:
    """Refuse to mix two configurations in one run folder.

    Raises:
        InputError: naming the first setting that differs.
    """
    path = out / "config.yaml"
    trained = any(out.glob("methods/*/*"))
    if not path.exists() or not ((out / "target.parquet").exists() or trained):
        return  # a start that failed before any result binds nobody
    before = flatten(with_defaults(yaml.safe_load(path.read_text(encoding="utf-8"))))
    now = flatten(yaml.safe_load(config.to_yaml()))
    for key in sorted(before.keys() | now.keys()):
        section = key.split(".")[0]
        if not trained and section not in ("data", "target"):
            continue  # nothing but the target's scores is there: they depend on no other setting
        if section not in FREE_SETTINGS and before.get(key) != now.get(key):
            raise InputError(f"{out} was made with {key} = {before.get(key)!r}, now it is {now.get(key)!r}: use another --out")


def flatten(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= flatten(item, f"{prefix}{key}.") if isinstance(item, dict) else {f"{prefix}{key}": item}
    return flat


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    found = {"lldfast": __version__, "python": platform.python_version(), "platform": platform.platform()}
    for name in ("torch", "numpy", "tiktoken", "tokenizers", "transformers"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
