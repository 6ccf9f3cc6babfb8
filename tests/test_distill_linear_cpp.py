"""csrc/cpu/distill/distill_linear.h: every instruction set against the fp64 oracle; the same bits whatever the company."""

import itertools
import math
import warnings
from types import SimpleNamespace

import pytest
import torch

from lldfast.backends import extension
from lldfast.ops import native
from lldfast.ops.distill import linear as distill_linear
from lldfast.ops.distill.loss import distill_loss
from lldfast.ops.distill.options import DistillOptions
from lldfast.ops.distill.oracle import reference
from lldfast.ops.distill.spec import resolve

C = extension()
pytestmark = pytest.mark.skipif(C is None, reason="lldfast._C is not built")
ISAS = [] if C is None else list(C.supported_isas())
KINDS = list(itertools.product(ISAS, ("fp32", "bf16")))
# Each way through the sweeps: loss from the statistics alone, normaliser with the sums, both apart, sums alone.
SOME = [
    {"preset": "kl"}, {"preset": "rkl"}, {"preset": "skl"}, {"preset": "srkl"}, {"preset": "jsd"}, {"preset": "taid"},
    {"preset": "ab"}, {"preset": "amid"}, {"divergence": "kl", "order": "pr", "alpha": -5.0, "lam": 0.3},
    {"divergence": "kl", "order": "rq", "alpha": 0.5, "lam": 0.3}, {"divergence": "js", "order": "rq", "alpha": 3.0, "lam": 0.3},
    {"divergence": "kl", "order": "qr", "alpha": -math.inf},
]  # fmt: skip


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def make(tokens, vocab, d, teacher_d, precision="bf16", scale=2.0):
    def head(width):
        return torch.randn(tokens, width), torch.randn(vocab, width) * scale / math.sqrt(width)

    factors = [*head(d), *head(teacher_d)]
    return [x.bfloat16() for x in factors] if precision == "bf16" else factors


def spec_of(**given):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return resolve(DistillOptions.of(**given), backend="cpp")


def call(factors, y, isa, g=None, rows=None, need=(True, True), vocab=None, dtype=torch.float32, precision=None, **given):
    """(divergence, cross entropy, dh, dw) of sum g (divergence + ce_weight cross entropy), whatever was not computed 0."""
    h, w, *_ = factors
    spec, ce_weight = spec_of(**given), DistillOptions.of(**given).ce_weight
    out = torch.zeros(len(h)), torch.zeros(len(h))
    grads = [torch.zeros(x.shape, dtype=dtype) if needed else None for x, needed in zip((h, w), need, strict=True)]
    gs = (g, g * ce_weight) if g is not None else (None, None)
    native.distill_linear(
        *factors, y, rows, len(w) if vocab is None else vocab, spec, precision, precision, *gs, *out, *grads, isa
    )
    return *out, *grads


def oracle(factors, y, g, rows=None, vocab=None, **given):
    """(loss [T], dh, dw) in fp64 from the factors as they are."""
    h, w, th, tw = (x.double() for x in factors)
    h, w = h.requires_grad_(), w.requires_grad_()
    kept = slice(None) if rows is None else rows
    zs, zt = h[kept] @ w[:vocab].T, th[kept] @ tw[:vocab].T
    loss = reference(zs, zt, None if y is None else y[kept], reduction="none", **given)
    total = (loss * g[kept].double()).sum() + 0 * (h.sum() + w.sum())  # the loss may depend on neither
    return loss.detach(), *torch.autograd.grad(total, (h, w))


def distance(a, b):
    return float((a.double() - b).norm() / b.norm().clamp(min=1e-12))


def check(factors, isa, y=None, rows=None, limit=3e-5, **given):
    """limit: of the gradients' relative errors; a few 1e-6 is usual, also with dz in two bf16 terms."""
    g = torch.rand(len(factors[0])) + 0.5
    divergence, ce, dh, dw = call(factors, y, isa, g, rows, **given)
    loss, want_h, want_w = oracle(factors, y, g, rows, **given)
    kept = slice(None) if rows is None else rows
    got = (divergence + DistillOptions.of(**given).ce_weight * ce)[kept].double()
    assert bool(((got - loss).abs() <= 1e-5 + 3e-6 * loss.abs()).all()), float((got - loss).abs().max())
    # With one id, or one distribution twice, nothing is to be learnt: the gradient is 0 but for rounding.
    if float(want_h.norm()) > 1e-4 and float(want_w.norm()) > 1e-4:
        assert distance(dh, want_h) < limit and distance(dw, want_w) < limit, (distance(dh, want_h), distance(dw, want_w))
    else:
        assert max(float(dh.norm()), float(dw.norm())) < 1e-4
    if rows is not None:
        left = torch.ones(len(dh), dtype=torch.bool)
        left[rows] = False
        assert all(bool((x[left] == 0).all()) for x in (divergence, ce, dh))


