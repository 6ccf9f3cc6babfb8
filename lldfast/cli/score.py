"""`lldfast score`: the log-likelihood vector of a model on an evaluation corpus."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from lldfast.cli.options import add_batch_tokens, add_bos, add_device, add_eval_data, add_model, evalset_of, model_of
from lldfast.terminal import aligned

if TYPE_CHECKING:
    from lldfast.cli.options import Commands


def add(commands: Commands) -> None:
    parser = commands.add_parser("score", help="log-likelihood vector of a model on an evaluation corpus -> Parquet")
    add_model(parser)
    add_eval_data(parser)
    parser.add_argument("--out", required=True, help="Parquet file to write")
    add_batch_tokens(parser)
    add_bos(parser)
    add_device(parser)
    parser.set_defaults(execute=run)


def run(options: argparse.Namespace) -> None:
    from lldfast.files import check_writable
    from lldfast.measure.score import score

    check_writable(options.out)
    evalset = evalset_of(options)
    vector = score(model_of(options), evalset, batch_tokens=options.batch_tokens, progress=True)
    vector.save(options.out)
    rows = [(name, f"{value:.4f} nats/token") for name, value in vector.by_domain().items()]
    print("\n".join(aligned(rows, least=(24, 20))))
    print(f"wrote {options.out}")
