"""Block sizes, warps and pipeline stages, as plain tables: no run waits for an autotuner, and two runs launch the same kernel.

A key is (op, class of device, dtype, class of shape). The class of shape looks at the width and never at the number of tokens: a
token's value must not depend on how many others there are, and another tile would add in another order.

An entry without a measurement beside it is an ESTIMATE, from register and shared-memory budgets and from compiled code. Replace
one only by a measured one, and then write beside it the device, the shape, the Triton version and the time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """BLOCK_T tokens x BLOCK_V vocabulary ids x BLOCK_D of the width; `split`: vocabulary ids per program.

    The last three are of the kernel with tensor descriptors: a bound on its registers, how many of its programs a multiprocessor
    then holds, and whether warps that load are apart from warps that multiply.
    """

    BLOCK_T: int
    BLOCK_V: int
    BLOCK_D: int
    split: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None
    per_sm: int = 1
    specialize: bool = False


# Row tiles that run beside each other on one part of the weight: their hidden states and that part stay in the L2 cache together.
GROUP_T = 32
# Rows whose bias gradient one program adds up before the second stage.
BIAS_ROWS = 256

# Of the sketch's tile of 32 x 128 sums each of 4 warps has a lane in all rows, so one Philox call for 32 signs; of the 8 that
# `sketch_outer` has, half the rows, which leaves registers for two addresses an entry.
SKETCH_WARPS, SKETCH_OUTER_WARPS = 4, 8
# Partial sums between the two passes: a thousand programs, and little enough to stay in the L2 cache of a large GPU.
SKETCH_PARTIAL_BYTES = 32 << 20
# The second pass adds in order, so a small sketch keeps few threads busy: narrow programs, and loads far ahead.
SKETCH_COMBINE_WIDTH, SKETCH_COMBINE_AHEAD = 32, 16

_NARROW, _WIDE, _ANY = "d<=1024", "d>1024", "any"

# The given-logits kernels have one row per program, so BLOCK_T and BLOCK_D do not count. BLOCK_V is 16 bytes a thread. The
# split keeps the horizontal sum at its end, some 15 instructions a lane, under a tenth of the work.
_LOGPROB: dict[tuple[str, str, torch.dtype, str], Tile] = {
    ("logprob", "gpu", torch.bfloat16, _ANY): Tile(1, 1024, 0, 16384, 4, 1),
    ("logprob", "gpu", torch.float16, _ANY): Tile(1, 1024, 0, 16384, 4, 1),
    ("logprob", "gpu", torch.float32, _ANY): Tile(1, 512, 0, 16384, 4, 1),
    ("logprob", "interpreter", torch.float32, _ANY): Tile(1, 64, 0, 256, 1, 1),
}

# sm_90: two programs share a multiprocessor, so that one multiplies while the other takes exponentials: 3 stages of 32 KiB and
# 128 registers a thread each. The alternative that Triton 3.6 compiles without spills, to be measured: specialize=True, 4 warps
# (it makes them 12: four load, two groups of four multiply 64 rows each), 128 x 128 or 128 x 256 x 64, 4 stages, one program.
# sm_80: what fits 100 KiB of shared memory, which 8.6 and 8.9 have. fp32 has no tensor cores ("ieee"): registers bound its tile.
_LINEAR: dict[tuple[str, str, torch.dtype, str], Tile] = {
    ("linear_logprob", "sm80", torch.bfloat16, _NARROW): Tile(128, 128, 32, 4096, 8, 3),
    ("linear_logprob", "sm80", torch.bfloat16, _WIDE): Tile(128, 128, 32, 4096, 8, 4),
    ("linear_logprob", "sm90", torch.bfloat16, _NARROW): Tile(128, 128, 64, 4096, 8, 3, 128, 2),
    ("linear_logprob", "sm90", torch.bfloat16, _WIDE): Tile(128, 128, 64, 4096, 8, 3, 128, 2),
    ("linear_logprob", "sm100", torch.bfloat16, _NARROW): Tile(128, 128, 64, 4096, 8, 3),
    ("linear_logprob", "sm100", torch.bfloat16, _WIDE): Tile(128, 128, 64, 4096, 8, 3),
    ("linear_logprob", "gpu", torch.float32, _ANY): Tile(64, 64, 32, 4096, 8, 2),
    ("linear_logprob", "interpreter", torch.float32, _ANY): Tile(16, 64, 32, 192, 1, 1),
}

# A row per program, swept up to four times; BLOCK_T, BLOCK_D and the split do not count. Few wide programs: two on a
# multiprocessor keep 64 KiB of loads in flight, and of what all have read the L2 cache still has the most when they come back.
# "distill_kl" has registers for 8 entries a thread; "distill" has a hundred instructions an entry and room for 4. Measured for
# sm_90 (H200, Triton 3.6, gradient, R=1024 V=50304; a copy of one model's logits: fp32 .106, bf16 .059 ms) among 1024 to 8192
# entries, 8 and 16 warps, loads pipelined 1 to 4 deep: forward KL fp32 .43 ms (best .41), bf16 .302, AMiD fp32 .79, bf16 .78
# (best .75). Pipelining gained 4 % at most, so there is none.
_DISTILL: dict[tuple[str, str, torch.dtype, str], Tile] = {
    ("distill_kl", "gpu", torch.float32, _ANY): Tile(1, 4096, 0, 0, 16, 1),
    ("distill_kl", "gpu", torch.bfloat16, _ANY): Tile(1, 4096, 0, 0, 16, 1),
    ("distill_kl", "sm90", torch.bfloat16, _ANY): Tile(1, 2048, 0, 0, 8, 1),
    ("distill_kl", "interpreter", torch.float32, _ANY): Tile(1, 128, 0, 0, 1, 1),
    ("distill", "gpu", torch.float32, _ANY): Tile(1, 2048, 0, 0, 16, 1),
    ("distill", "gpu", torch.bfloat16, _ANY): Tile(1, 2048, 0, 0, 16, 1),
    # Of 16 warps here ptxas keeps two programs at the price of spills.
    ("distill", "sm100", torch.float32, _ANY): Tile(1, 1024, 0, 0, 8, 1),
    ("distill", "sm100", torch.bfloat16, _ANY): Tile(1, 1024, 0, 0, 8, 1),
    ("distill", "interpreter", torch.float32, _ANY): Tile(1, 128, 0, 0, 1, 1),
}

TABLE = _LOGPROB | _LINEAR | _DISTILL


def capability_class(capability: tuple[int, int] | None) -> str:
    """The device class of a compute capability; None is the interpreter. Consumer parts (8.x, 12.x) count as sm_80."""
    if capability is None:
        return "interpreter"
    return {9: "sm90", 10: "sm100", 11: "sm100"}.get(capability[0], "sm80")


def tile(op: str, capability: tuple[int, int] | None, dtype: torch.dtype, width: int = 0) -> Tile:
    """The entry for an op on a device; fp16 takes bf16's tiles, and an op without entries of a class takes those of any GPU."""
    device = capability_class(capability)
    if device == "interpreter":
        return TABLE[op, device, torch.float32, _ANY]
    kinds = (dtype, torch.bfloat16) if dtype == torch.float16 else (dtype,)
    shape = _NARROW if width <= 1024 else _WIDE
    for key in ((op, d, kind, s) for d in (device, "gpu") for kind in kinds for s in (shape, _ANY)):
        if key in TABLE:
            return TABLE[key]
    raise ValueError(f"no tile of {op} for {dtype} on {device}")
