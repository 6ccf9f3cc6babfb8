"""ops/sketch/fold.py: its specification word by word; what inner products of sketches are worth; bad arguments."""

import itertools
import math

import numpy as np
import pytest
import torch

from lldfast.backends import extension
from lldfast.errors import InputError
from lldfast.ops.sketch.fold import fold
from lldfast.ops.sketch.philox import philox

needs_cpp = pytest.mark.skipif(extension() is None, reason="lldfast._C is not built")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
FAST = "torch" if extension() is None else "cpp"  # all backends give equal bits, so statistics need one of them
SEED = 0x0123456789ABCDEF


@pytest.fixture(params=["torch", pytest.param("cpp", marks=needs_cpp), pytest.param("cuda", marks=needs_gpu)])
def backend(request):
    return request.param


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def sketch(g, k, backend=FAST, offset=0, seed=SEED, **options):
    """The fold of g alone, and the sums, on the CPU."""
    device = "cuda" if backend == "cuda" else "cpu"
    out = torch.zeros(k, dtype=torch.float64, device=device)
    options = {key: [x.to(device) for x in v] if key == "dots" else v.to(device) for key, v in options.items()}
    sums = fold(out, g.to(device), offset=offset, seed=seed, backend=backend, **options)
    return out.cpu(), sums.cpu()


def integers(n, limit=100):
    return torch.randint(-limit, limit + 1, (n,)).float()


