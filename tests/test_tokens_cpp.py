from __future__ import annotations

import mmap
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from lldfast.backends import extension
from lldfast.data.mixture import gather_numpy

_C = extension()
pytestmark = pytest.mark.skipif(_C is None, reason="lldfast._C is not built here")


def gather(shards, vocab_size, domain, start, length):
    x = torch.full((len(domain), length), -1)
    y = torch.full((len(domain), length), -1)
    addresses = np.array([shard.ctypes.data for shard in shards], dtype=np.int64)
    sizes = np.array([len(shard) for shard in shards], dtype=np.int64)
    itemsize = shards[0].dtype.itemsize
    bad = _C.gather(addresses, sizes, itemsize, vocab_size, np.array(domain), np.array(start), length, x.data_ptr(), y.data_ptr())
    return x, y, bad


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
@given(seed=st.integers(0, 2**32), sizes=st.lists(st.integers(2, 90), min_size=1, max_size=4), rows=st.integers(0, 8))
@settings(max_examples=60, deadline=None)
def test_gather_equals_numpy(dtype, seed, sizes, rows):
    rng = np.random.default_rng(seed)
    vocab_size = 60_000
    shards = [rng.integers(0, vocab_size, size).astype(dtype) for size in sizes]
    length = int(rng.integers(1, min(sizes)))
    domain = rng.integers(0, len(sizes), rows)
    start = rng.integers(0, np.array(sizes)[domain]) if rows else np.empty(0, dtype=np.int64)
    x, y, bad = gather(shards, vocab_size, domain, start, length)
    x2, y2 = torch.full_like(x, -2), torch.full_like(y, -2)
    assert bad is None and gather_numpy(shards, vocab_size, domain, start, x2, y2) is None
    assert torch.equal(x, x2) and torch.equal(y, y2)


def test_the_largest_ids():
    shards = [np.array([0, 65535, 32768, 1], dtype=np.uint16)]
    x, y, bad = gather(shards, 65536, [0], [0], 3)
    assert bad is None and x.tolist() == [[0, 65535, 32768]] and y.tolist() == [[65535, 32768, 1]]
    shards = [np.array([0, 2**32 - 1, 2**31, 1], dtype=np.uint32)]
    x, y, bad = gather(shards, 2**32, [0], [0], 3)
    assert bad is None and x.tolist() == [[0, 2**32 - 1, 2**31]]


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
@pytest.mark.parametrize("at", range(10))
def test_bad_token_is_named(dtype, at):
    good, tokens = np.zeros(10, dtype=dtype), np.zeros(10, dtype=dtype)
    tokens[at] = 500
    for start in range(10):
        x, y = torch.empty(2, 6, dtype=torch.int64), torch.empty(2, 6, dtype=torch.int64)
        expected = gather_numpy([good, tokens], 500, np.array([0, 1]), np.array([0, start]), x, y)
        assert gather([good, tokens], 500, [0, 1], [0, start], 6)[2] == expected
        inside = (at - start) % 10 <= 6
        assert expected == ((1, at, 500) if inside else None)
    assert gather([good, tokens], 501, [1], [0], 9)[2] is None


@pytest.mark.parametrize(
    ("domain", "start", "length", "message"),
    [
        ([2], [0], 3, "row 0 asks for domain 2 of 2"),
        ([-1], [0], 3, "domain -1"),
        ([0, 1], [0, 8], 3, "row 1 reads 4 tokens at 8 of domain 1, which has 8"),
        ([0], [-1], 3, "at -1"),
        ([1], [0], 8, "reads 9 tokens"),
    ],
)
def test_gather_refuses_what_lies_outside(domain, start, length, message):
    shards = [np.zeros(20, dtype=np.uint16), np.zeros(8, dtype=np.uint16)]
    with pytest.raises(IndexError, match=message):
        gather(shards, 10, domain, start, length)


