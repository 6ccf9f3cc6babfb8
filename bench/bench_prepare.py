"""Encoding speed of `lldfast prepare` against bare tiktoken: same documents, same threads, turn about.

    python bench/bench_prepare.py [INPUT ...] [--threads 2] [--rounds 5]

"encode" is the second reading of `prepare` as it runs: decompress, parse, drop held-out documents, encode, write part
files. "prepare" is everything, from the inputs to the published folder. Bare tiktoken gets a list of texts that is in
memory already, so its figure holds no input or output at all. Before anything is timed, the tokens are compared.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lldfast.data.making.encode import Part, encode
from lldfast.data.making.evalplan import EvalPlan, digest_of, make_plan
from lldfast.data.making.prepare import prepare
from lldfast.data.making.sources import Source
from lldfast.data.tokenizer import TiktokenTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="*", default=["builtin"], help="as `lldfast prepare` takes them (default: builtin)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    tokenizer = TiktokenTokenizer("gpt2")
    plan = make_plan(Source(options.inputs), eval_texts=1000, eval_per_domain=None, estimate_share=0.5, seed=0)
    texts = [document.text for document in Source(options.inputs).documents()]

    def bare() -> list[list[int]]:
        return tokenizer.encoding.encode_ordinary_batch(texts, num_threads=options.threads)

    def encode_into(folder: Path) -> list[Path]:
        return encode(Source(options.inputs), plan, tokenizer, folder, seed=0, workers=options.threads)

    with tempfile.TemporaryDirectory() as name:
        check(texts, bare(), encode_into(Path(name)), plan)
    megabytes = plan.n_bytes / 1e6
    print(f"{cpu_name()}, {options.threads} threads; {len(texts)} documents, {megabytes:.1f} MB, {len(plan.domains)} domains")
    print(f"{'round':>5}  {'bare':>10}  {'encode':>10}  {'ratio':>6}  {'prepare':>10}  {'ratio':>6}   (MB/s)")
    ratios: list[tuple[float, float]] = []
    for i in range(options.rounds):
        with tempfile.TemporaryDirectory() as name:
            parts, whole = Path(name) / "parts", Path(name) / "whole"
            parts.mkdir()
            seconds = [
                timed(bare),
                timed(lambda parts=parts: encode_into(parts)),
                timed(lambda whole=whole: prepare(options.inputs, whole, workers=options.threads, progress=False)),
            ]
        ratios.append((seconds[0] / seconds[1], seconds[0] / seconds[2]))
        a, b, c = (megabytes / s for s in seconds)
        print(f"{i:>5}  {a:>10.1f}  {b:>10.1f}  {ratios[-1][0]:>6.2f}  {c:>10.1f}  {ratios[-1][1]:>6.2f}")
    medians = [statistics.median(ratio[k] for ratio in ratios) for k in (0, 1)]
    print(f"median ratio to bare tiktoken: encode {medians[0]:.2f}, prepare {medians[1]:.2f}")


def check(texts: list[str], expected: list[list[int]], parts: list[Path], plan: EvalPlan) -> None:
    """Every whole training document must have the tokens that bare tiktoken gives, and then end-of-text."""
    found = set()
    for path in parts:
        part = Part.load(path)
        ends = np.cumsum(part.lengths)
        found.update(part.tokens[start:end].tobytes() for start, end in zip(ends - part.lengths, ends))
    whole = [i for i, text in enumerate(texts) if i not in plan.units and digest_of(text.encode()) not in plan.held]
    for i in whole:
        if np.array([*expected[i], 50256], np.uint16).tobytes() not in found:
            raise SystemExit(f"document {i} has other tokens than bare tiktoken gives it")
    print(f"{len(whole)} documents have the tokens that bare tiktoken gives")


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.machine())


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