@pytest.mark.pairwise
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("order", ["pr", "qr", "rp", "rq"])
@pytest.mark.parametrize("divergence", ["kl", "rkl", "js", "ab", "alpha"])
def test_every_loss(threads, isa, divergence, order):
    factors, y = make(33, 65, 31, 20), torch.randint(65, (33,))
    for alpha, lam in itertools.product((-math.inf, -5.0, -1.0, 0.3, 1 - 1e-5, 1.0, 3.0, math.inf), (0.1, 0.9)):
        given = {"divergence": divergence, "order": order, "alpha": alpha, "lam": lam, "beta": 0.3, "divergence_alpha": 0.3}
        check(factors, isa, y, **given, ce_weight=0.5)
    for lam, temperature, detach in ((0.0, 1.0, False), (1.0, 2.0, False), (0.3, 0.7, True)):
        given = {"divergence": divergence, "order": order, "lam": lam, "temperature": temperature, "detach_assistant": detach}
        check(factors, isa, y, **given, ce_weight=0.7)
        check(factors, isa, **given)


@pytest.mark.pairwise
@pytest.mark.parametrize("isa,precision", KINDS)
@pytest.mark.parametrize("tokens,vocab,d,teacher_d", [
    (1, 1, 1, 1), (1, 33, 31, 64), (31, 257, 64, 31), (33, 1000, 1, 64), (100, 257, 31, 1), (100, 1000, 64, 97),
    (5, 8193, 20, 33),
])  # fmt: skip
def test_shapes(threads, isa, precision, tokens, vocab, d, teacher_d):
    factors, y = make(tokens, vocab, d, teacher_d, precision), torch.randint(vocab, (tokens,))
    for given in ({"preset": "kl+ce"}, {"preset": "amid"}, {"order": "qr", "alpha": 0.5, "temperature": 2.0, "ce_weight": 0.3}):
        check(factors, isa, y, **given)


@pytest.mark.pairwise
@pytest.mark.parametrize("isa,precision", KINDS)
@pytest.mark.parametrize("given", SOME, ids=str)
def test_several_chunks_of_tokens_and_vocabulary(threads, isa, precision, given):
    check(make(600, 1100, 40, 24, precision), isa, torch.randint(1100, (600,)), **{"ce_weight": 0.5, **given})


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("given", SOME, ids=str)
def test_a_tokens_bits_do_not_depend_on_its_company(threads, isa, given):
    given = {"ce_weight": 0.5, **given}
    factors, y, g = make(150, 8300, 20, 33), torch.randint(8300, (150,)), torch.rand(150)
    threads(1)
    want = call(factors, y, isa, g, **given)
    for n in (2, 5):
        threads(n)
        assert all(torch.equal(a, b) for a, b in zip(call(factors, y, isa, g, **given), want, strict=True))
    part = torch.randperm(150)[:37]
    h, w, th, tw = factors
    got = call([h[part], w, th[part], tw], y[part], isa, g[part], **given)
    assert all(torch.equal(a, b[part]) for a, b in zip(got[:3], want[:3], strict=True))


@pytest.mark.parametrize("isa", ISAS)
def test_gradient_bits_do_not_depend_on_the_threads(threads, isa):
    factors, y, g = make(1300, 700, 40, 24), torch.randint(700, (1300,)), torch.rand(1300)
    threads(1)
    want = call(factors, y, isa, g, preset="amid", ce_weight=0.5)
    for n in (2, 3, 7):
        threads(n)
        assert all(torch.equal(a, b) for a, b in zip(call(factors, y, isa, g, preset="amid", ce_weight=0.5), want, strict=True))


@pytest.mark.parametrize("isa", ISAS)
def test_kept_rows_and_parts_of_the_gradient(threads, isa):
    factors, y = make(100, 257, 31, 64), torch.randint(257, (100,))
    rows = torch.randperm(100)[:41].sort().values
    y[torch.randperm(100)[:5]] = 256
    check(factors, isa, y, rows, preset="kl+ce")
    g = torch.rand(100)
    divergence, ce, dh, dw = call(factors, y, isa, g, preset="amid", ce_weight=0.5)
    hidden_only = call(factors, y, isa, g, need=(True, False), preset="amid", ce_weight=0.5)
    weight_only = call(factors, y, isa, g, need=(False, True), preset="amid", ce_weight=0.5)
    neither = call(factors, y, isa, need=(False, False), preset="amid", ce_weight=0.5)
    assert all(torch.equal(x[0], divergence) and torch.equal(x[1], ce) for x in (hidden_only, weight_only, neither))
    assert torch.equal(hidden_only[2], dh) and torch.equal(weight_only[3], dw)
    narrow = call(factors, y, isa, g, dtype=torch.bfloat16, preset="amid", ce_weight=0.5)
    assert torch.equal(narrow[2], dh.bfloat16()) and torch.equal(narrow[3], dw.bfloat16())


