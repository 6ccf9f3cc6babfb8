"""fold_outer and fold_rows: every backend, instruction set and thread count against folding the product itself."""

import pytest
import torch

from lldfast.backends import extension
from lldfast.errors import InputError
from lldfast.ops import native
from lldfast.ops.sketch import outer as sketch_outer
from lldfast.ops.sketch.fold import fold
from lldfast.ops.sketch.outer import fold_outer, fold_rows, reference, rows_reference

pytestmark = pytest.mark.usefixtures("threads")

C = extension()
ISAS = [isa for isa in ([] if C is None else C.supported_isas()) if isa != "amx"]
needs_cpp = pytest.mark.skipif(C is None, reason="lldfast._C is not built")
BACKENDS = ["torch", pytest.param("cpp", marks=needs_cpp)]
SEED = 0x0123456789ABCDEF

# samples, tokens, I, O, k, offset: nothing a multiple of anything; one tile, many, part of one; several chunks; past 2^31
SHAPES = [
    (1, 1, 1, 1, 64, 0),
    (2, 1, 7, 1, 64, 61),
    (2, 3, 1, 9, 128, 1000),
    (3, 5, 33, 50, 64, 4095),
    (2, 17, 100, 129, 1024, 3),
    (1, 300, 96, 97, 4096, 12345),
    (2, 31, 216, 70, 1 << 14, 2**31 + 77),
    (1, 64, 130, 191, 1 << 18, 2**33 - 5000),
    (1, 9, 4100, 3, 1 << 13, 8191),
]


def make(samples, tokens, width, rows, dtype=torch.float32):
    return torch.randn(samples, tokens, width).to(dtype), torch.randn(samples, tokens, rows).to(dtype)


def empty(samples, k):
    return torch.zeros(samples, k, dtype=torch.float64)


def folded(a, b, k, offset, scale=None):
    """Each W_n made in fp64 and folded by the sketch's own op."""
    out, squares = empty(len(a), k), torch.zeros(len(a), dtype=torch.float64)
    for n in range(len(a)):
        w = b[n].double().T @ a[n].double()
        squares[n] = fold(out[n], w, offset=offset, seed=SEED, scale=scale, backend="torch")[0]
    return out, squares


def agree(got, want, limit=2e-6):
    for x, y in zip(got, want, strict=True):
        assert bool(
            ((x - y).norm(dim=-1) <= limit * y.norm(dim=-1)).all() if x.dim() > 1 else ((x - y).abs() <= limit * y.abs()).all()
        )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scaled", [False, True])
def test_reference(shape, scaled, monkeypatch):
    *sizes, k, offset = shape
    a, b = make(*sizes)
    scale = torch.rand(sizes[3], sizes[2]) if scaled else None
    monkeypatch.setattr(sketch_outer, "BLOCK_ENTRIES", 3000)  # several blocks of rows
    out = empty(sizes[0], k)
    agree(
        (out, reference(out, a, b, offset=offset, seed=SEED, scale=scale)), folded(a, b, k, offset, scale), 1e-12 + 1e-7 * scaled
    )


@pytest.mark.pairwise
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scaled", [False, True])
def test_backends(shape, backend, scaled):
    *sizes, k, offset = shape
    a, b = make(*sizes)
    scale = torch.rand(sizes[3] * sizes[2]) if scaled else None
    out = torch.ones(sizes[0], k, dtype=torch.float64)
    squares = fold_outer(out, a, b, offset=offset, seed=SEED, scale=scale, backend=backend)
    agree((out - 1, squares), folded(a, b, k, offset, scale))


@needs_cpp
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", SHAPES)
def test_isa(isa, shape):
    *sizes, k, offset = shape
    a, b = make(*sizes)
    scale = torch.rand(sizes[3] * sizes[2])
    for factor in (None, scale):
        out = empty(sizes[0], k)
        agree((out, native.sketch_outer(out, a, b, offset, SEED, factor, isa)), folded(a, b, k, offset, factor))


@needs_cpp
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("k", [1, 2, 4, 8, 32, 64, 512])
def test_small_sketches(isa, k):
    a, b = make(2, 6, 19, 23)
    out = empty(2, k)
    got = native.sketch_outer(out, a, b, 5, SEED, None, isa)
    want, squares = folded(a, b, k, 5)
    assert bool(((out - want).abs() <= 1e-4).all())
    agree((got,), (squares,))


