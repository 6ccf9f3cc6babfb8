"""The command line: `lldfast <command>` or `python -m lldfast <command>`. Errors a user can act on print without a traceback."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from lldfast import __version__
from lldfast.errors import InputError, LLDError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status (0 done, 1 a user error, 130 interrupted)."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        if args[:1] == ["train"]:  # its options come from the configuration's dataclasses
            from lldfast.train import main as train

            train(args[1:])
            return 0
        options = build_parser().parse_args(args)
        return int(options.execute(options) or 0)
    except BrokenPipeError:  # `lldfast ... | head`: nobody reads on, and the flush at exit must not complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (LLDError, OSError) as error:  # an OSError is the machine's (no permission, name too long) and names its file
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)  # libraries' messages have several lines
        return 1
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lldfast", description="Domain-mixture design by log-likelihood differences.")
    parser.add_argument("--version", action="version", version=f"lldfast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("train", help="Algorithm 1, pass 2 and the baselines; the demo by default (lldfast train --help)")

    p = commands.add_parser("prepare", help="texts with a domain label -> token shards + evaluation corpus")
    p.add_argument("inputs", nargs="*", help="JSONL (.gz, .zst), Parquet, a folder per domain, or a Hugging Face dataset id")
    p.add_argument("--source", choices=["builtin"], help="real text that is already on this machine, instead of inputs")
    p.add_argument("--out", required=True)
    p.add_argument("--domain-field", help="label field, dots for nesting (meta.pile_set_name); leave out for a folder per domain")
    p.add_argument("--text-field", default="text")
    p.add_argument("--tokenizer", default="gpt2", help="gpt2, bytes, bpe, a tokenizer.json, a model folder or a hub id")
    p.add_argument("--vocab-size", type=int, help="vocabulary of --tokenizer bpe")
    p.add_argument("--domains", nargs="+", help="keep only these")
    p.add_argument("--eval-texts", type=int, help="evaluation texts in all, in proportion to the domains' bytes")
    p.add_argument("--eval-per-domain", type=int, help="evaluation texts of each domain")
    p.add_argument("--estimate-share", type=float, default=0.5, help="share of them that weights are estimated on")
    p.add_argument("--split", help="split of a Hugging Face dataset")
    p.add_argument("--dataset-config", help="configuration of a Hugging Face dataset")
    p.add_argument("--max-documents", type=int)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--workers", type=int)
    p.add_argument("--overwrite", action="store_true")
    p.add_argument("--quiet", action="store_true")
    p.set_defaults(execute=run_prepare)

    p = commands.add_parser("verify", help="check a prepared folder: sizes, checksums, ids, evaluation texts kept apart")
    p.add_argument("path")
    p.set_defaults(execute=run_verify)

    p = commands.add_parser("score", help="log-likelihood vector of a model on an evaluation corpus -> Parquet")
    p.add_argument("model", help="lldfast checkpoint folder, Hugging Face folder or id, .gguf, asset:..., package:...")
    p.add_argument("--data", required=True, help="a prepared folder, or an eval.parquet")
    p.add_argument("--out", required=True, help="Parquet file to write")
    p.add_argument("--batch-tokens", type=int, default=16_384)
    p.add_argument("--bos", choices=["auto", "native", "none"], default="auto")
    p.add_argument("--device", default="cpu")
    p.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    p.set_defaults(execute=run_score)

    p = commands.add_parser("teach", help="a teacher's top-k next-token log-probabilities on shards -> cache for distillation")
    p.add_argument("model", help="as for score")
    p.add_argument("--data", required=True, help="a prepared folder")
    p.add_argument("--out", required=True, help="cache folder to make")
    p.add_argument("--k", type=int, default=64, help="ids kept per token; the mass of the others is kept as one number")
    p.add_argument("--block-size", type=int, required=True, help="tokens per window, as in the training that uses the cache")
    p.add_argument("--domains", nargs="+", help="cache only these")
    p.add_argument("--max-windows", type=int, help="cache only the first so many windows of each domain")
    p.add_argument("--batch-tokens", type=int, default=16_384)
    p.add_argument("--device", default="cpu")
    p.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    p.set_defaults(execute=run_teach)

    p = commands.add_parser("generate", help="text that a model writes for every domain -> token shards to train on")
    p.add_argument("model", help="as for score")
    p.add_argument("--data", required=True, help="a prepared folder: the prompts come from its shards")
    p.add_argument("--out", required=True, help="data folder to make")
    p.add_argument("--tokens", type=int, required=True, help="tokens of each domain, prompts included")
    p.add_argument("--prompt-tokens", type=int, default=16)
    p.add_argument("--length", type=int, help="most tokens of a document (default: the model's context)")
    p.add_argument("--temperature", type=float, default=1.0, help="0: the likeliest token always")
    p.add_argument("--top-k", type=int, help="draw from the k likeliest tokens only")
    p.add_argument("--top-p", type=float, default=1.0, help="draw from the likeliest tokens that hold this share only")
    p.add_argument("--batch-size", type=int, default=32, help="documents generated together")
    p.add_argument("--domains", nargs="+", help="only these")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="cpu")
    p.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    p.set_defaults(execute=run_generate)

    p = commands.add_parser("kl", help="eq. (2) between scored models, in bits per byte")
    p.add_argument("vectors", nargs="+", help="Parquet files of `lldfast score`")
    p.set_defaults(execute=run_kl)

    p = commands.add_parser("gram", help="Gram matrix of a model's domain gradients, with its errors -> .npz")
    p.add_argument("model", help="as for score")
    p.add_argument("--data", required=True, help="a prepared folder, or an eval.parquet")
    p.add_argument("--out", required=True, help=".npz file to write")
    p.add_argument("--mode", choices=["auto", "exact", "bf16", "int8", "int4", "fold"], default="auto")
    p.add_argument("--k", type=int, help="size of the sketches of mode fold, a power of two; chosen by --target-kl otherwise")
    p.add_argument("--target-kl", type=float, default=1e-4, help="expected KL of the weights that k is chosen for")
    p.add_argument("--groups", type=int, default=8, help="groups of texts per domain, for debiasing and error bars")
    p.add_argument("--no-debias", action="store_true", help="keep the noise of finitely many texts on the diagonal")
    p.add_argument("--budget-mb", type=float, help="memory for rows or sketches (default: 2048 for --mode auto)")
    p.add_argument("--part", choices=["estimate", "measure", "all"], help="texts to use (default: estimate, where there is one)")
    p.add_argument(
        "--target", help="Parquet of `lldfast score` of a target: prints Delta and eq. (6)'s weights with their errors"
    )
    p.add_argument("--tau", type=float, default=1.0)
    p.add_argument("--batch-tokens", type=int, default=4096)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--bos", choices=["auto", "native", "none"], default="auto")
    p.add_argument("--device", default="cpu")
    p.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    p.set_defaults(execute=run_gram)

    p = commands.add_parser("weights", help="recompute domain weights offline from a run's stored Delta_t")
    p.add_argument("run", metavar="RUN", help="a run folder, a method's folder, or a weights.json")
    p.add_argument("--method", help="which pass 1 of a run folder, when it has several")
    p.add_argument(
        "--rule", help="another rule on the same trajectory: iterative, spread, mirror, adjusted, adjusted-spread, ..."
    )
    p.add_argument("--tau", type=float)
    p.add_argument("--step-size", type=float, help="of mirror")
    p.add_argument("--radius", type=float, help="of adjusted-trust, nats")
    p.add_argument("--fit-step", type=float, help="of adjusted-fit")
    p.add_argument("--floor", type=float)
    p.add_argument(
        "--aggregate", choices=["geometric", "arithmetic", "none"], default="geometric", help="none: the last estimate"
    )
    p.add_argument("--step-weights", choices=["equal", "elapsed"])
    p.add_argument("--stages", type=int, choices=[1, 2], default=1)
    p.add_argument("--steps", type=int, nargs="+", help="use these estimates only")
    p.add_argument("--out", help="weights file to write")
    p.set_defaults(execute=run_weights)

    p = commands.add_parser("report", help="write report.html of a run folder again")
    p.add_argument("run")
    p.add_argument("--out")
    p.set_defaults(execute=run_report)

    p = commands.add_parser("env", help="what runs here, and why something does not")
    p.set_defaults(execute=run_env)
    return parser


def run_prepare(o: argparse.Namespace) -> None:
    from lldfast.data.making.prepare import prepare
    from lldfast.run.place import resolve_location

    if bool(o.inputs) == bool(o.source):
        raise InputError("prepare needs either inputs or --source builtin")
    out = prepare(
        o.source or o.inputs,
        o.out,
        domain_field=o.domain_field,
        text_field=o.text_field,
        tokenizer=resolve_location(o.tokenizer),
        vocab_size=o.vocab_size,
        domains=o.domains,
        eval_texts=o.eval_texts,
        eval_per_domain=o.eval_per_domain,
        estimate_share=o.estimate_share,
        split=o.split,
        config=o.dataset_config,
        max_documents=o.max_documents,
        seed=o.seed,
        workers=o.workers,
        overwrite=o.overwrite,
        progress=not o.quiet,
    )
    from lldfast.data.evalset import EvalSet
    from lldfast.data.shards import TokenShards

    shards, counts = TokenShards(out), EvalSet.load(out / "eval.parquet").counts()
    width = max(len(name) for name in shards.domains)
    print(f"{'domain':{width}}  {'documents':>10}  {'tokens':>13}  {'eval texts':>10}")
    for name in shards.domains:
        print(f"{name:{width}}  {shards.n_documents[name]:>10,}  {shards.n_tokens[name]:>13,}  {counts[name]:>10,}")
    print(f"wrote {out}")


def run_verify(o: argparse.Namespace) -> None:
    from lldfast.data.making.prepare import verify

    verify(o.path)
    print(f"{o.path}: all checks passed")


def run_score(o: argparse.Namespace) -> None:
    from lldfast.data.evalset import EvalSet
    from lldfast.files import check_writable
    from lldfast.measure.score import score
    from lldfast.models.scorer import load_scorer
    from lldfast.run.place import pick_device, resolve_location

    check_writable(o.out)
    path = Path(o.data)
    evalset = EvalSet.load(path / "eval.parquet" if path.is_dir() else path)
    scorer = load_scorer(resolve_location(o.model), device=pick_device(o.device, "--device"), dtype=o.dtype, bos=o.bos)
    vector = score(scorer, evalset, batch_tokens=o.batch_tokens, progress=True)
    vector.save(o.out)
    for name, value in vector.by_domain().items():
        print(f"{name:24}  {value:9.4f} nats/token")
    print(f"wrote {o.out}")


def run_teach(o: argparse.Namespace) -> None:
    from lldfast.distill.cache import TeacherCache
    from lldfast.distill.teach import teach
    from lldfast.run.place import pick_device, resolve_location

    cache = TeacherCache(
        teach(
            resolve_location(o.model),
            o.data,
            o.out,
            k=o.k,
            block_size=o.block_size,
            batch_tokens=o.batch_tokens,
            domains=o.domains,
            max_windows=o.max_windows,
            device=pick_device(o.device, "--device"),
            dtype=o.dtype,
        )
    )
    width = max(len("domain"), *map(len, cache.domains))
    print(f"{'domain':{width}}  {'windows':>10}  {'other mass':>10}  {'entropy >=':>10}  {'MiB':>9}")
    for name in cache.domains:
        mass, entropy = cache.statistics(name)
        size = cache.n_bytes(name) / 2**20
        print(f"{name:{width}}  {cache.windows[name]:>10,}  {mass:>10.4f}  {entropy:>10.4f}  {size:>9,.1f}")
    print(f"{cache.k} of {cache.vocab_size} ids, windows of {cache.block_size} tokens; entropy in nats, the others taken for one")
    print(f"wrote {cache.path}")


def run_gram(o: argparse.Namespace) -> None:
    from lldfast import gram
    from lldfast.data.evalset import EvalSet
    from lldfast.files import check_writable
    from lldfast.measure.loglik import LoglikVector, delta
    from lldfast.measure.score import score
    from lldfast.models.scorer import load_scorer
    from lldfast.run.place import pick_device, resolve_location

    check_writable(o.out)
    path = Path(o.data)
    evalset = EvalSet.load(path / "eval.parquet" if path.is_dir() else path)
    part = o.part or ("estimate" if "estimate" in evalset.part else "all")
    evalset = evalset if part == "all" else evalset.select(part)
    scorer = load_scorer(resolve_location(o.model), device=pick_device(o.device, "--device"), dtype=o.dtype, bos=o.bos)
    shift = None
    if o.target is not None:
        target = LoglikVector.load(o.target)
        target = target if part == "all" else target.select(part)
        shift = delta(target, score(scorer, evalset, progress=True))[0]
    found = gram.estimate(
        scorer,
        evalset,
        mode=o.mode,
        k="auto" if o.k is None else o.k,
        groups=o.groups,
        debias=not o.no_debias,
        budget_bytes=None if o.budget_mb is None else o.budget_mb * 2**20,
        batch_tokens=o.batch_tokens,
        seed=o.seed,
        delta=shift,
        tau=o.tau,
        target_kl=o.target_kl,
    )
    found.save(o.out)
    weights, errors = ({}, {}) if shift is None else found.weights(shift, tau=o.tau)
    width = max(len(name) for name in found.domains)
    head = f"{'domain':{width}}  {'texts':>6}  {'|gradient|':>10}  {'naive':>10}"
    print(head + ("" if shift is None else f"  {'Delta':>8}  {'weight':>7}"))
    for i, name in enumerate(found.domains):
        norms = found.gram[i, i] ** 0.5, found.naive_diagonal[i] ** 0.5
        line = f"{name:{width}}  {found.n_texts[i]:>6,}  {norms[0]:>10.4g}  {norms[1]:>10.4g}"
        print(line + ("" if shift is None else f"  {shift[name]:>+8.4f}  {weights[name]:>7.4f} +- {errors[name]:.4f}"))
    print(found.summary())
    if shift is not None and found.k is not None:
        print(f"expected KL of the weights by the sketch: {found.expected_kl(shift, tau=o.tau):.2g} nats")
    print(f"wrote {o.out}")


def run_generate(o: argparse.Namespace) -> None:
    from lldfast.distill.generate import generate
    from lldfast.files import read_json
    from lldfast.run.place import pick_device, resolve_location

    out = generate(
        resolve_location(o.model),
        o.data,
        o.out,
        tokens=o.tokens,
        prompt_tokens=o.prompt_tokens,
        length=o.length,
        temperature=o.temperature,
        top_k=o.top_k,
        top_p=o.top_p,
        batch_size=o.batch_size,
        domains=o.domains,
        seed=o.seed,
        device=pick_device(o.device, "--device"),
        dtype=o.dtype,
    )
    counts = read_json(out / "generate.json")["domains"]
    width = max(len("domain"), *map(len, counts))
    print(f"{'domain':{width}}  {'documents':>10}  {'tokens':>13}  {'mean length':>11}")
    for name, n in counts.items():
        print(f"{name:{width}}  {n['documents']:>10,}  {n['tokens']:>13,}  {n['tokens'] / n['documents']:>11.1f}")
    print(f"wrote {out}")


def run_kl(o: argparse.Namespace) -> None:
    from lldfast.measure.divergence import kl_matrix
    from lldfast.measure.loglik import LoglikVector

    vectors = {path: LoglikVector.load(path) for path in o.vectors}
    for path, row in zip(vectors, kl_matrix(vectors), strict=True):
        print("  ".join(f"{value:10.4f}" for value in row), f"  {path}")


def run_weights(o: argparse.Namespace) -> None:
    import dataclasses

    from lldfast.weights.file import Stage, WeightsFile
    from lldfast.weights.recompute import recompute
    from lldfast.weights.simplex import effective_domains

    path = find_trajectory(Path(o.run), o.method)
    changes = {"name": o.rule, "tau": o.tau, "step_size": o.step_size, "floor": o.floor}
    changes |= {"radius": o.radius, "fit_step": o.fit_step}
    rule = dataclasses.replace(WeightsFile.load(path).made_by(), **{k: v for k, v in changes.items() if v is not None})
    result = recompute(path, rule=rule, aggregate=o.aggregate, step_weights=o.step_weights, steps=o.steps, stages=o.stages)
    print(f"{path}: rule {rule.name}, tau {rule.tau:g}, {result.aggregate}, {result.step_weights} step weights")
    for stage in result.stages or [Stage(0, result.weights)]:
        if result.stages:
            print(f"from step {stage.from_step}:")
        for name, weight in sorted(stage.weights.items(), key=lambda item: -item[1]):
            error = "" if not result.weights_se else f" +- {result.weights_se[name]:.4f}"
            print(f"  {name:24}  {weight:.4f}{error}")
        print(f"  effective domains {effective_domains(stage.weights):.2f}")
    if o.out is not None:
        result.save(o.out)
        print(f"wrote {o.out}")


def find_trajectory(run: Path, method: str | None) -> Path:
    """The weights.json with stored Delta_t that RUN means.

    Raises:
        InputError: there is none, or several and no --method.
    """
    if not run.exists() or run == Path():
        raise InputError(f"{run}: no such run folder or weights file")
    if run.is_file():
        return run
    if (run / "weights.json").exists():
        return run / "weights.json"
    if method:
        path = run / "methods" / method / "weights.json"
        if not path.exists():
            raise InputError(f"{run} has no finished method {method!r}")
        return path
    found = [p for p in sorted(run.glob("methods/*/weights.json")) if json.loads(p.read_text(encoding="utf-8"))["trajectory"]]
    if not found:
        raise InputError(f"{run} has no finished method with stored Delta_t (0 methods)")
    if len(found) != 1:
        names = ", ".join(p.parent.name for p in found)
        raise InputError(f"{run} has {len(found)} methods with stored Delta_t ({names}): choose one by --method")
    return found[0]


def run_report(o: argparse.Namespace) -> None:
    from lldfast.report.page import write_report
    from lldfast.report.summary import summarise, table

    print(table(summarise(o.run)))
    print(f"report: {write_report(Path(o.run), out=o.out).resolve()}")


def run_env(o: argparse.Namespace) -> None:
    from lldfast.backends import env_report

    print(env_report())


if __name__ == "__main__":
    sys.exit(main())
