"""csrc/cpu/distill/distill.h: rows of both models' logits, every instruction set against the fp64 oracle and fp64 formulas."""

import math
import warnings

import pytest
import torch

from lldfast.backends import extension
from lldfast.ops import native
from lldfast.ops.distill import math as distill_math
from lldfast.ops.distill.options import ORDERS, DistillOptions
from lldfast.ops.distill.oracle import reference
from lldfast.ops.distill.spec import resolve

C = extension()
pytestmark = [pytest.mark.skipif(C is None, reason="lldfast._C is not built"), pytest.mark.usefixtures("threads")]
ISAS = [isa for isa in ([] if C is None else C.supported_isas()) if isa != "amx"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ALPHAS = [-math.inf, -5.0, -3.0, -1.0, 0.0, 0.5, 1 - 1e-5, 1.0, 1 + 1e-5, 3.0, 5.0, math.inf]
LAMS = [0.0, 0.1, 0.5, 0.9, 1.0]
DIVERGENCES = {
    "kl": {}, "rkl": {}, "js": {"beta": 0.3}, "ab": {"ab": (0.2, 0.7)}, "alpha": {"divergence_alpha": -3.0},
    "ab, no first": {"ab": (0.0, 1.0)}, "ab, no second": {"ab": (1.0, 0.0)}, "ab, neither": {"ab": (0.0, 0.0)},
    "ab, sum 0": {"ab": (0.5, -0.5)}, "ab, negative": {"ab": (-0.3, 0.8)},
}  # fmt: skip
# A loss of each kind, with an assistant that must be normalised.
SOME = [
    {"preset": "kl"}, {"preset": "rkl"}, {"preset": "skl"}, {"preset": "srkl"}, {"preset": "jsd"}, {"preset": "taid"},
    {"preset": "ab"}, {"preset": "amid"}, {"divergence": "js", "order": "rq", "alpha": 3.0, "lam": 0.3},
    {"divergence": "alpha", "order": "rp", "alpha": 0.0, "lam": 0.7}, {"divergence": "kl", "order": "pr", "alpha": -math.inf},
]  # fmt: skip


def options(name, **given):
    return {"divergence": name.split(",")[0], **DIVERGENCES[name], **given}


def spec_of(**given):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return resolve(DistillOptions.of(**given))


def call(student, teacher, y, isa, g=1.0, ce=None, gradient=True, out=None, **given):
    """(divergence, ce, gradient) of g * divergence + ce * cross entropy."""
    spec = spec_of(**given, **({} if ce is None else {"ce_weight": 1.0}))
    g_divergence = torch.full((len(student),), g)
    g_ce = None if ce is None else torch.full((len(student),), ce)
    if gradient and out is None:
        out = torch.empty_like(student, memory_format=torch.contiguous_format)
    gs = (g_divergence, g_ce) if gradient else (None, None)
    divergence, cross = native.distill_rows(student, teacher, y, spec, *gs, out, isa)
    return divergence, cross, out


def formulas(student, teacher, y=None, g=1.0, ce=None, **given):
    spec = spec_of(**given, **({} if ce is None else {"ce_weight": 1.0}))
    full = torch.ones(len(student), dtype=torch.float64)
    return distill_math.rows(student.double(), teacher.double(), y, spec, g * full, None if ce is None else ce * full)


def agrees(got, want, loss=2e-6, gradient=2e-6, floor=0.05):
    """Errors relative to each row's loss and gradient norm, or to `floor` where a saturated loss leaves less than that."""
    for a, b, limit in zip((got[0], got[2]), (want[0], want[2]), (loss, gradient), strict=True):
        a, b = (x.detach().double().reshape(len(x), -1) for x in (a, b))
        assert a.shape == b.shape and bool(torch.isfinite(a).all())
        assert float(((a - b).norm(dim=1) / b.norm(dim=1).clamp(min=floor)).max()) < limit
    assert bool(((got[1].double() - want[1]).abs() <= 1e-6 * (1 + want[1])).all())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_oracle(isa, name, product):
    """All assistants: rows of one call with the loss of every setting, their gradient from autograd."""
    student, teacher, y = torch.randn(2, 37) * 2, torch.randn(2, 37) * 2, torch.tensor([3, 36])
    for order, alpha, lam in product(ORDERS, ALPHAS, LAMS):
        if lam in (0.0, 1.0) and alpha != -1.0:
            continue  # there is no mixture
        given = options(name, order=order, alpha=alpha, lam=lam, temperature=1.0 if lam < 0.5 else 2.0)
        leaf = student.double().requires_grad_()
        loss = reference(leaf, teacher, y, reduction="none", **given)
        dz = torch.autograd.grad(loss.sum(), leaf)[0] if loss.requires_grad else torch.zeros_like(leaf)
        agrees(call(student, teacher, y, isa, **given), (loss, torch.zeros(2), dz), 5e-6, 1e-5)


@pytest.mark.pairwise
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("vocab", [1, 2, 17, 63, 64, 65, 257, 2049])
@pytest.mark.parametrize("given", SOME)
def test_sizes(isa, vocab, given):
    student, teacher, y = torch.randn(3, vocab) * 3, torch.randn(3, vocab) * 3, torch.randint(vocab, (3,))
    agrees(call(student, teacher, y, isa, ce=0.3, **given), formulas(student, teacher, y, ce=0.3, **given), 4e-6, 4e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("given", SOME)
def test_digits_of_a_large_vocabulary(isa, given):
    student, teacher = torch.randn(2, 50257) * 3, torch.randn(2, 50257) * 3
    agrees(call(student, teacher, None, isa, **given), formulas(student, teacher, **given), 2e-6, 4e-6, floor=0.02)


@pytest.mark.pairwise
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("vocabs", [(70, 65), (65, 70), (2100, 1000), (1000, 2100), (1024, 1025)])
@pytest.mark.parametrize("given", [{"preset": "jsd"}, {"preset": "ab"}, {"preset": "skl"}, {"preset": "amid", "alpha": 3.0}])
def test_vocabularies_that_differ(isa, vocabs, given):
    student, teacher, y = torch.randn(3, vocabs[0]), torch.randn(3, vocabs[1]), torch.randint(min(vocabs), (3,))
    want = formulas(student, teacher, y, ce=0.5, temperature=1.5, **given)
    agrees(call(student, teacher, y, isa, ce=0.5, temperature=1.5, **given), want, 4e-6, 4e-6)


@pytest.mark.parametrize("isa", ISAS)
def test_excluded_entries(isa, product):
    """-inf in the student, the teacher, both: what the formulas give, finite, infinite or none; NaN touches its token only."""
    student, teacher, y = torch.randn(6, 90), torch.randn(6, 90), torch.randint(80, 90, (6,))
    student[0, 5], teacher[1, 6], student[2, 7:30], teacher[2, 7:30] = [-math.inf] * 4
    student[3, 10:40], teacher[3, 30:80] = -math.inf, -math.inf
    for name, order, alpha, lam in product(DIVERGENCES, ORDERS, [-math.inf, -3.0, -1.0, 0.0, 1.0, 3.0, math.inf], LAMS):
        given = options(name, order=order, alpha=alpha, lam=lam)
        got, want = call(student, teacher, y, isa, ce=0.5, **given), formulas(student, teacher, y, ce=0.5, **given)
        clear = ~want[0].isnan()  # the formulas may meet inf - inf; the kernel gives inf there
        assert torch.equal((got[0] == math.inf)[clear], (want[0] == math.inf)[clear]), given
        sound = torch.isfinite(want[0]) & torch.isfinite(want[2]).all(-1)
        if bool(sound.any()):
            agrees([x[sound] for x in got], [x[sound] for x in want], 1e-5, 2e-5)
        assert bool((got[2][student == -math.inf] == 0).all())
    student[4, 3], teacher[5, 4] = math.nan, math.nan
    for given in SOME:
        divergence, _, dz = call(student, teacher, y, isa, **given)
        assert divergence.isnan().tolist()[4:] == [True, True] and not bool(divergence[:4].isnan().any())
        assert bool(dz[4].isnan().any()) and not bool(dz[2].isnan().any())
    assert call(student, teacher, y, isa, preset="kl")[0][0] == math.inf


@pytest.mark.parametrize("isa", ISAS)
def test_extremes(isa, product):
    student, teacher, y = torch.randn(4, 1100), torch.randn(4, 1100), torch.randint(1100, (4,))
    student[0] += 1e4
    teacher[1] -= 1e4
    student[2:] *= 30
    teacher[2:] *= 30
    for name, order, alpha in product(["kl", "js", "ab", "alpha"], ORDERS, ALPHAS):
        given = options(name, order=order, alpha=alpha, lam=0.3)
        if name == "alpha":
            given["divergence_alpha"] = 0.5  # exponents that no logits overflow
        got, want = call(student, teacher, y, isa, ce=0.5, **given), formulas(student, teacher, y, ce=0.5, **given)
        agrees(got, want, 1e-5, 2e-5, floor=0.1)
    # e^(x delta) beyond fp32 is infinite, not garbage.
    assert bool((call(student[2:] * 9, teacher[2:], None, isa, divergence="ab", lam=0.0, ab=(-2.0, 0.5))[0] == math.inf).all())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("student_dtype,teacher_dtype", [(a, b) for a in DTYPES for b in DTYPES])
def test_dtypes_and_places(isa, student_dtype, teacher_dtype):
    wide = [(torch.randn(5, 2 * 1300) * 3).to(dtype) for dtype in (student_dtype, teacher_dtype)]
    y = torch.randint(1200, (5,))
    rows = [x[:, 50:1250] for x in wide]
    for given in ({"preset": "skl"}, {"preset": "amid", "temperature": 2.0}):
        want = call(rows[0].contiguous(), rows[1].contiguous(), y, isa, ce=0.5, **given)
        limit = {torch.float32: 2e-6, torch.bfloat16: 3e-3, torch.float16: 6e-4}[student_dtype]
        agrees(want, formulas(*rows, y, ce=0.5, **given), 2e-6, limit)
        for student in (rows[0], rows[0].clone(), rows[0].clone().t().contiguous().t()):  # columns that are not contiguous too
            got = call(student, rows[1], y, isa, ce=0.5, **given)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        for out in (
            torch.full((5, 1300), 7.0, dtype=torch.float32)[:, :1200],
            torch.empty(1200, 5).t(),
            torch.empty(5, 2400)[:, ::2],
        ):
            call(rows[0], rows[1], y, isa, ce=0.5, out=out, **given)
            assert torch.equal(out.to(student_dtype), want[2])
        in_place = wide[0].clone()  # the very rows, then the same memory a column further
        call(in_place[:, 50:1250], rows[1], y, isa, ce=0.5, out=in_place[:, 50:1250], **given)
        assert torch.equal(in_place[:, 50:1250], want[2]) and torch.equal(in_place[:, 1250:], wide[0][:, 1250:])
        shifted = wide[0].clone()
        call(shifted[:, 50:1250], rows[1], y, isa, ce=0.5, out=shifted[:, 51:1251], **given)
        assert torch.equal(shifted[:, 51:1251], want[2])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("given", SOME)
def test_coefficients(isa, given, product):
    student, teacher, y = torch.randn(5, 300), torch.randn(5, 300), torch.randint(300, (5,))
    for g, ce, more in product([0.0, -1.7], [None, 0.0, 0.8], [{}, {"temperature": 0.5}, {"detach_assistant": True}]):
        got = call(student, teacher, y, isa, g=g, ce=ce, **(given | more))
        agrees(got, formulas(student, teacher, y, g=g, ce=ce, **(given | more)), 4e-6, 1e-5)
        alone = call(student, teacher, y, isa, ce=ce, gradient=False, **(given | more))
        assert torch.equal(alone[0], got[0]) and torch.equal(alone[1], got[1])
    sure = torch.zeros(1, 300)
    sure[0, 7] = 17.0  # p - 1 is 1e-5 there: a rounded p has few of its digits
    want = formulas(sure, teacher[:1], torch.tensor([7]), g=0.0, ce=1.0, **given)
    got = call(sure, teacher[:1], torch.tensor([7]), isa, g=0.0, ce=1.0, **given)
    assert float(got[2][0, 7] / want[2][0, 7] - 1) == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("isa", ISAS)
def test_bits_do_not_depend_on_the_company(threads, isa):
    student, teacher, y = torch.randn(23, 1500), torch.randn(23, 1400), torch.randint(1400, (23,))
    for given in ({"preset": "jsd"}, {"preset": "amid"}):
        threads(1)
        want = call(student, teacher, y, isa, ce=0.5, **given)
        for n in (2, 5):
            threads(n)
            assert all(torch.equal(a, b) for a, b in zip(call(student, teacher, y, isa, ce=0.5, **given), want, strict=True))
        part = torch.randperm(23)[:6]
        got = call(student[part], teacher[part], y[part], isa, ce=0.5, **given)
        assert all(torch.equal(a, b[part]) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("isa", ISAS)
def test_equal_models(isa, product):
    logits = torch.randn(3, 5003) * 3
    for name, order, alpha, lam in product(DIVERGENCES, ORDERS, [-math.inf, -5.0, -1.0, 0.0, 1.0, 3.0], [0.0, 0.1, 0.9, 1.0]):
        # Where the exponents sum to 0, entries of no probability have a gradient too: 5003 times the error of log r.
        limit = 1e-3 if name in ("ab, neither", "ab, sum 0") else 1e-6
        divergence, _, dz = call(logits, logits, None, isa, **options(name, order=order, alpha=alpha, lam=lam))
        assert float(divergence.abs().max()) < 2e-6 and float(dz.norm(dim=1).max()) < limit


def test_no_rows():
    empty = torch.zeros(0, 5)
    divergence, ce, dz = call(empty, empty, torch.zeros(0, dtype=torch.long), "", ce=1.0, preset="amid")
    assert divergence.shape == ce.shape == (0,) and dz.shape == (0, 5)
