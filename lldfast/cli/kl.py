"""`lldfast kl`: eq. (2) between scored models."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from lldfast.terminal import aligned

if TYPE_CHECKING:
    from lldfast.cli.options import Commands


def add(commands: Commands) -> None:
    parser = commands.add_parser("kl", help="eq. (2) between scored models, in bits per byte")
    parser.add_argument("vectors", nargs="+", help="Parquet files of `lldfast score`")
    parser.set_defaults(execute=run)


def run(options: argparse.Namespace) -> None:
    from lldfast.measure.divergence import kl_matrix
    from lldfast.measure.loglik import LoglikVector

    vectors = {path: LoglikVector.load(path) for path in options.vectors}
    matrix = kl_matrix(vectors)
    rows = [(*(f"{value:.4f}" for value in row), f" {path}") for path, row in zip(vectors, matrix, strict=True)]
    print("\n".join(aligned(rows, left={len(vectors)}, least=(10,) * len(vectors))))
