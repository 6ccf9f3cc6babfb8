"""Training checkpoints that survive kill -9: safetensors + JSON in a folder that appears by one rename.

A checkpoint holds the model, the AdamW moments, numpy arrays and JSON state (mixture cursors, controller, step). Reading it
back gives the same bits, so a resumed run continues as if it had never stopped.
"""

from __future__ import annotations

import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lldfast.errors import CorruptError, InputError, TrainingError, WriteError
from lldfast.files import atomic_folder, read_json, write_json

FORMAT = {"format": "lldfast-checkpoint", "version": 1}


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    state = optimizer.state_dict()["state"]
    return {f"{key}.{index}": torch.as_tensor(value) for index, entry in state.items() for key, value in entry.items()}


def save_checkpoint(
    folder: str | Path,
    *,
    step: int,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    arrays: dict[str, np.ndarray] | None = None,
    keep: int = 2,
) -> Path:
    """Write `folder/step-<step>` atomically, then delete all but the `keep` newest checkpoints.

    Args:
        step: optimiser steps done; the next step to run.
        state: JSON-able values.

    Raises:
        TrainingError: a parameter is not finite; earlier checkpoints are untouched.
        WriteError: the disk is full or not writable; earlier checkpoints are untouched.
    """
    target = Path(folder) / f"step-{step:07d}"
    with atomic_folder(target) as temporary:
        # safetensors refuses tensors that share storage; a tied head is one parameter, named once by named_parameters
        weights = {name: p.detach().contiguous() for name, p in model.named_parameters()}
        bad = next((name for name, p in weights.items() if not bool(torch.isfinite(p).all())), None)
        if bad:  # resuming from it could only fail, while an earlier checkpoint may be sound
            raise TrainingError(f"{target} was not written: parameter {bad!r} is not finite after step {step}")
        try:
            save_file(weights, str(temporary / "model.safetensors"))
            save_file(_optimizer_tensors(optimizer), str(temporary / "optimizer.safetensors"))
        except SafetensorError as error:  # its I/O errors are not OSErrors
            raise WriteError(f"cannot write {target}: {error}") from error
        np.savez(temporary / "arrays.npz", **(arrays or {}))  # type: ignore[arg-type]
        write_json(temporary / "state.json", {**FORMAT, "step": step, "state": state})
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def list_checkpoints(folder: str | Path) -> list[Path]:
    """Complete checkpoints in `folder`, oldest first."""
    found = [p for p in Path(folder).glob("step-*") if re.fullmatch(r"step-\d+", p.name)]
    return sorted(found, key=lambda p: int(p.name[5:]))


def load_checkpoint(
    path: str | Path, *, model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[int, dict[str, Any], dict[str, np.ndarray]]:
    """Load `path` into model and optimizer. Returns (step, state, arrays).

    Raises:
        CorruptError: a file is missing or damaged.
        InputError: the checkpoint belongs to another model.
    """
    path = Path(path)
    header = read_json(path / "state.json")
    if not isinstance(header, dict) or header.get("format") != FORMAT["format"] or header.get("version") != FORMAT["version"]:
        raise CorruptError(f"{path / 'state.json'} is not a version-1 lldfast checkpoint")
    try:
        weights = load_file(path / "model.safetensors")
        moments = load_file(path / "optimizer.safetensors")
        with np.load(path / "arrays.npz") as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (SafetensorError, OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise CorruptError(f"checkpoint {path} is damaged: {error}") from error
    parameters = dict(model.named_parameters())
    if set(parameters) != set(weights):
        odd = sorted(set(parameters) ^ set(weights))[0]
        raise InputError(f"checkpoint {path} belongs to another model: parameter {odd!r} is on one side only")
    for name, parameter in parameters.items():  # all of them before the first is changed
        if parameter.shape != weights[name].shape:
            raise InputError(f"checkpoint {path}: {name} is {list(weights[name].shape)}, the model's is {list(parameter.shape)}")
    current = optimizer.state_dict()
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in moments.items():
        name, index = key.rsplit(".", 1)
        state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": current["param_groups"]})
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    return int(header["step"]), header["state"], arrays
