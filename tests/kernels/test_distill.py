"""lldfast_kernels.distill, interpreted or on a GPU, against the fp64 oracle: every loss, shapes, dtypes, extremes, gradients."""

import itertools
import math
import warnings

import pytest
import torch

from lldfast.ops.distill import math as distill_math
from lldfast.ops.distill.options import DIVERGENCES, ORDERS, DistillOptions
from lldfast.ops.distill.oracle import reference
from lldfast.ops.distill.spec import resolve

pytestmark = [
    pytest.mark.usefixtures("interpreted"),
    # The kernels' infinities are meant; on a GPU nobody hears of them.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]

INF, NAN = math.inf, math.nan
ALPHAS = (-INF, -5.0, -1.0, 0.0, 1 - 1e-5, 1.0, 1 + 1e-5, 5.0, INF)
# lam 0 and 1 are r = q and r = p whatever alpha is.
ASSISTANTS = [(alpha, lam) for lam in (0.1, 0.9) for alpha in ALPHAS] + [(-1.0, 0.0), (5.0, 1.0)]
VOCABS = (1, 2, 17, 63, 64, 65, 257, 1000)
# One of each way through the kernel.
LOSSES = [
    {"preset": "kl+ce"},
    {"preset": "rkl"},
    {"preset": "taid"},
    {"preset": "jsd", "ce_weight": 1.0, "temperature": 3.0},
    {"preset": "amid", "order": "qr", "ce_weight": 1.0, "temperature": 0.7},
    {"divergence": "alpha", "order": "rq", "alpha": 5.0, "lam": 0.9, "divergence_alpha": 0.3},
    {"divergence": "kl", "order": "qr", "alpha": -INF, "lam": 0.1, "ce_weight": 1.0},
]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def name_of(loss):
    return "-".join(str(value) for value in loss.values())


def spec_of(**given):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the losses that collapse in training
        return resolve(DistillOptions.of(**given), backend="triton")


def rows(student, teacher, y, spec, g=None, g_ce=None, out=None):
    from lldfast_kernels.distill import distill_rows

    return distill_rows(student, teacher, y, spec, g, g_ce, out)


def make(tokens, vocab, device, vocab_t=None, scale=3.0, dtype=torch.float32, dtype_t=None):
    """(student, teacher, labels, g_divergence, g_ce), drawn on the CPU whatever the device is."""
    student, teacher = (torch.randn(tokens, n) * scale for n in (vocab, vocab_t or vocab))
    rest = torch.randint(vocab, (tokens,)), torch.randn(tokens), torch.randn(tokens)
    return tuple(x.to(device) for x in (student.to(dtype), teacher.to(dtype_t or dtype), *rest))


def oracle(student, teacher, y, g, g_ce, **loss):
    """Textbook formulas under autograd: (divergence, cross entropy, gradient) in fp64."""
    x, ce_weight = student.double().requires_grad_(), DistillOptions.of(**loss).ce_weight
    divergence = reference(x, teacher, y, reduction="none", **loss | {"ce_weight": 0.0})
    ce = torch.nn.functional.cross_entropy(x, y, reduction="none") if ce_weight else torch.zeros_like(divergence)
    total = (g * divergence + g_ce * ce).sum() + 0 * x.sum()  # D(p, p) does not depend on x
    return divergence.detach(), ce.detach(), torch.autograd.grad(total, x)[0]


def close(got, want, factor=4e-6, rounding=0.0):
    """A NaN or infinity where the oracle has it; else an error of `factor` beside 1, and of the output's rounding."""
    got = got.double()
    assert got.shape == want.shape
    same = (
        (got == want) | (got.isnan() & want.isnan()) | ((got - want).abs() <= factor * (1 + want.abs()) + rounding * want.abs())
    )
    assert bool(same.all()), (float((got - want).abs().nan_to_num(INF).max()), got[~same][:4], want[~same][:4])


def agrees(inputs, loss, factor=4e-6, reference=None):
    """Loss and gradient of one call against the oracle; gives both."""
    want, out = oracle(*inputs, **loss) if reference is None else reference, torch.full_like(inputs[0], NAN)
    got = rows(*inputs[:3], spec_of(**loss), *inputs[3:], out)
    rounding = {torch.float32: 0.0, torch.float16: 1e-3, torch.bfloat16: 2**-7}[out.dtype]  # the interpreter cuts to bf16
    assert got[0].dtype == got[1].dtype == torch.float32
    close(got[0], want[0], factor)
    close(got[1], want[1], factor)
    close(out, want[2], factor, rounding)
    return got, out


def double_rows(inputs, loss):
    """The formulas of distill_math in fp64: what the oracle cannot have, infinities among the logits."""
    return distill_math.rows(*(x.double() if x.is_floating_point() else x for x in inputs[:3]), spec_of(**loss), *inputs[3:])


@pytest.mark.pairwise
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("alpha,lam", ASSISTANTS)
def test_every_loss(alpha, lam, divergence, order, device):
    loss = {"divergence": divergence, "order": order, "alpha": alpha, "lam": lam, "divergence_alpha": -0.4}
    agrees(make(1, 65, device), loss)


@pytest.mark.parametrize(
    "ab", [(0.2, 0.7), (1.0, -0.5), (-0.5, 1.0), (0.0, 0.0), (0.5, 0.0), (0.0, 0.5), (0.5, -0.5), (-0.3, -0.3), (1.0, -0.9)]
)
@pytest.mark.parametrize("order", ["pr", "rq"])
def test_exponents(order, ab, device):
    inputs, loss = make(2, 33, device, scale=1.0), {"divergence": "ab", "order": order, "ab": ab}
    want = oracle(*inputs, **loss)
    size = float(want[2].abs().max()) + 1  # negative exponents: the terms are large, and so is what rounding leaves of them
    agrees(inputs, loss, 4e-6 * size, want)


@pytest.mark.parametrize("loss", LOSSES, ids=name_of)
def test_shapes(loss, device):
    for vocab in VOCABS:
        agrees(make(1, vocab, device), loss)


@pytest.mark.parametrize("loss", LOSSES, ids=name_of)
def test_vocabularies_of_other_sizes(loss, device):
    for vocab, vocab_t in ((65, 70), (300, 257), (10, 300)):
        inputs = make(1, vocab, device, vocab_t)
        agrees(inputs, loss, reference=double_rows(inputs, loss))


@pytest.mark.parametrize("loss", LOSSES[::2], ids=name_of)
def test_dtypes(loss, device):
    for dtype, dtype_t in itertools.product([torch.float16, torch.bfloat16], [torch.float32, torch.bfloat16]):
        agrees(make(1, 131, device, dtype=dtype, dtype_t=dtype_t), loss)


@pytest.mark.parametrize("loss", LOSSES, ids=name_of)
def test_detached(loss, device):
    agrees(make(1, 140, device), loss | {"detach_assistant": True})


@pytest.mark.parametrize("loss", LOSSES, ids=name_of)
def test_strides_padding_and_in_place(loss, device):
    """Columns behind the vocabulary are poison and stay it; the gradient may take the student's place; no place changes a bit."""
    inputs = make(3, 133, device)
    spec, (student, teacher, y, g, g_ce) = spec_of(**loss), inputs
    want, dense = agrees(inputs, loss)
    wide, wide_t = (torch.full((3, width), NAN, device=device) for width in (144, 160))
    wide[:, :133], wide_t[:, :133] = student, teacher
    got = rows(wide[:, :133], wide_t[:, :133], y, spec, g, g_ce, wide[:, :133])
    assert bool(wide[:, 133:].isnan().all()) and bool(wide_t[:, 133:].isnan().all())
    for x, exact in zip((*got, wide[:, :133]), (*want, dense)):
        close(x, exact.double(), 1e-6)
    wide[:, :133] = student
    one = torch.full((1, 144), NAN, device=device)[:, :133]
    for i in (0, 2):
        alone = rows(wide[i : i + 1, :133], wide_t[i : i + 1, :133], y[i : i + 1], spec, g[i : i + 1], g_ce[i : i + 1], one)
        assert torch.equal(alone[0], got[0][i : i + 1]) and torch.equal(alone[1], got[1][i : i + 1])
    forward = rows(wide[:, :133], wide_t[:, :133], y, spec)
    for x, exact in zip(forward, got):
        close(x, exact.double(), 1e-6)


@pytest.mark.parametrize("loss", LOSSES, ids=name_of)
def test_offsets_and_confident_models(loss, device):
    """Offsets cost nothing but what the logits themselves lose; far tails neither overflow nor go missing."""
    student, teacher, *rest = make(3, 90, device)
    student += torch.tensor([1e4, -1e4, 0.0], device=device)[:, None]
    teacher -= torch.tensor([1e4, -1e4, 3e4], device=device)[:, None]
    agrees((student, teacher, *rest), loss)
    agrees(make(3, 90, device, scale=30.0), loss, 2e-5)


@pytest.mark.parametrize("loss", LOSSES, ids=name_of)
def test_infinities_and_nan_stay_in_their_rows(loss, device):
    student, teacher, _, g, g_ce = make(8, 140, device)
    student[0, 5:9], teacher[0, 5:9] = -INF, -INF
    student[1, 135:] = -INF
    teacher[2, :7] = -INF
    student[3, 20], teacher[4, 130] = NAN, NAN
    student[5], teacher[6] = -INF, -INF
    student[7, 1:], teacher[7, 1:] = torch.finfo(torch.float32).min, -1e30
    inputs = (student, teacher, torch.full((8,), 100, device=device), g, g_ce)
    want, out = double_rows(inputs, loss), torch.empty_like(student)
    got = rows(*inputs[:3], spec_of(**loss), g, g_ce, out)
    sound = [0, 1, 2] if bool(want[0][1:3].isfinite().all()) else [0]
    close(got[0][:3], want[0][:3])
    for i in sound:
        close(out[i], want[2][i])
    for i in (3, 4, 5, 6):
        assert bool(got[0][i].isnan()) == bool(want[0][i].isnan()), i
    assert torch.equal(got[1].isnan(), want[1].isnan())
    assert bool((out[:2][student[:2] == -INF] == 0).all())


def test_loss_that_is_infinite(device):
    """Teacher mass where the student has none, also mass that fp32 cannot hold."""
    student, teacher = torch.zeros(3, 70, device=device), torch.zeros(3, 70, device=device)
    student[0, 3], student[1, 3] = -INF, -INF
    teacher[1, 3], teacher[2, 3] = -300.0, -300.0
    got = rows(student, teacher, None, spec_of(preset="kl"))[0]
    assert got[0] == INF and got[1] == INF and float(got[2]) == pytest.approx(math.log(70 / 69), abs=1e-6)


def test_the_label_of_a_certain_student(device):
    """p - 1 to the last digits where p rounds to 1: the gradient of cross entropy, alone."""
    student = torch.zeros(2, 200, device=device)
    student[0, 7], student[1, 7] = 14.0, 25.0
    y, zero, one = torch.full((2,), 7, device=device), torch.zeros(2, device=device), torch.ones(2, device=device)
    out = torch.empty_like(student)
    rows(student, torch.zeros_like(student), y, spec_of(preset="kl+ce"), zero, one, out)
    x = student.double().requires_grad_()
    want = torch.autograd.grad(torch.nn.functional.cross_entropy(x, y, reduction="sum"), x)[0]
    torch.testing.assert_close(out.double()[0], want[0], rtol=2e-3, atol=0)
    assert bool((out[1, 7] <= 0).all()) and abs(float(out[1, 7])) < 1e-7


def test_models_that_agree(device):
    """D(p, p) is 0, its gradient too, for any assistant."""
    student, _, y, g, g_ce = make(2, 140, device)
    for loss in LOSSES:
        out = torch.empty_like(student)
        spec = spec_of(**loss | {"ce_weight": 0.0})
        got = rows(student, student.clone(), y, spec, g, g_ce, out)[0]
        assert float(got.abs().max()) < 1e-6 and float(out.abs().max()) < 1e-6, loss


def test_no_rows_and_no_labels(device):
    none = torch.empty(0, 70, device=device)
    divergence, ce = rows(none, none, None, spec_of(preset="kl"), none[:, 0], none[:, 0], none.clone())
    assert divergence.shape == ce.shape == (0,)
    student, teacher, _, g, _ = make(2, 70, device)
    out = torch.empty_like(student)
    got = rows(student, teacher, None, spec_of(preset="kl"), g, None, out)
    assert got[1].tolist() == [0.0, 0.0]
    close(out, g[:, None] * (torch.softmax(student.double(), -1) - torch.softmax(teacher.double(), -1)))


@pytest.mark.parametrize(
    "change,message",
    [
        ({"teacher": torch.zeros(2, 5)}, r"\[3, V\]"),
        ({"student": torch.zeros(3, 5).double()}, "float64"),
        ({"student": torch.zeros(5, 3).T}, "column stride"),
        ({"y": torch.zeros(3)}, "int64"),
        ({"y": None}, "labels"),
        ({"out": torch.zeros(3, 6)}, "shape"),
        ({"g": None}, "g_divergence"),
    ],
)
def test_refusals(change, message, device):
    args = {"student": torch.zeros(3, 5), "teacher": torch.zeros(3, 5), "y": torch.zeros(3, dtype=torch.int64)}
    args |= {"spec": spec_of(preset="kl+ce"), "g": torch.zeros(3), "g_ce": torch.zeros(3), "out": torch.zeros(3, 5)} | change
    with pytest.raises(ValueError, match=message):
        rows(**{name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in args.items()})
