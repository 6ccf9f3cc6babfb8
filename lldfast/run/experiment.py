"""What all methods of a run share: data, target scores, the base model at theta_0, the teacher.

The target is scored once and its log-likelihoods kept in OUT/target.parquet. It is loaded again only to measure the true
token-level KL, which exists only when it shares the base's tokenizer; no method trains on it.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch

from lldfast.backends import pick_device
from lldfast.data.evalset import EvalSet
from lldfast.data.making.prepare import prepare
from lldfast.data.shards import TokenShards
from lldfast.data.tokenizer import Tokenizer
from lldfast.distill.cache import TeacherCache
from lldfast.errors import InputError, listed
from lldfast.measure.loglik import LoglikVector
from lldfast.measure.score import score
from lldfast.models.gpt import GPT, PRESETS, GPTConfig, read_gpt_json
from lldfast.models.language_model import LanguageModel
from lldfast.models.loading import load_model
from lldfast.run.config import Config
from lldfast.run.folder import RunFolder
from lldfast.run.inputs import (
    Inputs,
    check_inputs,
    digest,
    recipe_digest,
    scored_differently,
    stored_inputs,
    teacher_digest,
    weights_digest,
)
from lldfast.run.place import Place, resolve_location
from lldfast.terminal import note
from lldfast.weights.file import load_weights
from lldfast.weights.simplex import mixture


@dataclasses.dataclass
class Experiment:
    """An open run. Make it with `Experiment.open`.

    Attributes:
        target: log-likelihoods of the whole evaluation corpus; None for a run without a target.
        target_model: the target itself, only where the true KL can be measured.
        target_identity, base_identity: for provenance.
        ground_truth: the mixture that the target was trained on, where it is known.
        inputs: hashes of what the configuration names (run/inputs.py); the teacher's once it is open.
        compared: whether the conditions under which target and base are scored have been compared.
    """

    config: Config
    folder: RunFolder
    place: Place
    shards: TokenShards
    evalset: EvalSet
    tokenizer: Tokenizer
    base_identity: dict[str, Any]
    target: LoglikVector | None = None
    target_model: LanguageModel | None = None
    target_identity: dict[str, Any] | None = None
    ground_truth: dict[str, float] | None = None
    inputs: Inputs = dataclasses.field(default_factory=dict)
    compared: bool = False
    _teacher: LanguageModel | TeacherCache | None = None

    @classmethod
    def open(cls, config: Config) -> Experiment:
        """Prepare or open the data and score the target, once. The caller holds the folder's lock.

        Raises:
            InputError: the folder belongs to another configuration or to other inputs, tokenizers differ, a domain lacks
                evaluation texts.
        """
        folder = RunFolder(config.out)
        folder.check_same(config)
        if config.train.threads:
            torch.set_num_threads(config.train.threads)
        place = Place.pick(config.train.device, config.train.dtype)
        note(f"device: {place.describe()}")
        shards, evalset, tokenizer = open_data(config)
        exp = cls(config, folder, place, shards, evalset, tokenizer, base_identity={})
        if config.target.weights:
            exp.ground_truth = load_weights(config.target.weights, shards.domains)
        if config.target.model:
            exp._score_target(config.target.model)
        exp.base_identity = exp._describe_base()
        exp._keep_inputs()
        exp._warn_small_domains()
        return exp

    def _keep_inputs(self) -> None:
        """Hash what the configuration names, and refuse what is not what the folder's results were made from."""
        config = self.config
        found: Inputs = {"corpus": self.shards.corpus_hash, "evalset": self.evalset.hash}
        if config.model.init is not None:
            found["base"] = digest([self.base_identity["hash"], self.base_identity["config"]])
        if self.target_identity is not None:
            found["target"] = digest([self.target_identity["hash"], self.target_identity["tokenizer"]["hash"]])
        files = {"target.weights": config.target.weights, "lld.weights": config.lld.weights}
        files["lld.prior"] = None if config.lld.prior in ("uniform", "proportional") else config.lld.prior
        # one that is missing is told by the method that needs it
        found |= {
            key: weights_digest(resolve_location(path))
            for key, path in files.items()
            if path and Path(resolve_location(path)).is_file()
        }
        if config.lld.pass1 and Path(config.lld.pass1).is_file():
            found["lld.pass1"] = recipe_digest(config.lld.pass1)
        stored = stored_inputs(self.folder)
        check_inputs(self.folder, stored, found)
        self.inputs = stored | found

    def _score_target(self, model: str) -> None:
        t = self.config.target
        target = load_model(resolve_location(model), device=str(self.place.device), dtype=t.dtype, bos=t.bos)
        identity = dict(target.identity)
        if t.licence:
            identity["licence"] = t.licence
        self.target, self.target_identity = score_target(self.folder, target, self.evalset, self.config), identity
        own = (identity.get("extra") or {}).get("domain_weights")
        if self.ground_truth is None and own and set(own) == set(self.domains):
            self.ground_truth = mixture(own, self.domains)
        if target.tokenizer.hash == self.tokenizer.hash and self.config.measure.true_kl:
            # the true KL compares next-token distributions in the same context, so under the base's first-token rule
            self.target_model = target.with_bos("auto")

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
            return GPT(self.model_config(), seed=self.config.seed).to(self.place.device)
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
        return model.train().to(self.place.device)

    def estimation(self) -> tuple[EvalSet, LoglikVector]:
        """Texts and target log-likelihoods that weights are estimated on."""
        assert self.target is not None
        return self.evalset.select("estimate"), self.target.select("estimate")

    def teacher(self) -> LanguageModel | TeacherCache:
        """The teacher of the distilled methods, opened once: the target unless the configuration names another.

        Raises:
            InputError: another tokenizer than the data's (both are named), a context shorter than the student's, a cache of
                other data, or another teacher than that of the folder's distilled methods.
        """
        if self._teacher is None:
            teacher = self._open_teacher()  # kept once it has been checked, never before
            found = {"teacher": teacher_digest(teacher)}
            check_inputs(self.folder, self.inputs, found)
            self._teacher, self.inputs = teacher, self.inputs | found
        return self._teacher

    def _open_teacher(self) -> LanguageModel | TeacherCache:
        d, block_size = self.config.distill, self.model_config().block_size
        if d.cache:
            cache = TeacherCache(resolve_location(d.cache))
            cache.check(self.shards, block_size)
            return cache
        spec = d.teacher or self.config.target.model
        assert spec is not None  # Config.check asked
        device = self.place.device if d.device is None else pick_device(d.device, "distill.device")
        teacher = self.target_model
        if teacher is None or d.teacher or device != self.place.device or d.dtype != self.config.target.dtype:
            teacher = load_model(resolve_location(spec), device=device, dtype=d.dtype)
        self.shards.check_tokenizer(teacher.tokenizer.describe(), f"teacher {teacher.name}")
        if teacher.context_length < block_size:
            raise InputError(
                f"teacher {teacher.name} has a context of {teacher.context_length} tokens and model.block_size is {block_size}: "
                "it must see what the student sees"
            )
        return teacher

    def _describe_base(self) -> dict[str, Any]:
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

    def _warn_small_domains(self) -> None:
        if self.target is None:
            return
        counts = self.evalset.select("estimate").counts()
        few = {name: n for name, n in counts.items() if n < self.config.lld.min_texts}
        if few:
            names = listed(f"{name} ({n})" for name, n in few.items())
            warning = f"few texts to estimate Delta on: {names}; read their standard errors before their weights"
            print(f"warning: {warning}", file=sys.stderr)


