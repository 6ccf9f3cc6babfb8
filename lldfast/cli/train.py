"""`lldfast train`: Algorithm 1, pass 2 and the baselines."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lldfast.cli.options import Commands


def add(commands: Commands) -> None:
    commands.add_parser("train", help="Algorithm 1, pass 2 and the baselines; the demo by default (lldfast train --help)")


def run(arguments: list[str]) -> None:
    from lldfast.train import main

    main(arguments)
