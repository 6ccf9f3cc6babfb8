"""The kernels compiled for GPUs that are not there: what the assembly must hold. One process per capability, not interpreted."""

import functools
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys

import pytest


def _triton_version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


pytestmark = [
    pytest.mark.slow,  # unless Triton has the results in its cache
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None or importlib.util.find_spec("lldfast_kernels") is None,
        reason="triton or lldfast_kernels is not installed",
    ),
    # Registers and spills are one compiler's: 3.7.1 spills a few bytes in two kernels and crashes on the specialised one.
    pytest.mark.skipif(not _triton_version().startswith("3.6."), reason=f"written for Triton 3.6, not {_triton_version()}"),
]

CAPABILITIES = (80, 90, 100)
PATTERNS = {
    "wide loads": r"ld\.global\.v4|ld\.global\.L\S*\.v4",
    "wide stores": r"st\.global\.v4",
    "wide copies": r"cp\.async\.cg\.shared\.global[^;]*0x10",
    "tensor copies": r"cp\.async\.bulk\.tensor",
    "local memory": r"\b(?:ld|st)\.local",
    "wgmma": r"wgmma\.mma_async",
    "mma": r"mma\.sync",
    "tcgen05": r"tcgen05\.mma",
    "setmaxnreg": r"setmaxnreg",
    "high products": r"mul\.hi\.u32",
    "barriers": r"bar\.sync",
}
PROGRAM = """
import json, re, sys
from lldfast_kernels import aot
capability, patterns = json.loads(sys.argv[1])
found = {}
for spec in aot.specs(capability):
    if spec.dtype == "fp16" and capability != 90:
        continue  # the code of bf16, with another type in it
    kernel = aot.compile_spec(spec, capability)
    ptx = kernel.asm["ptx"]
    found[spec.name] = {key: len(re.findall(pattern, ptx)) for key, pattern in patterns.items()} | aot.resources(kernel)
print(json.dumps(found))
"""


@functools.cache
def assembly(capability):
    """Counts of each pattern, and ptxas' resources, by kernel."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    command = [sys.executable, "-c", PROGRAM, json.dumps([capability, PATTERNS])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def select(capability, *words):
    found = {name: info for name, info in assembly(capability).items() if all(word in name for word in words)}
    assert found, words
    return found


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_nothing_spills(capability):
    for name, info in assembly(capability).items():
        assert info["local memory"] == info["stack"] == info["spill_stores"] == info["spill_loads"] == 0, (name, info)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_given_logits_are_read_16_bytes_at_a_time_for_any_row_stride(capability):
    """The strides of these specs are not declared multiples of anything. First tile, four of the main loop, one of its rest."""
    for name, info in select(capability, "logprob_fwd", " ").items():
        if not name.startswith("linear"):
            assert info["wide loads"] >= 6, (name, info)
    for name, info in select(capability, "logprob_bwd").items():
        assert info["wide loads"] >= 1 and info["wide stores"] >= 1, (name, info)


@pytest.mark.parametrize("capability,product", [(80, "mma"), (90, "wgmma"), (100, "tcgen05")])
def test_products_use_tensor_cores(capability, product):
    for name, info in select(capability, "linear_logprob", "16 ").items():
        assert info[product] > 0, (name, info)
        assert info["tensor copies" if "tma" in name else "wide copies"] > 0, (name, info)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_fp32_is_not_rounded_to_tf32(capability):
    for name, info in select(capability, "linear_logprob", "fp32").items():
        assert info["mma"] == info["wgmma"] == info["tcgen05"] == 0, (name, info)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_shared_memory_fits(capability):
    """100 KiB: the 8.6 and 8.9 parts that run sm_80's tiles; of Hopper's 228 KiB each of two programs may have half."""
    bound = {80: 99 << 10, 90: 113 << 10, 100: 227 << 10}[capability]
    for name, info in assembly(capability).items():
        assert info["shared"] <= (227 << 10 if "specialized" in name else bound), (name, info)


def test_two_programs_share_a_hopper_multiprocessor():
    for name, info in select(90, "fwd_tma").items():
        if "specialized" not in name:
            assert info["registers"] <= 128, (name, info)


def test_hopper_warps_are_specialized_on_request():
    """Triton drops the request without a word where it cannot follow."""
    for name, info in select(90, "specialized").items():
        assert info["setmaxnreg"] > 0, (name, info)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_a_thread_makes_its_signs_by_one_philox_call(capability):
    """A call has 20 products, some of them known. One call for the permutation, one for the mask, one for the signs of all rows,
    and one where the bucket is sought from the source: a thread with lanes that are no neighbours would make more."""
    for name, info in select(capability, "sketch_fold").items():
        calls = 4 if "full" in name else 3
        assert 0 < info["high products"] <= 20 * calls, (name, info)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_threads_of_the_fold_share_nothing_but_the_sum_at_its_end(capability):
    """A thread has all rows of a lane, so that neither the tile nor its squares go through shared memory."""
    for name, info in select(capability, "sketch_fold").items():
        if "full" not in name:
            assert info["barriers"] <= 2 and info["shared"] <= 64, (name, info)


def test_four_folds_share_a_hopper_multiprocessor():
    for name, info in select(90, "sketch_fold").items():
        if "full" not in name:
            assert info["registers"] <= 128, (name, info)
