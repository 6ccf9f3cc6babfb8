"""What runs here, and why the rest does not: torch | cpp | triton | cuda. Which device a model goes to.

Nothing falls back in silence: `backends()` gives the reason for every backend that is missing, an extension that is present
but does not load is an error, and asking for a backend by name never gives another one.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from lldfast.errors import InputError, MissingDependencyError

if TYPE_CHECKING:
    import torch

# Implementations of each op, best first; "auto" takes the first that runs on the tensors' device.
IMPLEMENTATIONS: dict[str, list[str]] = {
    "logprob": ["triton", "cuda", "cpp", "torch"],
    "linear_logprob": ["triton", "cpp", "torch"],
    "distill": ["triton", "cpp", "torch"],
    "sketch": ["triton", "cuda", "cpp", "torch"],
    "sketch_outer": ["triton", "cpp", "torch"],
    "gather": ["cpp", "numpy"],
    "xxh3": ["cpp", "xxhash"],
}

# Device types each backend works on; torch is not listed, for it works on all of its own.
DEVICES: dict[str, tuple[str, ...]] = {
    "cpp": ("cpu",),
    "numpy": ("cpu",),
    "xxhash": ("cpu",),
    "triton": ("cuda",),
    "cuda": ("cuda",),
}

_DEPENDENCIES = (
    "numpy",
    "pyarrow",
    "tiktoken",
    "tokenizers",
    "safetensors",
    "datasets",
    "transformers",
    "peft",
    "gguf",
    "xxhash",
)


def compiled_module(name: str) -> ModuleType | None:
    """The compiled module lldfast.<name>, or None when it was not built."""
    full = f"lldfast.{name}"
    if importlib.util.find_spec(full) is None:
        return None
    try:
        return importlib.import_module(full)
    except ImportError as error:
        raise MissingDependencyError(f"{full} is installed but does not load ({error}); reinstall lldfast") from error


def require(package: str, purpose: str) -> Any:
    """An optional package, imported.

    Args:
        purpose: what the message begins with: "this tokenizer needs".

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingDependencyError(f"{purpose} the package {package}: pip install {package} ({error})") from error


@functools.cache
def extension() -> ModuleType | None:
    """lldfast._C, or None where it was not built (LLDFAST_PURE=1, or a source tree that hides the installed package).

    Raises:
        MissingDependencyError: the module is there but does not load.
        InputError: LLDFAST_ISA names an instruction set that is unknown, or that this machine lacks.
    """
    module = compiled_module("_C")
    if module is not None:
        try:
            module.isa()
        except ValueError as error:
            raise InputError(str(error)) from None
    return module


def _absent(name: str) -> str:
    folder = Path(__file__).resolve().parent
    if (folder.parent / "pyproject.toml").exists():
        return (
            f"lldfast._{name} is not in the source tree {folder}, which was imported in place of an installed package: "
            "run from another folder, or `pip install -e .`"
        )
    return f"this lldfast was built without _{name}" + (
        " (LLDFAST_PURE=1)" if name == "C" else " (no CUDA toolkit when it was built, or LLDFAST_PURE=1)"
    )


