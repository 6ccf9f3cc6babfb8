"""What each kernel is compiled for ahead of time, without a GPU or a driver: the assembly that tests and CI look into.

    compile_all(90) -> {"logprob_fwd bf16": CompiledKernel, ...}

Specialised as the usual launches are: pointers to 16-byte boundaries, row strides of the linear kernels a multiple of 16. Must
run in a process without TRITON_INTERPRET, which replaces the compiler.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lldfast_kernels import common, distill, linear_logprob, logprob, sketch, tuning

_INPUTS = ("x_ptr", "h_ptr", "w_ptr", "a_ptr", "b_ptr", "student_ptr", "teacher_ptr")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_POINTERS = {
    "bias_ptr": "*fp32", "label_ptr": "*i64", "best_ptr": "*i32", "argmax_ptr": "*i64",
    "sketch_ptr": "*fp64", "sums_ptr": "*fp64", "total_ptr": "*fp64", "n": "i64", "offset": "i64",
}  # fmt: skip
_INTEGERS = {
    "T", "V", "D", "G", "k", "width", "vocab", "splits", "split", "parts", "lead", "lead_x", "lead_o", "row_tiles", "first_block",
    "first_tile", "tiles", "blocks", "programs", "sums_at", "sums_stride", "seed_lo", "seed_hi", "count", "V_S", "V_T",
}  # fmt: skip
_NUMBERS = {"softcap", "scale", "inv_t", "a", "inv_a", "lam", "rest", "x", "y", "s", "inv_x", "inv_y", "inv_s"}


class KernelSpec(NamedTuple):
    """One compilation: `aligned` are the integers that are multiples of 16 (pointers always are), `dtype` that of the inputs."""

    name: str
    kernel: Any
    dtype: str
    constexprs: dict[str, Any]
    aligned: tuple[str, ...] = ()
    options: dict[str, int] = {}  # noqa: RUF012

    def source(self) -> ASTSource:
        signature: dict[str, str] = {}
        for arg in self.kernel.arg_names:
            if arg in self.constexprs:
                signature[arg] = "constexpr"
            elif arg.endswith("_desc"):
                rows = self.constexprs["BLOCK_T" if arg == "h_desc" else "BLOCK_V"]
                signature[arg] = f"tensordesc<{self.dtype}[{rows}, {self.constexprs['BLOCK_D']}]>"
            elif arg in _INPUTS or (arg == "out_ptr" and "g_ptr" in self.kernel.arg_names):
                signature[arg] = f"*{self.dtype}"
            elif arg in _NUMBERS:
                signature[arg] = "fp32"
            elif arg.startswith("stride_") or arg in _INTEGERS:
                signature[arg] = "i32"
            else:
                signature[arg] = _POINTERS.get(arg, "*fp32")
        attrs = {
            (i,): [["tt.divisibility", 16]]
            for i, arg in enumerate(self.kernel.arg_names)
            if signature[arg].startswith("*") or arg in self.aligned
        }
        return ASTSource(fn=self.kernel, signature=signature, constexprs=dict(self.constexprs), attrs=attrs)


def specs(capability: int) -> list[KernelSpec]:
    """The compilations for a compute capability (80, 90, 100)."""
    device = divmod(capability, 10)
    found: list[KernelSpec] = []
    for name, dtype in DTYPES.items():
        tile = tuning.tile("logprob", device, dtype)
        warps, vec = {"num_warps": tile.num_warps}, 16 // dtype.itemsize
        base: dict[str, Any] = {"HAS_BIAS": False, "SOFTCAP": False, "BLOCK_V": tile.BLOCK_V}
        fwd = base | {"ARGMAX": False, "ENTROPY": False, "VEC": vec, "bias_ptr": None}
        full = base | {"HAS_BIAS": True, "SOFTCAP": True, "ARGMAX": True, "ENTROPY": True, "VEC": vec}
        bwd = base | {"SAME": True, "VEC": vec, "bias_ptr": None}
        # No row stride is declared a multiple of anything: this is the odd vocabulary.
        found += [
            KernelSpec(f"logprob_fwd {name}", logprob.logprob_fwd_kernel, name, fwd, (), warps),
            KernelSpec(f"logprob_fwd {name} full", logprob.logprob_fwd_kernel, name, full, (), warps),
            KernelSpec(f"logprob_bwd {name}", logprob.logprob_bwd_kernel, name, bwd, (), warps),
        ]
        bias = base | {"HAS_BIAS": True, "ROWS": tuning.BIAS_ROWS}
        found.append(KernelSpec(f"logprob_bias {name}", logprob.logprob_bias_kernel, name, bias, ("stride_xt",), warps))
        tiles = {tuning.tile("linear_logprob", device, dtype, width): width for width in (2048, 768)}
        for shape, width in tiles.items():
            found += _linear(name, shape, width, capability)
        found += _sketch(name) + _distill(name, device)
    combine = {"ARGMAX": True, "ENTROPY": True, "BLOCK_T": 128}
    found.append(KernelSpec("logprob_combine", common.logprob_combine_kernel, "fp32", combine))
    found.append(KernelSpec("column_sum", common.column_sum_kernel, "fp32", {"ADD": True, "BLOCK_V": 1024}))
    second = {"WIDTH": tuning.SKETCH_COMBINE_WIDTH, "AHEAD": tuning.SKETCH_COMBINE_AHEAD}
    found.append(KernelSpec("sketch_combine", sketch.sketch_combine_kernel, "fp32", second, (), {"num_warps": 1}))
    found.append(KernelSpec("sketch_sum", sketch.sketch_sum_kernel, "fp32", {"WIDTH": 256}, (), {"num_warps": 4}))
    return found


def _sketch(name: str) -> list[KernelSpec]:
    """Tiles of 4096, as for every k from there on; "alone" is one block, "full" a small tensor with all that can be asked for."""
    fold, outer = sketch.sketch_fold_kernel, sketch.sketch_outer_kernel
    warps, outer_warps = {"num_warps": tuning.SKETCH_WARPS}, {"num_warps": tuning.SKETCH_OUTER_WARPS}
    shape = {"ROWS": sketch.TILE // sketch.LANES, "LANES": sketch.LANES}
    plain: dict[str, Any] = shape | {"HAS_SCALE": False, "SOURCE": False, "PARTIAL": True, "scale_ptr": None}
    alone = plain | {"PARTIAL": False}
    full: dict[str, Any] = shape | {"HAS_SCALE": True, "SOURCE": True, "PARTIAL": False}
    no_dots = {"DOTS": 0, "dot0_ptr": None, "dot1_ptr": None}
    found = [
        KernelSpec(f"sketch_fold {name}", fold, name, plain | no_dots, (), warps),
        KernelSpec(f"sketch_fold {name} full", fold, name, full | {"DOTS": 2}, (), warps),
        KernelSpec(f"sketch_outer {name}", outer, name, plain, (), outer_warps),
        KernelSpec(f"sketch_outer {name} full", outer, name, full, (), outer_warps),
    ]
    if name == "fp32":
        found += [
            KernelSpec(f"sketch_fold {name} alone", fold, name, alone | no_dots, (), warps),
            KernelSpec(f"sketch_fold {name} k=8", fold, name, plain | no_dots | {"ROWS": 1, "LANES": 8}, (), {"num_warps": 1}),
            KernelSpec(f"sketch_outer {name} alone", outer, name, alone, (), outer_warps),
        ]
    return found


def _distill(name: str, device: tuple[int, int]) -> list[KernelSpec]:
    """Forward KL, AMiD, and D(q, r) with cross entropy at another temperature; "forward" has no gradient."""
    kl: dict[str, Any] = {
        "assistant": 1, "a": 0.0, "order": 0, "divergence": 0, "x": 0.0, "y": 0.0, "detach": False, "temperature": 1.0,
        "ce": False, "normalised": True,
    }  # fmt: skip
    amid = kl | {"assistant": 2, "divergence": 2, "x": 0.2, "y": 0.7, "normalised": False}
    variants = [("kl", kl, True), ("amid", amid, True), ("kl forward", kl, False), ("amid forward", amid, False)]
    if name == "fp32":
        taid = kl | {"assistant": 3, "order": 3, "detach": True, "normalised": False}
        skewed, js = kl | {"assistant": 2, "normalised": True}, kl | {"divergence": 1, "x": 0.5}
        full = amid | {"order": 1, "temperature": 2.0, "ce": True}
        variants += [("kl+ce", kl | {"ce": True}, True), ("skl", skewed, True), ("srkl", skewed | {"order": 1}, True)]
        variants += [("js", js, True), ("taid", taid, True), ("amid full", full, True)]
    found = []
    for variant, numbers, grad in variants:
        spec = SimpleNamespace(**numbers)
        tile = distill.tile_of(spec, device, DTYPES[name])
        absent = () if grad and spec.ce else ("label_ptr", "gce_ptr") if grad else ("label_ptr", "gce_ptr", "g_ptr", "out_ptr")
        flags = distill.constants(spec, grad) | dict.fromkeys(absent) | {"BLOCK_V": tile.BLOCK_V}
        strides = ("stride_sr", "stride_tr", "stride_or")
        found.append(
            KernelSpec(
                f"distill {variant} {name}", distill.distill_rows_kernel, name, flags, strides, {"num_warps": tile.num_warps}
            )
        )
    return found


def _linear(name: str, tile: tuning.Tile, width: int, capability: int) -> list[KernelSpec]:
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    base: dict[str, Any] = {"HAS_BIAS": False, "SOFTCAP": False, "bias_ptr": None, "GROUP_T": tuning.GROUP_T}
    base |= {"BLOCK_T": tile.BLOCK_T, "BLOCK_V": tile.BLOCK_V, "BLOCK_D": tile.BLOCK_D}
    fwd = base | {"ARGMAX": False, "ENTROPY": False}
    full = fwd | {"HAS_BIAS": True, "SOFTCAP": True, "ARGMAX": True, "ENTROPY": True}
    del full["bias_ptr"]
    aligned = ("D", "stride_ht", "stride_wv", "stride_ot")
    pointers, dz = linear_logprob.linear_logprob_fwd_kernel, linear_logprob.linear_logprob_dz_kernel
    found = [
        KernelSpec(f"linear_logprob_fwd {name} d={width}", pointers, name, fwd | {"EVEN_D": True}, aligned, options),
        KernelSpec(f"linear_logprob_fwd {name} d={width} full", pointers, name, full | {"EVEN_D": True}, aligned, options),
        KernelSpec(
            f"linear_logprob_dz {name} d={width}", dz, name, base | {"COLUMN_SUMS": True, "EVEN_D": True}, aligned, options
        ),
    ]
    if capability >= 90 and name != "fp32":
        kernel = linear_logprob.linear_logprob_fwd_tma_kernel
        tma = options | ({"maxnreg": tile.max_registers} if tile.max_registers else {})
        variants = [("", fwd | {"SPECIALIZE": tile.specialize}, tma), (" full", full | {"SPECIALIZE": tile.specialize}, tma)]
        if capability < 100:
            variants.append((" specialized", fwd | {"SPECIALIZE": True}, {"num_warps": 4, "num_stages": 4}))
        for extra, flags, settings in variants:
            found.append(KernelSpec(f"linear_logprob_fwd_tma {name} d={width}{extra}", kernel, name, flags, aligned, settings))
    return found


def compile_spec(spec: KernelSpec, capability: int) -> Any:
    """triton's CompiledKernel: .asm["ptx"], .asm["cubin"], .metadata.shared."""
    return triton.compile(spec.source(), target=GPUTarget("cuda", capability, 32), options=spec.options)


