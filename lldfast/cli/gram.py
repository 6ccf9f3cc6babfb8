"""`lldfast gram`: the Gram matrix of a model's domain gradients, with its errors."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from lldfast.cli.options import add_batch_tokens, add_bos, add_device, add_eval_data, add_model, evalset_of, scorer_of
from lldfast.terminal import aligned

if TYPE_CHECKING:
    from lldfast.cli.options import Commands
    from lldfast.gram.result import GramEstimate


def add(commands: Commands) -> None:
    parser = commands.add_parser("gram", help="Gram matrix of a model's domain gradients, with its errors -> .npz")
    add_model(parser)
    add_eval_data(parser)
    parser.add_argument("--out", required=True, help=".npz file to write")
    parser.add_argument("--mode", choices=["auto", "exact", "bf16", "int8", "int4", "fold"], default="auto")
    parser.add_argument(
        "--k", type=int, help="size of the sketches of mode fold, a power of two; chosen by --target-kl otherwise"
    )
    parser.add_argument("--target-kl", type=float, default=1e-4, help="expected KL of the weights that k is chosen for")
    parser.add_argument("--groups", type=int, default=8, help="groups of texts per domain, for debiasing and error bars")
    parser.add_argument("--no-debias", action="store_true", help="keep the noise of finitely many texts on the diagonal")
    parser.add_argument("--budget-mb", type=float, help="memory for rows or sketches (default: 2048 for --mode auto)")
    parser.add_argument(
        "--part", choices=["estimate", "measure", "all"], help="texts to use (default: estimate, where there is one)"
    )
    parser.add_argument(
        "--target", help="Parquet of `lldfast score` of a target: prints Delta and eq. (6)'s weights with their errors"
    )
    parser.add_argument("--tau", type=float, default=1.0)
    add_batch_tokens(parser, 4096)
    parser.add_argument("--seed", type=int, default=0)
    add_bos(parser)
    add_device(parser)
    parser.set_defaults(execute=run)


def run(options: argparse.Namespace) -> None:
    from lldfast import gram
    from lldfast.files import check_writable
    from lldfast.measure.loglik import LoglikVector, delta, score

    check_writable(options.out)
    evalset = evalset_of(options)
    part = options.part or ("estimate" if "estimate" in evalset.part else "all")
    evalset = evalset if part == "all" else evalset.select(part)
    scorer = scorer_of(options)
    shift = None
    if options.target is not None:
        target = LoglikVector.load(options.target)
        target = target if part == "all" else target.select(part)
        shift = delta(target, score(scorer, evalset, progress=True))[0]
    found = gram.estimate(
        scorer,
        evalset,
        mode=options.mode,
        k="auto" if options.k is None else options.k,
        groups=options.groups,
        debias=not options.no_debias,
        budget_bytes=None if options.budget_mb is None else options.budget_mb * 2**20,
        batch_tokens=options.batch_tokens,
        seed=options.seed,
        delta=shift,
        tau=options.tau,
        target_kl=options.target_kl,
    )
    found.save(options.out)
    print("\n".join(_table(found, shift, options.tau)))
    print(found.summary())
    if shift is not None and found.k is not None:
        print(f"expected KL of the weights by the sketch: {found.expected_kl(shift, tau=options.tau):.2g} nats")
    print(f"wrote {options.out}")


def _table(found: GramEstimate, shift: dict[str, float] | None, tau: float) -> list[str]:
    """Texts and norms of every domain's gradient; with Delta, eq. (6)'s weights and their standard errors."""
    rows = [["domain", "texts", "|gradient|", "naive"]]
    for i, name in enumerate(found.domains):
        norm, naive = found.gram[i, i] ** 0.5, found.naive_diagonal[i] ** 0.5
        rows.append([name, f"{found.n_texts[i]:,}", f"{norm:.4g}", f"{naive:.4g}"])
    if shift is not None:
        weights, errors = found.weights(shift, tau=tau)
        rows[0] += ["Delta", f"{'weight':>7}"]
        for row in rows[1:]:
            row += [f"{shift[row[0]]:+.4f}", f"{weights[row[0]]:>7.4f} +- {errors[row[0]]:.4f}"]
    return aligned(rows, left={0, 5}, least=(0, 6, 10, 10, 8))
