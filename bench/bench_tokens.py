"""Reading training batches and checksums: lldfast against what people use today.

    python -m pytest bench/bench_tokens.py --benchmark-enable --benchmark-only --benchmark-group-by=group

Each pair is checked for equal results before it is timed. The data lies in the page cache: the code is measured, not the disk.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash

from lldfast.backends import extension
from lldfast.data.mixture import DomainMixture
from lldfast.data.shards import ShardWriter, TokenShards, write_manifest

_C = extension()
N_TOKENS = 20_000_000
SHAPES = [(64, 1024), (8, 128)]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> TokenShards:
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    entries = {}
    for domain in ("one", "two"):
        with ShardWriter(folder, domain, "uint16") as writer:
            for _ in range(10):
                writer.add(np.append(rng.integers(0, 50256, N_TOKENS // 20), 50256))
            entries[domain] = writer.close()
    write_manifest(folder, {"name": "gpt2", "hash": "gpt2", "eot": 50256}, 50257, entries)
    return TokenShards(folder)


def nanogpt_batch(path: Path, start: np.ndarray, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The way nanoGPT reads a batch: a memory map opened anew for every batch, then one slice per row, cast and stacked."""
    return stack_batch(np.memmap(path, dtype=np.uint16, mode="r"), start, length)


def stack_batch(data: np.ndarray, start: np.ndarray, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.stack([torch.from_numpy(data[i : i + length].astype(np.int64)) for i in start])
    y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + length].astype(np.int64)) for i in start])
    return x, y


def cpp_batch(tokens: np.ndarray, start: np.ndarray, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    assert _C is not None
    x, y = torch.empty(len(start), length, dtype=torch.int64), torch.empty(len(start), length, dtype=torch.int64)
    domain, address, size = np.zeros(len(start), dtype=np.int64), np.array([tokens.ctypes.data]), np.array([len(tokens)])
    assert _C.gather(address, size, 2, 50257, domain, start, length, x.data_ptr(), y.data_ptr()) is None
    return x, y


@pytest.mark.skipif(_C is None, reason="lldfast._C is not built here")
@pytest.mark.parametrize(("rows", "length"), SHAPES)
@pytest.mark.parametrize("method", ["lldfast C++", "nanoGPT", "nanoGPT, map kept"])
def test_gather(benchmark, shards, method, rows, length):
    benchmark.group = f"gather B={rows} T={length}"
    start = np.random.default_rng(1).integers(0, shards.n_tokens["one"] - length - 1, rows)
    path, tokens = shards.shard_file("one"), shards.tokens("one")
    ours, theirs = cpp_batch(tokens, start, length), nanogpt_batch(path, start, length)
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
    benchmark.extra_info["tokens"] = rows * length
    if method == "nanoGPT":
        benchmark(nanogpt_batch, path, start, length)
    elif method == "nanoGPT, map kept":
        benchmark(stack_batch, tokens, start, length)
    else:
        benchmark(cpp_batch, tokens, start, length)


@pytest.mark.parametrize(("rows", "length"), SHAPES)
@pytest.mark.parametrize("backend", ["cpp", "numpy"])
def test_mixture(benchmark, shards, backend, rows, length):
    """The whole step: draw domains, find the windows, read them."""
    if backend == "cpp" and _C is None:
        pytest.skip("lldfast._C is not built here")
    benchmark.group = f"next_batch B={rows} T={length}"
    make = lambda name: DomainMixture(shards, [0.3, 0.7], block_size=length, batch_size=rows, backend=name)  # noqa: E731
    mixture = make(backend)
    assert torch.equal(mixture.next_batch().x, make("numpy").next_batch().x)
    benchmark(mixture.next_batch)


@pytest.mark.skipif(_C is None, reason="lldfast._C is not built here")
@pytest.mark.parametrize("size", [200, 65_536, 64 << 20])
@pytest.mark.parametrize("method", ["lldfast C++", "xxhash package"])
def test_xxh3(benchmark, method, size):
    benchmark.group = f"xxh3 of {size} bytes"
    data = np.random.default_rng(2).bytes(size)
    assert _C is not None and _C.xxh3_64(data) == xxhash.xxh3_64_intdigest(data)
    benchmark.extra_info["bytes"] = size
    benchmark(_C.xxh3_64 if method == "lldfast C++" else xxhash.xxh3_64_intdigest, data)
