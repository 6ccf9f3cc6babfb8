"""What a run's results depend on besides its configuration: the content of what the configuration names.

A path says where something was. Data prepared anew, a base or a weights file written over, another teacher at the old place: the
configuration stays the same, and what is in the run folder is of something else. So experiment.json keeps a hash of every input,
and a folder in which anything was trained takes the same inputs only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import xxhash

from lldfast.distill.cache import TeacherCache
from lldfast.distill.objective import fingerprint
from lldfast.errors import CorruptError, InputError
from lldfast.files import read_json
from lldfast.measure.loglik import LoglikVector
from lldfast.models.language_model import LanguageModel
from lldfast.run.folder import RunFolder
from lldfast.weights.file import WeightsFile, load_weights

Inputs = dict[str, str]

# How a message says that a run was trained with each input.
PHRASES = {
    "corpus": "on the data (data.path)",
    "evalset": "with the evaluation texts",
    "base": "from the base (model.init)",
    "target": "toward the target (target.model)",
    "target.weights": "beside the target's mixture (target.weights)",
    "lld.weights": "on the weights (lld.weights)",
    "lld.prior": "with the prior (lld.prior)",
    "lld.pass1": "on the recipe (lld.pass1)",
    "teacher": "against the teacher (distill.teacher, distill.cache)",
}


def digest(value: Any) -> str:
    """XXH3-128 (hex) of what can be JSON."""
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True, ensure_ascii=False).encode())


def weights_digest(path: str) -> str:
    """Of the mixture in a weights file; not of how the file says it."""
    return digest(load_weights(path))


def recipe_digest(path: str) -> str:
    """Of all in a weights file that a pass 2 is made from: mixture, trajectory, rule, length."""
    file = WeightsFile.load(path)
    steps = [[estimate.step, estimate.weights] for estimate in file.trajectory]
    return digest([file.weights, steps, file.rule, file.total_steps])


def teacher_digest(teacher: LanguageModel | TeacherCache) -> str:
    """Of a running teacher its weights, of a recorded one also everything that was recorded."""
    return f"{fingerprint(teacher)}, {teacher.content_hash}" if isinstance(teacher, TeacherCache) else str(fingerprint(teacher))


def stored_inputs(folder: RunFolder) -> Inputs:
    """The inputs that the results in a run folder were made from; none where nothing was trained.

    Raises:
        CorruptError: experiment.json is damaged.
    """
    if not folder.trained or not folder.experiment.exists():
        return {}
    experiment = read_json(folder.experiment)
    try:
        # Runs of before inputs were kept said these two.
        older = {"corpus": experiment["corpus"]["hash"], "evalset": experiment["corpus"]["evalset_hash"]}
        return {str(key): str(value) for key, value in (older | experiment.get("inputs", {})).items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise CorruptError(f"{folder.experiment} is not what a run writes ({error!r})") from None


def check_inputs(folder: RunFolder, stored: Inputs, now: Mapping[str, str]) -> None:
    """Refuse inputs that are not those of the results in the folder. What only one side knows is not compared.

    Raises:
        InputError: naming the first input that was replaced.
    """
    for key, value in now.items():
        if key in stored and stored[key] != value:
            raise InputError(
                f"{folder} was trained {PHRASES[key]} whose hash is {stored[key]}; it was replaced, now it is {value}: "
                "use another --out"
            )


def scored_differently(vector: LoglikVector, model: LanguageModel, evalset_hash: str) -> str | None:
    """In what stored scores are not those that `model` would give by `score`'s defaults now; None where in nothing.

    What older files do not say is not compared.
    """
    identity, meta = model.identity, vector.meta
    was = meta.get("model") or {}
    rows: list[tuple[str, Any, Any]] = [
        ("the texts' hash", meta.get("evalset_hash"), evalset_hash),
        ("its hash", was.get("hash"), identity["hash"]),
        ("its tokenizer's hash", meta.get("tokenizer_hash", model.tokenizer.hash), model.tokenizer.hash),
        ("its first token", meta.get("bos", identity["bos"]), identity["bos"]),
        *((name, was.get(name, identity[name]), identity[name]) for name in ("dtype", "context_length")),
        *((name, meta.get(name), None) for name in ("amp_dtype", "precision")),
        ("overlap", meta.get("overlap", 0), 0),
    ]
    return next((f"{what} was {old!r}, now it is {new!r}" for what, old, new in rows if old != new), None)
