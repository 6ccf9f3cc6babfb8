"""csrc/cpu/sketch/sketch.h: every instruction set and number of threads gives the bits of the reference."""

import math

import pytest
import torch

from lldfast.backends import extension
from lldfast.ops import native
from lldfast.ops.sketch.fold import reference

C = extension()
pytestmark = [pytest.mark.skipif(C is None, reason="lldfast._C is not built"), pytest.mark.usefixtures("threads")]
ISAS = [isa for isa in ([] if C is None else C.supported_isas()) if isa != "amx"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SEED = 0xFEDCBA9876543210


def check(threads, out, g, offset, isa, counts=(1, 2, 5), scale=None, dots=()):
    """Bits of the sketch as the reference's, sums of every thread count the same; gives the sums."""
    want = out.clone()
    sums = reference(want, g, offset=offset, seed=SEED, scale=scale, dots=dots)
    size = torch.stack([sums[0], *((g.double() * d).abs().sum() for d in dots)])
    for n in counts:
        threads(n)
        got = out.clone()
        of_kernel = native.sketch_fold(got, g, offset, SEED, scale, dots, isa)
        assert torch.equal(got, want), f"{n} threads: {int((got != want).sum())} of {len(got)} buckets differ"
        assert bool(((of_kernel - sums).abs() <= 3e-7 * size).all()), (n, of_kernel, sums)
    return sums


# sizes that fill a part of a row, of a tile, of a chunk; several chunks; more than a block of 32 chunks
CASES = [
    (1, [1, 40]),
    (2, [1, 101]),
    (64, [1, 63, 3000]),
    (128, [127, 129, 5000]),
    (256, [255, 9000]),
    (512, [768, 20_000]),
    (1024, [1023, 1024, 40_000]),
    (4096, [1, 768, 4095, 4097, 200_001]),
    (8192, [768, 8191, 300_001]),
    (65536, [768, 65537, 200_000]),
    (1 << 20, [1, 768, 5000, 70_000]),
]


@pytest.mark.pairwise
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k,sizes", CASES)
def test_bits(threads, isa, dtype, k, sizes):
    out = torch.randn(k, dtype=torch.float64)
    for n in sizes:
        g = torch.randn(n + 1).to(dtype)[1:]  # not aligned
        for offset in (0, 1, 777 * k + k // 2 + 1, 2**31 + 4097, 2**33 * k - n // 2):
            check(threads, out, g, offset, isa, (1, 5) if offset else (1, 2))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("k", [4096, 65536])
def test_whole_blocks_of_chunks(threads, isa, k):
    g = torch.randn(70 * 4096 if k == 4096 else 2_200_000)
    check(threads, torch.zeros(k, dtype=torch.float64), g, 13 * k + 5, isa)


@pytest.mark.pairwise
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k,n", [(2, 99), (64, 500), (256, 5000), (4096, 10_001), (1 << 17, 10_001)])
def test_scale_and_dots(threads, isa, dtype, k, n):
    g, scale, dots = torch.randn(n).to(dtype), torch.rand(n) + 0.5, [torch.randn(n), torch.randn(n)]
    out = torch.zeros(k, dtype=torch.float64)
    check(threads, out, g, 3 * k + 1, isa, scale=scale, dots=dots)
    check(threads, out, g, 77, isa, scale=scale)
    check(threads, out, g, 2**40 + 1, isa, dots=dots[:1])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("k", [64, 256, 4096, 16384])
def test_pieces_give_the_bits_of_the_whole(threads, isa, k):
    n, offset = 50_000, 2**31 - 20_000
    g = torch.randint(-100, 101, (n,)).to(torch.bfloat16)
    want = torch.zeros(k, dtype=torch.float64)
    check(threads, want, g, offset, isa)
    native.sketch_fold(want, g, offset, SEED, None, (), isa)
    got = torch.zeros(k, dtype=torch.float64)
    cuts = [0, *sorted(torch.randperm(n)[:20].tolist()), n]
    for i in torch.randperm(21).tolist():
        if cuts[i + 1] > cuts[i]:
            native.sketch_fold(got, g[cuts[i] : cuts[i + 1]], offset + cuts[i], SEED, None, (), isa)
    assert torch.equal(got, want)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_read_or_written_beside(threads, isa, dtype):
    """NaN around the numbers and around the sketch stays where it is."""
    for k, n, offset in [(64, 100, 3), (1024, 1500, 700), (4096, 5000, 4000), (8192, 40_000, 123)]:
        memory, table = torch.full((n + 400,), math.nan, dtype=dtype), torch.full((k + 200,), math.nan, dtype=torch.float64)
        g, out = memory[200 : 200 + n], table[100 : 100 + k]
        g.copy_(torch.randn(n))
        out.zero_()
        want = torch.zeros(k, dtype=torch.float64)
        reference(want, g, offset=offset, seed=SEED)
        native.sketch_fold(out, g, offset, SEED, None, (), isa)
        assert torch.equal(out, want)
        assert bool(table[:100].isnan().all()) and bool(table[100 + k :].isnan().all())


@pytest.mark.pairwise
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("k", [64, 4096, 32768])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e30, 1e-12, 1e-30, 1e-39])
def test_extremes(threads, isa, k, dtype, size):
    g = (torch.randn(9000) * size).to(dtype)
    sums = check(threads, torch.zeros(k, dtype=torch.float64), g, 5, isa)
    assert 0 < float(sums[0]) < math.inf  # squares that fp32 cannot hold


