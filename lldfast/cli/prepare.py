"""`lldfast prepare`: texts with a domain label -> token shards and an evaluation corpus."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lldfast.cli.options import add_fields, values_of
from lldfast.data.making.options import PrepareOptions
from lldfast.errors import InputError
from lldfast.terminal import aligned

if TYPE_CHECKING:
    from lldfast.cli.options import Commands


def add(commands: Commands) -> None:
    parser = commands.add_parser("prepare", help="texts with a domain label -> token shards + evaluation corpus")
    parser.add_argument(
        "inputs", nargs="*", help="JSONL (plain, gzip, zstd, bz2, xz), Parquet, a folder per domain, or a Hugging Face dataset id"
    )
    parser.add_argument("--source", choices=["builtin"], help="real text that is already on this machine, instead of inputs")
    parser.add_argument("--out", required=True, help="data folder to make")
    add_fields(parser, PrepareOptions, spelling={"config": "--dataset-config"})
    parser.add_argument("--workers", type=int, help="encoding threads (default: one per core)")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a folder that was made of other inputs or with other options"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars, no warnings")
    parser.set_defaults(execute=run)


def run(options: argparse.Namespace) -> None:
    from lldfast.data.evalset import EvalSet
    from lldfast.data.making.prepare import prepare
    from lldfast.data.shards import TokenShards
    from lldfast.run.place import resolve_location

    if bool(options.inputs) == bool(options.source):
        raise InputError("prepare needs either inputs or --source builtin")
    before = _file_of(options.out)
    out = prepare(
        options.source or options.inputs,
        options.out,
        **values_of(options, PrepareOptions) | {"tokenizer": resolve_location(options.tokenizer)},
        workers=options.workers,
        overwrite=options.overwrite,
        progress=not options.quiet,
    )
    shards, texts = TokenShards(out), EvalSet.load(out / "eval.parquet").counts()
    rows = [("domain", "documents", "tokens", "eval texts")]
    for name in shards.domains:
        rows.append((name, f"{shards.n_documents[name]:,}", f"{shards.n_tokens[name]:,}", f"{texts[name]:,}"))
    print("\n".join(aligned(rows, least=(0, 10, 13, 10))))
    same = before is not None and before == _file_of(out)
    print(f"{out} is there already, made of the same inputs with the same arguments" if same else f"wrote {out}")


def _file_of(out: str | Path) -> tuple[int, int] | None:
    """What tells a folder's record from that of a folder which took its place."""
    try:
        found = (Path(out) / "prepare.json").stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns
