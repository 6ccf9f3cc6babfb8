"""ops/distill*.py: the formulas in torch against 50 digits, plain autograd and the closed forms of the literature."""

import functools
import itertools
import math
import warnings

import mpmath
import pytest
import torch
import torch.nn.functional as F
from mpmath import mp, mpf

from lldfast.ops.distill import math as distill_math
from lldfast.ops.distill.loss import distill_loss_from_logits
from lldfast.ops.distill.options import ORDERS, PRESETS, DistillOptions
from lldfast.ops.distill.oracle import reference
from lldfast.ops.distill.spec import resolve

ALPHAS = [-math.inf, -5, -3, -1, 0, 0.5, 1 - 1e-5, 1, 1 + 1e-5, 3, 5, math.inf]
KINDS = ["kl", "rkl", "js", "ab", "alpha"]
INNER = [0.1, 0.5, 0.9]
BETA, AB = 0.3, (0.2, 0.7)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _collapse_is_known():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="order=.* mode-seeking")
        yield


def make(tokens=4, vocab=9, scale=1.0, dtype=torch.float64):
    """Logits of student and teacher."""
    return [torch.randn(tokens, vocab, dtype=torch.float64).mul_(scale).to(dtype) for _ in range(2)]


def loss_and_gradient(function, student, *args, **options):
    student = student.clone().requires_grad_()
    loss = function(student, *args, **options)
    # No gradient at all (the teacher against itself) is one of zero.
    got = torch.autograd.grad(loss.sum(), student)[0] if loss.requires_grad else torch.zeros_like(student)
    return loss.detach(), got


ours = functools.partial(distill_loss_from_logits, reduction="none", backend="torch")
plain = functools.partial(reference, reduction="none")


def same(got, want, factor=1e-12):
    """Losses and gradients of `loss_and_gradient`, the latter relative to the largest of each token."""
    torch.testing.assert_close(got[0], want[0], rtol=factor, atol=factor)
    size = want[1].abs().amax(-1, keepdim=True)
    assert bool(((got[1] - want[1]).abs() <= factor * (size + 0.1)).all()), float((got[1] - want[1]).abs().max())


def spec(**given):
    return resolve(DistillOptions.of(**given))


def parts(kind, a, b, alpha):
    """D(a, b) of one entry and its derivatives by a and b: an oracle in probabilities instead of logs."""
    if kind == "rkl":
        loss, of_b, of_a = parts("kl", b, a, alpha)
        return loss, of_a, of_b
    if kind == "kl":
        return a * mp.log(a / b), mp.log(a / b) + 1, -a / b
    if kind == "js":
        beta = mpf(BETA)
        m = beta * a + (1 - beta) * b
        of_a, of_b = beta * mp.log(a / m), (1 - beta) * mp.log(b / m)
        return a * of_a + b * of_b, of_a, of_b
    x, y = ((1 - mpf(alpha)) / 2, (1 + mpf(alpha)) / 2) if kind == "alpha" else map(mpf, kind)
    s, both = x + y, a**x * b**y
    if x and y and s:
        return -(both - x / s * a**s - y / s * b**s) / (x * y), (a**s - both) / (y * a), (b**s - both) / (x * b)
    log = mp.log(a / b)
    if x and y:
        return (both - 1 - x * log) / x**2, (both - 1) / (x * a), (1 - both) / (x * b)
    if x:
        return (x * a**x * log - a**x + b**x) / x**2, a ** (x - 1) * log, (b**x - a**x) / (x * b)
    if y:
        return (a**y - b**y - y * b**y * log) / y**2, (a**y - b**y) / (y * a), -(b ** (y - 1)) * log
    return log**2 / 2, log / a, -log / b


