"""What the log-likelihood benchmarks share: checks against fp64, interleaved timing, peak memory, tables. Not run by itself.

    from common import Method, run      (bench/bench_linear_logprob.py, bench/bench_logprob.py)

A method is checked before any is timed; one of ours that misses its tolerance, or raises, ends the run. Methods alternate within
every round, and a ratio is the median over rounds of the ratio within a round. The time that counts is processor time on a CPU
(all threads; other work on the machine hardly moves it) and the time between CUDA events on a GPU, whose L2 is flushed before
each call. Peak memory is that of one warm call, results included: growth of the resident set (Linux), or of CUDA allocations.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import gc
import json
import math
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import lldfast

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ENOUGH = 0.02  # seconds of a sample; shorter calls are repeated
FLUSH_BYTES = 256 * 2**20
SCORED_ROWS = 64  # compared with fp64


@dataclass
class Method:
    """Something to time. `tolerance` is None for peers: their error is shown, not judged. `absent`: why it is not there."""

    name: str
    call: Callable[[], Any] = lambda: None
    tolerance: float | None = None
    oracle: str = "given"  # which inputs the tolerance is relative to: "given", or "bf16" (these inputs rounded)
    floor: bool = False  # does only a part of the work, and so has no result
    held: int = 0  # bytes of a ready buffer, counted into the peak
    absent: str = ""
    small: float | None = None  # error of the same method on a small problem


# Error of a method's result: (against the inputs as given, against what its tolerance is about).
Check = Callable[[Method, Any], tuple[float, float]]


@dataclass
class Oracle:
    """fp64 values of some rows."""

    logprob: torch.Tensor
    lse: torch.Tensor
    entropy: torch.Tensor
    logits: torch.Tensor

    @classmethod
    def of(cls, logits: torch.Tensor, labels: torch.Tensor) -> Oracle:
        parts = []
        for z, y in zip(logits.split(16), labels.split(16), strict=True):
            logprob = torch.log_softmax(z, -1)
            lse, entropy = torch.logsumexp(z, -1), -(logprob.exp() * logprob).sum(-1)
            parts.append((logprob.gather(1, y[:, None])[:, 0], lse, entropy))
        return cls(*(torch.cat(part) for part in zip(*parts, strict=True)), logits)

    def error(self, got: torch.Tensor, want: torch.Tensor) -> float:
        return float(((got.double() - want).abs() / (1 + self.lse.abs())).max())


def scored_rows(tokens: int, device: str) -> torch.Tensor:
    return torch.linspace(0, tokens - 1, min(tokens, SCORED_ROWS), device=device).round().long()


def check_against(rows: torch.Tensor, oracles: dict[str, Oracle]) -> Check:
    """For methods that return log-likelihoods [T], or a LogprobResult; units of the error: 1 + |lse|."""

    def check(method: Method, result: Any) -> tuple[float, float]:
        logprob = (result if isinstance(result, torch.Tensor) else result.logprob)[rows]
        wanted = oracles[method.oracle]
        shown, judged = (o.error(logprob, o.logprob) for o in (oracles["given"], wanted))
        if method.tolerance is not None and not isinstance(result, torch.Tensor) and result.entropy is not None:
            off = wanted.error(result.entropy[rows], wanted.entropy)
            short = wanted.logits.max(1).values - wanted.logits.gather(1, result.argmax[rows][:, None])[:, 0]
            if not (off <= 10 * method.tolerance and float((short / (1 + wanted.lse.abs())).max()) <= method.tolerance):
                raise ValueError(f"entropy off by {off:.1e}, logit at argmax below the largest by {float(short.max()):.1e}")
        return shown, judged

    return check


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative, in the Frobenius norm."""
    total = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(got.split(4096), want.split(4096), strict=True))
    return math.sqrt(total) / max(float(torch.linalg.vector_norm(want, dtype=torch.float64)), 1e-300)


