"""The kernels' tests run in Triton's interpreter, on the CPU; test_aot.py compiles in processes of its own, since the interpreter
takes the compiler's place for as long as a process lives. KERNELS_ON_GPU=1 compiles them for the GPU that is there instead, for
the files whose tests put their tensors on `device`.
"""

from __future__ import annotations

import importlib
import os
import sys

import pytest

NOT_INTERPRETED = "triton was imported before the kernels' tests, without TRITON_INTERPRET=1: run `pytest tests/kernels` alone"


def _import_interpreted() -> str:
    """Import the kernels so that they are interpreted; gives the reason why that cannot be, empty if it can."""
    try:
        with pytest.MonkeyPatch.context() as patch:
            # Read when a kernel is decorated. Not left set: programs that other tests start shall compile.
            patch.setenv("TRITON_INTERPRET", "1")
            before = "triton" in sys.modules
            importlib.import_module("triton")
            language = importlib.import_module("triton.language.standard")
            interpreter = importlib.import_module("triton.runtime.interpreter")
            if before and not isinstance(language.cdiv, interpreter.InterpretedFunction):
                return NOT_INTERPRETED
            for kernels in ("distill", "linear_logprob", "sketch"):
                importlib.import_module(f"lldfast_kernels.{kernels}")
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed"
    _accept_numpy_2_4(interpreter)
    _patch_once(interpreter)
    return ""


def _patch_once(interpreter: object) -> None:
    """A launch patches Triton; to do so again at every call of the kernels' device functions takes half of a test's time."""
    function = interpreter.InterpretedFunction  # type: ignore[attr-defined]
    usual = function.__call__

    def call(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        ours = self.fn.__module__.startswith("lldfast_kernels.")
        return self.rewrite()(*args, **kwargs) if ours else usual(self, *args, **kwargs)

    function.__call__ = call


def _accept_numpy_2_4(interpreter: object) -> None:
    """Triton 3.6 makes an int of an array of one element where range() gets a number of the kernel, which numpy 2.4 refuses."""
    patch_tensor = getattr(interpreter, "_patch_lang_tensor", None)
    if patch_tensor is None:
        return

    def patched(tensor: object, scope: object) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))  # type: ignore[attr-defined]

    interpreter._patch_lang_tensor = patched  # type: ignore[attr-defined]


ON_GPU = os.environ.get("KERNELS_ON_GPU") == "1"
REASON = "" if ON_GPU else _import_interpreted()


@pytest.fixture
def device() -> str:
    return "cuda" if ON_GPU else "cpu"


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip where the kernels cannot be interpreted."""
    if ON_GPU:
        return
    if REASON:
        pytest.skip(REASON)
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # Triton imports parts of itself at the first launch