def _torch() -> dict[str, Any]:
    if importlib.util.find_spec("torch") is None:
        return {"available": False, "reason": "torch is not installed", "devices": []}
    import torch

    devices = ["cpu"] + [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    return {"available": True, "reason": "", "version": torch.__version__, "devices": devices, "threads": torch.get_num_threads()}


def _cpp() -> dict[str, Any]:
    forced = os.environ.get("LLDFAST_ISA") or None
    module = extension()
    if module is None:
        return {"available": False, "reason": _absent("C"), "isa": None, "isas": [], "forced": forced}
    return {"available": True, "reason": "", "isa": isa(), "isas": list(module.supported_isas()), "forced": forced}


def isa() -> str | None:
    """The instruction set of the C++ kernels (scalar, avx2, avx512 or amx), None without the extension."""
    module = extension()
    return None if module is None else str(module.isa())


def _triton() -> dict[str, Any]:
    if importlib.util.find_spec("lldfast_kernels") is None:
        return {"available": False, "reason": "the package lldfast_kernels is not installed"}
    from lldfast_kernels import probe

    return probe()


def _cuda() -> dict[str, Any]:
    module = compiled_module("_cuda")
    if module is None:
        return {"available": False, "reason": _absent("cuda"), "devices": []}
    found: dict[str, Any] = module.probe()
    return {"available": not found["reason"], **found}


def backends() -> dict[str, dict[str, Any]]:
    """What runs here: name -> {"available": bool, "reason": why not (empty when available), ...details}.

    torch: version, devices, threads. cpp: isa in use, isas supported, forced (LLDFAST_ISA). triton: version. cuda: runtime,
    driver, devices. Imports torch, and starts the CUDA driver where there is one.

    Raises:
        InputError: LLDFAST_ISA cannot be had.
        MissingDependencyError: a compiled module is there but does not load.
    """
    return {"torch": _torch(), "cpp": _cpp(), "triton": _triton(), "cuda": _cuda()}


def resolve(op: str, backend: str = "auto", device: str = "cpu") -> str:
    """The implementation of `op` to run on `device` ("cpu", "cuda", "cuda:1", a torch.device).

    "auto" gives the best that runs; a name gives that one or an error.

    Raises:
        InputError: the op or the backend is unknown, or the backend does not have the op, does not work on the device, or
            does not run here; the message says what does.
    """
    if op not in IMPLEMENTATIONS:
        raise InputError(f"unknown op {op!r}; known: {', '.join(IMPLEMENTATIONS)}")
    choices = IMPLEMENTATIONS[op]
    kind = str(device).split(":")[0]
    if backend != "auto":
        if backend not in choices:
            raise InputError(f"{op} has no backend {backend!r}; it has: {', '.join(choices)}, and auto")
        reason = _why_not(backend, kind)
        if reason:
            raise InputError(f"backend {backend!r} of {op} cannot run on {device}: {reason}")
        return backend
    reasons = {choice: _why_not(choice, kind) for choice in choices}
    for choice, reason in reasons.items():
        if not reason:
            return choice
    raise InputError(f"no backend of {op} runs on {device}: " + "; ".join(f"{name}: {why}" for name, why in reasons.items()))


def _why_not(backend: str, kind: str) -> str:
    if backend not in DEVICES:  # torch: its tensors are the arguments, so it is here
        return ""
    if kind not in DEVICES[backend]:
        return f"it works on {', '.join(DEVICES[backend])}"
    return _unavailable(backend)


@functools.cache
def _unavailable(backend: str) -> str:
    # Asked on every call of an op, so answered once.
    if backend == "cpp":
        return str(_cpp()["reason"])
    if backend == "triton":
        return str(_triton()["reason"])
    if backend == "cuda":
        found = _cuda()
        return str(found["reason"]) or ("" if found["kernels"] else "built where there was no nvcc, without its kernels")
    return ""


def pick_device(name: str | torch.device = "auto", what: str = "device") -> torch.device:
    """The device called `name`, made sure to work; "auto" is cuda where there is one, else the CPU.

    "auto" never takes mps, since scores are summed in fp64, which it lacks.

    Args:
        what: how the message calls the option that `name` is from.

    Raises:
        InputError: there is no such device, or it cannot be used.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # "meta" makes tensors, and has no values
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split(". ")[0].splitlines()[0]  # torch goes on with advice and, for some, with pages of its tables
        raise InputError(f"{what} {str(name)!r} cannot be used here: {reason}") from None
    return device


def describe_device(device: torch.device, dtype: str | torch.dtype) -> str:
    """A device and what is computed with on it, for people: "cuda:0 NVIDIA H100 80GB HBM3, float32", "cpu, float32"."""
    import torch

    where = str(device)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        where = f"cuda:{index} {torch.cuda.get_device_name(index)}"
    return f"{where}, {str(dtype).removeprefix('torch.')}"


def versions() -> dict[str, str]:
    """Versions for the provenance of a result: lldfast, python, torch (without importing it) and the data packages present."""
    return dict(_versions())


@functools.cache  # looking them up reads files, which would be a tenth of scoring a few texts
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("lldfast", "torch", *_DEPENDENCIES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # an optional package, or a source tree without metadata: then there is no version to report
    return found


def env_report() -> str:
    """The text of `lldfast env`: versions, machine, and each backend with its reason."""
    lines = [f"{name:<12} {value}" for name, value in versions().items()]
    lines += [f"{'platform':<12} {platform.platform()} ({platform.machine()}, {os.cpu_count()} processors)"]
    lines += [f"{'package':<12} {Path(__file__).resolve().parent}", f"{'executable':<12} {sys.executable}", ""]
    for name, info in backends().items():
        details = {
            key: value for key, value in info.items() if key not in ("available", "reason") and value not in (None, [], False, "")
        }
        text = ", ".join(f"{key} {_show(value)}" for key, value in details.items())
        state = "yes" if info["available"] else f"no: {info['reason']}"
        lines.append(f"{name:<12} {state}" + (f" ({text})" if text else ""))
    return "\n".join(lines)


def _show(value: Any) -> str:
    if isinstance(value, list):
        return "; ".join(_show(item) for item in value)
    if isinstance(value, dict):
        return " ".join(f"{key}={_show(item)}" for key, item in value.items())
    if isinstance(value, tuple):
        return ".".join(str(item) for item in value)
    return str(value)