def oracle(student, teacher, kind, order="pr", alpha=-1.0, lam=0.0):
    """(loss, gradient by the student's logits) of one token, all finite."""
    q, p = ([mp.exp(x) / mp.fsum(map(mp.exp, row)) for x in row] for row in (student, teacher))
    lam = mpf(lam)
    if lam in (0, 1):
        r, slope = (p, [mpf(0)] * len(q)) if lam else (q, [mpf(1)] * len(q))
    elif math.isinf(alpha):
        r = [(max if alpha < 0 else min)(pair) for pair in zip(p, q, strict=True)]
        slope = [mpf(x == y) for x, y in zip(r, q, strict=True)]
    elif alpha == 1:
        r = [x**lam * y ** (1 - lam) for x, y in zip(p, q, strict=True)]
        slope = [(1 - lam) * x / y for x, y in zip(r, q, strict=True)]
    else:
        a = (1 - mpf(alpha)) / 2
        mean = [lam * x**a + (1 - lam) * y**a for x, y in zip(p, q, strict=True)]
        r = [m ** (1 / a) for m in mean]
        slope = [x / m * (1 - lam) * y ** (a - 1) for x, m, y in zip(r, mean, q, strict=True)]
    total = mp.fsum(r)
    r, slope = [x / total for x in r], [x / total for x in slope]
    first, second = ({"p": p, "q": q, "r": r}[name] for name in order)
    each = [parts(kind, x, y, alpha) for x, y in zip(first, second, strict=True)]
    by = {order[0]: [x[1] for x in each], order[1]: [x[2] for x in each]}
    inner = mp.fdot(by["r"], r)
    free = [w * (g - inner) + d for w, g, d in zip(slope, by["r"], by.get("q", [0] * len(q)), strict=True)]
    outer = mp.fdot(free, q)
    return mp.fsum(x[0] for x in each), [x * (f - outer) for x, f in zip(q, free, strict=True)]


def oracle_rows(student, teacher, *args, **options):
    with mp.workdps(50):
        rows = [oracle(*pair, *args, **options) for pair in zip(student.tolist(), teacher.tolist(), strict=True)]
        loss, gradient = [float(row[0]) for row in rows], [[float(x) for x in row[1]] for row in rows]
    return torch.tensor(loss, dtype=torch.float64), torch.tensor(gradient, dtype=torch.float64)


def given(kind, **options):
    """A call's arguments for a divergence of the oracle."""
    return options | ({"divergence": "ab", "ab": kind} if isinstance(kind, tuple) else {"divergence": kind, "beta": BETA})


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", ["kl", "rkl", "js", AB, (0, 0.5), (0.5, 0), (0, 0), (0.6, -0.6), (-1.0, 2.0), "alpha"])
def test_oracle_is_its_own_derivative(kind, order):
    student, teacher = (x[0].tolist() for x in make(1, 4))
    alpha = {"pr": 0.3, "qr": 1, "rp": 3, "rq": -math.inf if kind != "alpha" else -3}[order]
    with mp.workdps(50):
        _, gradient = oracle(student, teacher, kind, order, alpha, 0.3)
        step = mpf(10) ** -15
        for j, want in enumerate(gradient):
            up, down = (oracle([x + h * (i == j) for i, x in enumerate(student)], teacher, kind, order, alpha, 0.3)[0]
                        for h in (step, -step))  # fmt: skip
            assert mpmath.almosteq((up - down) / (2 * step), want, 1e-20, 1e-25)


def agrees(student, teacher, kind, factor=1e-6, floor=1e-14, **options):
    """Where p and q hardly overlap gradients vanish: then rounding is relative to the loss, the scale of what cancels."""
    got = loss_and_gradient(ours, student, teacher, **given(kind, **options))
    loss, gradient = oracle_rows(student, teacher, kind, **options)
    base = floor * (1 + loss.abs())
    assert bool(((got[0] - loss).abs() <= factor * loss.abs() + base).all()), (options, got[0], loss)
    limit = factor * gradient.abs().amax(-1) + 10 * base
    assert bool(((got[1] - gradient).abs().amax(-1) <= limit).all()), (options, got[1], gradient)


@pytest.mark.pairwise
@pytest.mark.parametrize(
    "alpha,order,kind",
    [
        (alpha, order, kind)
        for alpha, order, kind in itertools.product(ALPHAS, ORDERS, ["kl", "rkl", "js", AB, "alpha"])
        if kind != "alpha" or math.isfinite(alpha)  # which has the assistant's alpha
    ],
)
def test_gradients_against_50_digits(alpha, order, kind):
    logits = torch.cat([torch.randn(2, 1, 7, dtype=torch.float64) * scale for scale in (1, 30)], 1)
    for lam in INNER if alpha != -1 else [0, *INNER, 1]:
        agrees(*logits, kind, order=order, alpha=alpha, lam=lam)


