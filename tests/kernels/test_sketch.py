"""lldfast_kernels.sketch in the interpreter: the bits of lldfast/ops/sketch/fold.py, and gradients of linear layers
that are folded without being stored.
"""

import itertools

import pytest
import torch

from lldfast.errors import InputError
from lldfast.ops.sketch.fold import BLOCK, TILE, fold, reference
from lldfast.ops.sketch.outer import fold_outer
from lldfast.ops.sketch.philox import philox

pytestmark = [
    pytest.mark.usefixtures("interpreted"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # of products that wrap, which is what Philox wants
]

SEED = 0xFEDCBA9876543210
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAN, INF = float("nan"), float("inf")
BIG = 2**31

# Few tiles of an interpreted kernel take a second: each line is here for what stands behind it.
PLACES = [  # k, n, offset
    (1, 1, 0),
    (1, 35, 2**33 + 30),  # chunk numbers past 2^32, two blocks
    (2, 67, 1),
    (64, 64 * 35, 37),  # two blocks, the first and last chunk in part
    (256, 256, 256),  # one chunk, exactly
    (256, 1000, 256 * (2**32 + 31) + 3),  # chunk numbers past 2^32, a block's end after the first chunk
    (4096, 4096 * 3, 4096 * 31),  # whole tiles, two blocks
    (4096, 9000, BIG + 4095),
    (4096, 2, 4095),  # two chunks, an entry in each
    (8192, 8192 * 3 + 5, 8191),
    (8192, 5000, 3000),
    (8192, 8192, 31 * 8192 + 4097),  # as many tiles as a chunk, and one more; two blocks
    (32768, 33000, 7 * 32768 - 11),
    (32768, 100, 3 * BIG + 4090),  # fewer tiles than a chunk: by source, two tiles
    (2**22, 9000, 5 * 2**22 + 77),  # 1024 tiles: inverses modulo more than Newton's first step gives
]
# Tensors that reach over a chunk's end by source, so that buckets get terms of two chunks: within a block, and of two blocks.
MEETING = [(65536, 14 * TILE, 65536 - 7 * TILE + 5), (65536, 10 * TILE, 64 * 65536 - 4 * TILE - 1)]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def kernel(*args):
    from lldfast_kernels.sketch import sketch_fold

    return sketch_fold(*args)


def outer(*args):
    from lldfast_kernels.sketch import sketch_outer

    return sketch_outer(*args)


def folds_alike(k, g, offset, scale=None, dots=(), seed=SEED):
    """Bits of the sketch and of where it was already; sums but for their rounding."""
    got = torch.randn(k, dtype=torch.float64)
    want = got.clone()
    sums = kernel(got, g, offset, seed, scale, list(dots))
    torch.testing.assert_close(
        sums, reference(want, g, offset=offset, seed=seed, scale=scale, dots=dots), rtol=1e-13, atol=1e-13, equal_nan=True
    )
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("k,n,offset", PLACES + MEETING)
def test_bits_of_the_reference(k, n, offset):
    folds_alike(k, torch.randn(n), offset)


@pytest.mark.parametrize("k,n,offset", MEETING)
def test_the_meeting_of_two_chunks_is_tested(k, n, offset):
    """Else the order of terms, and which program owns a bucket, would not be: some tile gets both, some the second alone."""
    from lldfast.ops.sketch.fold import tile_plan

    first, last = offset // TILE, (offset + n - 1) // TILE
    chunk, target, _, _ = tile_plan(first, last - first + 1, k, SEED, torch.device("cpu"))
    of = [set(target[chunk == c].tolist()) for c in chunk.unique()]
    assert len(of) == 2 and of[0] & of[1] and of[1] - of[0]


@pytest.mark.pairwise
@pytest.mark.parametrize("dots", [0, 1, 2])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_scale_and_inner_products(dtype, scaled, dots):
    n = 4096 + 301
    scale = torch.randn(n).exp() if scaled else None
    folds_alike(4096, torch.randn(n).to(dtype), 4000, scale, [torch.randn(n) for _ in range(dots)])


@pytest.mark.parametrize("k,n,offset", [(256, 700, 100), (32768, 4000, 32700)])
def test_everything_at_other_sizes(k, n, offset):
    folds_alike(k, torch.randn(n).half(), offset, torch.rand(n), [torch.randn(n), torch.randn(n)])


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 1])
def test_seeds_of_64_bits(seed):
    folds_alike(128, torch.randn(200), 77, seed=seed)


