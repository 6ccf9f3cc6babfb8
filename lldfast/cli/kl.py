"""`lldfast kl`: eq. (2) between scored models."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from lldfast.cli.options import add_anyway
from lldfast.terminal import aligned, note

if TYPE_CHECKING:
    from lldfast.cli.options import Commands


def add(commands: Commands) -> None:
    parser = commands.add_parser("kl", help="eq. (2) between scored models, in bits per byte")
    parser.add_argument("vectors", nargs="+", help="Parquet files of `lldfast score`")
    add_anyway(parser)
    parser.set_defaults(execute=run)


def run(options: argparse.Namespace) -> None:
    from lldfast.measure.comparable import describe_differences
    from lldfast.measure.divergence import kl_matrix
    from lldfast.measure.loglik import LoglikVector

    vectors = {path: LoglikVector.load(path) for path in options.vectors}
    if options.anyway and (said := describe_differences(list(vectors.values()), list(vectors))):
        note(f"warning: {said}")
    matrix = kl_matrix(vectors, allow_differences=options.anyway)
    rows = [(*(f"{value:.4f}" for value in row), f" {path}") for path, row in zip(vectors, matrix, strict=True)]
    print("\n".join(aligned(rows, left={len(vectors)}, least=(10,) * len(vectors))))
