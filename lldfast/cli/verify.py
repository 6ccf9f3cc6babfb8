"""`lldfast verify`: whether a prepared folder is what `prepare` wrote."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lldfast.cli.options import Commands


def add(commands: Commands) -> None:
    parser = commands.add_parser("verify", help="check a prepared folder: sizes, checksums, ids, evaluation texts kept apart")
    parser.add_argument("path", help="a folder that `lldfast prepare` made")
    parser.set_defaults(execute=run)


def run(options: argparse.Namespace) -> None:
    from lldfast.data.making.prepare import verify

    verify(options.path)
    print(f"{options.path}: all checks passed")
