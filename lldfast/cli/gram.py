"""`lldfast gram`: the Gram matrix of a model's domain gradients, with its errors."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from lldfast.cli.options import (
    add_anyway,
    add_bos,
    add_device,
    add_eval_data,
    add_fields,
    add_model,
    evalset_of,
    model_of,
    values_of,
)
from lldfast.gram.options import GramOptions
from lldfast.terminal import aligned, note

if TYPE_CHECKING:
    from lldfast.cli.options import Commands
    from lldfast.gram.result import GramEstimate


def add(commands: Commands) -> None:
    parser = commands.add_parser("gram", help="Gram matrix of a model's domain gradients, with its errors -> .npz")
    add_model(parser)
    add_eval_data(parser)
    parser.add_argument("--out", required=True, help=".npz file to write")
    add_fields(parser, GramOptions, leave_out=("precondition",))  # there is no optimizer here
    parser.add_argument(
        "--part", choices=["estimate", "measure", "all"], help="texts to use (default: estimate, where there is one)"
    )
    parser.add_argument(
        "--target", help="Parquet of `lldfast score` of a target: prints Delta and eq. (6)'s weights with their errors"
    )
    parser.add_argument("--tau", type=float, default=1.0, help="temperature of those weights, nats per token (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the sketch and the groups (default: 0)")
    add_anyway(parser)
    add_bos(parser)
    add_device(parser)
    parser.set_defaults(execute=run)


def run(options: argparse.Namespace) -> None:
    from lldfast import gram
    from lldfast.files import check_writable
    from lldfast.measure.comparable import describe_differences
    from lldfast.measure.loglik import LoglikVector, check_same_texts, delta
    from lldfast.measure.score import score

    check_writable(options.out)
    evalset = evalset_of(options)
    part = options.part or ("estimate" if "estimate" in evalset.part else "all")
    evalset = evalset if part == "all" else evalset.select(part)
    target = None
    if options.target is not None:  # compared before a model runs
        target = LoglikVector.load(options.target)
        target = target if part == "all" or len(target) == len(evalset) else target.select(part)
        check_same_texts(target, evalset, (options.target, f"the evaluation texts of {options.data}"))
    model = model_of(options)
    shift = None
    if target is not None:
        base = score(model, evalset, progress=True)
        if options.anyway and (said := describe_differences([target, base], [options.target, options.model])):
            note(f"warning: {said}")
        shift = delta(target, base, allow_differences=options.anyway)[0]
    found = gram.estimate(
        model,
        evalset,
        **GramOptions(**values_of(options, GramOptions)).keywords(),
        seed=options.seed,
        delta=shift,
        tau=options.tau,
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
