"""Log-likelihood from given logits, and their gradient, against what people use today: time, memory, error.

    python bench/bench_logprob.py --tokens 1024 4096 --vocab 50304 50257 --threads 1 --out results.json
    python bench/bench_logprob.py --mode train --device cuda --tokens 16384
    python -m pytest bench/bench_logprob.py --benchmark-only                 (small shapes, about a minute)

Forward: log-likelihoods per token. Train: forward and backward, the gradient of the mean loss in the logits. The rate counts
the logits once in forward and three times in train (read twice, gradient written once). "sum of the logits" is the plain reading
of the tensor, in train followed by a copy of it. Errors are |err| / (1 + |lse|) against fp64 on 64 of the tokens; those of the
gradient relative in the Frobenius norm, on the same tokens. An odd vocabulary (50257) leaves rows unaligned. common.py says what
is timed.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent))  # pytest's importlib mode does not
from common import (
    DTYPES,
    Check,
    Method,
    Oracle,
    check_against,
    compiled,
    distance,
    isas,
    parse,
    parser,
    pytest_run,
    run,
    scored_rows,
    write,
)

import lldfast
from lldfast import logprob
from lldfast.ops import native
from lldfast.ops.chunks import Outputs

LIMIT = {"bf16": 5e-6, "fp32": 2e-6}
GRADIENT_LIMIT = {"bf16": 3e-3, "fp32": 2e-6}  # bf16: gradients are rounded to 8 bits
FLOOR = {"forward": "sum of the logits", "train": "sum and copy of the logits"}


def make(tokens: int, vocab: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    logits = torch.empty(tokens, vocab, dtype=dtype, device=device)
    for part in logits.split(4096):
        part.copy_(2 * torch.randn(part.shape, device=device))
    return logits, torch.randint(vocab, (tokens,), device=device)


def gathered(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits.float(), -1).gather(1, labels[:, None])[:, 0]


def eager(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return -F.cross_entropy(logits, labels, reduction="none")


def eager_fp32(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return -F.cross_entropy(logits.float(), labels, reduction="none")


def ours(backend: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    return lambda logits, labels: logprob(logits, labels, backend=backend).logprob


def forced(logits: torch.Tensor, labels: torch.Tensor, isa: str, train: bool) -> torch.Tensor:
    """One instruction set, past the custom op: log-likelihoods, or the gradient of the mean loss."""
    out = Outputs.zeros(logits, len(logits), torch.float32, False, False)
    native.logprob_fwd(logits, labels, None, logits.shape[1], None, None, 1.0, out, isa)
    if not train:
        return out.logprob
    g, h = torch.full_like(out.lse, -1 / len(logits)), torch.zeros_like(out.lse)
    grad = torch.empty_like(logits)
    native.logprob_bwd(
        logits, labels, None, logits.shape[1], None, None, 1.0, out.logprob, out.lse, g, h, grad, g.new_empty(0), isa
    )
    return grad


def backends(device: str) -> list[str]:
    """Those of ours that run on the device, best first; torch last."""
    return [name for name in (("triton", "cuda") if device.startswith("cuda") else ("cpp",)) if available(name)] + ["torch"]


def available(name: str) -> bool:
    found = lldfast.backends()[name]
    return bool(found["available"]) and bool(found.get("kernels", True))


def methods(logits: torch.Tensor, labels: torch.Tensor, kind: str, o: argparse.Namespace) -> list[Method]:
    train = o.mode == "train"
    limit = (GRADIENT_LIMIT if train else LIMIT)[kind]
    leaf = logits.detach().requires_grad_(train)
    made: list[Method] = []

    def add(name: str, values: Callable[..., torch.Tensor], tolerance: float | None = None) -> None:
        call = functools.partial(gradient, values, leaf, labels) if train else functools.partial(values, leaf, labels)
        made.append(Method(name, call, tolerance))

    for backend in backends(o.device):
        add(f"lldfast, {backend}", ours(backend), limit)
    for isa in isas(o):
        made.append(Method(f"lldfast, {isa}", functools.partial(forced, logits, labels, isa, train), limit))
    if train:
        copy = torch.empty_like(logits)

        def floor() -> None:
            logits.sum()
            copy.copy_(logits)

        made.append(Method(FLOOR["train"], floor, floor=True, held=copy.numel() * copy.element_size()))
    else:
        made.append(Method(FLOOR["forward"], logits.sum, floor=True))
    if kind == "bf16":
        add("F.cross_entropy, bf16 to fp32", eager_fp32)
    add(f"F.cross_entropy, {kind}", eager)
    add("log_softmax and gather", gathered)
    if not o.no_compile:
        made.append(compiled_method(leaf, labels, train))
    return made


def compiled_method(leaf: torch.Tensor, labels: torch.Tensor, train: bool) -> Method:
    call = compiled(eager_fp32, leaf, labels)
    return Method("torch.compile", (lambda: torch.autograd.grad(-call().mean(), leaf)[0]) if train else call)


def gradient(values: Callable[..., torch.Tensor], leaf: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(-values(leaf, labels).mean(), leaf)[0]


def check_of(logits: torch.Tensor, labels: torch.Tensor, train: bool) -> Check:
    rows = scored_rows(len(logits), logits.device.type)
    z, y = logits[rows].double(), labels[rows]
    if not train:
        return check_against(rows, {"given": Oracle.of(z, y)})
    wanted = torch.softmax(z, -1)
    wanted[torch.arange(len(rows), device=z.device), y] -= 1
    wanted /= len(logits)

    def check(_: Method, result: torch.Tensor) -> tuple[float, float]:
        off = distance(result[rows], wanted)
        return off, off

    return check


def bench(tokens: int, vocab: int, kind: str, o: argparse.Namespace) -> dict[str, Any]:
    torch._dynamo.reset()  # past its limit of recompilations it would run eagerly, without a word
    logits, labels = make(tokens, vocab, DTYPES[kind], o.device)
    title = f"given logits, {o.mode}, {kind}, T={tokens} V={vocab}, {o.device}"
    title += "" if o.device.startswith("cuda") else f", {o.threads} threads"
    moved = logits.numel() * logits.element_size() * (3 if o.mode == "train" else 1)
    with torch.set_grad_enabled(o.mode == "train"):
        made = methods(logits, labels, kind, o)
        return run(title, made, check_of(logits, labels, o.mode == "train"), o, moved, "GB/s")


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--tokens", type=int, nargs="+", default=[1024])
    options.add_argument("--vocab", type=int, nargs="+", default=[50304, 50257])
    options.add_argument("--mode", choices=("forward", "train"), default="forward")
    o = parse(options)
    groups: list[dict[str, Any]] = []
    for tokens in o.tokens:
        for vocab in o.vocab:
            for kind in o.dtypes or ["bf16", "fp32"]:
                groups.append(bench(tokens, vocab, kind, o))
                write(o.out, groups, o)


# Small shapes for pytest-benchmark. Compiling would take most of the minute.
NAMES = [
    "lldfast, cpp",
    "lldfast, avx512",
    "lldfast, avx2",
    "lldfast, torch",
    "F.cross_entropy, {kind}",
    "log_softmax and gather",
]


@functools.cache
def small(mode: str, kind: str) -> tuple[list[Method], Check]:
    o = argparse.Namespace(device="cpu", mode=mode, no_compile=True, scalar=False)
    logits, labels = make(256, 8193, DTYPES[kind], "cpu")
    return methods(logits, labels, kind, o), check_of(logits, labels, mode == "train")


@pytest.mark.parametrize("kind", list(DTYPES))
@pytest.mark.parametrize("name", [*NAMES, FLOOR["forward"]])
@pytest.mark.benchmark(max_time=0.3, min_rounds=5)
def test_forward(benchmark: Any, name: str, kind: str) -> None:
    benchmark.group = f"given logits, forward {kind}"
    with torch.no_grad():
        pytest_run(benchmark, *small("forward", kind), name.format(kind=kind))


@pytest.mark.parametrize("kind", list(DTYPES))
@pytest.mark.parametrize("name", [*NAMES, FLOOR["train"]])
@pytest.mark.benchmark(max_time=0.3, min_rounds=5)
def test_train(benchmark: Any, name: str, kind: str) -> None:
    benchmark.group = f"given logits, train {kind}"
    pytest_run(benchmark, *small("train", kind), name.format(kind=kind))


if __name__ == "__main__":
    main()
