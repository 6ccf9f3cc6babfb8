"""Triton kernels of lldfast. Imports torch and triton only, never lldfast, so that the folder can be used alone."""

from __future__ import annotations

import importlib.util
import os
from typing import Any


def probe() -> dict[str, Any]:
    """Can Triton kernels run here: {"available": bool, "reason": why not (empty when available), "version": str | None,
    "interpreter": is TRITON_INTERPRET=1 set, "device": name of the current CUDA device | None}.

    The interpreter runs kernels on the CPU, one block after another: good for checks, so it counts as no device.
    """
    interpreter = os.environ.get("TRITON_INTERPRET") == "1"
    answer: dict[str, Any] = {"available": False, "reason": "", "version": None, "interpreter": interpreter, "device": None}
    if importlib.util.find_spec("triton") is None:
        answer["reason"] = "triton is not installed (pip install 'lldfast[triton]')"
        return answer
    import triton

    answer["version"] = triton.__version__
    if importlib.util.find_spec("torch") is None:
        answer["reason"] = "torch is not installed"
        return answer
    import torch

    if torch.version.cuda is None:
        answer["reason"] = f"torch {torch.__version__} is built without CUDA"
    elif not torch.cuda.is_available():
        answer["reason"] = "no CUDA device"
    else:
        major, minor = torch.cuda.get_device_capability()
        answer["device"] = f"{torch.cuda.get_device_name()} (sm_{major}{minor})"
        if major < 8:
            answer["reason"] = f"compute capability {major}.{minor}; the kernels need 8.0"
    answer["available"] = not answer["reason"]
    return answer
