"""`lldfast env`: what runs on this machine, and why something does not."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lldfast.cli.options import Commands


def add(commands: Commands) -> None:
    commands.add_parser("env", help="what runs here, and why something does not").set_defaults(execute=run)


def run(options: argparse.Namespace) -> None:
    from lldfast.backends import env_report

    print(env_report())
