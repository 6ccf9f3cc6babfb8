"""Log-likelihood and loss from hidden states and the head, against what people use today: time, memory, error.

    python bench/bench_linear_logprob.py --tokens 1024 4096 --width 768 --vocab 50304 --threads 1 --out results.json
    python bench/bench_linear_logprob.py --mode train --tokens 4096 --device cuda
    python -m pytest bench/bench_linear_logprob.py --benchmark-only          (small shapes, about a minute)

Forward: log-likelihoods per token. Train: mean loss and the gradients of hidden states and weight, bf16. "logits alone" is the
product into a ready buffer, without any softmax: what no method that goes through logits can beat. Errors of the forward are
|err| / (1 + |lse|) against fp64 on 64 of the tokens; those of the gradients relative in the Frobenius norm, of the worse of the
two gradients: against fp32 row by row, and ("small") against fp64 on 128 tokens and 2048 ids. common.py says what is timed.

On a CPU, fp32 is also run in a process of its own in which torch, oneDNN, MKL and lldfast are all held to AVX2.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).parent))  # pytest's importlib mode does not
from common import DTYPES, Method, Oracle, check_against, compiled, distance, isas, judge, parse, parser, pytest_run, run, write
from common import scored_rows as rows_of

import lldfast
from lldfast import linear_cross_entropy, linear_logprob
from lldfast.ops import native
from lldfast.ops.chunks import Outputs

LIMIT = {"bf16": 5e-6, "fp32": 2e-6, "bf16x3": 1e-4}
GRADIENT_LIMIT = {"bf16": 4e-3, "fp32": 2e-5}  # bf16: gradients are rounded to 8 bits
AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "LLDFAST_ISA": "avx2",
}

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def make(tokens: int, width: int, vocab: int, dtype: torch.dtype, device: str) -> Inputs:
    hidden = torch.randn(tokens, width, device=device, dtype=torch.float32).to(dtype)
    weight = (torch.randn(vocab, width, device=device, dtype=torch.float32) * (2 / math.sqrt(width))).to(dtype)
    return hidden, weight, torch.randint(vocab, (tokens,), device=device)


def oracle(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> Oracle:
    """The weight goes through fp64 in blocks: whole, that of a large vocabulary would take gigabytes."""
    logits = torch.cat([hidden.double() @ block.double().T for block in weight.split(8192)], 1)
    return Oracle.of(logits, labels)


def eager(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, reduction: str = "none") -> torch.Tensor:
    return F.cross_entropy((hidden @ weight.T).float(), labels, reduction=reduction)


def vocabulary_chunks(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, step: int = 4096) -> torch.Tensor:
    lse = torch.full(labels.shape, -math.inf, device=hidden.device)
    own = torch.zeros_like(lse)
    for start in range(0, len(weight), step):
        logits = (hidden @ weight[start : start + step].T).float()
        lse = torch.logaddexp(lse, torch.logsumexp(logits, -1))
        at = labels - start
        inside = (at >= 0) & (at < logits.shape[1])
        own = torch.where(inside, logits.gather(1, at.clamp(0, logits.shape[1] - 1)[:, None])[:, 0], own)
    return own - lse


def forced(inputs: Inputs, isa: str) -> torch.Tensor:
    hidden, weight, labels = inputs
    out = Outputs.zeros(hidden, len(hidden), torch.float32, False, False)
    native.linear_logprob_fwd(hidden, weight, labels, None, len(weight), None, None, 1.0, None, out, isa)
    return out.logprob


def torch_fused(inputs: Inputs, reduction: str) -> list[tuple[str, Callable[[], torch.Tensor] | None]]:
    """F.linear_cross_entropy as it is and chunked, where this torch has it."""
    names = ["F.linear_cross_entropy", "F.linear_cross_entropy, chunked"]
    if not hasattr(F, "linear_cross_entropy"):
        return [(name, None) for name in names]
    plain = functools.partial(F.linear_cross_entropy, reduction=reduction)
    calls: list[tuple[str, Callable[[], torch.Tensor] | None]] = [(names[0], lambda: plain(*inputs))]
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    calls.append((names[1], None if options is None else lambda: plain(*inputs, options=options())))
    return calls


def gpu_peers(inputs: Inputs, reduction: str) -> list[tuple[str, Callable[[], torch.Tensor] | None]]:
    hidden, weight, labels = inputs
    calls: list[tuple[str, Callable[[], torch.Tensor] | None]] = []
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss(reduction=reduction)
        calls.append(("Liger fused linear cross entropy", lambda: liger(weight, hidden, labels)))
    except ImportError:
        calls.append(("Liger fused linear cross entropy", None))
    try:
        from cut_cross_entropy import linear_cross_entropy as cce

        calls.append(("Cut Cross-Entropy", lambda: cce(hidden, weight, labels, reduction=reduction)))
    except ImportError:
        calls.append(("Cut Cross-Entropy", None))
    return calls


def peers(inputs: Inputs, reduction: str) -> list[tuple[str, Callable[[], torch.Tensor] | None]]:
    return torch_fused(inputs, reduction) + (gpu_peers(inputs, reduction) if inputs[0].is_cuda else [])


def forward_methods(inputs: Inputs, kind: str, o: argparse.Namespace) -> list[Method]:
    hidden, weight, labels = inputs
    made: list[Method] = []

    def ours(name: str, tolerance: float, oracle: str = "given", **options: Any) -> None:
        made.append(Method(name, lambda: linear_logprob(*inputs, **options), tolerance, oracle))

    def negated(loss: Callable[..., torch.Tensor], *args: Any, **options: Any) -> Callable[[], torch.Tensor]:
        return lambda: -loss(*args, **options)

    ours("lldfast", LIMIT[kind])
    if kind == "bf16":
        ours("lldfast, argmax and entropy", LIMIT[kind], return_argmax=True, return_entropy=True)
    else:
        if not hidden.is_cuda:
            ours("lldfast bf16x3", LIMIT["bf16x3"], precision="bf16x3")
        ours("lldfast, rounded to bf16", LIMIT["bf16"], "bf16", precision="bf16")
    for isa in isas(o):
        made.append(Method(f"lldfast, {isa}", lambda isa=isa: forced(inputs, isa), LIMIT[kind]))
    if kind == "bf16":
        ours("lldfast, torch backend", LIMIT[kind], backend="torch")
    buffer = torch.empty(len(hidden), len(weight), dtype=hidden.dtype, device=hidden.device)
    size = buffer.numel() * buffer.element_size()
    made.append(Method("logits alone, ready buffer", lambda: torch.mm(hidden, weight.T, out=buffer), floor=True, held=size))
    if kind == "fp32":
        made.append(Method("eager fp32", negated(eager, *inputs)))
    else:
        made.append(Method("eager bf16 to fp32", negated(eager, *inputs)))
        made.append(Method("eager bf16", lambda: -F.cross_entropy(hidden @ weight.T, labels, reduction="none")))
    if not o.no_compile:
        made.append(Method("torch.compile", negated(compiled(eager, *inputs))))
    if kind == "bf16":
        made.append(Method("vocabulary chunks, online lse", lambda: vocabulary_chunks(*inputs)))
        for name, loss in peers(inputs, "none"):
            made.append(Method(name, absent="not installed") if loss is None else Method(name, negated(loss)))
    return made


def restricted_methods(inputs: Inputs) -> list[Method]:
    return [Method("lldfast, all AVX2", lambda: forced(inputs, "avx2"), LIMIT["fp32"]),
            Method("eager fp32, all AVX2", lambda: -eager(*inputs))]  # fmt: skip


def row_chunks(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, rows: int = 512) -> torch.Tensor:
    total = torch.zeros((), device=hidden.device)
    for h, y in zip(hidden.split(rows), labels.split(rows), strict=True):
        total = total + checkpoint(eager, h, weight, y, "sum", use_reentrant=False)
    return total / len(labels)


def train_methods(inputs: Inputs, kind: str, o: argparse.Namespace) -> list[Method]:
    """Calls return (dh, dw) of the mean loss."""
    hidden, weight = (x.detach().requires_grad_() for x in inputs[:2])
    leaves = (hidden, weight)
    own: Inputs = (hidden, weight, inputs[2])
    made: list[Method] = []

    def add(name: str, loss: Callable[[], torch.Tensor] | None, tolerance: float | None = None) -> None:
        if loss is None:
            made.append(Method(name, absent="not installed"))
        else:
            made.append(Method(name, lambda: torch.autograd.grad(loss(), leaves), tolerance))

    add("lldfast", lambda: linear_cross_entropy(*own), GRADIENT_LIMIT[kind])
    add("lldfast, torch backend", lambda: linear_cross_entropy(*own, backend="torch"), GRADIENT_LIMIT[kind])
    buffer = torch.empty(len(hidden), len(weight), dtype=hidden.dtype, device=hidden.device)
    d_hidden, d_weight = torch.empty_like(inputs[0]), torch.empty_like(inputs[1])

    def products() -> None:
        torch.mm(inputs[0], inputs[1].T, out=buffer)
        torch.mm(buffer, inputs[1], out=d_hidden)
        torch.mm(buffer.T, inputs[0], out=d_weight)

    held = sum(x.numel() * x.element_size() for x in (buffer, d_hidden, d_weight))
    made.append(Method("three products alone, ready buffers", products, floor=True, held=held))
    add("eager", lambda: eager(*own, "mean"))
    if not o.no_compile:
        add("torch.compile", compiled(functools.partial(eager, reduction="mean"), *own))
    add("row chunks, checkpointed", lambda: row_chunks(*own))
    for name, loss in peers(own, "mean"):
        add(name, loss)
    return made


def gradients(inputs: Inputs, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the mean loss, in `dtype`, with 256 MiB of logits at a time."""
    hidden, weight, labels = inputs[0], inputs[1].to(dtype), inputs[2]
    dh, dw = torch.empty(hidden.shape, dtype=dtype, device=hidden.device), torch.zeros_like(weight)
    for rows in torch.arange(len(hidden), device=hidden.device).split(max(2**28 // (weight.shape[0] * dtype.itemsize), 1)):
        h = hidden[rows].to(dtype)
        dz = torch.softmax(h @ weight.T, -1)
        dz[torch.arange(len(rows), device=rows.device), labels[rows]] -= 1
        dz /= len(hidden)
        dh[rows] = dz @ weight
        dw.addmm_(dz.T, h)
    return dh, dw


def check_gradients(inputs: Inputs, dtype: torch.dtype) -> Callable[[Method, Any], tuple[float, float]]:
    wanted = gradients(inputs, dtype)

    def check(_: Method, result: Any) -> tuple[float, float]:
        worst = max(distance(a, b) for a, b in zip(result, wanted, strict=True))
        return worst, worst

    return check


def check_forward(inputs: Inputs) -> Callable[[Method, Any], tuple[float, float]]:
    hidden, weight, labels = inputs
    rows = rows_of(len(hidden), hidden.device.type)
    oracles = {"given": oracle(hidden[rows], weight, labels[rows])}
    if hidden.dtype == torch.float32:
        oracles["bf16"] = oracle(hidden[rows].bfloat16(), weight.bfloat16(), labels[rows])
    return check_against(rows, oracles)


def small_errors(methods: list[Method], width: int, kind: str, o: argparse.Namespace) -> None:
    """Fills `small` of the methods with their errors on a small problem of the same width; ours must be good here too."""
    inputs = make(128, width, 2048, DTYPES[kind], o.device)
    check, small = check_gradients(inputs, torch.float64), {m.name: m for m in train_methods(inputs, kind, o)}
    for method in methods:
        if method.absent or method.floor or (o.only and not re.search(o.only, method.name)):
            continue
        try:
            method.small = judge(small[method.name], check)
        except Exception as error:  # noqa: BLE001 - a peer that does not run is reported where it is timed
            print(f"{method.name}, small problem: {type(error).__name__}: {error}", file=sys.stderr)


def bench(tokens: int, kind: str, o: argparse.Namespace) -> dict[str, Any]:
    torch._dynamo.reset()  # past its limit of recompilations it would run eagerly, without a word
    inputs = make(tokens, o.width, o.vocab, DTYPES[kind], o.device)
    title = f"{o.mode}, {kind} inputs, T={tokens} d={o.width} V={o.vocab}, {o.device}"
    title += "" if o.device.startswith("cuda") else f", {o.threads} threads" + (", all held to AVX2" if o.restricted else "")
    products = tokens * o.width * o.vocab * 2
    if o.mode == "train":
        methods = train_methods(inputs, kind, o)
        small_errors(methods, o.width, kind, o)
        return run(title, methods, check_gradients(inputs, torch.float32), o, 3 * products, "TFLOP/s")
    with torch.no_grad():
        methods = restricted_methods(inputs) if o.restricted else forward_methods(inputs, kind, o)
        return run(title, methods, check_forward(inputs), o, products, "TFLOP/s")


def bench_restricted(tokens: int, o: argparse.Namespace) -> list[dict[str, Any]]:
    """The group of `restricted_methods`, from a process whose libraries read these variables when they start."""
    env = {key: value for key, value in os.environ.items() if key != "MKL_DEBUG_CPU_TYPE"} | AVX2
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "avx2.json"
        command = [sys.executable, __file__, "--restricted", "--dtypes", "fp32", "--tokens", str(tokens), "--out", str(out)]
        for name in ("width", "vocab", "threads", "rounds"):
            command += [f"--{name}", str(getattr(o, name))]
        if subprocess.run(command, env=env).returncode:
            raise SystemExit("the run held to AVX2 failed")
        groups: list[dict[str, Any]] = json.loads(out.read_text())["groups"]
        return groups


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--tokens", type=int, nargs="+", default=[1024])
    options.add_argument("--width", type=int, default=768)
    options.add_argument("--vocab", type=int, default=50304)
    options.add_argument("--mode", choices=("forward", "train"), default="forward")
    options.add_argument("--peak-tflops", type=float, help="of one thread or of the GPU: prints the fraction of it too")
    options.add_argument("--restricted", action="store_true", help=argparse.SUPPRESS)
    o = parse(options)
    kinds = o.dtypes or (["bf16"] if o.mode == "train" else ["bf16", "fp32"])
    groups: list[dict[str, Any]] = []
    for tokens in o.tokens:
        for kind in kinds:
            groups.append(bench(tokens, kind, o))
            write(o.out, groups, o)
        restrict = o.device == "cpu" and "avx2" in lldfast.backends()["cpp"]["isas"] and not (o.restricted or o.only)
        if o.mode == "forward" and "fp32" in kinds and restrict:
            groups += bench_restricted(tokens, o)
            write(o.out, groups, o)


SMALL = argparse.Namespace(device="cpu", no_compile=True, scalar=False)  # compiling would take most of the minute
NAMES = {
    "bf16": ["lldfast", "lldfast, argmax and entropy", "lldfast, avx512", "lldfast, avx2", "lldfast, torch backend",
             "logits alone, ready buffer", "eager bf16 to fp32", "eager bf16", "vocabulary chunks, online lse"],
    "fp32": ["lldfast", "lldfast bf16x3", "lldfast, rounded to bf16", "lldfast, avx512", "lldfast, avx2",
             "logits alone, ready buffer", "eager fp32"],
}  # fmt: skip


@functools.cache
def small_forward(kind: str) -> tuple[list[Method], Any]:
    inputs = make(256, 256, 4096, DTYPES[kind], "cpu")
    return forward_methods(inputs, kind, SMALL), check_forward(inputs)


@functools.cache
def small_train() -> tuple[list[Method], Any]:
    inputs = make(256, 256, 4096, torch.bfloat16, "cpu")
    return train_methods(inputs, "bf16", SMALL), check_gradients(inputs, torch.float64)


@pytest.mark.parametrize("kind,name", [(kind, name) for kind, names in NAMES.items() for name in names])
@pytest.mark.benchmark(max_time=0.5, min_rounds=5)
def test_forward(benchmark: Any, kind: str, name: str) -> None:
    benchmark.group = f"linear forward {kind}"
    with torch.no_grad():
        pytest_run(benchmark, *small_forward(kind), name)


@pytest.mark.parametrize("name", ["lldfast", "lldfast, torch backend", "three products alone, ready buffers", "eager"])
@pytest.mark.benchmark(max_time=0.5, min_rounds=5)
def test_train(benchmark: Any, name: str) -> None:
    benchmark.group = "linear train bf16"
    pytest_run(benchmark, *small_train(), name)


if __name__ == "__main__":
    main()