@pytest.mark.parametrize("k", [64, 4096])
def test_many_blocks_a_few_at_a_time(k, monkeypatch):
    """Slabs of two blocks, the last of one, which needs no partial sums; more blocks in a second pass than its loads ahead."""
    from lldfast_kernels import tuning

    n = k * BLOCK * (1 if k == TILE else 2)
    want = torch.randn(k, dtype=torch.float64)
    out, g = want.clone(), torch.randn(n)
    reference(want, g, offset=5, seed=SEED)
    for ahead, most in ((16, 2), (2, 99)):
        got = out.clone()
        monkeypatch.setattr(tuning, "SKETCH_PARTIAL_BYTES", 4 * k * most)
        monkeypatch.setattr(tuning, "SKETCH_COMBINE_AHEAD", ahead)
        kernel(got, g, 5, SEED, None, [])
        assert torch.equal(got, want), (ahead, most)


@pytest.mark.parametrize("k,n,offset", PLACES + MEETING + [(2**20, 100, 2**25 - 50), (2**24, 3, BIG), (16, 10**6, 7)])
def test_work_is_that_of_the_tensor(k, n, offset):
    """Every block once, and no more programs than tiles are touched, or those of one chunk more for each end."""
    from lldfast_kernels.sketch import launches

    size = min(k, TILE)
    tiles, touched = k // size, (offset + n - 1) // size - offset // size + 1
    for most in (1, 3, 10**6):
        plan = launches(n, offset, k, most)
        blocks = [block for launch in plan for block in range(launch.first_block, launch.first_block + launch.blocks)]
        assert blocks == list(range(offset // (BLOCK * k), (offset + n - 1) // (BLOCK * k) + 1))
        assert all(launch.blocks <= most for launch in plan)
        programs = sum(launch.programs for launch in plan)
        assert programs <= (touched if touched < tiles else touched // BLOCK + 2 * tiles), (most, plan)


@pytest.mark.parametrize("k", [64, 4096])
def test_nan_and_infinities_come_through(k):
    g = torch.randn(k + 100)
    g[3], g[50], g[k], g[k + 20] = NAN, INF, -INF, INF
    folds_alike(k, g, 9)
    folds_alike(k, torch.where(g.isfinite(), g, 0.0), 9, torch.where(g.isfinite(), 1.0, g), [g])


def test_an_empty_tensor():
    out = torch.ones(64, dtype=torch.float64)
    got = kernel(out, torch.empty(0), 5, SEED, None, [torch.empty(0)])
    assert torch.equal(got, torch.zeros(2, dtype=torch.float64)) and torch.equal(out, torch.ones(64, dtype=torch.float64))


@pytest.mark.parametrize("k", [64, 8192])
def test_pieces_make_the_whole_of_integers(k):
    """Sums of integers are exact in any order: a vector folded in pieces, last first, has the bits of one call."""
    n, offset = 3 * k + 41, BIG + 100
    g = torch.randint(-1000, 1000, (n,)).float()
    whole, parts = (torch.zeros(k, dtype=torch.float64) for _ in range(2))
    total = kernel(whole, g, offset, SEED, None, [])
    cuts = [0, 1, 30, k, k + 7, n]
    pieces = [kernel(parts, g[i:j].contiguous(), offset + i, SEED, None, []) for i, j in reversed(list(itertools.pairwise(cuts)))]
    assert torch.equal(whole, parts) and torch.equal(total, torch.stack(pieces).sum(0))


def test_philox_has_random123s_answers(monkeypatch):
    import triton
    import triton.language

    from lldfast_kernels.sketch import philox_words

    for name, value in (("tl", triton.language), ("words", philox_words)):  # the interpreter sees no names but global ones
        monkeypatch.setitem(globals(), name, value)

    @triton.jit
    def answer(counter_ptr, out_ptr, seed_lo, seed_hi):
        i = tl.arange(0, 4)  # noqa: F821
        c0, c1, chunk = (tl.load(counter_ptr + 4 * j + i) for j in range(3))  # noqa: F821
        for j, word in enumerate(words(c0, c1, chunk, seed_lo, seed_hi)):  # noqa: F821
            tl.store(out_ptr + 4 * j + i, word.to(tl.int64))  # noqa: F821

    full, pi = 0xFFFFFFFF, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    known = [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((full, full, full, full), 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (pi, 0x299F31D0A4093822, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ]
    for (c0, c1, c2, c3), seed, want in known:
        chunk = c2 | c3 << 32
        counter = torch.tensor([[c0], [c1], [chunk - (chunk >> 63 << 64)]]).repeat(1, 4)
        counter[0, 1] ^= 1  # and another counter beside it
        got = torch.empty(4, 4, dtype=torch.int64)
        lo, hi = (half - (half >> 31 << 32) for half in (seed & full, seed >> 32))
        answer[(1,)](counter, got, lo, hi)
        assert tuple(got[:, 0].tolist()) == want
        other = philox(tuple(torch.tensor([c]) for c in (c0 ^ 1, c1, c2, c3)), seed)
        assert got[:, 1].tolist() == [int(word) for word in other]


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"out": torch.zeros(64)}, "float64"),
        ({"out": torch.zeros(2, 64, dtype=torch.float64)}, "vectors"),
        ({"out": torch.zeros(48, dtype=torch.float64)}, "power of two"),
        ({"g": torch.zeros(5, dtype=torch.float64)}, "float64"),
        ({"g": torch.zeros(10)[::2]}, "contiguous"),
        ({"offset": -1}, "offset"),
        ({"scale": torch.ones(4)}, "5 numbers"),
        ({"scale": torch.ones(5).half()}, "float16"),
        ({"dots": [torch.ones(5)] * 3}, "at most 2"),
        ({"dots": [torch.ones(5), torch.ones(6)]}, r"dots\[1\]"),
        ({"g": torch.zeros(5, device="meta")}, "meta"),
    ],
)
def test_refusals(arguments, message):
    usual = {"out": torch.zeros(64, dtype=torch.float64), "g": torch.zeros(5), "offset": 0, "seed": 0, "scale": None, "dots": []}
    with pytest.raises(ValueError, match=message):
        kernel(*(usual | arguments).values())


@pytest.mark.parametrize("k,n,offset", [(64, 200, 3), (8192, 9000, BIG + 1), (32768, 60, 5)])
def test_through_the_public_function(k, n, offset):
    g = torch.randn(n + 1).bfloat16()[1:].requires_grad_()  # memory that is not aligned
    scale, dots = torch.rand(n), [torch.randn(n).double()]
    out, want = torch.zeros(k, dtype=torch.float64), torch.zeros(k, dtype=torch.float64)
    got = fold(out, g, offset=offset, seed=SEED, scale=scale, dots=dots, backend="triton")
    with torch.no_grad():
        sums = reference(want, g, offset=offset, seed=SEED, scale=scale, dots=[d.float() for d in dots])
    assert torch.equal(out, want) and not got.requires_grad
    torch.testing.assert_close(got, sums, rtol=1e-13, atol=1e-13)


def test_the_public_function_refuses_fp64():
    with pytest.raises(InputError, match="fp64"):
        fold(torch.zeros(8, dtype=torch.float64), torch.zeros(3, dtype=torch.float64), offset=0, seed=0, backend="triton")


def outer_agrees(k, a, b, offset, scale=None):
    samples = len(a)
    out = torch.randn(samples, k, dtype=torch.float64)
    want = out.clone()
    got = outer(out, a, b, offset, SEED, scale)
    w = torch.einsum("nto,nti->noi", b.double(), a.double()).reshape(samples, -1)
    sums = [reference(to, row, offset=offset, seed=SEED, scale=scale)[0] for to, row in zip(want, w)]
    atol = 1e-6 * float(w.abs().max() if scale is None else (w * scale).abs().max()) * (1 + w.shape[1] / k) ** 0.5
    torch.testing.assert_close(out, want, rtol=1e-6, atol=atol)
    torch.testing.assert_close(got, torch.stack(sums), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "k,samples,tokens,rows,width,offset",
    [
        (1, 1, 2, 5, 8, 3),
        (64, 2, 3, 30, 80, 17),  # two blocks, in partial sums of each sample
        (256, 3, 1, 7, 33, BIG * 256 + 5),
        (4096, 2, 5, 100, 130, 4095),  # a tile has 32 rows
        (4096, 1, 4, 3, 5000, 77),  # a row is more than a tile
        (8192, 2, 3, 5, 4096, 2**33),
        (32768, 2, 3, 13, 101, 32768 * 32 - 500),  # by source, two blocks
        (4096, 1, 1, 4096 * 33, 1, 0),
    ],
)
def test_outer(k, samples, tokens, rows, width, offset):
    outer_agrees(k, torch.randn(samples, tokens, width), torch.randn(samples, tokens, rows), offset)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scaled", [False, True])
def test_outer_of_dtypes_scale_and_strides(dtype, scaled):
    memory = torch.randn(6, 3, 50).to(dtype)  # tokens before samples, every second token, columns out of wider rows
    a, b = memory[::2, :2, 5:38].transpose(0, 1), memory[1::2, 1:, :20].transpose(0, 1)
    scale = torch.rand(33 * 20) if scaled else None
    outer_agrees(512, a, b, 9, scale)
    columns = torch.randn(2, 17, 3).to(dtype).transpose(1, 2)  # whose last dimension is not contiguous
    outer_agrees(64, columns, columns.flip(2), 9)


@pytest.mark.parametrize("tokens", [3, 70])
def test_outer_through_the_public_function(tokens):
    """Of two dtypes; with few tokens and with so many that products of matrices are folded."""
    a, b, scale = torch.randn(2, tokens, 12).half().requires_grad_(), torch.randn(2, tokens, 30), torch.rand(30, 12)
    out, want = torch.zeros(2, 64, dtype=torch.float64), torch.zeros(2, 64, dtype=torch.float64)
    got = fold_outer(out, a, b, offset=11, seed=SEED, scale=scale, backend="triton")
    sums = fold_outer(want, a.detach().double(), b.double(), offset=11, seed=SEED, scale=scale, backend="torch")
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(got, sums, rtol=1e-5, atol=0)
    assert not got.requires_grad


def test_outer_is_nan_only_where_a_sample_is():
    a, b = torch.randn(3, 4, 20), torch.randn(3, 4, 11)
    a[1, 2, 7] = NAN
    out = torch.zeros(3, 64, dtype=torch.float64)
    got = outer(out, a, b, 5, SEED, None)
    assert got.isnan().tolist() == [False, True, False] and out.isnan().any(1).tolist() == [False, True, False]
    clean = torch.zeros(2, 64, dtype=torch.float64)
    assert torch.equal(outer(clean, a[::2], b[::2], 5, SEED, None), got[::2]) and torch.equal(clean, out[::2])


def test_outer_of_nothing():
    out = torch.ones(2, 8, dtype=torch.float64)
    for a, b in [((2, 0, 3), (2, 0, 4)), ((2, 3, 0), (2, 3, 4)), ((2, 3, 4), (2, 3, 0))]:
        assert torch.equal(outer(out, torch.empty(a), torch.empty(b), 0, 1, None), torch.zeros(2, dtype=torch.float64))
    assert torch.equal(out, torch.ones(2, 8, dtype=torch.float64))
    assert outer(out[:0], torch.empty(0, 3, 4), torch.empty(0, 3, 4), 0, 1, None).shape == (0,)


def test_outer_refusals():
    out, a, b = torch.zeros(2, 8, dtype=torch.float64), torch.zeros(2, 3, 4), torch.zeros(2, 3, 5)
    for arguments, message in [
        ((out[:1], a, b, 0, 1, None), r"\[N, T, I\]"),
        ((out, a[:, :2], b, 0, 1, None), r"\[N, T, I\]"),
        ((out.float(), a, b, 0, 1, None), "float64"),
        ((out, a.double(), b, 0, 1, None), "float64"),
        ((out, a, b, 0, 1, torch.ones(19)), "20 numbers"),
    ]:
        with pytest.raises(ValueError, match=message):
            outer(*arguments)
