"""ops/linear_logprob.py against its fp64 oracle: forward, loss, gradients, memory, compilation."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from lldfast.errors import InputError
from lldfast.ops import chunks
from lldfast.ops import linear_logprob as linear
from lldfast.ops import torch_linear as module
from lldfast.ops.linear_logprob import linear_cross_entropy, linear_logprob, reference
from lldfast.ops.logprob import merge_vocab_shards

SHAPES = [
    (0, 8, 7), (1, 1, 1), (2, 8, 2), (15, 31, 17), (16, 32, 63), (17, 33, 64), (31, 64, 65), (33, 123, 127), (127, 32, 129),
    (128, 8, 257), (129, 64, 507), (1000, 31, 1000), (33, 768, 1000),
]  # fmt: skip
BIG = [(31, 64, 50257), (17, 768, 50304), (5, 33, 65537), (9, 32, 128256), (3, 2048, 4099), (4, 64, 151936), (2, 31, 262144)]
EVERYTHING = {"return_lse": True, "return_argmax": True, "return_entropy": True}


@pytest.fixture(params=["torch", "cpp"], autouse=True)
def backend(request, force_backend):
    force_backend(linear, request.param)
    return request.param


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(module, "LEAST_ROWS", 3)
    monkeypatch.setitem(chunks.CHUNK_BYTES, "cpu", 1)


def make(tokens, d, vocab, dtype=torch.float32):
    hidden, weight = torch.randn(tokens, d), torch.randn(vocab, d) / math.sqrt(d)
    return hidden.to(dtype), weight.to(dtype), torch.randint(vocab, (tokens,))


def agrees(hidden, weight, labels, factor=2e-6, **options):
    got, want = linear_logprob(hidden, weight, labels, **EVERYTHING, **options), reference(hidden, weight, labels, **options)
    limit = factor * (1 + want.lse.abs())
    for a, b, times in ((got.logprob, want.logprob, 1), (got.lse, want.lse, 1), (got.entropy, want.entropy, 10)):
        assert a.dtype == torch.float32 and a.shape == labels.shape
        assert bool(((a.double() - b).abs() <= times * limit).all()), float((a.double() - b).abs().max())
    assert bool((got.logprob <= 0).all())
    return got


@pytest.mark.parametrize("tokens,d,vocab", SHAPES)
def test_shapes(tokens, d, vocab):
    agrees(*make(tokens, d, vocab))


@pytest.mark.parametrize(
    "tokens,d,vocab", [shape if shape[0] * shape[1] < 200 else pytest.param(*shape, marks=pytest.mark.slow) for shape in BIG]
)
def test_big_vocabularies(tokens, d, vocab):
    agrees(*make(tokens, d, vocab))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_inputs(dtype):
    agrees(*make(40, 64, 333, dtype), factor=5e-6)


def test_mixed_dtypes():
    hidden, weight, labels = make(20, 32, 100)
    agrees(hidden.bfloat16(), weight, labels, factor=5e-6)
    agrees(hidden, weight.half(), labels, factor=5e-6)


def test_small_chunks(small_chunks):
    hidden, weight, labels = make(50, 16, 40)
    labels[[0, 17, 49]] = -100
    agrees(hidden, weight, labels)


def test_ignored_tokens_are_not_computed():
    hidden, weight, labels = make(12, 8, 20)
    hidden[::2], labels[::2] = math.nan, -100
    got = linear_logprob(hidden, weight, labels, **EVERYTHING)
    assert bool((got.logprob[::2] == 0).all()) and bool(torch.isfinite(got.logprob).all())
    want = reference(hidden[1::2], weight, labels[1::2])
    torch.testing.assert_close(got.logprob[1::2].double(), want.logprob, rtol=0, atol=1e-5)


def test_padded_rows_may_hold_nan():
    hidden, weight, labels = make(9, 16, 64)
    labels %= 50
    want = linear_logprob(hidden, weight[:50], labels).logprob
    weight[50:] = math.nan
    bias = torch.zeros(64)
    bias[50:] = math.nan
    assert torch.equal(linear_logprob(hidden, weight, labels, valid_vocab=50).logprob, want)
    weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels, valid_vocab=50, bias=bias)
    loss.backward()
    assert math.isfinite(loss.item()) and bool((weight.grad[50:] == 0).all()) and bool(torch.isfinite(weight.grad).all())


@pytest.mark.parametrize("options", [{"softcap": 1.5}, {"logit_scale": 0.3}, {"softcap": 2.0, "logit_scale": 4.0}])
def test_softcap_scale_bias(options):
    hidden, weight, labels = make(30, 24, 70)
    agrees(hidden, weight, labels, **options)
    agrees(hidden, weight, labels, bias=torch.randn(70), **options)


def test_strides_three_dimensions_and_a_tied_weight():
    table = torch.randn(60, 32)
    hidden = torch.randn(10, 3, 64).transpose(0, 1)[:, 1:, ::2]
    labels = torch.randint(60, (3, 9))
    want = linear_logprob(hidden.contiguous(), table, labels)
    torch.testing.assert_close(linear_logprob(hidden, table, labels).logprob, want.logprob, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        linear_logprob(hidden, table.T.contiguous().T, labels).logprob, want.logprob, rtol=1e-6, atol=1e-6
    )  # a transposed view
    row = torch.randn(1, 32)
    agrees(row.expand(5, 32), table, torch.randint(60, (5,)))


def test_uneven_and_empty_vocabulary_shards():
    hidden, weight, labels = make(25, 16, 53)
    want = linear_logprob(hidden, weight, labels, **EVERYTHING)
    edges = [0, 7, 7, 40, 53]
    parts = [
        linear_logprob(hidden, weight[a:b], labels, vocab_start=a, valid_vocab=53, **EVERYTHING)
        for a, b in itertools.pairwise(edges)
    ]
    for a, b in zip(merge_vocab_shards(parts), want, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6 * (1 + float(want.lse.abs().max())))


def test_gradient_of_vocabulary_shards():
    hidden, weight, labels = make(8, 6, 20, torch.float64)
    hidden.requires_grad_(), weight.requires_grad_()
    parts = [
        linear_logprob(hidden, weight[a:b], labels, vocab_start=a, valid_vocab=20, return_lse=True) for a, b in ((0, 6), (6, 20))
    ]
    got = torch.autograd.grad(merge_vocab_shards(parts).logprob.sum(), (hidden, weight))
    want = torch.autograd.grad(reference(hidden, weight, labels).logprob.sum(), (hidden, weight))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss_and_gradients_equal_plain_autograd(reduction):
    hidden, weight, labels = make(70, 32, 90)
    labels[5] = -100
    bias = torch.randn(90)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    got = linear_cross_entropy(hidden, weight, labels, bias=bias, reduction=reduction)
    want = F.cross_entropy(hidden @ weight.T + bias, labels, reduction=reduction)
    torch.testing.assert_close(got, want)
    upstream = torch.randn_like(want)
    for a, b in zip(torch.autograd.grad(got, leaves, upstream), torch.autograd.grad(want, leaves, upstream), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.pairwise
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "options", [{}, {"softcap": 2.0}, {"logit_scale": 0.5}, {"softcap": 3.0, "logit_scale": 2.0, "valid_vocab": 9}]
)
def test_gradcheck(reduction, options, small_chunks):
    hidden, weight, _ = make(7, 4, 11, torch.float64)
    bias = torch.randn(11, dtype=torch.float64)
    labels = torch.tensor([0, 8, -100, 4, 4, 2, 1])
    inputs = [t.requires_grad_() for t in (hidden, weight, bias)]
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_cross_entropy(h, w, labels, bias=b, reduction=reduction, **options), inputs
    )


def test_gradcheck_of_logprob_and_lse():
    hidden, weight, labels = make(6, 3, 8, torch.float64)
    inputs = [t.requires_grad_() for t in (hidden, weight)]

    def both(h, w):
        result = linear_logprob(h, w, labels, softcap=2.0, return_lse=True)
        return result.logprob, result.lse

    assert torch.autograd.gradcheck(both, inputs)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_only_wanted_gradients(wanted):
    hidden, weight, labels = make(10, 6, 12)
    leaves = [hidden, weight, torch.randn(12)]
    for i in wanted:
        leaves[i].requires_grad_()
    for reduction in ("mean", "none"):
        linear_cross_entropy(hidden, weight, labels, bias=leaves[2], reduction=reduction).sum().backward()
    assert [t.grad is not None for t in leaves] == [i in wanted for i in range(3)]


def test_without_gradients_nothing_is_kept():
    hidden, weight, labels = make(10, 6, 12)
    assert not linear_cross_entropy(hidden, weight, labels).requires_grad
    weight.requires_grad_()
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, labels).requires_grad


def test_retain_graph_and_accumulation():
    hidden, weight, labels = make(10, 6, 12)
    weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels)
    loss.backward(retain_graph=True)
    once = weight.grad.clone()
    loss.backward()
    torch.testing.assert_close(weight.grad, 2 * once)


def test_second_derivative_is_refused():
    hidden, weight, labels = make(4, 3, 5, torch.float64)
    hidden.requires_grad_()
    (grad,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()


def test_bf16_weight_gradient_is_accumulated_in_fp32():
    hidden, weight, labels = make(8192, 16, 40, torch.bfloat16)
    weight.requires_grad_()
    linear_cross_entropy(hidden, weight, labels, reduction="sum").backward()
    assert weight.grad.dtype == torch.bfloat16
    exact = weight.detach().double().requires_grad_()
    F.cross_entropy(hidden.double() @ exact.T, labels, reduction="sum").backward()
    gap = (weight.grad.double() - exact.grad).abs().max() / exact.grad.abs().max()
    assert float(gap) < 2**-8  # one rounding to bf16, not thousands


def test_nothing_to_score_is_a_loss_of_zero():
    hidden, weight, _ = make(4, 3, 5)
    hidden.requires_grad_()
    for labels in (torch.full((4,), -100), torch.zeros(0, dtype=torch.long)):
        part = hidden[: len(labels)]
        loss = linear_cross_entropy(part, weight, labels)
        assert loss.item() == 0
        assert bool((torch.autograd.grad(loss, hidden, allow_unused=True)[0] == 0).all())


def test_returned_logprob():
    hidden, weight, labels = make(3, 8, 30)
    hidden, labels = hidden.expand(2, 3, 8), torch.randint(30, (2, 3))
    weight.requires_grad_()
    for reduction in ("mean", "sum", "none"):
        loss, each = linear_cross_entropy(hidden, weight, labels, reduction=reduction, return_logprob=True)
        assert each.shape == (2, 3) and not each.requires_grad and loss.requires_grad
        torch.testing.assert_close(each, linear_logprob(hidden, weight, labels).logprob.detach())
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, labels), -each.mean())


def test_memory_stays_below_one_logits_tensor():
    """Peak of what is alive during loss and backward, seen by an allocation hook: far below T V floats."""
    tokens, d, vocab = 2048, 8, 4096
    hidden, weight, labels = make(tokens, d, vocab)
    hidden.requires_grad_(), weight.requires_grad_()
    with torch.profiler.profile(profile_memory=True) as profile:
        linear_cross_entropy(hidden, weight, labels).backward()
    alive = peak = 0
    for event in profile.events():
        if event.name == "[memory]":
            alive += event.cpu_memory_usage
            peak = max(peak, alive)
    assert peak < chunks.CHUNK_BYTES["cpu"] + 4 * 4 * (tokens * d + vocab * d) + (1 << 20) < tokens * vocab * 4


@pytest.mark.parametrize("scored", [16, pytest.param(33_000, marks=[pytest.mark.slow, pytest.mark.alone])])
def test_more_than_two_billion_logits(scored):
    tokens, d, vocab = 33_000, 2, 66_000  # T V > 2^31
    hidden, weight, labels = make(tokens, d, vocab)
    labels[:-scored] = -100
    got = linear_logprob(hidden, weight, labels).logprob[-16:]
    want = reference(hidden[-16:], weight, labels[-16:]).logprob
    torch.testing.assert_close(got.double(), want, rtol=0, atol=3e-5)


def test_opcheck(backend):
    hidden, weight, labels = make(6, 4, 9)
    bias = torch.randn(9, requires_grad=True)
    hidden.requires_grad_(), weight.requires_grad_()
    labels[2] = -100
    options = (3.0, 0.5, -100, 9, 0, None, backend)
    torch.library.opcheck(torch.ops.lldfast.linear_logprob, (hidden, weight, labels, bias, *options, True, True))
    torch.library.opcheck(
        torch.ops.lldfast.linear_cross_entropy,
        (hidden, weight, labels, bias, None, 1.0, -100, None, 0, None, "torch", True, True, True),
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile_fullgraph(reduction):
    hidden, weight, labels = make(12, 8, 30)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]

    def loss(h, w):
        return linear_cross_entropy(h * 2, w, labels, reduction=reduction).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*leaves), loss(*leaves))
    for a, b in zip(torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(loss(*leaves), leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_on_a_cpu_rounds_the_factors_as_a_layer_would():
    hidden, weight, labels = make(12, 8, 30)
    weight.requires_grad_()
    rounded = linear_cross_entropy(hidden, weight, labels, precision="bf16")
    with torch.autocast("cpu", torch.bfloat16):
        under = linear_cross_entropy(hidden, weight, labels)
        asked = linear_cross_entropy(hidden, weight, labels, precision="fp32")
    assert torch.equal(rounded, under) and under.dtype == torch.float32
    assert torch.equal(asked, linear_cross_entropy(hidden, weight, labels))
    want = reference(hidden.bfloat16(), weight.detach().bfloat16(), labels).logprob
    assert abs(float(under.detach()) + float(want.mean())) < 5e-6 * 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda(dtype):
    hidden, weight, labels = make(300, 64, 5000, dtype)
    want = reference(hidden, weight, labels)
    on_gpu = [t.cuda() for t in (hidden, weight, labels)]
    got = linear_logprob(*on_gpu, return_lse=True)
    assert bool(((got.logprob.cpu().double() - want.logprob).abs() <= 5e-6 * (1 + want.lse.abs())).all())
    leaves = [t.requires_grad_() for t in on_gpu[:2]]
    grads = torch.autograd.grad(linear_cross_entropy(*on_gpu), leaves)
    cpu = [t.double().requires_grad_() for t in (hidden, weight)]
    exact = torch.autograd.grad(F.cross_entropy(cpu[0] @ cpu[1].T, labels), cpu)
    for a, b in zip(grads, exact, strict=True):
        # In norm: bf16 products round the logits' gradient, so a small entry may be off by the rounding of large ones.
        assert float((a.cpu().double() - b).norm() / b.norm()) < (4e-3 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"weight": torch.zeros(5, 7)}, "weight has shape"),
        ({"weight": torch.zeros(5)}, "weight has shape"),
        ({"labels": torch.tensor([0, 5, 0])}, "label 5 of token 1"),
        ({"reduction": "median"}, "reduction='median'"),
        ({"valid_vocab": 6}, "valid_vocab=6"),
        ({"precision": "fp8"}, "precision='fp8'"),
        ({"backend": "abacus"}, "abacus"),
        ({"bias": torch.zeros(3)}, "bias has shape"),
    ],
)
def test_bad_arguments(change, message):
    given_ = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(5, 4), "labels": torch.zeros(3, dtype=torch.long), **change}
    with pytest.raises(InputError, match=message):
        linear_cross_entropy(**given_)


@pytest.mark.parametrize("ignored", [0, 5])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast_on_a_cpu_is_the_precision_bf16(ignored, reduction):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=generator, requires_grad=True) for n in (64, 50))
    labels = torch.randint(50, (64,), generator=generator)
    labels[:ignored] = -100

    def gradients(**options):
        loss = linear_cross_entropy(hidden, weight, labels, reduction=reduction, **options).sum()
        return [loss.detach(), *torch.autograd.grad(loss, [hidden, weight])]

    plain = gradients(precision="bf16")
    with torch.autocast("cpu", torch.bfloat16):
        cast = gradients()  # the backward too, as where a trainer calls it inside
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))
