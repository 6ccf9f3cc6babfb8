"""`lldfast generate`: text that a model writes, as token shards to train on."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from lldfast.cli.options import add_data, add_device, add_model, device_of, teacher_of
from lldfast.terminal import aligned

if TYPE_CHECKING:
    from lldfast.cli.options import Commands


def add(commands: Commands) -> None:
    parser = commands.add_parser("generate", help="text that a model writes for every domain -> token shards to train on")
    add_model(parser)
    add_data(parser, "a prepared folder: the prompts come from its shards")
    parser.add_argument("--out", required=True, help="data folder to make")
    parser.add_argument("--tokens", type=int, required=True, help="tokens of each domain, prompts included")
    parser.add_argument("--prompt-tokens", type=int, default=16, help="tokens of a document that come from --data")
    parser.add_argument("--length", type=int, help="most tokens of a document (default: the model's context)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: the likeliest token always")
    parser.add_argument("--top-k", type=int, help="draw from the k likeliest tokens only")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from the likeliest tokens that hold this share only")
    parser.add_argument("--batch-size", type=int, default=32, help="documents generated together")
    parser.add_argument("--domains", nargs="+", help="only these")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and text (default: 0)")
    add_device(parser)
    parser.set_defaults(execute=run)


def run(options: argparse.Namespace) -> None:
    from lldfast.distill.generate import generate
    from lldfast.files import read_json

    out = generate(
        teacher_of(options),
        options.data,
        options.out,
        tokens=options.tokens,
        prompt_tokens=options.prompt_tokens,
        length=options.length,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        batch_size=options.batch_size,
        domains=options.domains,
        seed=options.seed,
        device=device_of(options),
        dtype=options.dtype,
    )
    rows = [("domain", "documents", "tokens", "mean length")]
    for name, n in read_json(out / "generate.json")["domains"].items():
        rows.append((name, f"{n['documents']:,}", f"{n['tokens']:,}", f"{n['tokens'] / n['documents']:.1f}"))
    print("\n".join(aligned(rows, least=(0, 10, 13, 11))))
    print(f"wrote {out}")
