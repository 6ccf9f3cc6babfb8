from __future__ import annotations

import importlib
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from lldfast.errors import InputError, MissingDependencyError

# importlib, since `lldfast.backends` is also the public function of that name
module = importlib.import_module("lldfast.backends")

BACKENDS = ("torch", "cpp", "triton", "cuda")


@pytest.fixture(autouse=True)
def _fresh_answers():
    module._unavailable.cache_clear()
    yield
    module._unavailable.cache_clear()


def test_every_backend_answers_with_a_reason():
    found = module.backends()
    assert tuple(found) == BACKENDS
    for info in found.values():
        assert info["available"] == (info["reason"] == "")
    assert found["torch"]["available"] and found["torch"]["version"] == torch.__version__
    cpp = found["cpp"]
    if cpp["available"]:
        assert cpp["isas"][0] == "scalar" and cpp["isa"] in cpp["isas"]


def test_no_device_is_a_reason_and_no_crash():
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    found = module.backends()
    assert not found["triton"]["available"] and found["triton"]["reason"]
    assert not found["cuda"]["available"] and found["cuda"]["reason"]


def test_cuda_device_is_seen():
    if not torch.cuda.is_available() or module.compiled_module("_cuda") is None:
        pytest.skip("needs a CUDA device and lldfast._cuda")
    found = module.backends()["cuda"]
    assert found["available"] and found["devices"][0]["name"] == torch.cuda.get_device_name(0)
    assert found["devices"][0]["capability"] == torch.cuda.get_device_capability(0)


def test_absent_extension(monkeypatch):
    monkeypatch.setattr(module, "extension", lambda: None)
    info = module.backends()["cpp"]
    assert not info["available"] and info["isas"] == []
    assert "source tree" in info["reason"] or "LLDFAST_PURE" in info["reason"]
    assert module.resolve("gather") == "numpy" and module.resolve("xxh3") == "xxhash"
    with pytest.raises(InputError, match="backend 'cpp' of gather cannot run on cpu"):
        module.resolve("gather", "cpp")


def test_broken_extension_is_an_error(tmp_path):
    # A compiled module that does not load must never pass for one that was not built.
    script = f"""
import importlib.util, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        return importlib.util.spec_from_file_location(name, {str(tmp_path / "_C.so")!r}) if name == "lldfast._C" else None
sys.meta_path.insert(0, Finder())
from lldfast.backends import extension
extension()
"""
    (tmp_path / "_C.so").write_bytes(b"not a library")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert MissingDependencyError.__name__ in done.stderr and "is installed but does not load" in done.stderr


def test_resolve_auto():
    for op, choices in module.IMPLEMENTATIONS.items():
        assert module.resolve(op) in choices
    expected = "torch" if not torch.cuda.is_available() else "triton"
    assert module.resolve("linear_logprob", "auto", torch.device("cuda:0")) == expected
    assert module.resolve("linear_logprob", "auto", "cpu") == ("torch" if module.extension() is None else "cpp")
    assert module.resolve("logprob", "torch", "cpu") == "torch"


def test_resolve_refuses():
    with pytest.raises(InputError, match="unknown op 'softmax'; known: logprob"):
        module.resolve("softmax")
    with pytest.raises(InputError, match="logprob has no backend 'jax'; it has: triton, cuda, cpp, torch, and auto"):
        module.resolve("logprob", "jax")
    with pytest.raises(InputError, match="gather cannot run on cuda: it works on cpu"):
        module.resolve("gather", "numpy", "cuda")
    with pytest.raises(InputError, match="no backend of gather runs on cuda: cpp: it works on cpu; numpy"):
        module.resolve("gather", "auto", "cuda")


def test_every_implementation_is_a_backend_or_a_package():
    known = {*BACKENDS, *module.DEVICES}
    assert all(choice in known for choices in module.IMPLEMENTATIONS.values() for choice in choices)


def test_versions():
    found = module.versions()
    assert found["numpy"] == np.__version__ and found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["lldfast"] and found["torch"] == torch.__version__


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )


def test_env_report():
    text = module.env_report()
    for name in (*BACKENDS, "python", "numpy", "platform", "package"):
        assert any(line.startswith(name) for line in text.splitlines())


@pytest.mark.slow
def test_forced_isa_is_shown():
    if module.extension() is None:
        pytest.skip("lldfast._C is not built here")
    code = "from lldfast.backends import backends; b = backends()['cpp']; print(b['isa'], b['forced'])"
    assert run(code, LLDFAST_ISA="scalar").stdout.split() == ["scalar", "scalar"]
    done = run(code, LLDFAST_ISA="sse")
    assert done.returncode != 0 and "InputError: LLDFAST_ISA=sse is unknown" in done.stderr


def test_kernels_probe_stands_alone():
    done = run("import lldfast_kernels, sys; print(lldfast_kernels.probe()); assert 'lldfast' not in sys.modules")
    assert done.returncode == 0 and "'available'" in done.stdout, done.stderr


def test_kernels_probe_gives_reasons(monkeypatch):
    import lldfast_kernels

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else real(name))
    answer = lldfast_kernels.probe()
    assert not answer["available"] and "triton is not installed" in answer["reason"] and answer["version"] is None
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert lldfast_kernels.probe()["interpreter"] is True


def test_the_public_name_stays_a_function():
    # lldfast/backends.py has the name of the function: loading the file must not put the module in the function's place.
    done = run("import lldfast as lld, lldfast.data.shards; print(list(lld.backends()))")
    assert done.returncode == 0 and "cpp" in done.stdout, done.stderr


@pytest.mark.parametrize(("there", "expected"), [(True, "cuda"), (False, "cpu")])
def test_the_auto_device_is_cuda_where_there_is_one(there, expected, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros", lambda *size, device: asked.append(device) or torch.ones(size))
        assert module.pick_device() == module.pick_device("auto") == torch.device(expected)
        assert module.pick_device("cpu") == module.pick_device(torch.device("cpu")) == torch.device("cpu")
    assert [str(device) for device in asked] == [expected, expected, "cpu", "cpu"]


@pytest.mark.parametrize("name", ["gpu", "meta", torch.device("meta")])
def test_a_device_that_cannot_be_used_is_named(name):
    with pytest.raises(InputError, match=f"--device '{name}' cannot be used here: "):
        module.pick_device(name, "--device")


def test_devices_for_people(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: ["Old Card", "New Card"][index])
    assert module.describe_device(torch.device("cpu"), "float32") == "cpu, float32"
    assert module.describe_device(torch.device("cuda"), torch.bfloat16) == "cuda:1 New Card, bfloat16"
    assert module.describe_device(torch.device("cuda:0"), "float32") == "cuda:0 Old Card, float32"
