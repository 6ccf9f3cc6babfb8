"""Sketches of the gradients of single texts, gram.per_text, against what torch offers for them: time, memory, error.

    python bench/bench_per_text.py --model demo-4m 10m --tokens 32 128 --texts 16 64 --out per_text.json
    python bench/bench_per_text.py --device cuda --model nano-124m --tokens 256 --texts 16 64
    python -m pytest bench/bench_per_text.py --benchmark-only            (a small model, about a minute)

Every method ends with the same sketches [texts, k], and is checked against autograd text by text before anything is timed. Peers
make gradients of some texts at once as rows of P numbers (torch.func vmap(grad), or plain autograd for one text) and fold every
row with our fold. vmap has no rule for the fused attention of a CPU, so it is measured with that one's loop over texts and with
the plain attention. The rate counts 6 P operations a token. Ours includes its own check of one text against autograd. common.py
says what is timed.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parent))  # pytest's importlib mode does not
from common import Check, Method, distance, parse, parser, pytest_run, run, write

from lldfast.data.evalset import EvalSet
from lldfast.data.tokenizer import load_tokenizer
from lldfast.gram.texts import per_text
from lldfast.models.batches import evaluating
from lldfast.models.gpt import GPT, PRESETS, GPTConfig
from lldfast.models.language_model import LanguageModel
from lldfast.ops.sketch.fold import fold

SEED = 1234
LIMIT = 1e-5  # relative, of all sketches
MODELS = {**PRESETS, "10m": GPTConfig(1024, 1024, 256, 8, 10, 320)}


def make(model: str, tokens: int, texts: int, device: str) -> tuple[LanguageModel, EvalSet]:
    """Random letters, one token each."""
    letters = np.random.default_rng(0).integers(97, 123, (texts, tokens), dtype=np.uint8)
    lm = LanguageModel.from_gpt(GPT(MODELS[model], seed=0), load_tokenizer("bytes")).to(device)
    return lm, EvalSet.from_texts([row.tobytes().decode() for row in letters], ["letters"] * texts)


class Peer:
    """Rows of gradients of `together` texts at once, each folded."""

    def __init__(self, lm: LanguageModel, evalset: EvalSet, k: int, together: int, plain: bool) -> None:
        self.lm, self.k, self.together, self.plain = lm, k, together, plain
        self.ids = torch.tensor(np.stack([s.ids for s in lm.tokenize(evalset)]), device=lm.device)
        self.parameters = {name: p.detach() for name, p in lm.module.named_parameters()}
        self.vocab = lm.vocab_size

    def total(self, parameters: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
        hidden = functional_call(self.lm.module, parameters, (ids[None, :-1],))[0]
        return -F.cross_entropy(hidden @ parameters["wte.weight"][: self.vocab].T, ids[1:], reduction="sum")

    def rows(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.together > 1:
            return vmap(grad(self.total), in_dims=(None, 0))(self.parameters, ids)
        leaves = {name: p.requires_grad_() for name, p in self.parameters.items()}
        found = torch.autograd.grad(self.total(leaves, ids[0]), list(leaves.values()))
        return {name: g[None] for name, g in zip(leaves, found, strict=True)}

    def __call__(self) -> torch.Tensor:
        out = torch.zeros(len(self.ids), self.k, dtype=torch.float64, device=self.ids.device)
        attention = sdpa_kernel(SDPBackend.MATH) if self.plain else contextlib.nullcontext()
        with evaluating(self.lm), warnings.catch_warnings(), attention:
            warnings.simplefilter("ignore")  # that the fused attention is a loop
            for first in range(0, len(self.ids), self.together):
                gradients = self.rows(self.ids[first : first + self.together])
                offset = 0
                for g in gradients.values():
                    for i, row in enumerate(g):
                        fold(out[first + i], row, offset=offset, seed=SEED)
                    offset += g[0].numel()
        return out


def ours(lm: LanguageModel, evalset: EvalSet, k: int, backend: str, batch_tokens: int) -> torch.Tensor:
    found = per_text(lm, evalset, k=k, seed=SEED, backend=backend, batch_tokens=batch_tokens)
    return torch.from_numpy(found.sketches)


def methods(lm: LanguageModel, evalset: EvalSet, o: argparse.Namespace) -> list[Method]:
    k, n = 1 << o.log2_k, len(evalset)
    made = [Method("lldfast.gram.per_text", functools.partial(ours, lm, evalset, k, "auto", o.batch_tokens), LIMIT)]
    if o.torch:
        made.append(Method("lldfast, torch folds", functools.partial(ours, lm, evalset, k, "torch", o.batch_tokens), LIMIT))
    made.append(Method("autograd, 1 text at once", Peer(lm, evalset, k, 1, False)))
    for together in sorted({min(size, n) for size in (*o.together, n)} - {1}):
        made.append(Method(f"vmap(grad), {together} at once", Peer(lm, evalset, k, together, False)))
        made.append(Method(f"vmap(grad), {together} at once, plain attention", Peer(lm, evalset, k, together, True)))
    return made


def check_of(lm: LanguageModel, evalset: EvalSet, k: int) -> Check:
    wanted = Peer(lm, evalset, k, 1, True)().cpu()

    def check(_: Method, result: torch.Tensor) -> tuple[float, float]:
        off = distance(result.cpu(), wanted)
        return off, off

    return check


def bench(model: str, tokens: int, texts: int, o: argparse.Namespace) -> dict[str, Any]:
    lm, evalset = make(model, tokens, texts, o.device)
    size = sum(p.numel() for p in lm.module.parameters())
    title = f"{model} ({size / 1e6:.1f}M parameters), {texts} texts of {tokens} tokens, k=2^{o.log2_k}, {o.device}"
    title += "" if o.device.startswith("cuda") else f", {o.threads} threads"
    check = check_of(lm, evalset, 1 << o.log2_k)
    return run(title, methods(lm, evalset, o), check, o, 6.0 * size * tokens * texts, "TFLOP/s")


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--model", nargs="+", choices=list(MODELS), default=["demo-4m"])
    options.add_argument("--tokens", type=int, nargs="+", default=[32, 128], help="of a text")
    options.add_argument("--texts", type=int, nargs="+", default=[16, 64])
    options.add_argument("--together", type=int, nargs="+", default=[4], help="texts that peers take at once, beside all of them")
    options.add_argument("--log2-k", type=int, default=14)
    options.add_argument("--batch-tokens", type=int, default=4096, help="ours, at most")
    options.add_argument("--torch", action="store_true", help="also our folds in plain torch")
    o = parse(options)
    groups: list[dict[str, Any]] = []
    for model in o.model:
        for tokens in o.tokens:
            for texts in o.texts:
                groups.append(bench(model, tokens, texts, o))
                write(o.out, groups, o)


# A small model for pytest-benchmark.
@functools.cache
def small() -> tuple[list[Method], Callable[..., Any]]:
    o = argparse.Namespace(device="cpu", log2_k=12, together=[4], batch_tokens=4096, torch=True)
    lm, evalset = make("demo-330k", 48, 16, "cpu")
    return methods(lm, evalset, o), check_of(lm, evalset, 1 << 12)


@pytest.mark.parametrize(
    "name", ["lldfast.gram.per_text", "lldfast, torch folds", "autograd, 1 text at once", "vmap(grad), 4 at once"]
)
@pytest.mark.benchmark(group="gradients of single texts", max_time=0.5, min_rounds=5)
def test_per_text(benchmark: Any, name: str) -> None:
    pytest_run(benchmark, *small(), name)


if __name__ == "__main__":
    main()