def test_gather_refuses_wrong_arguments():
    shard = np.zeros(20, dtype=np.uint16)
    one, out = np.array([0]), torch.zeros(1, 4, dtype=torch.int64)
    address, size = np.array([shard.ctypes.data]), np.array([20])
    x = out.data_ptr()
    for arguments, message in [
        ((address, np.array([20, 20]), 2, 9, one, one, 4, x, x), "addresses and sizes"),
        ((address, size, 2, 9, one, np.array([0, 0]), 4, x, x), "domain and start"),
        ((address, size, 8, 9, one, one, 4, x, x), "itemsize"),
        ((address, size, 2, 9, one, one, 0, x, x), "length"),
    ]:
        with pytest.raises(ValueError, match=message):
            _C.gather(*arguments)


def test_xxh3_of_every_short_length():
    data = np.random.default_rng(0).bytes(2001)
    for size in range(2001):
        assert _C.xxh3_64(data[:size]) == xxhash.xxh3_64_intdigest(data[:size]), size


@pytest.mark.parametrize("size", [1 << 20, (1 << 20) + 1, (1 << 20) - 1, 5_000_003, 8 << 20])
def test_xxh3_of_megabytes(size):
    data = np.random.default_rng(size).bytes(size)
    assert _C.xxh3_64(data) == xxhash.xxh3_64_intdigest(data)


def test_xxh3_known_answers():
    # From the published test vectors of xxHash: the empty input, and one zero byte.
    assert _C.xxh3_64(b"") == 0x2D06800538D394C2
    assert _C.xxh3_64(b"\0") == 0xC44BDFF4074EECDB


def test_xxh3_buffers(tmp_path):
    data = np.random.default_rng(1).bytes(3000)
    (tmp_path / "file").write_bytes(data)
    expected = xxhash.xxh3_64_intdigest(data)
    with open(tmp_path / "file", "rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as view:
        assert _C.xxh3_64(view) == expected
    assert _C.xxh3_64(memoryview(data)) == _C.xxh3_64(bytearray(data)) == expected
    assert _C.xxh3_64(np.frombuffer(data, dtype=np.uint32)) == expected
    assert _C.xxh3_64(b"?" + data) != expected
    for shift in range(1, 9):  # addresses that are aligned to nothing
        assert _C.xxh3_64(memoryview(b"?" * shift + data)[shift:]) == expected
    with pytest.raises(ValueError, match="not contiguous"):
        _C.xxh3_64(np.frombuffer(data, dtype=np.uint8)[::2])


def test_xxh3_in_threads():
    data = [np.random.default_rng(i).bytes(300_000 + i) for i in range(4)]
    answers = [0] * 4

    def work(i):
        for _ in range(20):
            answers[i] = _C.xxh3_64(data[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [xxhash.xxh3_64_intdigest(item) for item in data]


HASHES = """
import random
from lldfast.backends import extension
c = extension()
data = random.Random(3).randbytes(70_000)
print(c.isa(), [c.xxh3_64(data[:size]) for size in (1, 20, 200, 241, 1024, 1025, 2048, 2049, 69_999, 70_000)])
"""


def run_with_isa(isa):
    return subprocess.run(
        [sys.executable, "-c", HASHES], env={**os.environ, "LLDFAST_ISA": isa}, capture_output=True, text=True, timeout=60
    )


def test_every_isa_gives_the_same_bits():
    answers = set()
    for isa in ["", *_C.supported_isas()]:
        done = run_with_isa(isa)
        assert done.returncode == 0, done.stderr
        name, numbers = done.stdout.split(" ", 1)
        assert name == (isa or _C.supported_isas()[-1])
        answers.add(numbers)
    assert len(answers) == 1


def test_an_isa_that_cannot_be_had():
    done = run_with_isa("avx1024")
    assert done.returncode != 0
    assert "LLDFAST_ISA=avx1024 is unknown; choose scalar, avx2, avx512 or amx" in done.stderr
    missing = [isa for isa in ("avx2", "avx512", "amx") if isa not in _C.supported_isas()]
    for isa in missing:
        done = run_with_isa(isa)
        assert done.returncode != 0 and f"LLDFAST_ISA={isa}: this machine supports scalar" in done.stderr