@needs_cpp
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32), (torch.float32, torch.bfloat16)]
)
def test_dtypes(isa, dtypes):
    a, b = (x.to(dtype) for x, dtype in zip(make(2, 40, 37, 53), dtypes, strict=True))
    out = empty(2, 1024)
    agree((out, native.sketch_outer(out, a, b, 99, SEED, None, isa)), folded(a, b, 1024, 99))


def test_fp64_is_summed_in_fp64():
    a, b = make(2, 40, 37, 53, torch.float64)
    out = empty(2, 1024)
    agree((out, fold_outer(out, a, b, offset=99, seed=SEED)), folded(a, b, 1024, 99), 1e-12)


@needs_cpp
@pytest.mark.parametrize("isa", ISAS)
def test_threads_and_other_samples_change_no_bit(isa, threads):
    a, b = make(5, 33, 70, 45)
    results = []
    for n in (1, 2, 4):
        threads(n)
        out = empty(5, 2048)
        results.append((out, native.sketch_outer(out, a, b, 777, SEED, None, isa)))
    alone = empty(1, 2048)
    native.sketch_outer(alone, a[3:4], b[3:4], 777, SEED, None, isa)
    for out, squares in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(squares, results[0][1])
    assert torch.equal(alone[0], results[0][0][3])


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend):
    a, b = torch.randn(40, 3, 2, 37).transpose(0, 1)[:, :, 1], torch.randn(3, 53, 40).transpose(1, 2)
    assert a.stride(2) == 1 and not a.is_contiguous() and b.stride(2) != 1
    for x, y in ((a, b), (b, a), (a[:, ::3], b[:, ::3]), (a[:1].expand(3, -1, -1), b)):
        out = empty(3, 512)
        agree((out, fold_outer(out, x, y, offset=11, seed=SEED, backend=backend)), folded(x, y, 512, 11))


def test_transposed_weight():
    """A weight kept as [in, out] is the one of swapped a and b."""
    a, b = make(1, 12, 30, 20)
    out, want = empty(1, 256), empty(1, 256)
    fold_outer(out, b, a, offset=40, seed=SEED)
    fold(want[0], (b[0].T @ a[0]).T.contiguous(), offset=40, seed=SEED)
    agree((out,), (want,))


