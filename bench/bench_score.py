"""score() against a plain transformers loop: tokens per second and peak memory, and the largest difference per text.

    python bench/bench_score.py --model gpt2-124m --model path/to/model.gguf --data eval.parquet --texts 48 --threads 2

`gpt2-124m` is GPT-2's shape with random weights; other models are what `lldfast.load_model` takes. The plain loop
is what one writes without this library: texts sorted by length, padded batches with an attention mask, the model's full
logits, log_softmax, gather. It runs at each of --batch-sizes, and its best one counts. Methods are interleaved, medians are over
rounds; the gap is to one text at a time with the log_softmax in fp64. Peak memory is the growth of the resident set during a
call (Linux). On a machine that others use too, compare the processor seconds of runs with one thread.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from lldfast.data.evalset import EvalSet
from lldfast.data.tokenizer import load_tokenizer
from lldfast.measure.score import score
from lldfast.models.gpt import GPT
from lldfast.models.language_model import LanguageModel
from lldfast.models.loading import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", help="gpt2-124m, or a model folder, hub id or .gguf; repeatable")
    parser.add_argument("--data", help="eval.parquet; default: random words")
    parser.add_argument("--texts", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 16], help="of the plain loop")
    parser.add_argument("--batch-tokens", type=int, nargs="+", default=[2048, 16_384], help="of score()")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", help="write the results as JSON too")
    o = parser.parse_args()
    torch.set_num_threads(o.threads)
    texts = load_texts(o.data, o.texts)
    results = [bench(name, texts, o) for name in o.model or ["gpt2-124m"]]
    if o.out:
        Path(o.out).write_text(json.dumps(results, indent=2) + "\n")


def load_texts(path: str | None, n: int) -> EvalSet:
    if path is None:
        rng = np.random.default_rng(0)
        words = ["".join(rng.choice(list("etaoinshrdlu"), size=k)) for k in rng.integers(1, 9, 2000)]
        texts = [" ".join(rng.choice(words, size=180))[: int(rng.integers(256, 1024))] for _ in range(n)]
        return EvalSet.from_texts(texts, ["x"] * n)
    whole = EvalSet.load(path)
    rows = np.random.default_rng(0).permutation(len(whole))[:n]
    return EvalSet.from_texts([whole.texts[i] for i in rows], whole.domain[rows])


def load_pair(name: str, device: str, dtype: str) -> tuple[LanguageModel, torch.nn.Module]:
    """Our model and the transformers model with the same weights."""
    if name != "gpt2-124m":
        lm = load_model(name, device=device, dtype=dtype)
        return lm, lm.module.to_hf() if isinstance(lm.module, GPT) else lm.module
    gpt = GPT("nano-124m", seed=0)
    ours, theirs = (model.to(device=device, dtype=getattr(torch, dtype)).eval() for model in (gpt, gpt.to_hf()))
    return LanguageModel.from_gpt(ours, load_tokenizer("gpt2"), name="GPT-2 124M"), theirs


def plain_loop(
    model: torch.nn.Module, ids: list[list[int]], batch_size: int, device: str, dtype: torch.dtype = torch.float32
) -> np.ndarray:
    out = np.zeros(len(ids))
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    with torch.inference_mode():
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            width = max(len(ids[i]) for i in rows)
            x = torch.zeros(len(rows), width, dtype=torch.long)
            mask = torch.zeros(len(rows), width, dtype=torch.long)
            for row, i in enumerate(rows):
                x[row, : len(ids[i])], mask[row, : len(ids[i])] = torch.tensor(ids[i]), 1
            x, mask = x.to(device), mask.to(device)
            logits = model(input_ids=x, attention_mask=mask).logits[:, :-1].to(dtype)
            logprob = torch.log_softmax(logits, -1).gather(-1, x[:, 1:, None])[..., 0]
            out[rows] = (logprob * mask[:, 1:]).double().sum(1).cpu().numpy()
    return out


def measure(call: Callable[[], np.ndarray], device: str) -> tuple[float, float, float, np.ndarray]:
    """Seconds, processor seconds, MiB of peak growth, result."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what earlier calls freed but malloc kept would hide this call's growth
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
        before = resident("VmRSS")
    began, cpu = time.perf_counter(), time.process_time()
    result = call()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    peak = torch.cuda.max_memory_allocated() if device.startswith("cuda") else resident("VmHWM")
    return seconds, cpu, (peak - before) / 2**20, result


def resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def bench(name: str, texts: EvalSet, o: argparse.Namespace) -> dict[str, object]:
    lm, model = load_pair(name, o.device, o.dtype)
    ids = [([] if lm.bos_id is None else [lm.bos_id]) + lm.tokenizer.encode(text) for text in texts.texts]
    if max(map(len, ids)) > lm.context_length:
        raise SystemExit(f"{name}: a text is longer than the context of {lm.context_length}; the plain loop has no windows")
    lengths = np.array([len(i) - 1 for i in ids])
    tokens = int(lengths.sum())
    lm.tokenize(texts)  # tokenising is timed on neither side
    calls: dict[str, Callable[[], np.ndarray]] = {}
    for size in o.batch_sizes:
        calls[f"transformers loop, batch {size}"] = lambda size=size: plain_loop(model, ids, size, o.device)
    for budget in o.batch_tokens:
        calls[f"score(), batch_tokens {budget}"] = lambda budget=budget: score(lm, texts, batch_tokens=budget).logprob
    seconds: dict[str, list[float]] = {key: [] for key in calls}
    processor: dict[str, list[float]] = {key: [] for key in calls}
    peak: dict[str, float] = dict.fromkeys(calls, 0.0)
    values: dict[str, np.ndarray] = {}
    exact = plain_loop(model, ids, 1, o.device, torch.float64)
    for _ in range(o.rounds):
        for key, call in calls.items():
            spent, cpu, grown, values[key] = measure(call, o.device)
            seconds[key].append(spent)
            processor[key].append(cpu)
            peak[key] = max(peak[key], grown)
    median = {key: statistics.median(times) for key, times in seconds.items()}
    best = {kind: min((k for k in calls if k.startswith(kind)), key=median.__getitem__) for kind in ("transformers", "score")}
    device = torch.cuda.get_device_name() if o.device.startswith("cuda") else platform.processor() or platform.machine()
    print(f"\n{lm.name}: {len(texts)} texts, {tokens} tokens, {o.dtype}, {device}, {o.threads} threads, {o.rounds} rounds")
    for key in calls:
        gap = np.abs(values[key] - exact)
        cpu = statistics.median(processor[key])
        speed = f"{tokens / median[key]:9.0f} tokens/s  {cpu:8.2f} processor s"
        print(
            f"  {key:34} {speed}  {peak[key]:7.0f} MiB  gap {gap.max():.1e} nats per text, {(gap / lengths).max():.1e} per token"
        )
    ratio = median[best["transformers"]] / median[best["score"]]
    memory = f"{peak[best['score']]:.0f} MiB against {peak[best['transformers']]:.0f} MiB"
    print(f"  score() is {ratio:.2f} times as fast as the best transformers loop, with {memory}")
    facts = {"model": lm.identity, "tokens": tokens, "threads": o.threads, "device": device, "ratio": ratio}
    return {**facts, "seconds": seconds, "processor_seconds": processor, "peak_mib": peak}


if __name__ == "__main__":
    main()