def seconds_once(call: Callable[[], Any], device: str) -> float:
    synchronize(device)
    began = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - began


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def sample(call: Callable[[], Any], repeats: int, device: str, flush: torch.Tensor | None) -> tuple[float, float]:
    """Seconds of a call that count (see above), and of the wall clock."""
    if flush is None:
        wall, processor = time.perf_counter(), time.process_time()
        for _ in range(repeats):
            call()
        return (time.process_time() - processor) / repeats, (time.perf_counter() - wall) / repeats
    flush.zero_()
    wall = seconds_once(call, device)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        flush.zero_()  # also keeps the GPU busy until the call's kernels are queued
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.fmean(start.elapsed_time(end) for start, end in events) / 1e3, wall


def resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def peak_bytes(call: Callable[[], Any], device: str) -> int | None:
    """None where the system does not tell."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what earlier calls freed but malloc kept would hide this call's growth
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from what is resident now
        before = resident("VmRSS")
        call()
        return max(resident("VmHWM") - before, 0)
    except OSError:
        return None


def judge(method: Method, check: Check) -> float | None:
    """Call a method and give its error; SystemExit where one of ours fails, any other exception from a peer is the caller's."""
    try:
        result = method.call()
        if method.floor:
            return None
        shown, judged = check(method, result)
    except Exception as error:
        if method.tolerance is not None:
            raise SystemExit(f"{method.name}: {type(error).__name__}: {error}") from error
        raise
    if method.tolerance is not None and not judged <= method.tolerance:
        raise SystemExit(f"{method.name}: error {judged:.2e} is over its tolerance of {method.tolerance:.0e}; nothing was timed")
    return shown


def run(title: str, methods: Sequence[Method], check: Check, o: argparse.Namespace, work: float, unit: str) -> dict[str, Any]:
    """Check, then time, one group of methods; the first of ours is what ratios are to. `work` is in operations or bytes."""
    cuda = o.device.startswith("cuda")
    rows: dict[str, dict[str, Any]] = {}
    ready: list[Method] = []
    for method in methods:
        if o.only and not re.search(o.only, method.name):
            continue
        print(f"check {method.name}", file=sys.stderr, flush=True)
        row = rows[method.name] = {"method": method.name, "note": method.absent}
        if method.absent:
            continue
        try:
            row["error"], row["error_small"] = judge(method, check), method.small
            once = seconds_once(method.call, o.device)
            peak = peak_bytes(method.call, o.device)
        except Exception as error:  # noqa: BLE001 - a peer that does not run here gets a line that says so
            row["note"] = "failed: " + " ".join(f"{type(error).__name__}: {error}".split())[:120]
            continue
        row["peak_mib"] = None if peak is None else (peak + method.held) / 2**20
        row["repeats"] = min(max(math.ceil(ENOUGH / max(once, 1e-7)), 1), 200)
        ready.append(method)
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=o.device) if cuda else None
    counted: dict[str, list[float]] = {m.name: [] for m in ready}
    wall: dict[str, list[float]] = {m.name: [] for m in ready}
    for i in range(o.rounds):
        print(f"round {i + 1} of {o.rounds}", file=sys.stderr, flush=True)
        for method in ready if i % 2 == 0 else reversed(ready):
            a, b = sample(method.call, rows[method.name]["repeats"], o.device, flush)
            counted[method.name].append(a)
            wall[method.name].append(b)
    base = next((counted[m.name] for m in ready if m.tolerance is not None), None)
    floor = next((counted[m.name] for m in ready if m.floor), None)
    for method in ready:
        times, row = counted[method.name], rows[method.name]
        row["device_ms" if cuda else "processor_ms"] = {"median": statistics.median(times) * 1e3, "min": min(times) * 1e3}
        row["wall_ms"] = {"median": statistics.median(wall[method.name]) * 1e3, "min": min(wall[method.name]) * 1e3}
        row["ratio"] = None if base is None else statistics.median(t / b for t, b in zip(times, base, strict=True))
        row["of_floor"] = None if floor is None else statistics.median(f / t for f, t in zip(floor, times, strict=True))
        row["rate"] = work / statistics.median(times)
        if getattr(o, "peak_tflops", None) and unit == "TFLOP/s":
            row["of_peak"] = row["rate"] / 1e12 / o.peak_tflops
    group = {"title": title, "unit": unit, "work": work, "rows": list(rows.values())}
    print(table(group, cuda), flush=True)
    return group


