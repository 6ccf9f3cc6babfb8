"""Which implementation of an op serves a call, and the options that logprob and linear_logprob hand to their custom ops.

Both are settled before an op is entered: inside it, everything is plain numbers.
"""

import importlib.util
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lldfast.backends import isa, resolve
from lldfast.errors import InputError
from lldfast.ops.chunks import is_shard, kept_rows, local_vocab

# The fields of Options, as torch.library's schemas want them.
OPTIONS = "float? softcap, float logit_scale, int ignore_index, int? valid_vocab, int vocab_start, str? precision, str backend"


class Options(NamedTuple):
    """The arguments of the custom ops behind their tensors. `rows` below is the vocabulary dimension of head or logits."""

    softcap: float | None
    logit_scale: float
    ignore_index: int
    valid_vocab: int | None
    vocab_start: int
    precision: str | None
    backend: str

    def vocab(self, rows: int) -> int:
        return local_vocab(rows, self.valid_vocab, self.vocab_start)

    def shard(self, rows: int) -> bool:
        return is_shard(rows, self.valid_vocab, self.vocab_start)

    def kept(self, rows: int, labels: Tensor) -> Tensor | None:
        """`kept_rows`, which raises for labels outside the whole vocabulary."""
        return kept_rows(labels, self.ignore_index, self.vocab_start + rows if self.valid_vocab is None else self.valid_vocab)

    def triton(self, vocab: int, bias: Tensor | None) -> dict[str, Any]:
        """Keyword arguments of the launchers in lldfast_kernels."""
        bias = None if bias is None else bias.float()
        return {"bias": bias, "softcap": self.softcap, "logit_scale": self.logit_scale, "vocab": vocab}


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