@pytest.mark.parametrize("isa", ISAS)
def test_rows_behind_the_vocabulary_are_left_alone(threads, isa):
    h, w, th, tw = make(33, 300, 31, 20)
    w[257:], tw[257:] = math.nan, math.nan
    g = torch.rand(33)
    divergence, _, dh, dw = call([h, w, th, tw], None, isa, g, vocab=257, preset="skl")
    loss, want_h, want_w = oracle([h, w[:257], th, tw[:257]], None, g, preset="skl")
    torch.testing.assert_close(divergence.double(), loss, rtol=0, atol=1e-5)
    assert distance(dh, want_h) < 2e-5 and distance(dw[:257], want_w) < 2e-5 and bool((dw[257:] == 0).all())


@pytest.mark.parametrize("isa", ISAS)
def test_equal_models_and_far_ones(threads, isa):
    h, w, *_ = make(64, 500, 48, 48)
    for given in SOME:
        divergence, _, dh, dw = call([h, w, h, w], None, isa, torch.ones(64), **{**given, "ce_weight": 0.0})
        assert float(divergence.abs().max()) < 2e-6 and float(dh.abs().max()) < 1e-5 and float(dw.abs().max()) < 1e-5
        far = make(64, 500, 48, 40, scale=6.0)  # losses of tens of nats
        divergence, _, dh, dw = call(far, None, isa, torch.ones(64), **{**given, "ce_weight": 0.0})
        loss, want_h, want_w = oracle(far, None, torch.ones(64), **{**given, "ce_weight": 0.0})
        torch.testing.assert_close(divergence.double(), loss, rtol=1e-5, atol=1e-4)
        # Nearly all mass lies on one id: gradients are small differences, to which the formulas in fp32 are no nearer.
        assert distance(dh, want_h) < 1e-3 and distance(dw, want_w) < 1e-3


@pytest.mark.parametrize("isa,precision", KINDS)
def test_gradients_of_tokens_that_are_nearly_certain(threads, isa, precision):
    """Cross entropy where q is near 1: its q - 1 is a difference of near equals, so it must come from the logprob."""
    n = 64
    weight, labels = torch.eye(n) + 0.1 * torch.randn(n, n), torch.arange(n)
    hidden = torch.eye(n) * 16 + 0.1 * torch.randn(n, n)
    factors = [hidden, weight, hidden.clone(), weight.clone()]
    if precision == "bf16":
        factors = [x.bfloat16() for x in factors]
    g = torch.full((n,), 1 / n)
    *_, dh, dw = call(factors, labels, isa, g, preset="kl+ce", ce_weight=1.0)
    _, want_h, want_w = oracle(factors, labels, g, preset="kl+ce", ce_weight=1.0)
    assert distance(dh, want_h) < 5e-3 and distance(dw, want_w) < 5e-3


@pytest.mark.parametrize("isa", ISAS)
def test_factors_rounded_to_bf16(threads, isa):
    """fp32 factors under precision bf16, as autocast has them, are those factors rounded."""
    factors, g = make(40, 100, 33, 20, "fp32"), torch.rand(40)
    want = call([x.bfloat16() for x in factors], None, isa, g, preset="amid")
    got = call(factors, None, isa, g, precision="bf16", preset="amid")
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_not_a_number_comes_through(threads):
    factors = make(40, 100, 33, 20)
    factors[2][7] = math.nan
    divergence, *_ = call(factors, None, "", torch.ones(40), preset="amid")
    assert bool(divergence[7].isnan()) and bool(divergence[torch.arange(40) != 7].isfinite().all())


def test_the_op_takes_this_path_on_amx(threads, monkeypatch):
    """Under an extension that says "amx", `distill_loss` gives what its chunks do; only calls that fit go this way."""
    h, w, th, tw = make(70, 130, 31, 20)
    y = torch.randint(100, (70,))
    y[::3] = -100
    options = {"preset": "amid", "ce_weight": 0.5, "backend": "cpp"}

    def run(**more):
        leaves = [h.clone().requires_grad_(), w.clone().requires_grad_()]
        loss = distill_loss(*leaves, th, tw, y, **options, **more)
        return loss, *torch.autograd.grad(loss.sum(), leaves)

    want, each = run(), run(reduction="none")
    fused = native.distill_linear
    calls = []

    def spy(*args):
        calls.append(args)
        return fused(*args)

    monkeypatch.setattr(native, "distill_linear", spy)
    monkeypatch.setattr(distill_linear, "extension", lambda: SimpleNamespace(isa=lambda: "amx"))
    got = run()
    assert len(calls) == 1
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-5)
    for a, b in zip(run(reduction="none"), each, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-5)
    count = len(calls)
    run(softcap=30.0)
    run(logit_scale=0.5)
    run(precision="fp32")
    run(valid_vocab=100)
    assert len(calls) == count + 1  # the last, whose heads are cut to the same size