@pytest.mark.pairwise
@pytest.mark.parametrize("order", ["pr", "rp"])
@pytest.mark.parametrize("kind", [(3.0, -2.0), (2.0, -1.0), (-1.0, 2.0), (-2.0, 3.0)])
@pytest.mark.parametrize("dtype,factor", [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_alpha_divergences_beyond_one_of_far_distributions(kind, order, dtype, factor):
    """exponents of both signs: the one factor vanishes where the other is huge, and 1 + expm1 would have lost the former."""
    for gap in (5, 12, 20, 50):
        teacher = torch.tensor([[0.0, 0.3, 0.1, -1.0], [0.0, 0.3, 0.1, -gap]], dtype=dtype)
        student = torch.tensor([[0.1, 0.0, -0.2, -gap], [0.1, 0.0, -0.2, -1.0]], dtype=dtype)
        if gap > 40:  # one way only, the other is infinite in fp32
            keep = 0 if (kind[1] > 0) == (order == "pr") else 1
            teacher, student = teacher[keep : keep + 1], student[keep : keep + 1]
        got = loss_and_gradient(ours, student, teacher, divergence="ab", ab=kind, order=order, lam=0)
        want = oracle_rows(student, teacher, kind, order)
        assert bool(((got[0].double() / want[0] - 1).abs() < factor).all()), (gap, got[0], want[0])
        size = want[1].abs().amax(-1, keepdim=True)
        assert bool(((got[1] - want[1]).abs() <= factor * size).all()), (gap, got[1], want[1])


@pytest.mark.pairwise
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 2.5}, {"detach_assistant": True}, {"ce_weight": 0.7, "temperature": 0.5}]
)
def test_loss_and_gradients_equal_plain_autograd(kind, order, options):
    student, teacher = make(5, 40, 2.0)
    labels = torch.tensor([0, 39, -100, 7, 7])
    for lam, alpha in [*((0.3, alpha) for alpha in ALPHAS), (0, 0.5), (1, 0.5)]:
        if kind != "alpha" or math.isfinite(alpha):
            chosen = {"divergence": kind, "order": order, "alpha": alpha, "lam": lam, **options}
            got, want = (loss_and_gradient(f, student, teacher, labels, **chosen) for f in (ours, plain))
            # At 1 +- 1e-5 the textbook's logaddexp / a has lost five digits of 16.
            same(got, want, 1e-8 if 0 < abs(alpha - 1) < 1e-3 else 1e-10)


@pytest.mark.parametrize(
    "chosen",
    [*({"preset": name} for name in PRESETS if name != "taid"), {"alpha": 3.0, "lam": 0.4, "order": "rq"},
     {"alpha": 1.0, "lam": 0.4, "order": "rp", "temperature": 1.7}, {"alpha": 0.99999, "order": "qr", "divergence": "js"},
     {"alpha": -math.inf, "order": "qr"}, {"divergence": "alpha", "divergence_alpha": 2.5, "alpha": 0.0}],
)  # fmt: skip
def test_gradcheck(chosen):
    student, teacher = make(3, 6)
    labels = torch.tensor([0, -100, 5])
    chosen = {"ce_weight": 0.3} | chosen if "preset" not in chosen else chosen
    assert torch.autograd.gradcheck(lambda z: ours(z, teacher, labels, **chosen), student.requires_grad_())


def kl(a, b):
    return (a.exp() * (a - b)).sum(-1)


def mixture(p, q, share):
    return (share * p.exp() + (1 - share) * q.exp()).log()


def ab(a, b, x=0.2, y=0.7):
    s = x + y
    return -((x * a + y * b).exp() - x / s * (s * a).exp() - y / s * (s * b).exp()).sum(-1) / (x * y)


def amid(p, q):
    r = torch.log_softmax((0.1 * (3 * p).exp() + 0.9 * (3 * q).exp()).log() / 3, -1)
    return ab(p, r)


CLOSED = {
    "kl": kl,
    "rkl": lambda p, q: kl(q, p),
    "skl": lambda p, q: kl(p, mixture(p, q, 0.1)),
    "srkl": lambda p, q: kl(q, mixture(p, q, 0.9)),
    "jsd": lambda p, q: (kl(p, mixture(p, q, 0.5)) + kl(q, mixture(p, q, 0.5))) / 2,
    "taid": lambda p, q: kl(torch.log_softmax((p + q.detach()) / 2, -1), q),
    "ab": ab,
    "amid": amid,
    "kl+ce": lambda p, q: kl(p, q) - q[:, 3],
}


def closed(function):
    return lambda student, teacher: function(torch.log_softmax(teacher, -1), torch.log_softmax(student, -1))


