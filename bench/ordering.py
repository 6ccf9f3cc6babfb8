"""Is the ordering of the methods real? The demo's setting over several seeds, from a random and from a pretrained base.

    python bench/ordering.py                                   3 seeds, 900 steps, both bases, every method
    python bench/ordering.py --seeds 0 1 --methods uniform,mirror --bases random

A seed changes the base's initialisation and the order of its data; data, evaluation texts and target stay. The pretrained
base of a seed is trained for as many steps on the domains' natural proportions first. Every run is a normal run folder under
--out (with a report), so a call that was interrupted goes on, and a method added later is the only one that runs.
Prints mean +- standard deviation over seeds, says which of the expected orderings hold by more than that spread, and writes
bench/results/ordering.json and .md.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import io
import json
import multiprocessing
import platform
import statistics
from datetime import date
from pathlib import Path
from typing import Any

METHODS = "uniform,proportional,iterative,aggregated,adjusted,spread,adjusted-spread,mirror,mirror-fixed,two-stage,ground-truth"
# (nearer, farther): what the paper and our own rules promise
EXPECTED = [
    ("iterative", "uniform"),
    ("aggregated", "uniform"),
    ("mirror", "iterative"),
    ("mirror", "aggregated"),
    ("mirror-fixed", "iterative"),
    ("mirror-fixed", "aggregated"),
]
MEASURES = [("kl", "eq. (2)"), ("true_kl", "true KL")]


def run_seed(base: str, seed: int, options: dict[str, Any]) -> dict[str, Any]:
    """One seed with one base, on one thread; returns its summary."""
    from lldfast.files import read_json
    from lldfast.run.config import LogConfig
    from lldfast.run.parsing import parse_config
    from lldfast.train import run

    out = Path(options["out"]) / f"{base}-seed{seed}"
    config = parse_config([f"--methods={options['methods']}", f"--out={out}", f"--seed={seed}", *options["extra"]])
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, path=options["data"]),
        train=dataclasses.replace(config.train, steps=options["steps"], threads=1),
        measure=dataclasses.replace(config.measure, times=options["times"]),
        log=LogConfig(progress=False, report=options["report"]),
    )
    # the runs' own lines would interleave: the report and the logs keep everything
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        if base == "pretrained":
            first = out.with_name(f"base-seed{seed}")
            run(
                dataclasses.replace(
                    config,
                    out=str(first),
                    seed=seed + 500,
                    methods=["proportional"],
                    target=type(config.target)(),
                    log=LogConfig(progress=False, report=False),
                )
            )
            init = str(first / "methods" / "proportional" / "final")
            config = dataclasses.replace(config, model=dataclasses.replace(config.model, init=init))
        run(config)
    return dict(read_json(out / "summary.json"))


def collect(results: list[tuple[str, int, dict[str, Any]]], base: str) -> dict[str, dict[str, list[float]]]:
    """{method: {measure: values over seeds}} of one base."""
    found: dict[str, dict[str, list[float]]] = {}
    for kind, _, summary in sorted(results, key=lambda r: (r[0], r[1])):
        if kind != base:
            continue
        for row in ([summary["base_row"]] if summary["base_row"] else []) + summary["rows"]:
            values = found.setdefault(row["method"], {})
            for key in (
                "kl",
                "kl_between",
                "true_kl",
                "nll_gap",
                "weight_kl",
                "effective_domains",
                "final_loss",
                "max_grad_norm",
            ):
                if row.get(key) is not None:
                    values.setdefault(key, []).append(row[key])
    return found


def hardware() -> str:
    """The processor's name where Linux tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def spread(values: list[float] | None, digits: int) -> str:
    if not values:
        return "-"
    sd = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.{digits}f} +- {sd:.{digits}f}"


def markdown(found: dict[str, dict[str, list[float]]]) -> str:
    lines = [
        "| method | eq. (2) | between | true KL | NLL gap | KL(w, truth) | eff. domains | final loss | max grad norm | seeds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for method, v in found.items():
        cells = [spread(v.get("kl"), 1), spread(v.get("kl_between"), 1), spread(v.get("true_kl"), 3), spread(v.get("nll_gap"), 3)]
        cells += [spread(v.get("weight_kl"), 2), spread(v.get("effective_domains"), 1), spread(v.get("final_loss"), 2)]
        cells += [f"{max(v['max_grad_norm']):.1f}" if v.get("max_grad_norm") else "-", str(len(v.get("kl", [])))]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def verdicts(found: dict[str, dict[str, list[float]]]) -> list[str]:
    """Each expected ordering, by both measures: the gap of the means against the seeds' pooled standard deviation, and in how
    many seeds (paired: same initialisation, same data order) it held."""
    lines = []
    for near, far in EXPECTED:
        for key, label in MEASURES:
            a, b = found.get(near, {}).get(key), found.get(far, {}).get(key)
            if not a or not b or len(a) != len(b):
                continue
            gap = statistics.mean(b) - statistics.mean(a)
            sd = ((statistics.variance(a) + statistics.variance(b)) / 2) ** 0.5 if len(a) > 1 else float("nan")
            wins = sum(x < y for x, y in zip(a, b, strict=True))
            word = "holds" if gap > sd and wins == len(a) else "within the seed spread" if abs(gap) <= sd else "does NOT hold"
            lines.append(
                f"- {near} nearer than {far} by {label}: {word} (gap {gap:.3g}, pooled sd {sd:.2g}, {wins}/{len(a)} seeds)"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--bases", nargs="+", choices=["random", "pretrained"], default=["random", "pretrained"])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--times", type=int, default=2, help="measurements along a run")
    parser.add_argument("--data", help="prepared folder; made under --out when left out")
    parser.add_argument("--out", default="runs/ordering")
    parser.add_argument("--results", default="bench/results/ordering", help="where .json and .md go")
    parser.add_argument("--reports", action="store_true", help="write a report for every run folder")
    parser.add_argument("extra", nargs="*", help="further options of lldfast train, after --")
    o = parser.parse_args()

    from lldfast.run.experiment import open_data
    from lldfast.run.parsing import parse_config

    data = o.data
    if data is None:
        shards, _, _ = open_data(parse_config([f"--out={o.out}", *o.extra]))
        data = str(shards.path)
    options = {
        "out": o.out,
        "methods": o.methods,
        "steps": o.steps,
        "times": o.times,
        "data": data,
        "extra": o.extra,
        "report": o.reports,
    }
    results = []
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(o.jobs, mp_context=context) as pool:
        jobs = {pool.submit(run_seed, base, seed, options): (base, seed) for base in o.bases for seed in o.seeds}
        for job in concurrent.futures.as_completed(jobs):
            base, seed = jobs[job]
            results.append((base, seed, job.result()))
            print(f"{base}, seed {seed}: done", flush=True)

    parts = [f"{o.steps} steps, seeds {o.seeds}, {hardware()}, {date.today()}; mean +- sd over seeds, bits/byte"]
    record: dict[str, Any] = {"steps": o.steps, "seeds": o.seeds, "date": str(date.today()), "bases": {}}
    for base in o.bases:
        found = collect(results, base)
        record["bases"][base] = found
        parts += [f"\n### {base} base\n", markdown(found), "", *verdicts(found)]
    text = "\n".join(parts) + "\n"
    path = Path(o.results)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
