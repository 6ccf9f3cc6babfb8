"""The weight files of a Hugging Face folder: which ones a load takes, and what each says it holds.

A folder may hold several sets of weights. transformers takes one, in a fixed order; the same one is listed here, so that a
model's identity covers what it was loaded from and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lldfast.errors import CorruptError, InputError

# In the order in which transformers looks for them.
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F4")


@dataclass(frozen=True)
class Stored:
    """What a weight file says of one tensor."""

    file: Path
    shape: tuple[int, ...]
    floating: bool


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers reads the weights of `folder` from, sorted by name.

    Raises:
        InputError: there are none, or the index names a file that is absent.
        CorruptError: the index is no index.
    """
    chosen = _explicit(folder) or next((name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if chosen is None:
        raise InputError(f"{folder} has no weights: none of {', '.join(WEIGHT_FILES)} is there")
    first = folder / chosen
    if first.suffix != ".json":
        return [first]
    index = _json(first)
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise CorruptError(f"{first} is no index of weights: it has no weight_map of tensors to files")
    if not isinstance(index.get("metadata"), dict):
        raise CorruptError(f"{first} is no index of weights: it has no metadata")
    files = [folder / name for name in sorted(set(places.values()))]
    for file in files:
        if not file.is_file():
            lost = sum(name == file.name for name in places.values())
            raise InputError(f"{first} places {lost} weights in {file.name}, which is not in the folder")
    return files


def _explicit(folder: Path) -> str | None:
    """The file that config.json names as the one to take."""
    config = _json(folder / "config.json")
    name = config.get("transformers_weights") if isinstance(config, dict) else None
    if name is not None and not (isinstance(name, str) and (folder / name).is_file()):
        raise InputError(f"{folder / 'config.json'} names the weights {name!r}, which are not in the folder")
    return name


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{file} is not valid JSON ({error})") from None


def stored_tensors(files: Sequence[Path]) -> dict[str, Stored]:
    """{name: what its file says}; no values are read.

    Raises:
        CorruptError: a file is truncated or no weight file, or two files hold different values for one name.
    """
    found: dict[str, Stored] = {}
    for file in files:
        for name, stored in (_in_safetensors if file.suffix == ".safetensors" else _in_pickle)(file):
            if name in found and not _same(name, found[name].file, file):
                raise CorruptError(f"{found[name].file} and {file.name} both hold {name}, with different values")
            found[name] = stored
    return found


@contextlib.contextmanager
def open_tensors(files: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """{name: its values, as transformers takes them in `state_dict`}, read when they are needed, while the block lasts."""
    from safetensors import safe_open

    values: dict[str, Any] = {}
    with contextlib.ExitStack() as opened:
        for file in files:
            if file.suffix == ".safetensors":
                handle = opened.enter_context(safe_open(file, framework="pt"))
                values |= {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (it is no mapping)
            else:
                values |= _unpickled(file)
        yield values


def _in_safetensors(file: Path) -> Iterator[tuple[str, Stored]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as handle:
            slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (it is no mapping)
            yield from ((n, Stored(file, tuple(s.get_shape()), s.get_dtype() in _FLOATS)) for n, s in slices.items())
    except SafetensorError as error:
        raise CorruptError(f"{file} is truncated or no safetensors file ({error})") from None


def _in_pickle(file: Path) -> Iterator[tuple[str, Stored]]:
    try:
        content = _unpickled(file)
    except Exception as error:  # torch raises EOFError, OSError, RuntimeError, UnpicklingError, KeyError, ...
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CorruptError(f"{file} is truncated or no file of tensors ({reason})") from error
    if not isinstance(content, Mapping):
        raise CorruptError(f"{file} holds a {type(content).__name__}, not tensors by name")
    for name, value in content.items():
        if not isinstance(value, torch.Tensor):
            raise CorruptError(f"{file} is not a file of weights alone: its entry {name!r} is a {type(value).__name__}")
        yield str(name), Stored(file, tuple(value.shape), value.is_floating_point())


def _unpickled(file: Path) -> Any:
    """The content of a .bin file; values stay on disk until they are needed, where the format (a zip file) allows it."""
    return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))


def _same(name: str, *files: Path) -> bool:
    values = []
    for file in files:
        with open_tensors([file]) as tensors:
            value = tensors[name]
            values.append((value if isinstance(value, torch.Tensor) else value[:]).clone())
    return torch.equal(*values)