@pytest.mark.parametrize("preset", PRESETS)
def test_presets(preset):
    logits = make(6, 11, 2.0)
    want = loss_and_gradient(closed(CLOSED[preset]), *logits)
    labels = torch.full((6,), 3)
    same(loss_and_gradient(ours, *logits, labels, preset=preset), want)
    same(loss_and_gradient(plain, *logits, labels, preset=preset), want)


SPECIAL = [
    ({"divergence": "rkl", "order": "pr", "lam": 0}, lambda p, q: kl(q, p)),
    ({"divergence": "rkl", "order": "qr", "lam": 1}, kl),
    ({"order": "pr", "lam": 1}, lambda p, q: kl(p, p) + 0 * q.sum(-1)),
    ({"order": "pr", "alpha": -1, "lam": 0.3}, lambda p, q: kl(p, mixture(p, q, 0.3))),
    ({"order": "rq", "alpha": 0, "lam": 0.3}, lambda p, q: kl(torch.log_softmax(2 * mixture(p / 2, q / 2, 0.3), -1), q)),
    ({"order": "rp", "alpha": 3, "lam": 0.3}, lambda p, q: kl(torch.log_softmax(-mixture(-p, -q, 0.3), -1), p)),
    ({"preset": "taid", "lam": 0.8}, lambda p, q: kl(torch.log_softmax(0.8 * p + 0.2 * q.detach(), -1), q)),
    ({"preset": "ab", "ab": (0.6, 0.3)}, lambda p, q: ab(p, q, 0.6, 0.3)),
    ({"divergence": "alpha", "divergence_alpha": -1, "lam": 0}, kl),
    ({"divergence": "alpha", "divergence_alpha": 1, "lam": 0}, lambda p, q: kl(q, p)),
    ({"divergence": "alpha", "divergence_alpha": 0, "lam": 0}, lambda p, q: 4 - 4 * ((p + q) / 2).exp().sum(-1)),
    ({"divergence": "alpha", "divergence_alpha": 3, "lam": 0}, lambda p, q: ((2 * q - p).exp().sum(-1) - 1) / 2),  # chi squared
    ({"divergence": "ab", "ab": (1, 0), "lam": 0}, kl),
    ({"divergence": "ab", "ab": (0, 1), "lam": 0}, lambda p, q: kl(q, p)),
    ({"divergence": "ab", "ab": (1, 1), "lam": 0}, lambda p, q: (p.exp() - q.exp()).square().sum(-1) / 2),
    ({"divergence": "ab", "ab": (0.5, 0.5), "lam": 0}, lambda p, q: 2 * ((p / 2).exp() - (q / 2).exp()).square().sum(-1)),
    ({"divergence": "ab", "ab": (0, 0), "lam": 0}, lambda p, q: (p - q).square().sum(-1) / 2),
    ({"divergence": "ab", "ab": (1, -1), "lam": 0}, lambda p, q: ((p - q).exp() - 1 - (p - q)).sum(-1)),  # Itakura-Saito
]  # fmt: skip


@pytest.mark.parametrize("options,function", SPECIAL)
def test_special_cases(options, function):
    logits = make(6, 11, 1.5)
    same(loss_and_gradient(ours, *logits, **options), loss_and_gradient(closed(function), *logits))


def test_srkl_is_not_the_mixture_the_other_way_round():
    logits = make()
    wrong = closed(lambda p, q: kl(q, mixture(p, q, 0.1)))(*logits)
    assert bool((ours(*logits, preset="srkl") < 0.9 * wrong).logical_or(ours(*logits, preset="srkl") > 1.1 * wrong).all())


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jensen_shannon_is_the_sum_of_both_orders(beta):
    logits = make()
    want = [loss_and_gradient(ours, *logits, order=order, alpha=-1, lam=beta) for order in ("pr", "qr")]
    want = [beta * a + (1 - beta) * b for a, b in zip(*want, strict=True)]
    for chosen in ({"preset": "jsd", "lam": beta}, {"preset": "jsd", "beta": beta}, {"divergence": "js", "lam": 0, "beta": beta}):
        same(loss_and_gradient(ours, *logits, **chosen), want)