# Random123's own table of known answers (kat_vectors)
ANSWERS = [
    ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def plain_philox(counter, key):
    """Philox4x32-10 with Python's integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = p1 >> 32 ^ c1 ^ k0, p1 & 0xFFFFFFFF, p0 >> 32 ^ c3 ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


@pytest.mark.parametrize("counter,key,words", ANSWERS)
def test_philox_known_answers(counter, key, words):
    want = [int(word, 16) for word in words.split()]
    got = philox(tuple(torch.tensor([c, 1]) for c in counter), key[1] << 32 | key[0])
    assert [int(word[0]) for word in got] == want and list(plain_philox(counter, key)) == want


def plain_fold(g, k, offset, seed):
    """The docstring of ops/sketch/fold.py, read literally, with numpy's fp32; zeros are the sketch before."""
    size = min(k, 4096)
    tiles, n, g = k // size, g.numel(), g.float().reshape(-1).numpy()
    key = (seed & 0xFFFFFFFF, seed >> 32)
    out, i = np.zeros(k), np.arange(size)
    blocks = {}
    for c in range(offset // k, (offset + n - 1) // k + 1):
        low, high = c & 0xFFFFFFFF, c >> 32
        a, b = plain_philox((0, 2, low, high), key)[:2]
        total = blocks.setdefault(c // 32, np.zeros(k, np.float32))
        for tile in range(tiles):
            r = plain_philox((tile, 1, low, high), key)[0] % size
            words = [plain_philox((32 * tile + q, 0, low, high), key) for q in range(-(-min(size, 128) // 4))]
            bits = np.array(words, dtype=np.int64).reshape(-1)[i % 128] >> (i // 128) & 1
            at = c * k + ((a | 1) * tile + b) % tiles * size + (i ^ r) - offset
            inside = (at >= 0) & (at < n)
            x = np.where(inside, g[np.clip(at, 0, n - 1)], np.float32(0))
            total[tile * size : (tile + 1) * size] += np.where(bits == 1, -x, x)
    for block in sorted(blocks):
        out += blocks[block]
    return torch.from_numpy(out)


@pytest.mark.parametrize(
    "k,n,offset",
    [
        (1, 70, 0),
        (2, 150, 63),
        (64, 5000, 2**31 + 3),
        (128, 5000, 1),
        (256, 20000, 2**33 * 256 - 777),  # the index of a chunk passes 32 bits
        (512, 20000, 2**36 - 5),
        (4096, 200001, 4095),
        (8192, 300000, 2**33 * 8192 + 12345),
        (65536, 150000, 3 * 65536 - 7),
    ],
)
def test_the_specification(backend, k, n, offset):
    g = torch.randn(n)
    out, sums = sketch(g, k, backend, offset)
    assert torch.equal(out, plain_fold(g, k, offset, SEED))
    assert float(sums[0]) == pytest.approx(float(g.double().square().sum()), rel=3e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_scale_and_dots(backend, dtype):
    g, scale = torch.randn(9, 1111).to(dtype), torch.rand(9999) + 0.5
    dots = [torch.randn(9999), torch.randn(1111, 9).to(torch.bfloat16)]
    out, sums = sketch(g, 1024, backend, 55, scale=scale, dots=dots)
    scaled = g.float().reshape(-1) * scale
    assert torch.equal(out, plain_fold(scaled, 1024, 55, SEED))
    x = g.double().reshape(-1)
    want = [scaled.double().square().sum(), x @ dots[0].double(), x @ dots[1].double().reshape(-1)]
    assert torch.allclose(sums, torch.stack(want), rtol=3e-7, atol=1e-3 * 1e-3)
    assert sketch(g, 1024, backend, 55)[1].shape == (1,)
    assert sketch(g, 1024, backend, 55, dots=dots[:1])[1].shape == (2,)


def test_it_adds_and_is_linear(backend):
    k, x, y = 512, integers(30000), integers(30000)
    of_x, of_y = sketch(x, k, backend)[0], sketch(y, k, backend)[0]
    assert torch.equal(sketch(3 * x - 2 * y, k, backend)[0], 3 * of_x - 2 * of_y)
    out = of_x.to("cuda" if backend == "cuda" else "cpu", copy=True)
    fold(out, y.to(out.device), offset=0, seed=SEED, backend=backend)
    assert torch.equal(out.cpu(), of_x + of_y)


def test_fp64_is_taken_by_torch():
    g = torch.randn(3000, dtype=torch.float64) * 1e100
    out, sums = sketch(g, 4096, "auto")
    assert float(out.norm()) == pytest.approx(float(g.norm()), rel=1e-12) and float(sums[0]) == pytest.approx(float(g @ g))


@pytest.mark.parametrize("k", [64, 4096, 65536])
def test_pieces_shards_and_order_do_not_matter(backend, k):
    n, offset = 100_000, 3_000_000_019
    g = integers(n)
    want = sketch(g, k, backend, offset)[0]
    cuts = [0, *sorted(torch.randperm(n)[:9].tolist()), n]
    pieces = list(itertools.pairwise(cuts))
    for order in (pieces, pieces[::-1], [pieces[i] for i in torch.randperm(len(pieces))]):
        out = torch.zeros(k, dtype=torch.float64, device="cuda" if backend == "cuda" else "cpu")
        for a, b in order:
            fold(out, g[a:b].to(out.device), offset=offset + a, seed=SEED, backend=backend)
        assert torch.equal(out.cpu(), want)
    for shards in (1, 2, 4):
        step = -(-n // shards)
        assert torch.equal(sum(sketch(g[i : i + step], k, backend, offset + i)[0] for i in range(0, n, step)), want)


@pytest.mark.parametrize("k", [2, 64, 1024, 4096, 32768])
def test_entries_of_a_chunk_never_meet(backend, k):
    g = integers(k)
    out, sums = sketch(g, k, backend, offset=7 * k)
    assert torch.equal(out.abs().sort()[0], g.double().abs().sort()[0])
    assert float(sums[0]) == float(out @ out)
    moved = sketch(g, k, backend, offset=8 * k)[0]
    assert not torch.equal(moved, out)


def test_seeds_give_other_sketches(backend):
    g = integers(5000)
    seeds = [0, 1, 2**32, 2**63 + 1, 2**64 - 1]  # both halves of the key count
    outs = [sketch(g, 64, backend, seed=seed)[0] for seed in seeds]
    assert all(not torch.equal(outs[i], outs[j]) for i in range(5) for j in range(i))


def exact_variance(a, b, k):
    """Of <fold(a), fold(b)>: V0 / k without the pairs of one chunk, which never meet."""
    pad = -a.numel() % k
    a, b = (torch.cat([x.double().reshape(-1), torch.zeros(pad, dtype=torch.float64)]).reshape(-1, k) for x in (a, b))
    aa, bb, ab = a.square().sum(1), b.square().sum(1), (a * b).sum(1)
    return float(aa.sum() * bb.sum() - aa @ bb + ab.sum() ** 2 - ab @ ab) / k


def estimates(a, b, k, seeds):
    return torch.tensor([float(sketch(a, k, seed=s)[0] @ sketch(b, k, seed=s)[0]) for s in range(seeds)], dtype=torch.float64)


@pytest.mark.parametrize("shape", [(70,), (1,), (33, 9), (64, 64), (5, 4, 3, 2), (2, 1000), (1000, 2), (6001,)])
def test_inner_products_are_unbiased(shape):
    """Against the products of the tensors themselves, for those of any shape, in one flat space after one another."""
    seeds, k = 300, 32
    sizes = [torch.Size(shape).numel(), 500]
    a, b = (tuple(torch.randn(s) for s in (shape, (20, 25))) for _ in range(2))
    a = (a[0] + 0.3 * b[0], a[1])
    want = sum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))
    flat = [torch.cat([x.reshape(-1) for x in pair]) for pair in (a, b)]
    got = []
    for seed in range(seeds):
        outs = [torch.zeros(k, dtype=torch.float64) for _ in range(2)]
        for out, pair in zip(outs, (a, b), strict=True):
            fold(out, pair[0], offset=0, seed=seed, backend=FAST)
            fold(out, pair[1], offset=sizes[0], seed=seed, backend=FAST)
        got.append(float(outs[0] @ outs[1]))
    z = (sum(got) / seeds - want) / math.sqrt(exact_variance(*flat, k) / seeds)
    assert abs(z) < 4, z


@pytest.mark.parametrize("k,n,seeds", [(64, 2560, 4000), (256, 1500, 4000), (8192, 3 * 8192, 3000)])
@pytest.mark.parametrize("same", [False, True])
@needs_cpp
def test_variance_is_what_theory_says(k, n, seeds, same):
    a = torch.randn(n)
    b = a if same else 0.5 * a + torch.randn(n)
    got, want = estimates(a, b, k, seeds), exact_variance(a, b, k)
    error = got - float(a.double() @ b.double())
    assert abs(float(error.mean())) < 4 * math.sqrt(want / seeds)
    assert float(error.square().mean()) == pytest.approx(want, rel=0.1)


def adversarial(k, n=40_000):
    """Pairs that defeat a sketch with too little randomness."""
    place = torch.arange(n)
    rows = [torch.zeros(n // 100, 100) for _ in range(2)]
    rows[0][17], rows[1][317] = torch.randn(100), torch.randn(100)
    heavy = [torch.randn(n) / torch.randn(3, n).square().mean(0).sqrt() for _ in range(2)]  # Student's t, 3 degrees of freedom
    wave = torch.randn(2, k)
    return {
        "one-hot rows": rows,
        "one row, dense": (rows[0].reshape(-1), torch.randn(n)),
        "period k": (wave[0][place % k], wave[1][place % k]),
        "period k, equal": (wave[0][place % k], wave[0][place % k]),
        "period k / 8": (wave[0][place % (k // 8)], wave[1][place % (k // 8)]),
        "ones": (torch.ones(n), torch.ones(n)),
        "alternating": (1.0 - 2 * (place % 2), torch.ones(n)),
        "constant rows": tuple(torch.randn(n // 500, 1).expand(-1, 500) for _ in range(2)),
        "constant in tiles": tuple(torch.randn(-(-n // 4096)).repeat_interleave(4096)[:n] for _ in range(2)),
        "heavy tails": heavy,
        "heavy tails, equal": (heavy[0], heavy[0]),
    }


@pytest.mark.parametrize("k", [256, 8192])
@pytest.mark.parametrize("name", adversarial(256))
def test_structure_does_not_hurt(k, name):
    a, b = adversarial(k)[name]
    seeds = 40
    error = estimates(a, b, k, seeds) - float((a.double() * b.double()).sum())
    sigma = math.sqrt(exact_variance(a, b, k))
    assert float(error.abs().max()) <= 6 * sigma + 1e-4  # 1e-4: fp32 sums, where nothing can meet
    assert float(error.square().mean().sqrt()) <= 1.6 * sigma + 1e-4


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("n,k", [(5000, 4096), (90, 64), (10_000, 65536)])
def test_nan_and_infinities_come_through(backend, bad, n, k):
    g = torch.randn(n)
    g[n // 2] = bad
    out, sums = sketch(g, k, backend, 11)
    assert int((~out.isfinite()).sum()) == 1
    assert bool(sums[0].isnan()) if math.isnan(bad) else float(sums[0]) == math.inf
    assert bool(out.isnan().any()) == math.isnan(bad)


@pytest.mark.parametrize("size", [1e30, 1e18, 1e-12, 1e-30, 1e-40])
def test_extremes(backend, size):
    if backend == "cuda" and size == 1e-40:
        pytest.skip("subnormal numbers of the GPU have a test of their own")
    g = torch.randn(5000) * size
    out, sums = sketch(g, 1024, backend, 3)
    assert torch.equal(out, plain_fold(g, 1024, 3, SEED)) and bool(out.isfinite().all())
    assert float(sums[0]) == pytest.approx(float(g.double().square().sum()), rel=3e-7, abs=0.0)


def test_a_layout_that_is_not_contiguous(backend):
    g = integers(60_000).reshape(200, 300)
    want = sketch(g.T.contiguous(), 4096, backend)[0]
    assert torch.equal(sketch(g.T, 4096, backend)[0], want)
    sliced, scale = g[::2, 1::3], torch.rand(200, 300)[::2, 1::3]
    got = sketch(sliced, 256, backend, 5, scale=scale, dots=[sliced])
    want = sketch(sliced.contiguous(), 256, backend, 5, scale=scale.contiguous(), dots=[sliced.contiguous()])
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    assert float(got[1][1]) == float(sliced.double().square().sum())


def test_parameters_and_their_gradients_are_not_tracked(backend):
    g = torch.nn.Parameter(integers(100))
    out, sums = sketch(g, 64, backend, scale=torch.ones(100, requires_grad=True), dots=[g])
    assert not out.requires_grad and not sums.requires_grad


def test_nothing(backend):
    out, sums = sketch(torch.empty(0, 5), 64, backend, dots=[torch.empty(0)])
    assert not out.any() and sums.tolist() == [0.0, 0.0] and sums.dtype == torch.float64


G = torch.zeros(10)
OUT = torch.zeros(64, dtype=torch.float64)


@pytest.mark.parametrize(
    "change,words",
    [
        ({"out": torch.zeros(63, dtype=torch.float64)}, "power of two, got 63"),
        ({"out": torch.zeros(0, dtype=torch.float64)}, "power of two, got 0"),
        ({"out": torch.zeros(64)}, "out must be a contiguous fp64 vector, got torch.float32"),
        ({"out": torch.zeros(8, 8, dtype=torch.float64)}, "out must be a contiguous fp64 vector"),
        ({"out": torch.zeros(128, dtype=torch.float64)[::2]}, "out must be a contiguous fp64 vector"),
        ({"out": OUT.to("meta")}, "out is on meta, g on cpu"),
        ({"g": torch.zeros(10, dtype=torch.int64)}, "g must be fp32, bf16, fp16 or fp64, got torch.int64"),
        ({"offset": -1}, "offset must be an integer >= 0, got -1"),
        ({"offset": 1.0}, "offset must be an integer >= 0, got 1.0"),
        ({"offset": True}, "offset must be an integer >= 0, got True"),
        ({"offset": 2**62}, "offset"),
        ({"seed": -1}, "seed must be an integer in"),
        ({"seed": 2**64}, "seed must be an integer in"),
        ({"seed": True}, "seed must be an integer in"),
        ({"seed": 0.5}, "seed must be an integer in"),
        ({"dots": [G] * 3}, "at most 2 tensors in dots, got 3"),
        ({"dots": [G, torch.zeros(9)]}, "dots has 9 entries, g has 10"),
        ({"dots": [G.to("meta")]}, "dots is on meta, g on cpu"),
        ({"scale": torch.ones(11)}, "scale has 11 entries, g has 10"),
        ({"scale": torch.ones(10, dtype=torch.float64)}, "scale must be fp32, got torch.float64"),
        ({"scale": torch.ones(10, device="meta")}, "scale is on meta, g on cpu"),
        ({"backend": "cuda"}, "cuda"),
        ({"backend": "fast"}, "fast"),
    ],
)
def test_bad_arguments(change, words):
    arguments = {"out": OUT.clone(), "g": G, "offset": 0, "seed": 0, **change}
    with pytest.raises(InputError) as raised:
        fold(arguments.pop("out"), arguments.pop("g"), **arguments)
    assert words in str(raised.value)


@needs_cpp
def test_a_named_kernel_refuses_fp64():
    with pytest.raises(InputError, match="fp64"):
        fold(OUT.clone(), G.double(), offset=0, seed=0, backend="cpp")
