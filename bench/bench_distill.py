"""Distillation losses with their gradients: time, peak memory and error against eager, torch.compile, Liger at equal settings.

    bench/bench_distill.py                                   hidden states and heads, T=1024 d=768 V=50304, one thread
    bench/bench_distill.py --mode logits                     given logits
    bench/bench_distill.py --device cuda --tokens 8192       with Liger's fused linear JSD where it is installed
    pytest bench/bench_distill.py                            small, under pytest-benchmark

Student and teacher have heads of their own. Kinds: "bf16" has bf16 parameters, whose gradients are rounded to bf16 at the end;
"mixed" fp32 parameters under autocast, as in training; "fp32". A method returns the loss and its gradients by the student's
hidden states and head (or logits); its error is the largest relative distance of one of them from fp64.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from common import Method, compiled, distance, parse, parser, pytest_run, run, write

from lldfast.ops.chunks import pieces
from lldfast.ops.distill import loss as distill
from lldfast.ops.distill.oracle import reference

KINDS = ("bf16", "mixed", "fp32")
# bf16: the gradients' own rounding. mixed: what one rounding of the logits, or of their gradient, to bf16 would fail.
LIMIT = {"bf16": 4e-3, "mixed": 1e-3, "fp32": 2e-5}
# On a GPU 16-bit factors make 16-bit products: the logits' gradient is rounded once to their dtype.
GPU_LIMIT = {"bf16": 4e-3, "mixed": 3e-3, "fp32": 2e-5}
SETTINGS: dict[str, dict[str, Any]] = {
    "kl": {"preset": "kl"},
    "jsd": {"preset": "jsd"},
    "skl": {"preset": "skl"},
    "amid": {"preset": "amid"},
}

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def make(tokens: int, width: int, vocab: int, kind: str, device: str) -> Inputs:
    """Student hidden states and head, teacher's: logits of both vary by 2, and agree in part as those of trained models do."""
    shared = torch.randn(tokens, width, device=device), torch.randn(vocab, width, device=device) * (2 / math.sqrt(width))
    made = []
    for base in (shared, shared):
        for x in base:
            noisy = 0.8 * x + 0.6 * x.std() * torch.randn_like(x)
            made.append(noisy.bfloat16() if kind == "bf16" else noisy.bfloat16().float() if kind == "mixed" else noisy)
    return made[0], made[1], made[2], made[3]


def textbook(zs: torch.Tensor, zt: torch.Tensor, setting: str) -> torch.Tensor:
    """Mean loss from logits as one writes it in torch."""
    q, p = F.log_softmax(zs.float(), -1), F.log_softmax(zt.float(), -1)
    if setting == "kl":
        return F.kl_div(q, p, log_target=True, reduction="batchmean")
    if setting == "jsd":
        m = torch.logaddexp(p, q) - math.log(2)
        each = [F.kl_div(m, x, log_target=True, reduction="batchmean") for x in (p, q)]
        return 0.5 * (each[0] + each[1])
    if setting == "skl":
        return F.kl_div(torch.logaddexp(p + math.log(0.1), q + math.log(0.9)), p, log_target=True, reduction="batchmean")
    r = F.log_softmax(torch.logaddexp(3 * p + math.log(0.1), 3 * q + math.log(0.9)) / 3, -1)
    x, y, s = 0.2, 0.7, 0.9
    each = (x * p + y * r).exp() - x / s * (s * p).exp() - y / s * (s * r).exp()
    return -each.sum(-1).mean() / (x * y)


def eager(hs: torch.Tensor, ws: torch.Tensor, ht: torch.Tensor, wt: torch.Tensor, setting: str, mixed: bool) -> torch.Tensor:
    with torch.autocast(hs.device.type, torch.bfloat16, enabled=mixed):
        zs = F.linear(hs, ws)
        with torch.no_grad():
            zt = F.linear(ht, wt)
    return textbook(zs, zt, setting)


