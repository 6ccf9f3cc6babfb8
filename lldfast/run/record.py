"""What a run writes about itself: the description of the experiment, every method's weights file, its result."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lldfast.backends import versions
from lldfast.distill.objective import teacher_identity
from lldfast.files import read_json, write_json
from lldfast.run.experiment import Experiment
from lldfast.run.folder import MethodFolder
from lldfast.run.methods import Method, parse_method
from lldfast.run.plan import WeightPlan
from lldfast.weights.disclosure import disclosure, distillation_disclosure
from lldfast.weights.file import WeightsFile
from lldfast.weights.simplex import mixture

VERSIONS = ("lldfast", "python", "platform", "torch", "numpy", "tiktoken", "tokenizers", "transformers")


def run_versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    found = versions() | {"platform": platform.platform()}
    return {name: found[name] for name in VERSIONS if name in found}


def write_experiment(exp: Experiment, methods: Sequence[Method]) -> None:
    """config.yaml, and experiment.json with `methods` after those that the folder has finished."""
    names = exp.folder.with_finished([method.name for method in methods])
    write_json(exp.folder.experiment, describe(exp, [parse_method(name) for name in names]))
    exp.folder.write_config(exp.config)


def describe(exp: Experiment, methods: Sequence[Method]) -> dict[str, Any]:
    """The content of experiment.json."""
    estimated, taught = any(m.rule for m in methods), taught_by(exp, [m for m in methods if m.distilled])
    shards = Path(exp.shards.path)
    prepared = next((p for p in (shards / "prepare.json", shards.parent / "prepare.json") if p.exists()), None)
    config = exp.config
    return {
        "format": "lldfast-run",
        "version": 1,
        "name": exp.folder.path.name,
        "recipe": config.recipe,
        "seed": config.seed,
        "steps": config.train.steps,
        "tokens_per_step": exp.tokens_per_step,
        "domains": exp.domains,
        "base": exp.base_identity,
        "target": exp.target_identity,
        "corpus": {
            "hash": exp.shards.corpus_hash,
            "evalset_hash": exp.evalset.hash,
            "n_texts": len(exp.evalset),
            "mean_bytes": float(np.mean(exp.evalset.n_bytes)),
            "sources": None if prepared is None else read_json(prepared)["arguments"]["inputs"],
        },
        "inputs": exp.inputs,  # with the teacher, which taught_by has opened where one is still needed
        "ground_truth": exp.ground_truth,
        "shared_tokenizer": exp.target_model is not None,
        "delta_normalize": config.lld.per,
        "tau": config.lld.tau if np.isfinite(config.lld.tau) else "inf",
        "methods": [method.name for method in methods],
        "versions": run_versions(),
        "device": str(exp.place),
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "disclosure": disclosure("log-likelihood difference" if estimated else None, exp.target_identity)
        + ("" if taught is None else distillation_disclosure(taught)),
    }


def taught_by(exp: Experiment, distilled: Sequence[Method]) -> dict[str, Any] | None:
    """Identity of the distilled methods' teacher; finished ones name theirs in their files, since it may be gone."""
    folders = [exp.folder.method(method.name) for method in distilled]
    if not all(folder.finished for folder in folders):
        return teacher_identity(exp.teacher())
    if not folders:
        return None
    stored = WeightsFile.load(folders[0].weights).distillation
    return None if stored is None else stored["teacher"]


def method_weights(exp: Experiment, method: Method, plan: WeightPlan, folder: MethodFolder) -> WeightsFile:
    """The weights file of a method after its last step: for pass 1 the fixed recipe of eq. (8) with its trajectory, else
    what was trained on."""
    file = plan.record(folder)
    file.weights = mixture(file.weights, file.domains)
    file.method, file.objective = method.name, method.objective
    file.total_steps, file.per = exp.config.train.steps, exp.config.lld.per
    file.base, file.target = exp.base_identity, file.target or exp.target_identity
    file.about = provenance(exp)
    file.disclosure = disclosure(file.rule, file.target if file.rule else None)
    if method.distilled:
        taught = teacher_identity(exp.teacher())
        file.distillation = exp.config.distill.record(method) | {"teacher": taught}
        file.disclosure += distillation_disclosure(taught)
    return file


def provenance(exp: Experiment) -> dict[str, Any]:
    """What every weights file says about its corpus and its run, beside the models."""
    return {
        "corpus_hash": exp.shards.corpus_hash,
        "evalset_hash": exp.evalset.hash,
        "tokenizer": exp.tokenizer.describe(),
        "seed": exp.config.seed,
        "versions": run_versions(),
    }


def write_result(exp: Experiment, method: Method, *, seconds: float, measured: dict[str, Any]) -> None:
    """result.json: written last, since it says that the method is finished."""
    tokens = exp.config.train.steps * exp.tokens_per_step
    write_json(exp.folder.method(method.name).result, {"method": method.name, "seconds": seconds, "tokens": tokens, **measured})
