"""A folder with a PEFT adapter: its base model, and the adapter put into it with every one of its weights accounted for.

peft passes over weights of an adapter that it has no place for, and an adapter none of whose weights are found changes nothing:
the base would be scored under the adapter's name.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from lldfast.backends import require
from lldfast.errors import InputError
from lldfast.files import read_json
from lldfast.models.checkpoint_files import stored_tensors
from lldfast.models.pretrained import check_loaded, explained
from lldfast.models.wrappers import learnt_prompt, plain_name, unwrap

CONFIG = "adapter_config.json"
WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")  # in the order in which peft looks for them
NAME = "default"
PROMPT = "prompt_embeddings"  # the one weight in the file of a learnt prompt


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def base_of(folder: Path) -> str:
    """The folder or hub id of the adapter's base model.

    Raises:
        InputError: the folder names none, or holds a whole model too, so that it does not say whether the adapter is in it.
        CorruptError: adapter_config.json is no JSON.
    """
    about = read_json(folder / CONFIG)
    base = about.get("base_model_name_or_path") if isinstance(about, dict) else None
    if not isinstance(base, str) or not base:
        raise InputError(f"{folder / CONFIG} names no base model (base_model_name_or_path)")
    if (Path(base).is_absolute() or base.startswith(".")) and not Path(base).is_dir():
        raise InputError(
            f"adapter {folder}: its base model {base} is not here; put it there, or change base_model_name_or_path in {CONFIG}"
        )
    if any(folder.glob("model*.safetensors")) or any(folder.glob("pytorch_model*.bin")):
        raise InputError(
            f"{folder} holds the weights of a whole model and an adapter ({CONFIG}), and does not say whether the adapter is in "
            "those weights already: keep one of them in the folder"
        )
    return base


def adapter_files(folder: Path) -> list[Path]:
    """The files that decide what the adapter does to its base.

    Raises:
        InputError: the adapter has no weights.
    """
    weights = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if weights is None:
        raise InputError(f"{folder} has no adapter weights: none of {', '.join(WEIGHT_FILES)} is there")
    return [folder / CONFIG, weights]


def put_into(base: nn.Module, folder: Path) -> nn.Module:
    """`base` with the adapter in its layers, in evaluation mode; the same object, or with a learnt prompt the PEFT model of it.

    The adapter stays apart from the weights that it adds to: adding them up would round, in bf16 by as much as it changes.

    Raises:
        InputError: the adapter does not fit the base (tensors are named), or it is of a kind that changes more than layers.
        CorruptError: the adapter's file is truncated.
        MissingDependencyError: peft is not installed.
    """
    peft = require("peft", "a model with an adapter needs")
    stored = stored_tensors(adapter_files(folder)[1:])
    with explained(folder, f"peft cannot put the adapter {folder} into its base model"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # between peft and transformers
        config = peft.PeftConfig.from_pretrained(str(folder))
        config.inference_mode = True
        wrapped = peft.PeftModelForCausalLM(base, config, NAME)
        inner = unwrap(wrapped)
        mapping = getattr(base, "_checkpoint_conversion_mapping", None)
        read = peft.utils.load_peft_weights(str(folder), device="cpu", key_mapping=mapping)
        weights = {plain_name(name): value for name, value in read.items()}
        if len(weights) < len(read):
            raise InputError("two of its weights have one name once wrappers' parts are taken out")
        result = peft.set_peft_model_state_dict(wrapped, weights, adapter_name=NAME)
    report = {"missing_keys": _missing(wrapped, result.missing_keys), "unexpected_keys": result.unexpected_keys}
    if learnt_prompt(wrapped):  # under this one name in the file, and under another in the model, which peft's report misses
        report = {"missing_keys": {PROMPT} - weights.keys(), "unexpected_keys": weights.keys() - {PROMPT}}
    check_loaded(report, f"adapter {folder}")
    changed = next((name for name in stored if plain_name(name) != name), None)
    if changed is not None:
        warnings.warn(f"{folder}: weights are named as a compiler or trainer wraps them ({changed}); read without", stacklevel=4)
    for p in inner.parameters():
        if p.is_floating_point():
            p.requires_grad_(True)  # as those of any model that is loaded; peft freezes all
    return inner.eval()


def _missing(wrapped: Any, keys: list[str]) -> list[str]:
    """Of the keys that were not set, those of the adapter that do not share their values with one that was."""
    state = wrapped.state_dict()
    unset = {key for key in keys if NAME in key.split(".")}
    place = {key: value.data_ptr() for key, value in state.items() if isinstance(value, torch.Tensor)}
    found = {place[key] for key in place.keys() - unset if NAME in key.split(".")}
    return sorted(key for key in unset if place.get(key) not in found)