def products(inputs: Inputs, mixed: bool) -> Callable[[], None]:
    """The four matrix products of a loss and its gradient, into ready buffers."""
    hs, ws, ht, wt = (x.bfloat16() if mixed else x for x in inputs)
    z, zt = hs.new_empty(len(hs), len(ws)), ht.new_empty(len(ht), len(wt))
    dh, dw = torch.empty_like(hs), torch.empty_like(ws)

    def call() -> None:
        torch.mm(hs, ws.T, out=z)
        torch.mm(ht, wt.T, out=zt)
        torch.mm(z, ws, out=dh)
        torch.mm(z.T, hs, out=dw)

    call.held = sum(x.numel() * x.element_size() for x in (z, zt, dh, dw))  # type: ignore[attr-defined]
    return call


def liger(inputs: Inputs, setting: str) -> Callable[[], torch.Tensor] | None:
    """Liger's fused linear JSD; its beta 0 is forward KL. None where it is not installed."""
    try:
        from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD
    except ImportError:
        return None
    hs, ws, ht, wt = inputs
    module = LigerFusedLinearJSD(jsd_beta=0.0 if setting == "kl" else 0.5)
    return lambda: module(hs, ws, ht, wt, None)


def linear_methods(inputs: Inputs, setting: str, kind: str, o: argparse.Namespace) -> list[Method]:
    hs, ws = (x.detach().requires_grad_() for x in inputs[:2])
    own: Inputs = (hs, ws, inputs[2], inputs[3])
    mixed, limit = kind == "mixed", (GPU_LIMIT if hs.is_cuda else LIMIT)[kind]
    made: list[Method] = []

    def add(name: str, loss: Callable[[], torch.Tensor], tolerance: float | None = None) -> None:
        def call() -> tuple[torch.Tensor, ...]:
            value = loss()
            return value.detach(), *torch.autograd.grad(value, (hs, ws))

        made.append(Method(name, call, tolerance))

    def ours(**options: Any) -> torch.Tensor:
        return distill.distill_loss(*own, **SETTINGS[setting], precision="bf16" if mixed else None, **options)

    add("lldfast", ours, limit)
    add("lldfast, torch backend", lambda: ours(backend="torch"), limit)
    floor = products(inputs, mixed)
    made.append(Method("four products alone, ready buffers", floor, floor=True, held=floor.held))  # type: ignore[attr-defined]
    add("eager", lambda: eager(*own, setting, mixed))
    if not o.no_compile:
        add("torch.compile", compiled(functools.partial(eager, setting=setting, mixed=mixed), *own))
    if hs.is_cuda and setting in ("kl", "jsd"):
        peer = liger(own, setting)
        if peer is None:
            made.append(Method("Liger fused linear JSD", absent="not installed"))
        else:
            add("Liger fused linear JSD", peer)
    return made


def logits_methods(inputs: Inputs, setting: str, kind: str, o: argparse.Namespace) -> list[Method]:
    zs, zt = given_logits(inputs)
    zs = zs.detach().requires_grad_()
    made: list[Method] = []

    def add(name: str, loss: Callable[[], torch.Tensor], tolerance: float | None = None) -> None:
        def call() -> tuple[torch.Tensor, ...]:
            value = loss()
            return value.detach(), *torch.autograd.grad(value, zs)

        made.append(Method(name, call, tolerance))

    limit = LIMIT["fp32" if kind == "fp32" else "bf16"]
    add("lldfast", lambda: distill.distill_loss_from_logits(zs, zt, **SETTINGS[setting]), limit)
    add("lldfast, torch backend", lambda: distill.distill_loss_from_logits(zs, zt, **SETTINGS[setting], backend="torch"), limit)
    out = torch.empty_like(zs)
    made.append(Method("reads both logits, writes one", lambda: torch.add(zs.detach(), zt, out=out), floor=True))
    add("eager", lambda: textbook(zs, zt, setting))
    if not o.no_compile:
        add("torch.compile", compiled(functools.partial(textbook, setting=setting), zs, zt))
    return made