def compile_all(capability: int, only: str = "") -> dict[str, Any]:
    """Every spec of a capability whose name contains `only`: {name: CompiledKernel}."""
    return {s.name: compile_spec(s, capability) for s in specs(capability) if only in s.name}


def resources(kernel: Any) -> dict[str, int]:
    """registers, stack, spill_stores and spill_loads (bytes) of a compiled kernel, as ptxas gives them, and shared memory."""
    ptx = kernel.asm["ptx"]
    arch = re.search(r"\.target (sm_\w+)", ptx)
    tools = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
    blackwell = os.path.join(tools, "ptxas-blackwell")
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.ptx")
        with open(path, "w") as file:
            file.write(ptx)
        assert arch is not None
        program = blackwell if arch[1] >= "sm_100" and len(arch[1]) > 5 and os.path.exists(blackwell) else f"{tools}/ptxas"
        command = [program, "-v", f"--gpu-name={arch[1]}", path, "-o", os.path.join(folder, "kernel.cubin")]
        log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    patterns = {
        "registers": r"Used (\d+) registers", "stack": r"(\d+) bytes stack frame",
        "spill_stores": r"(\d+) bytes spill stores", "spill_loads": r"(\d+) bytes spill loads",
    }  # fmt: skip
    found = {name: max((int(n) for n in re.findall(pattern, log)), default=-1) for name, pattern in patterns.items()}
    return found | {"shared": int(kernel.metadata.shared)}
