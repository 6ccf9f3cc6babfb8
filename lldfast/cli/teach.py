"""`lldfast teach`: a recorded teacher for distillation."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from lldfast.cli.options import add_batch_tokens, add_data, add_device, add_model, device_of, teacher_of
from lldfast.terminal import aligned

if TYPE_CHECKING:
    from lldfast.cli.options import Commands


def add(commands: Commands) -> None:
    what = "a teacher's top-k next-token log-probabilities on shards -> cache for distillation"
    parser = commands.add_parser("teach", help=what)
    add_model(parser)
    add_data(parser)
    parser.add_argument("--out", required=True, help="cache folder to make")
    parser.add_argument("--k", type=int, default=64, help="ids kept per token; the mass of the others is kept as one number")
    parser.add_argument("--block-size", type=int, required=True, help="tokens per window, as in the training that uses the cache")
    parser.add_argument("--domains", nargs="+", help="cache only these")
    parser.add_argument("--max-windows", type=int, help="cache only the first so many windows of each domain")
    add_batch_tokens(parser)
    add_device(parser)
    parser.set_defaults(execute=run)


def run(options: argparse.Namespace) -> None:
    from lldfast.distill.cache import TeacherCache
    from lldfast.distill.teach import teach

    made = teach(
        teacher_of(options),
        options.data,
        options.out,
        k=options.k,
        block_size=options.block_size,
        batch_tokens=options.batch_tokens,
        domains=options.domains,
        max_windows=options.max_windows,
        device=device_of(options),
        dtype=options.dtype,
    )
    cache = TeacherCache(made)
    rows = [("domain", "windows", "other mass", "entropy >=", "MiB")]
    for name in cache.domains:
        mass, entropy = cache.statistics(name)
        rows.append((name, f"{cache.windows[name]:,}", f"{mass:.4f}", f"{entropy:.4f}", f"{cache.n_bytes(name) / 2**20:,.1f}"))
    print("\n".join(aligned(rows, least=(0, 10, 10, 10, 9))))
    print(f"{cache.k} of {cache.vocab_size} ids, windows of {cache.block_size} tokens; entropy in nats, the others taken for one")
    print(f"wrote {cache.path}")