def given_logits(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    hs, ws, ht, wt = inputs
    return hs @ ws.T, ht @ wt.T


def wanted(inputs: Inputs, setting: str, mode: str) -> tuple[torch.Tensor, ...]:
    """The mean loss and its gradients in fp64."""
    if mode == "logits":
        zs, zt = (z.double() for z in given_logits(inputs))
        zs.requires_grad_()
        loss = reference(zs, zt, **SETTINGS[setting])
        return loss.detach(), *torch.autograd.grad(loss, zs)
    hs, ws, ht, wt = inputs
    w64, wt64 = ws.double(), wt.double()
    total, dh, dw = w64.new_zeros(()), hs.double(), torch.zeros_like(w64)
    for rows in pieces(len(hs), len(ws), 8, 2**27 if hs.is_cuda else 2**24, 16):
        z = (hs[rows].double() @ w64.T).requires_grad_()
        loss = reference(z, ht[rows].double() @ wt64.T, reduction="sum", **SETTINGS[setting]) / len(hs)
        (dz,) = torch.autograd.grad(loss, z)
        total += loss.detach()
        dh[rows] = dz @ w64
        dw.addmm_(dz.T, hs[rows].double())
    return total, dh, dw


def check_against(right: tuple[torch.Tensor, ...]) -> Callable[[Method, Any], tuple[float, float]]:
    def check(_: Method, result: Any) -> tuple[float, float]:
        worst = max(distance(a.reshape(-1, 1) if a.dim() == 0 else a, b.reshape(-1, 1) if b.dim() == 0 else b)
                    for a, b in zip(result, right, strict=True))  # fmt: skip
        return worst, worst

    return check


def bench(tokens: int, kind: str, setting: str, o: argparse.Namespace) -> dict[str, Any]:
    torch._dynamo.reset()  # past its limit of recompilations it would run eagerly, without a word
    inputs = make(tokens, o.width, o.vocab, kind, o.device)
    where = o.device if o.device.startswith("cuda") else f"{o.device}, {o.threads} threads"
    title = f"{setting}, {o.mode}, {kind}, T={tokens} d={o.width} V={o.vocab}, {where}"
    torch.set_num_threads(os.cpu_count() or 1)  # fp64 products of this size take a while
    check = check_against(wanted(inputs, setting, o.mode))
    torch.set_num_threads(o.threads)
    if o.mode == "logits":
        itemsize = 4 if kind != "bf16" else 2
        return run(title, logits_methods(inputs, setting, kind, o), check, o, 3 * itemsize * tokens * o.vocab, "GB/s")
    return run(title, linear_methods(inputs, setting, kind, o), check, o, 8 * tokens * o.width * o.vocab, "TFLOP/s")


def main() -> None:
    options = parser(__doc__)
    for action in options._actions:
        if action.dest == "dtypes":
            action.choices = list(KINDS)
    options.add_argument("--tokens", type=int, default=1024)
    options.add_argument("--width", type=int, default=768)
    options.add_argument("--vocab", type=int, default=50304)
    options.add_argument("--mode", choices=("linear", "logits"), default="linear")
    options.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=["kl", "amid"])
    o = parse(options)
    groups: list[dict[str, Any]] = []
    for kind in o.dtypes or (["mixed"] if o.mode == "linear" else ["bf16"]):
        for setting in o.settings:
            groups.append(bench(o.tokens, kind, setting, o))
            write(o.out, groups, o)


SMALL = argparse.Namespace(device="cpu", no_compile=True)


@functools.cache
def small(setting: str) -> tuple[list[Method], Any]:
    inputs = make(128, 128, 2048, "fp32", "cpu")
    return linear_methods(inputs, setting, "fp32", SMALL), check_against(wanted(inputs, setting, "linear"))


@pytest.mark.parametrize("setting", list(SETTINGS))
@pytest.mark.parametrize("name", ["lldfast", "lldfast, torch backend", "four products alone, ready buffers", "eager"])
@pytest.mark.benchmark(max_time=0.5, min_rounds=5)
def test_distill(benchmark: Any, setting: str, name: str) -> None:
    benchmark.group = f"distill {setting}"
    pytest_run(benchmark, *small(setting), name)


if __name__ == "__main__":
    main()