@pytest.mark.parametrize("isa", ISAS)
def test_one_large_number_among_many(threads, isa):
    g = torch.randn(100_000)
    g[12345] = 3e19
    check(threads, torch.zeros(4096, dtype=torch.float64), g, 0, isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_subnormal_numbers_count_in_every_mode(threads, isa, dtype):
    g, scale = (torch.randn(9000) * 1e-40).to(dtype), torch.full((9000,), 0.5)
    if dtype == torch.float16:
        g = torch.randint(-1023, 1024, (9000,), dtype=torch.int16).abs().view(torch.float16)
    want, scaled = torch.zeros(1024, dtype=torch.float64), torch.zeros(1024, dtype=torch.float64)
    sums = reference(want, g, offset=9, seed=SEED)
    reference(scaled, g, offset=9, seed=SEED, scale=scale)
    assert want.count_nonzero() > 900
    if not torch.set_flush_denormal(True):
        pytest.skip("this machine cannot flush subnormal numbers")
    try:
        for n in (1, 2, 5):
            threads(n)
            got, got_scaled = torch.zeros(1024, dtype=torch.float64), torch.zeros(1024, dtype=torch.float64)
            of_kernel = native.sketch_fold(got, g, 9, SEED, None, (), isa)
            native.sketch_fold(got_scaled, g, 9, SEED, scale, (), isa)
            assert torch.equal(got, want) and torch.equal(got_scaled, scaled)
            assert float(of_kernel) == pytest.approx(float(sums), rel=3e-7, abs=0.0)
            # and the caller's own mode is as it was
            assert float(torch.tensor(1e-39) * torch.tensor(1.0)) == 0.0
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinities(threads, isa, bad):
    for k, n in [(64, 300), (1024, 5000), (65536, 9000)]:
        g = torch.randn(n)
        g[n // 3] = bad
        for count in (1, 5):
            threads(count)
            out = torch.zeros(k, dtype=torch.float64)
            sums = native.sketch_fold(out, g, 99, SEED, None, (g, torch.ones(n)), isa)
            assert int((~out.isfinite()).sum()) == 1 and not bool(sums.isfinite().any())
            assert bool(sums[0].isnan()) == math.isnan(bad)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_norm_of_equal_numbers(threads, isa, dtype):
    """Errors of fp32 sums of squares that all go the same way."""
    g = torch.full((300_000,), 0.1).to(dtype)
    sums = native.sketch_fold(torch.zeros(4096, dtype=torch.float64), g, 0, SEED, None, (), isa)
    assert float(sums[0]) == pytest.approx(float(g.double().square().sum()), rel=5e-7)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_do_not_depend_on_threads(threads, isa, dtype):
    g, sums = torch.randn(200_000).to(dtype), []
    for n in (1, 2, 5):
        threads(n)
        out = torch.zeros(65536, dtype=torch.float64)
        sums.append(native.sketch_fold(out, g, 31, SEED, None, (torch.ones(200_000),), isa))
    assert torch.equal(sums[0], sums[1]) and torch.equal(sums[0], sums[2])
