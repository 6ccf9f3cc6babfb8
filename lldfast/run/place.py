"""Where things are and what they are computed on: locations of files and models, devices, dtypes."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
from importlib import resources
from pathlib import Path

import numpy as np
import torch

from lldfast.backends import describe_device, pick_device
from lldfast.errors import InputError, MissingDependencyError


def resolve_location(spec: str) -> str:
    """A path or model id; "asset:NAME" is a file shipped with lldfast, "package:NAME/PATTERN" one in an installed package.

    Raises:
        InputError: no such asset or file.
        MissingDependencyError: the package is not installed.
    """
    if not spec:
        raise InputError("an empty string is neither a path nor a model id")
    if spec.startswith("asset:"):
        path = Path(str(resources.files("lldfast") / "assets" / spec.removeprefix("asset:")))
        if not path.exists():
            raise InputError(f"lldfast ships no asset {spec.removeprefix('asset:')!r}")
        return str(path)
    if spec.startswith("package:"):
        name, _, pattern = spec.removeprefix("package:").partition("/")
        if not name.isidentifier() or not pattern or pattern.startswith("/"):
            raise InputError(f"{spec}: expected package:NAME/FILE, with a top-level package and a file inside it")
        found = importlib.util.find_spec(name)
        if found is None or not found.submodule_search_locations:
            raise MissingDependencyError(
                f"{spec}: package {name!r} is not installed: pip install --no-deps {name.replace('_', '-')}"
            )
        files = sorted(Path(found.submodule_search_locations[0]).glob(pattern))
        if not files:
            raise InputError(f"{spec}: package {name!r} has no file {pattern!r}")
        return str(files[0])
    return spec


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Autocast dtype; see TrainConfig.dtype.

    Raises:
        InputError: bfloat16 was asked for and the hardware lacks it.
    """
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_bf16 = device.type == "cpu" and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if name == "bfloat16" and not has_bf16:
        raise InputError(f"train.dtype bfloat16: this {device.type} has no bf16 instructions; use float32")
    # on a CPU bf16 pays only for wide layers (none of the small presets gained from it), so auto leaves it to the user
    return torch.bfloat16 if name == "bfloat16" or (name == "auto" and has_bf16 and device.type == "cuda") else torch.float32


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a run computes, and the dtype of its layers (autocast; parameters are fp32)."""

    device: torch.device
    dtype: torch.dtype

    @classmethod
    def pick(cls, device: str, dtype: str) -> Place:
        """What "auto" or a name means here; see `pick_device` and `pick_dtype`."""
        chosen = pick_device(device, "train.device")
        return cls(chosen, pick_dtype(dtype, chosen))

    def __str__(self) -> str:
        return f"{self.device}, {self.dtype}".replace("torch.", "")

    def describe(self) -> str:
        """For people: the name of the GPU too."""
        return describe_device(self.device, self.dtype)

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on the device."""
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, self.dtype)

    def rng_state(self) -> dict[str, np.ndarray]:
        """The states of torch's generators that training draws from, for a checkpoint."""
        states = {"torch_rng": torch.get_rng_state().numpy()}
        if self.device.type == "cuda":  # dropout draws there
            states["cuda_rng"] = torch.cuda.get_rng_state(self.device).numpy()
        return states

    def set_rng_state(self, states: dict[str, np.ndarray]) -> None:
        torch.set_rng_state(torch.from_numpy(states["torch_rng"]))
        if self.device.type == "cuda" and "cuda_rng" in states:
            torch.cuda.set_rng_state(torch.from_numpy(states["cuda_rng"]), self.device)
