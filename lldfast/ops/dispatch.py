"""Which implementation of an op serves a call, decided before the op is entered: inside it, everything is plain numbers."""

import importlib.util
import os

import torch
from torch import Tensor

from lldfast.backends import isa, resolve
from lldfast.errors import InputError

PRECISIONS = (None, "fp32", "bf16", "bf16x3")


@torch.compiler.assume_constant_result
def _choose(op: str, backend: str, device: str, wide: bool) -> str:
    # Only where it is asked for by name: the interpreter is for checks.
    interpreted = backend == "triton" and device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if interpreted and importlib.util.find_spec("triton") is None:
        raise InputError("backend 'triton': TRITON_INTERPRET=1 is set, but triton is not installed")
    name = "triton" if interpreted else resolve(op, backend, device)
    if name == "torch":
        return name
    if backend == "auto":
        # Plain C++ without vector instructions is slower than torch; and only torch works in fp64.
        return "torch" if wide or (name == "cpp" and isa() == "scalar") else name
    if wide:
        raise InputError(f"backend {name!r} of {op} works in fp32: for fp64 inputs take 'torch' or 'auto'")
    return name


def choose(op: str, backend: str, *tensors: Tensor | None) -> str:
    """The backend that runs `op` on these tensors: `backends.resolve`, but "auto" gives torch for fp64 inputs.

    Raises:
        InputError: as `backends.resolve`, or a named backend cannot compute in fp64.
    """
    present = [t for t in tensors if t is not None]
    return _choose(op, backend, present[0].device.type, any(t.dtype == torch.float64 for t in present))


def check_precision(precision: str | None, known: tuple[str | None, ...] = PRECISIONS) -> None:
    if precision not in known:
        names = ", ".join(repr(name) for name in known if name is not None)
        raise InputError(f"precision={precision!r} is not one of {names}, or None")