@pytest.mark.parametrize("kind", [(0.0, 0.7), (0.7, 0.0), (0.5, -0.5), (0.0, 0.0), (1.0, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize("dtype,factor", [(torch.float64, 1e-7), (torch.float32, 2e-5)])
def test_alpha_beta_is_continuous_at_its_special_exponents(kind, dtype, factor):
    logits = make(2, 6, dtype=dtype)
    for x, y in itertools.product((-1e-3, -1e-7, 0, 1e-7, 1e-3), repeat=2):
        near = (kind[0] + x, kind[1] + y)
        if 0 < max(map(abs, near)) < 1e-4:  # refused: nothing would be left of the loss
            continue
        got = loss_and_gradient(ours, *logits, divergence="ab", ab=near, lam=0)
        want = oracle_rows(*logits, near, "pr")
        torch.testing.assert_close(got[1].double(), want[1], rtol=0, atol=factor * float(want[1].abs().max()))
        # Around (0, 0) the loss is a second difference of e^x at three points this near to one another.
        limit = max(factor, torch.finfo(dtype).eps / (max(map(abs, near)) or 1))
        torch.testing.assert_close(got[0].double(), want[0], rtol=limit, atol=0)


def assistant(student, teacher, **options):
    q, p = torch.log_softmax(student, -1), torch.log_softmax(teacher, -1)
    r, _ = distill_math.assistant(p, q, spec(**options))
    return r.exp(), p.exp(), q.exp()


MEANS = {
    -1: lambda p, q, lam: lam * p + (1 - lam) * q,
    0: lambda p, q, lam: (lam * p.sqrt() + (1 - lam) * q.sqrt()) ** 2,
    1: lambda p, q, lam: p**lam * q ** (1 - lam),
    3: lambda p, q, lam: 1 / (lam / p + (1 - lam) / q),
    -math.inf: lambda p, q, lam: torch.maximum(p, q),
    math.inf: lambda p, q, lam: torch.minimum(p, q),
}


@pytest.mark.parametrize("lam", INNER)
@pytest.mark.parametrize("alpha", MEANS)
def test_assistant_is_the_mean_of_its_alpha(alpha, lam):
    r, p, q = assistant(*make(), alpha=alpha, lam=lam)
    want = MEANS[alpha](p, q, lam)
    torch.testing.assert_close(r, want / want.sum(-1, keepdim=True), rtol=1e-13, atol=0)


@pytest.mark.parametrize("alpha,near", [(-math.inf, -4e4), (math.inf, 4e4), (1, 1 + 1e-9), (1, 1 - 1e-9), (1, 1 - 1e-13)])
def test_assistant_is_continuous_in_alpha(alpha, near):
    logits = make()
    torch.testing.assert_close(assistant(*logits, alpha=near)[0], assistant(*logits, alpha=alpha)[0], rtol=2e-4, atol=0)


@pytest.mark.parametrize("alpha", [-3.0, -1.0, 0.0, 0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("lam", [0.2, 0.7])
def test_assistant_minimises_the_mixed_divergences(alpha, lam):
    r, p, q = assistant(*make(5, 6), alpha=alpha, lam=lam)

    def mixed(s):
        if abs(alpha) == 1:
            each = [kl(x.log(), s.log()) if alpha < 0 else kl(s.log(), x.log()) for x in (p, q)]
        else:
            a = (1 - alpha) / 2
            each = [4 / (1 - alpha**2) * (1 - (x**a * s ** (1 - a)).sum(-1)) for x in (p, q)]
        return lam * each[0] + (1 - lam) * each[1]

    least = mixed(r)
    for _ in range(50):
        other = torch.softmax(r.log() + 0.03 * torch.randn_like(r), -1)
        assert bool((mixed(other) > least).all())


@pytest.mark.parametrize("alpha", [-25, -5, -1, 0, 0.9, 0.999, 0.99999, 1, 1.00001, 1.001, 1.1, 2, 3, 5, 25])
def test_assistant_in_fp32(alpha):
    p, q = (torch.log_softmax(z, -1) for z in make(64, 50, 2.0))
    got, _ = distill_math.assistant(p.float(), q.float(), spec(alpha=alpha, lam=0.3))
    p, q = p.float().double(), q.float().double()
    want, _ = distill_math.assistant(p, q, spec(alpha=alpha, lam=0.3))
    a = (1 - alpha) / 2
    textbook = torch.logaddexp(math.log(0.3) + a * p, math.log(0.7) + a * q) / a if a else 0.3 * p + 0.7 * q
    torch.testing.assert_close(want, torch.log_softmax(textbook, -1), rtol=0, atol=1e-7)
    assert float((got - want).abs().max()) < 2e-6  # of logs up to 12: two roundings


def test_the_textbook_form_is_no_use_in_fp32():
    """Why the formula has branches and expm1: near alpha = 1 a difference of 1e-7 is divided by 5e-6."""
    p, q = (torch.log_softmax(z, -1) for z in make(64, 50, 2.0))
    a = (1 - 0.99999) / 2
    exact, naive = (
        torch.logaddexp(math.log(0.3) + a * x, math.log(0.7) + a * y) / a for x, y in ((p, q), (p.float(), q.float()))
    )
    assert float((torch.log_softmax(naive, -1) - torch.log_softmax(exact, -1)).abs().max()) > 5e-3


@pytest.mark.parametrize("dtype,limit", [(torch.float64, 3e-14), (torch.float32, 1e-5)])
@pytest.mark.parametrize("order", ORDERS)
def test_equal_distributions_have_no_loss_and_no_gradient(order, dtype, limit, product):
    student, _ = make(4, 30, 3.0, dtype)
    for kind, lam, alpha in product(("kl", "js", AB, (0.5, -0.5), (0, 0), "alpha"), (0, 0.3, 1), ALPHAS):
        if kind != "alpha" or math.isfinite(alpha):
            chosen = given(kind, order=order, lam=lam, alpha=alpha)
            loss, gradient = loss_and_gradient(ours, student, student, **chosen)
            assert float(loss.abs().max()) <= limit and float(gradient.abs().max()) <= limit, chosen


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", KINDS)
def test_fp32(kind, order):
    student, teacher = make(16, 60, 3, torch.float32)
    for lam, alpha in [*itertools.product((0.1, 0.9), ALPHAS), (0, -1), (1, -1), (0, 3), (1, 3)]:
        if kind != "alpha" or math.isfinite(alpha):
            chosen = {"divergence": kind, "order": order, "alpha": alpha, "lam": lam}
            got = loss_and_gradient(ours, student, teacher, **chosen)
            want = loss_and_gradient(ours, student.double(), teacher.double(), **chosen)
            assert got[0].dtype == got[1].dtype == torch.float32
            # Relative to what is summed: exponents of alpha = 5 also triple the rounding of the logs.
            limit = (1e-5 if kind == "alpha" else 3e-6) * (1 + want[0] + want[1].abs().amax(-1))
            assert bool(((got[0] - want[0]).abs() <= limit).all()), (chosen, got[0], want[0])
            assert bool(((got[1] - want[1]).abs() <= limit[:, None]).all()), (chosen, float((got[1] - want[1]).abs().max()))


def test_whole_numbers_are_settings():
    logits = make()
    for a, b in (({"lam": 1}, {"lam": 1.0}), ({"alpha": 3}, {"alpha": 3.0}), ({"temperature": 2}, {"temperature": 2.0})):
        for order in ("pr", "rq"):
            assert torch.equal(ours(*logits, order=order, **a), ours(*logits, order=order, **b))


def test_the_temperature_divides_both_logits_but_not_those_of_the_cross_entropy():
    student, teacher = make()
    want = loss_and_gradient(ours, student / 3, teacher / 3, alpha=0.5)
    same(loss_and_gradient(ours, student, teacher, alpha=0.5, temperature=3), (want[0], want[1] / 3))
    labels = torch.tensor([0, 8, 2, 2])
    both = ours(student, teacher, labels, alpha=0.5, ce_weight=0.5, temperature=3)
    torch.testing.assert_close(both, want[0] + 0.5 * F.cross_entropy(student, labels, reduction="none"))


@pytest.mark.parametrize("lam", [1e-8, 1e-4, 1 - 1e-4, 1 - 1e-7])
@pytest.mark.parametrize("kind", ["kl", "ab"])
def test_shares_near_0_and_1_in_fp32(kind, lam):
    """1 - (1 - lam) (1 - e^u) is a difference that leaves nothing where lam and e^u are both small."""
    for alpha, order in itertools.product((-5, -1, 3), ("pr", "rq")):
        student, teacher = (z.float() for z in make(6, 50, 3.0))
        chosen = given(kind, order=order, alpha=alpha, lam=lam)
        got = loss_and_gradient(ours, student, teacher, **chosen)
        want = loss_and_gradient(reference, student.double(), teacher.double(), reduction="none", **chosen)
        assert bool(((got[0] - want[0]).abs() <= 1e-5 * (1 + want[0].abs())).all()), (alpha, order)
        assert float((got[1] - want[1]).norm()) <= 1e-5 * (1 + float(want[1].norm())), (alpha, order)
