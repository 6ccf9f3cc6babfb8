"""The command line, one file a command: `add(commands)` states its options, `run(options)` does the work.

What a command needs is imported inside its `run`, so that `lldfast --help` answers at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from lldfast import __version__
from lldfast.cli import env, generate, gram, kl, prepare, report, score, teach, train, verify, weights
from lldfast.terminal import exit_status

COMMANDS = (train, prepare, verify, score, teach, generate, kl, gram, weights, report, env)  # in the order of --help


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status (0 done, 1 a user error, 130 interrupted)."""
    args = list(sys.argv[1:] if argv is None else argv)
    return exit_status(lambda: execute(args))


def execute(args: list[str]) -> None:
    """Run one command; its errors are raised, and a usage error leaves the program with status 2, as argparse does it."""
    if args[:1] == ["train"]:  # its options come from the configuration's dataclasses
        train.run(args[1:])
    else:
        options = build_parser().parse_args(args)
        options.execute(options)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lldfast", description="Domain-mixture design by log-likelihood differences.")
    parser.add_argument("--version", action="version", version=f"lldfast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser
