"""The signed XOR-fold against a plain read of its input and against other sketches: time, memory, error.

    python bench/bench_sketch.py --threads 1 --out sketch.json            (67M parameters, 2^12 to 2^20 buckets)
    python bench/bench_sketch.py --params 4194304 --log2-k 12 16 --dtypes fp32
    python bench/bench_sketch.py --mode error --out error.json            (inner products of adversarial vectors)
    python bench/bench_sketch.py --device cuda --params 134217728
    python -m pytest bench/bench_sketch.py --benchmark-only               (small shapes, about a minute)

Time: one vector of P numbers to k. The rate counts the vector once. "read" is the fastest plain read found in this process, of
the same bytes, whatever it computes from them. A dense sketch takes 2 k P operations, so it has a vector of its own
(--dense-params), which we sketch as well. The error column is | |sketch|^2 / |g|^2 - 1 |, whose standard deviation is
sqrt(2 / k); ours is also compared with the reference, entry by entry, before anything is timed. common.py says what is timed.

Error: root mean square over seeds of <sketch(x), sketch(y)> - <x, y>, in units of |x| |y|, beside sqrt(V0 / k) with
V0 = |x|^2 |y|^2 + <x, y>^2 - 2 sum x^2 y^2.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # pytest's importlib mode does not
from common import DTYPES, Check, Method, distance, isas, parse, parser, pytest_run, run, show, write
from peers_gram import CountSketch, PlainCountSketch, ReadySigns, dense_jl

from lldfast.backends import resolve
from lldfast.errors import InputError
from lldfast.ops import native
from lldfast.ops.sketch.fold import fold, reference

SEED = 1234
LIMIT = 1e-12  # relative, to the reference: the order of the sums is part of the specification


def backends(device: str) -> list[str]:
    """Those of ours that run on the device, best first; torch last."""
    found = []
    for name in ("triton", "cuda", "cpp"):
        try:
            found.append(resolve("sketch", name, device))
        except InputError:
            continue
    return [*found, "torch"]


def make(n: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    g = torch.empty(n, dtype=dtype, device=device)
    for part in g.split(1 << 22):
        part.copy_(torch.randn(part.shape, device=device))
    return g


def folded(g: torch.Tensor, k: int, backend: str, out: torch.Tensor) -> torch.Tensor:
    fold(out.zero_(), g, offset=0, seed=SEED, backend=backend)
    return out


def forced(g: torch.Tensor, k: int, isa: str, out: torch.Tensor) -> torch.Tensor:
    """One instruction set, past the dispatch."""
    native.sketch_fold(out.zero_(), g, 0, SEED, None, [], isa)
    return out


def fastest_read(g: torch.Tensor) -> tuple[str, Callable[[], Any]]:
    """Sums and largest values of the same bytes, as they are or taken for integers."""
    even = g[: g.numel() // 4 * 4]
    whole, half = even.view(torch.int64), even.view(torch.int32)
    found: dict[str, Callable[[], Any]] = {
        "sum": g.sum,
        "sum as int64": whole.sum,
        "max as int32": half.amax,
        "max as int64": whole.amax,
    }
    if g.device.type == "cpu":
        found["numpy sum as int64"] = whole.numpy().sum
        found["numpy max as int32"] = half.numpy().max
    if g.dtype == torch.float32:
        found["dot with itself"] = lambda: torch.dot(g, g)
    best = {name: min(seconds(call, g.device.type) for _ in range(4)) for name, call in found.items()}
    name = min(best, key=best.__getitem__)
    return name, found[name]


def seconds(call: Callable[[], Any], device: str) -> float:
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    synchronize()
    began = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - began


def check_of(g: torch.Tensor, k: int) -> Check:
    norm = float(torch.linalg.vector_norm(g, dtype=torch.float64)) ** 2
    wanted: list[torch.Tensor] = []  # made for the first of ours only

    def check(method: Method, result: torch.Tensor) -> tuple[float, float]:
        shown = abs(float(result.double().square().sum()) / norm - 1)
        if method.tolerance is None:
            return shown, 0.0
        if not wanted:
            wanted.append(torch.zeros(k, dtype=torch.float64, device=g.device))
            reference(wanted[0], g, offset=0, seed=SEED)
        return shown, distance(result, wanted[0])

    return check


def ours(g: torch.Tensor, k: int, o: argparse.Namespace, torch_too: bool) -> list[Method]:
    out = torch.zeros(k, dtype=torch.float64, device=g.device)
    names = backends(o.device)
    made = [
        Method(f"lldfast, {name}", functools.partial(folded, g, k, name, out), LIMIT)
        for name in names
        if torch_too or name != "torch" or len(names) == 1
    ]
    for isa in isas(o):
        made.append(Method(f"lldfast, {isa}", functools.partial(forced, g, k, isa, out), LIMIT))
    return made


def methods(g: torch.Tensor, k: int, o: argparse.Namespace, torch_too: bool = False) -> list[Method]:
    kind, read = fastest_read(g)
    made = [*ours(g, k, o, torch_too), Method(f"read ({kind})", read, floor=True)]
    n = g.numel()
    table = CountSketch(n, k, SEED, g.device.type)
    made.append(Method("CountSketch, index_add_", functools.partial(table.index_add, g), held=4 * n))
    if g.device.type == "cpu":
        made.append(Method("CountSketch, numpy bincount", functools.partial(table.bincount, g), held=4 * n))
    plain = PlainCountSketch(n, k, SEED, g.device.type)
    made.append(Method("CountSketch, as usually written", functools.partial(plain, g), held=12 * n))
    made.append(Method("chunks with ready signs, torch", functools.partial(ReadySigns(n, k, SEED, o.device), g), held=n))
    return made


def where(o: argparse.Namespace) -> str:
    return o.device + ("" if o.device.startswith("cuda") else f", {o.threads} threads")


def bench(n: int, k: int, kind: str, o: argparse.Namespace) -> dict[str, Any]:
    g = make(n, DTYPES[kind], o.device)
    title = f"sketch, {kind}, P={n} k=2^{k.bit_length() - 1}, {where(o)}"
    return run(title, methods(g, k, o), check_of(g, k), o, n * g.element_size(), "GB/s")


def bench_dense(n: int, k: int, o: argparse.Namespace) -> dict[str, Any]:
    g = make(n, torch.float32, o.device)
    made = ours(g, k, o, True)
    made.append(Method("dense signs, made on the fly", lambda: dense_jl(g[None], k, SEED)[0]))
    title = f"dense sketch, fp32, P={n} k={k}, {where(o)}"
    return run(title, made, check_of(g, k), o, n * g.element_size(), "GB/s")


def time_of(row: dict[str, Any]) -> float | None:
    found = row.get("processor_ms") or row.get("device_ms")
    return None if found is None else float(found["median"])


def summary(groups: list[dict[str, Any]]) -> dict[str, Any]:
    """What the groups say together: share of a plain read, gain over the best CountSketch, flatness in k."""
    rows: list[dict[str, Any]] = []
    for group in groups:
        times = {row["method"]: time_of(row) for row in group["rows"]}
        mine = next((times[m] for m in times if m.startswith("lldfast") and times[m] is not None), None)
        count = [t for m, t in times.items() if m.startswith("CountSketch") and t is not None]
        read = next((t for m, t in times.items() if m.startswith("read") and t is not None), None)
        dense = next((t for m, t in times.items() if m.startswith("dense") and t is not None), None)
        if mine is None:
            continue
        gain = {"read": read, "countsketch": min(count, default=None), "dense": dense}
        ratios = {name: None if t is None else t / mine for name, t in gain.items()}
        rows.append({"method": group["title"], "ms": mine, "gb_s": group["work"] / mine / 1e6, **ratios})
    print("\n### Together\n\n| | ms | GB/s | read / ours | best CountSketch / ours | dense / ours |\n|---|---|---|---|---|---|")
    for row in rows:
        cells = [f"{row['ms']:.3g}", f"{row['gb_s']:.3g}"] + [show(row[c], ".2f") for c in ("read", "countsketch", "dense")]
        print(f"| {row['method']} | {' | '.join(cells)} |")
    flat = {}
    for kind in DTYPES:
        found = [row["ms"] for row in rows if row["method"].startswith(f"sketch, {kind}")]
        if len(found) > 1:
            flat[kind] = max(found) / min(found)
            print(f"\n{kind}: the slowest k takes {flat[kind]:.2f} times as long as the fastest")
    return {"title": "together", "rows": rows, "slowest_to_fastest_k": flat}


# Pairs of vectors that defeat a sketch with too little randomness: [x, y] of n numbers.
def families(n: int, k: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    made = torch.Generator().manual_seed(0)
    normal = [torch.randn(n, generator=made) for _ in range(3)]
    width = 384
    rows = torch.zeros(2, n // width, width)
    rows[0, :: max(n // width // 8, 1)] = 1.0  # a few rows of an embedding, the same in every column
    rows[1] = rows[0]
    rows[1, 1 :: max(n // width // 8, 1)] = 0.5
    pad = n - n // width * width
    one_hot = torch.nn.functional.pad(rows.flatten(1), (0, pad))
    t, block = torch.arange(n), min(n // 16, 4096)
    tail = (normal[2].abs() + 1e-3).pow(-1.5).clamp(max=1e4) * normal[0].sign()
    return {
        "normal": (normal[0], normal[0] + normal[1]),
        "orthogonal": (normal[0], normal[1]),
        "one-hot rows": (one_hot[0], one_hot[1]),
        "period 64": ((t % 64 == 0).float(), (t % 64 == 32).float() + 0.1),
        "period k": ((t % k == 0).float(), (t % k == 0).float()),
        "shifted by k": (normal[0], normal[0].roll(k)),
        "blocks": ((t // block % 2).float(), (t // block % 3 == 0).float()),
        "heavy tails": (tail, tail + tail.roll(1)),
    }


def error_table(n: int, k: int, seeds: int, o: argparse.Namespace) -> dict[str, Any]:
    pairs = families(n, k)
    flat = torch.stack([v for pair in pairs.values() for v in pair])  # [2 F, n]
    exact = {name: float(x.double() @ y.double()) for name, (x, y) in pairs.items()}
    found: dict[str, dict[str, list[float]]] = {}
    backend = backends(o.device)[0]

    def keep(method: str, sketches: torch.Tensor) -> None:
        for i, name in enumerate(pairs):
            got = float(sketches[2 * i].double() @ sketches[2 * i + 1].double())
            found.setdefault(method, {}).setdefault(name, []).append(got - exact[name])

    began = time.perf_counter()
    for seed in range(seeds):
        out = torch.zeros(len(flat), k, dtype=torch.float64, device=o.device)
        for row, v in zip(out, flat.to(o.device), strict=True):
            fold(row, v, offset=0, seed=seed, backend=backend)
        keep("fold", out.cpu())
        keep("CountSketch", CountSketch(n, k, seed).rows(flat))
        if k <= o.dense_k[-1] and seed < max(seeds // 4, 8):
            keep("dense signs", dense_jl(flat, k, seed))
    rows = []
    for name, (x, y) in pairs.items():
        x, y = x.double(), y.double()
        size = float(x.norm() * y.norm())
        variance = size**2 + exact[name] ** 2 - 2 * float((x.square() * y.square()).sum())
        theory = math.sqrt(max(variance, 0.0) / k) / size
        for method, errors in found.items():
            rms = math.sqrt(statistics.fmean(e**2 for e in errors[name])) / size
            bias = statistics.fmean(errors[name]) / size
            rows.append(
                {"vectors": name, "method": method, "seeds": len(errors[name]), "rms": rms, "mean": bias, "theory": theory}
            )
    title = f"error of inner products, P={n} k=2^{k.bit_length() - 1}, {seeds} seeds, {time.perf_counter() - began:.0f} s"
    print(f"\n### {title}\n\n| vectors | method | rms error | sqrt(V0 / k) | ratio | mean error |\n|---|---|---|---|---|---|")
    for row in rows:
        ratio = show(row["rms"] / row["theory"] if row["theory"] > 1e-12 else None, ".2f")
        print(f"| {row['vectors']} | {row['method']} | {row['rms']:.2e} | {row['theory']:.2e} | {ratio} | {row['mean']:.1e} |")
    sys.stdout.flush()
    return {"title": title, "rows": rows}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--mode", choices=("time", "error"), default="time")
    options.add_argument("--params", type=int, default=1 << 26)
    options.add_argument("--log2-k", type=int, nargs="+", help="default: 12 14 16 18 20; errors 8 10 12 14")
    options.add_argument("--dense-params", type=int, default=1 << 20)
    options.add_argument("--dense-k", type=int, nargs="*", default=[256, 1024], help="none: leave the dense sketch out")
    options.add_argument("--error-params", type=int, default=1 << 18)
    options.add_argument("--seeds", type=int, default=200)
    o = parse(options)
    groups: list[dict[str, Any]] = []
    if o.mode == "error":
        o.dense_k = o.dense_k or [0]
        for log2 in o.log2_k or [8, 10, 12, 14]:
            groups.append(error_table(o.error_params, 1 << log2, o.seeds, o))
            write(o.out, groups, o)
        return
    for kind in o.dtypes or ["fp32", "bf16"]:
        for log2 in o.log2_k or [12, 14, 16, 18, 20]:
            groups.append(bench(o.params, 1 << log2, kind, o))
            write(o.out, groups, o)
    for k in o.dense_k:
        groups.append(bench_dense(o.dense_params, k, o))
        write(o.out, groups, o)
    write(o.out, [*groups, summary(groups)], o)


# Small shapes for pytest-benchmark.
NAMES = ["lldfast, cpp", "lldfast, torch", "CountSketch, index_add_", "CountSketch, numpy bincount", "read"]


@functools.cache
def small(kind: str) -> tuple[list[Method], Check]:
    o = argparse.Namespace(device="cpu", scalar=False)
    g = make(1 << 20, DTYPES[kind], "cpu")
    return methods(g, 1 << 14, o, True), check_of(g, 1 << 14)


@pytest.mark.parametrize("kind", list(DTYPES))
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.benchmark(max_time=0.3, min_rounds=5)
def test_sketch(benchmark: Any, name: str, kind: str) -> None:
    benchmark.group = f"sketch {kind}"
    made, check = small(kind)
    found = next((m.name for m in made if m.name.startswith(name)), name)
    pytest_run(benchmark, made, check, found)


def test_numbers_of_the_error_table() -> None:
    """A sketch that loses what it should not would be told by the table; here the table itself is run, on little."""
    o = argparse.Namespace(device="cpu", dense_k=[64])
    found = error_table(1 << 12, 64, 8, o)
    assert {row["method"] for row in found["rows"]} == {"fold", "CountSketch", "dense signs"}
    assert np.isfinite([row["rms"] for row in found["rows"]]).all()


if __name__ == "__main__":
    main()