def test_long_strips_and_slabs():
    """More tokens than a slab has, more rows than a strip has, a last panel of columns that is not full."""
    a, b = make(1, 700, 530, 250)
    out = empty(1, 4096)
    agree((out, fold_outer(out, a, b, offset=4000, seed=SEED)), folded(a, b, 4096, 4000))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_infinity_come_through(backend):
    for value in (float("nan"), float("inf")):
        a, b = make(3, 8, 40, 30)
        a[1, 2, 3] = value
        out = empty(3, 512)
        squares = fold_outer(out, a, b, offset=0, seed=SEED, backend=backend)
        assert squares.isfinite().tolist() == [True, False, True]
        assert out.isfinite().all(1).tolist() == [True, False, True]


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_and_tiny_squares(backend):
    for factor in (1e25, 1e-30):
        a, b = make(1, 8, 40, 30)
        out = empty(1, 512)
        squares = fold_outer(out, a * factor, b, offset=0, seed=SEED, backend=backend)
        agree((out, squares), folded(a * factor, b, 512, 0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_fold(backend):
    for n, t, i, o in ((0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)):
        out = torch.ones(n, 64, dtype=torch.float64)
        squares = fold_outer(out, torch.ones(n, t, i), torch.ones(n, t, o), offset=0, seed=1, backend=backend)
        assert squares.tolist() == [0.0] * n and bool((out == 1).all())


def test_no_gradient_is_recorded():
    a, b = (x.requires_grad_() for x in make(1, 3, 4, 5))
    out = empty(1, 64)
    assert not fold_outer(out, a, b, offset=0, seed=1).requires_grad and not out.requires_grad


BAD = [
    ({"out": torch.zeros(2, 64)}, "fp64"),
    ({"out": torch.zeros(2, 65, dtype=torch.float64)}, "power of two"),
    ({"out": torch.zeros(64, 2, dtype=torch.float64).T}, "contiguous"),
    ({"out": torch.zeros(3, 64, dtype=torch.float64)}, "agree"),
    ({"a": torch.zeros(2, 4, 5)}, "agree"),
    ({"a": torch.zeros(3, 5)}, "a must be"),
    ({"b": torch.zeros(2, 3, 5, dtype=torch.int32)}, "b must be"),
    ({"offset": -1}, "offset"),
    ({"offset": 1.0}, "offset"),
    ({"seed": -1}, "seed"),
    ({"scale": torch.ones(7)}, "scale"),
    ({"scale": torch.ones(20, dtype=torch.float64)}, "scale"),
    ({"backend": "cuda"}, "cuda"),
    ({"backend": "nonsense"}, "nonsense"),
]


@pytest.mark.parametrize("change,message", BAD)
def test_refused(change, message):
    good = {"out": empty(2, 64), "a": torch.zeros(2, 3, 4), "b": torch.zeros(2, 3, 5), "offset": 0, "seed": 0, "scale": None}
    call = {**good, **change}
    with pytest.raises(InputError, match=message):
        fold_outer(call.pop("out"), call.pop("a"), call.pop("b"), **call)


@needs_cpp
def test_cpp_refuses_fp64():
    a, b = make(1, 2, 3, 4, torch.float64)
    with pytest.raises(InputError, match="fp64"):
        fold_outer(empty(1, 64), a, b, offset=0, seed=0, backend="cpp")


ROWS = [(4, 1, 1, 1), (64, 33, 9, 3), (1024, 2000, 5, 2), (1 << 14, 216, 40, 4), (1 << 13, 9000, 3, 3)]  # k, width, rows, samples


@pytest.mark.parametrize("k,width,count,samples", ROWS)
def test_rows(k, width, count, samples, threads):
    rows = torch.randn(count, width)
    sample = torch.arange(count) * samples // count
    place = torch.randint(0, 2**33, (count,))
    want = empty(samples, k)
    for r in range(count):
        fold(want[sample[r]], rows[r], offset=int(place[r]), seed=SEED, backend="torch")
    found = [empty(samples, k)]
    rows_reference(found[0], rows, sample, place, seed=SEED)
    for isa in ISAS:
        for n in (1, 3):
            threads(n)
            found.append(empty(samples, k))
            native.sketch_rows(found[-1], rows, sample, place, SEED, isa)
    found.append(empty(samples, k))
    fold_rows(found[-1], rows.T.contiguous().T, sample, place, seed=SEED)
    for out in found:
        agree((out,), (want,), 1e-6)


def test_rows_of_several_blocks(monkeypatch):
    monkeypatch.setattr(sketch_outer, "ROW_ENTRIES", 50)
    rows, sample, place = torch.randn(11, 30).half(), torch.zeros(11, dtype=torch.int64), torch.arange(11) * 30 + 7
    for backend in ("torch", "auto"):
        out, want = empty(2, 128), empty(2, 128)
        fold_rows(out, rows, sample, place, seed=2, backend=backend)
        fold(want[0], rows, offset=7, seed=2)
        agree((out[:1],), (want[:1],))
        assert not out[1].any()


@pytest.mark.parametrize(
    "change,message",
    [
        ({"rows": torch.zeros(3)}, "rows must be"),
        ({"sample": torch.tensor([0, 1])}, "sample must be"),
        ({"sample": torch.tensor([0, 1, 0])}, "ascend"),
        ({"sample": torch.tensor([0, 1, 2])}, "ascend"),
        ({"place": torch.tensor([0, 1, -2])}, "place"),
        ({"place": torch.zeros(3)}, "place"),
        ({"seed": 2**64}, "seed"),
    ],
)
def test_rows_refused(change, message):
    good = {"rows": torch.zeros(3, 4), "sample": torch.tensor([0, 1, 1]), "place": torch.tensor([0, 9, 5]), "seed": 0}
    call = {**good, **change}
    with pytest.raises(InputError, match=message):
        fold_rows(empty(2, 64), call["rows"], call["sample"], call["place"], seed=call["seed"])