def open_data(config: Config) -> tuple[TokenShards, EvalSet, Tokenizer]:
    """The prepared data of a run, made in OUT/data first when `data.path` is unset."""
    d = config.data
    if d.path is not None:
        folder = Path(d.path)
    else:
        folder = prepare(
            "builtin" if d.source == ["builtin"] else d.source,
            RunFolder(config.out).data,
            **d.corpus_options() | {"tokenizer": resolve_location(d.tokenizer)},
            progress=config.log.progress,
        )
    shards = TokenShards(folder)
    folder = shards.path.parent  # data.path may name the folder or its shards
    if d.domains is not None and d.path is not None and set(d.domains) != set(shards.domains):
        raise InputError(f"data.domains names {listed(sorted(d.domains))}; {folder} holds {listed(sorted(shards.domains))}")
    evalset = EvalSet.load(folder / "eval.parquet")
    for name in shards.domains:
        for part in ("estimate", "measure"):
            if not ((evalset.domain == name) & (evalset.part == part)).any():
                raise InputError(f"domain {name!r} has no evaluation texts in part {part!r} of {folder / 'eval.parquet'}")
    unknown = [name for name in evalset.domains if name not in shards.domains]
    if unknown:
        raise InputError(f"{folder / 'eval.parquet'} has texts of domain {unknown[0]!r}, which has no shard")
    return shards, evalset, shards.load_tokenizer()


def score_target(folder: RunFolder, model: LanguageModel, evalset: EvalSet, config: Config) -> LoglikVector:
    """l(target) on the whole evaluation corpus, from the folder when the same model scored the same texts there.

    Raises:
        InputError: the folder's scores are of another target, other texts, or were made in another way.
    """
    path = folder.target
    if path.exists():
        stored = LoglikVector.load(path)
        differs = scored_differently(stored, model, evalset.hash)
        if differs is None:
            return stored
        raise InputError(f"{path} was scored with another target or other texts: {differs}; use another --out")
    vector = score(model, evalset, batch_tokens=config.measure.batch_tokens, progress=config.log.progress)
    vector.save(path)
    return vector
