"""Our training loop against a minimal nanoGPT-style loop: same model, same batch, same number of steps.

    python bench/bench_loop.py --data DIR                       (DIR: a folder of `lldfast prepare`)

The peer is what a reader of nanoGPT would write in forty lines: batches by `torch.stack` over an np.memmap (nanoGPT's
get_batch), F.cross_entropy, AdamW, gradient clipping, cosine schedule, a print every 10 steps; no domains, no weights, no
per-domain losses, no log file, no checkpoint. Ours does all of that. Both run `--rounds` times in alternation in one process;
the ratio is tokens/s of ours over theirs, in wall and in processor time. nanoGPT uses fused AdamW on CUDA only; `--fused-peer`
gives the peer fused AdamW on the CPU too, which is the stricter comparison.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from lldfast.data.shards import TokenShards
from lldfast.loop import train_method
from lldfast.models.gpt import GPT
from lldfast.run.config import Config, LogConfig, TargetConfig
from lldfast.run.experiment import Experiment
from lldfast.run.methods import parse_method
from lldfast.run.parsing import parse_config


def minimal_loop(exp: Experiment, tokens: np.memmap, fused: bool) -> float:
    """Returns the last loss."""
    t = exp.config.train
    model: GPT = exp.new_model()
    decay = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decay, "weight_decay": t.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=t.learning_rate, betas=(t.beta1, t.beta2), eps=t.eps, fused=fused)
    size, value = model.config.block_size, 0.0
    torch.manual_seed(0)
    for step in range(t.steps):
        lr = t.min_lr + 0.5 * (1 + math.cos(math.pi * step / t.steps)) * (t.learning_rate - t.min_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for _ in range(t.batch_size // t.micro_batch_size):
            at = torch.randint(len(tokens) - size, (t.micro_batch_size,))
            x = torch.stack([torch.from_numpy(tokens[i : i + size].astype(np.int64)) for i in at])
            y = torch.stack([torch.from_numpy(tokens[i + 1 : i + 1 + size].astype(np.int64)) for i in at])
            logits = model(x) @ model.head_weight.T
            loss = F.cross_entropy(logits.view(-1, logits.shape[-1]), y.view(-1))
            (loss * t.micro_batch_size / t.batch_size).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), t.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        value = loss.item()
        if step % 100 == 0:
            print(f"minimal step {step}: {value:.3f}", flush=True)
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--preset", default="demo-330k")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--fused-peer", action="store_true")
    parser.add_argument("--results", help="JSON file to write")
    o = parser.parse_args()

    base: Config = parse_config(["--recipe=demo", "--methods=uniform"])
    with tempfile.TemporaryDirectory() as folder:
        config = dataclasses.replace(
            base,
            out=folder,
            data=dataclasses.replace(base.data, path=o.data),
            model=dataclasses.replace(base.model, preset=o.preset),
            target=TargetConfig(),
            train=dataclasses.replace(
                base.train, steps=o.steps, batch_size=o.batch_size, micro_batch_size=o.micro_batch_size, threads=o.threads
            ),
            log=LogConfig(progress=False, report=False),
        )
        exp = Experiment.open(config)
        shards = TokenShards(o.data)
        longest = max(shards.domains, key=lambda name: shards.n_tokens[name])
        tokens = shards.tokens(longest)

        def ours() -> None:
            shutil.rmtree(Path(folder) / "methods", ignore_errors=True)
            train_method(exp, parse_method("uniform"))

        def peer() -> None:
            minimal_loop(exp, tokens, o.fused_peer)

        for warm in (ours, peer):
            warm()
        wall, processor = [], []
        for i in range(o.rounds):
            took = {}
            for run in (ours, peer) if i % 2 == 0 else (peer, ours):
                a, b = time.perf_counter(), time.process_time()
                run()
                took[run.__name__] = (time.perf_counter() - a, time.process_time() - b)
            wall.append(took["peer"][0] / took["ours"][0])
            processor.append(took["peer"][1] / took["ours"][1])
    print(f"{o.preset}, {o.steps} steps of {o.batch_size} sequences, {o.threads} threads, fused peer: {o.fused_peer}")
    for name, ratios in (("wall", wall), ("processor", processor)):
        low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
        print(
            f"tokens/s, ours / minimal loop, {name} time: median {middle:.3f} (min {low:.3f}, max {high:.3f}, {o.rounds} rounds)"
        )
    if o.results:
        options = {key: value for key, value in vars(o).items() if key not in ("data", "results")}
        Path(o.results).write_text(json.dumps({"options": options, "wall": wall, "processor": processor}, indent=1) + "\n")


if __name__ == "__main__":
    main()