def table(group: dict[str, Any], cuda: bool) -> str:
    """Markdown. A rate on a CPU is per second of processor time, so per thread."""
    scale = 1e12 if group["unit"] == "TFLOP/s" else 1e9
    kind = "device" if cuda else "processor"
    peak = any(row.get("of_peak") for row in group["rows"])
    head = [f"{kind} ms (min)", "wall ms (min)", "time / ours", group["unit"] + ("" if cuda else " per thread"), "floor / time"]
    head += (["of peak"] if peak else []) + ["peak MiB", "error"]
    lines = [f"\n### {group['title']}\n", f"| method | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    for row in group["rows"]:
        if row["note"]:
            lines.append(f"| {row['method']} | {row['note'].replace('|', '/')} |" + " |" * (len(head) - 1))
            continue
        cells = [f"{row[k]['median']:.4g} ({row[k]['min']:.4g})" for k in (f"{kind}_ms", "wall_ms")]
        cells += [show(row["ratio"], ".2f"), f"{row['rate'] / scale:.3g}", show(row["of_floor"], ".2f")]
        cells += [show(row["of_peak"], ".2f")] if peak else []
        small = "" if row["error_small"] is None else f" (small {row['error_small']:.1e})"
        cells += [show(row["peak_mib"], ".0f"), show(row["error"], ".1e") + small]
        lines.append(f"| {row['method']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def show(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def hardware(device: str) -> dict[str, Any]:
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    found = {name: {k: v for k, v in info.items() if k not in ("devices", "reason")} for name, info in lldfast.backends().items()}
    return {
        "cpu": model[1] if model else platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "isa": found["cpp"]["isa"],
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if device.startswith("cuda") else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "lldfast": lldfast.__version__,
        "backends": found,
        "date": datetime.date.today().isoformat(),
    }


def write(out: str | None, groups: list[dict[str, Any]], o: argparse.Namespace) -> None:
    """After every group, so that a run that is cut off leaves what it has."""
    if out:
        places = ("out", "work", "plot", "data")  # of one machine: a file's name says enough
        options = {key: Path(str(value)).name if key in places and value else value for key, value in vars(o).items()}
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        found = {"hardware": hardware(o.device), "options": options, "groups": groups}
        Path(out).write_text(json.dumps(found, indent=1, default=str) + "\n")


def parser(doc: str) -> argparse.ArgumentParser:
    """The options that both benchmarks have."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--dtypes", nargs="+", choices=list(DTYPES))
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--rounds", type=int, default=5, help="5 or more")
    made.add_argument("--device", default="cpu")
    made.add_argument("--only", help="regular expression: methods to run")
    made.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    made.add_argument("--scalar", action="store_true", help="also the plain C++ path, which is very slow")
    made.add_argument("--out", help="JSON file to write")
    return made


def parse(made: argparse.ArgumentParser) -> argparse.Namespace:
    o = made.parse_args()
    if o.rounds < 5:
        made.error("--rounds: fewer than 5 say nothing")
    torch.set_num_threads(o.threads)
    torch.manual_seed(0)
    return o


def isas(o: argparse.Namespace) -> list[str]:
    """Instruction sets to force in turn: best first, without the one in use, which is measured as the default."""
    cpp = lldfast.backends()["cpp"]
    if o.device != "cpu":
        return []
    return [isa for isa in reversed(cpp["isas"]) if isa != cpp["isa"] and (isa != "scalar" or o.scalar)]


def compiled(function: Callable[..., Any], *inputs: torch.Tensor) -> Callable[[], Any]:
    """torch.compile for these shapes alone; compiled at the first call, which is not timed."""
    made = torch.compile(function, dynamic=False)
    return lambda: made(*inputs)


def pytest_run(benchmark: Any, methods: Sequence[Method], check: Check, name: str) -> None:
    """One method under pytest-benchmark, checked first; on one thread, since a busy second core would be measured too."""
    import pytest

    method = next((m for m in methods if m.name == name), None)
    if method is None or method.absent:
        pytest.skip(method.absent if method else "not in this build")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        judge(method, check)
        benchmark(method.call)
    except SystemExit as error:
        pytest.fail(str(error))
    finally:
        torch.set_num_threads(before)
