"""`lldfast report`: the answer of a run, as a table and a page."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lldfast.cli.options import Commands


def add(commands: Commands) -> None:
    parser = commands.add_parser("report", help="write report.html of a run folder again")
    parser.add_argument("run", help="a run folder")
    parser.add_argument("--out", help="page to write (default: report.html in the run folder)")
    parser.set_defaults(execute=run)


def run(options: argparse.Namespace) -> None:
    from lldfast.report.page import write_report
    from lldfast.report.summary import summarise, table

    print(table(summarise(options.run)))
    print(f"report: {write_report(Path(options.run), out=options.out).resolve()}")
