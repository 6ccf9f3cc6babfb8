"""backend="triton" through the public functions, in the interpreter, against the fp64 oracle: what lldfast/ops/ puts around the
kernels, which are tested beside this file.
"""

import itertools
import math

import pytest
import torch

from lldfast.errors import InputError
from lldfast.ops import chunks, torch_linear
from lldfast.ops import linear_logprob as linear
from lldfast.ops import logprob as given
from lldfast.ops.linear_logprob import linear_cross_entropy, linear_logprob
from lldfast.ops.logprob import logprob, merge_vocab_shards

pytestmark = [
    pytest.mark.usefixtures("interpreted"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]

EVERYTHING = {"return_lse": True, "return_argmax": True, "return_entropy": True, "backend": "triton"}
OPTIONS = [{}, {"softcap": 3.0}, {"logit_scale": 0.4}, {"softcap": 4.0, "logit_scale": 1.5, "bias": True, "valid_vocab": 70}]
DTYPES = [torch.float32, torch.float16]
INTERPRETED_BF16 = "the interpreter's tl.dot is wrong on bf16"
NAN = math.nan


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(torch_linear, "LEAST_ROWS", 3)
    monkeypatch.setitem(chunks.CHUNK_BYTES, "cpu", 1)


def make(tokens=11, width=24, vocab=77, dtype=torch.float32):
    hidden, weight = torch.randn(tokens, width), torch.randn(vocab, width) / math.sqrt(width)
    return hidden.to(dtype), weight.to(dtype), torch.randint(vocab, (tokens,))


def complete(options, vocab, labels):
    """The options of a parametrisation as arguments: bias=True means a random one; labels are moved below valid_vocab."""
    options = dict(options)
    labels %= options.get("valid_vocab", vocab)
    if options.pop("bias", False):
        options["bias"] = torch.randn(vocab)
    return options


def tolerance(*tensors):
    return 2e-6 if all(t.dtype == torch.float32 for t in tensors) else 5e-6


def agrees(got, want, kept=slice(None), factor=2e-6):
    for name, times in (("logprob", 1), ("lse", 1), ("entropy", 10), ("max_logit", 1)):
        x, y = getattr(got, name), getattr(want, name)[kept]
        assert x.dtype == torch.float32
        gap = (x[kept].double() - y).abs()
        assert bool(((x[kept] == y) | (gap <= times * factor * (1 + want.lse[kept].abs()))).all()), (name, float(gap.max()))
    assert torch.equal(got.argmax[kept], want.argmax[kept])
    assert bool((got.logprob <= 0).all())


def holds_nothing(got, ignored):
    for field in (got.logprob, got.lse, got.entropy, got.max_logit):
        assert bool((field[ignored] == 0).all())
    assert bool((got.argmax[ignored] == -1).all())


def gradients(value, leaves, upstream=None):
    return torch.autograd.grad(value, leaves, upstream)


def in_fp64(*tensors):
    return [t.detach().double().requires_grad_() for t in tensors]


def close(got, want, leaf):
    """Sums are in fp32; a gradient is rounded to the dtype of its input, and so is dz between 16-bit factors."""
    assert got.dtype == leaf.dtype and got.shape == leaf.shape
    rounding = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2**-7}[leaf.dtype]
    torch.testing.assert_close(got.double(), want, rtol=rounding, atol=rounding / 4 * (1 + float(want.abs().max())))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16])
def test_logprob(dtype, options):
    logits, labels = (torch.randn(11, 77) * 3).to(dtype), torch.randint(77, (11,))
    options = complete(options, 77, labels)
    agrees(logprob(logits, labels, **EVERYTHING, **options), given.reference(logits, labels, **options))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_logprob_gradients(dtype, options):
    """By logits and bias, through logprob and lse; with ignored tokens, whose logits are NaN, and without."""
    for ignored in ([], [0, 4, 10]):
        logits, labels, bias = (torch.randn(11, 77) * 3).to(dtype), torch.randint(77, (11,)), torch.randn(77)
        rest = complete(options | {"bias": False}, 77, labels)
        labels[ignored] = -100
        g, h = torch.randn(11), torch.randn(11)
        x, b = in_fp64(logits, bias)
        want = given.reference(x, labels, bias=b, **rest)
        d_x, d_b = gradients((g * want.logprob + h * want.lse).sum(), (x, b))
        logits[ignored] = NAN
        logits.requires_grad_(), bias.requires_grad_()
        got = logprob(logits, labels, bias=bias, return_lse=True, backend="triton", **rest)
        got_x, got_b = gradients((g * got.logprob + h * got.lse).sum(), (logits, bias))
        close(got_x, d_x, logits)
        close(got_b, d_b, bias)
        assert bool((got_x[ignored] == 0).all())


@pytest.mark.parametrize("wanted", [(0,), (1,)])
def test_only_wanted_gradients_of_logprob(wanted):
    leaves, labels = [torch.randn(5, 20), torch.randn(20)], torch.tensor([1, -100, 19, 3, 4])
    for i in wanted:
        leaves[i].requires_grad_()
    logprob(leaves[0], labels, bias=leaves[1], backend="triton").logprob.sum().backward()
    assert [t.grad is not None and bool(t.grad.isfinite().all()) for t in leaves] == [i in wanted for i in range(2)]


def test_large_logits_of_ignored_tokens_stay_out_of_the_bias_gradient():
    logits, bias, labels = torch.full((4, 30), 500.0), torch.zeros(30, requires_grad=True), torch.tensor([-100, 2, -100, 3])
    logprob(logits, labels, bias=bias, backend="triton").logprob.sum().backward()
    want = torch.full((30,), -2 / 30)
    want[2:4] += 1
    torch.testing.assert_close(bias.grad, want)


@pytest.mark.parametrize("ignore", [-100, -1, 3])
def test_ignored_logits_may_be_nan(ignore):
    logits, labels = torch.randn(6, 10), torch.tensor([1, ignore, 9, ignore, 0, 4])
    kept = labels != ignore
    want = given.reference(logits, labels, ignore_index=ignore)
    logits[~kept] = NAN
    got = logprob(logits, labels, ignore_index=ignore, **EVERYTHING)
    agrees(got, want, kept)
    holds_nothing(got, ~kept)


def test_logprob_with_padding_of_nan():
    logits, bias, labels = torch.randn(7, 90), torch.randn(90), torch.randint(65, (7,))
    want = given.reference(logits, labels, bias=bias, valid_vocab=65)
    logits[:, 65:], bias[65:] = NAN, NAN
    logits.requires_grad_(), bias.requires_grad_()
    got = logprob(logits, labels, bias=bias, valid_vocab=65, **EVERYTHING)
    agrees(got, want)
    for grad in gradients(got.logprob.sum() + got.lse.sum(), (logits, bias)):
        assert bool((grad[..., 65:] == 0).all()) and bool(grad.isfinite().all())


def test_logprob_of_vocabulary_shards():
    """Uneven ones, one empty, one all padding; values, and gradients through the merge."""
    logits, labels = torch.randn(9, 64), torch.randint(53, (9,))
    labels[4] = -100
    (x,) = in_fp64(logits)
    want = given.reference(x, labels, valid_vocab=53)
    logits[:, 53:], logits[4] = NAN, NAN
    logits.requires_grad_()
    parts = [
        logprob(logits[:, a:b], labels, vocab_start=a, valid_vocab=53, **EVERYTHING)
        for a, b in itertools.pairwise([0, 7, 7, 40, 56, 64])
    ]
    got = merge_vocab_shards(parts)
    agrees(got, want, factor=4e-6)
    (d_x,) = gradients((want.logprob + 0.3 * want.lse).sum(), (x,))
    close(gradients((got.logprob + 0.3 * got.lse).sum(), (logits,))[0], d_x, logits)


def test_logprob_of_three_dimensions_strides_and_int32():
    logits = torch.randn(50, 4, 6).permute(2, 1, 0)[::2]
    labels = torch.randint(50, (3, 4), dtype=torch.int32)
    agrees(logprob(logits, labels, **EVERYTHING), given.reference(logits, labels))


@pytest.mark.parametrize("bias", [torch.float16, torch.float64])
def test_a_bias_of_another_dtype(bias):
    hidden, weight, labels = make()
    offset = torch.randn(77).to(bias).requires_grad_()
    for value in (
        logprob(hidden @ weight.T, labels, bias=offset, backend="triton").logprob,
        linear_logprob(hidden, weight, labels, bias=offset, backend="triton").logprob,
    ):
        want = linear.reference(hidden, weight, labels, bias=offset.detach())
        torch.testing.assert_close(value.double(), want.logprob, rtol=0, atol=1e-5)
        assert gradients(value.sum(), (offset,))[0].dtype == bias


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_logprob(dtype, options):
    hidden, weight, labels = make(dtype=dtype)
    options = complete(options, 77, labels)
    got, want = (
        linear_logprob(hidden, weight, labels, **EVERYTHING, **options),
        linear.reference(hidden, weight, labels, **options),
    )
    agrees(got, want, factor=tolerance(hidden))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_logprob_gradients(dtype, options):
    for ignored in ([], [0, 4, 10]):
        hidden, weight, labels = make(dtype=dtype)
        bias = torch.randn(77)
        rest = complete(options | {"bias": False}, 77, labels)
        labels[ignored] = -100
        g, h = torch.randn(11), torch.randn(11)
        doubles = in_fp64(hidden, weight, bias)
        want = linear.reference(doubles[0], doubles[1], labels, bias=doubles[2], **rest)
        exact = gradients((g * want.logprob + h * want.lse).sum(), doubles)
        hidden[ignored] = NAN
        leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
        got = linear_logprob(hidden, weight, labels, bias=bias, return_lse=True, backend="triton", **rest)
        for x, y, leaf in zip(gradients((g * got.logprob + h * got.lse).sum(), leaves), exact, leaves, strict=True):
            close(x, y, leaf)


def test_ignored_hidden_rows_may_be_nan():
    hidden, weight, labels = make()
    labels[[1, 2, 10]] = -100
    kept = labels != -100
    want = linear.reference(hidden, weight, labels)
    hidden[~kept] = NAN
    got = linear_logprob(hidden, weight, labels, **EVERYTHING)
    agrees(got, want, kept)
    holds_nothing(got, ~kept)


def test_linear_logprob_of_vocabulary_shards():
    hidden, weight, labels = make(9, 16, 64)
    labels %= 53
    labels[4] = -100
    doubles = in_fp64(hidden, weight)
    want = linear.reference(*doubles, labels, valid_vocab=53)
    weight[53:], hidden[4] = NAN, NAN
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    parts = [
        linear_logprob(hidden, weight[a:b], labels, vocab_start=a, valid_vocab=53, **EVERYTHING)
        for a, b in itertools.pairwise([0, 7, 7, 40, 56, 64])
    ]
    got = merge_vocab_shards(parts)
    agrees(got, want, factor=4e-6)
    exact = gradients((want.logprob + 0.3 * want.lse).sum(), doubles)
    for x, y, leaf in zip(gradients((got.logprob + 0.3 * got.lse).sum(), leaves), exact, leaves, strict=True):
        close(x, y, leaf)


@pytest.mark.parametrize(
    "types", [(torch.float16, torch.float32), (torch.float32, torch.float16), (torch.bfloat16, torch.float32)]
)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_mixed_dtypes(types, reduction):
    """Both factors are widened; only gradients are rounded, each to the dtype of its own input."""
    hidden, weight, labels = make()
    hidden, weight = hidden.to(types[0]), weight.to(types[1])
    agrees(linear_logprob(hidden, weight, labels, **EVERYTHING), linear.reference(hidden, weight, labels))
    doubles = in_fp64(hidden, weight)
    exact = gradients(-linear.reference(*doubles, labels).logprob.sum(), doubles)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    loss = linear_cross_entropy(hidden, weight, labels, reduction=reduction, backend="triton").sum()
    for x, y, leaf in zip(gradients(loss, leaves), exact, leaves, strict=True):
        close(x, y, leaf)


@pytest.mark.parametrize("precision", ["fp32", "bf16x3", pytest.param("bf16", marks=pytest.mark.skip(INTERPRETED_BF16))])
def test_precision(precision):
    hidden, weight, labels = make()
    rounded = [t.bfloat16() if precision == "bf16" else t for t in (hidden, weight)]
    got = linear_logprob(hidden, weight, labels, precision=precision, **EVERYTHING)
    agrees(got, linear.reference(*rounded, labels))


@pytest.mark.pairwise
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy(dtype, options, reduction, small_chunks):
    hidden, weight, labels = make(dtype=dtype)
    bias = torch.randn(77)
    rest = complete(options | {"bias": False}, 77, labels)
    vocab = rest.get("valid_vocab", 77)
    labels[[2, 3, 9]] = -100
    doubles = in_fp64(hidden, weight, bias)
    each = linear.reference(doubles[0], doubles[1], labels, bias=doubles[2], **rest).logprob
    want = {"mean": -each.sum() / 8, "sum": -each.sum(), "none": -each}[reduction]
    upstream = torch.randn(want.shape)
    exact = gradients(want, doubles, upstream.double())
    hidden[[2, 3, 9]], weight[vocab:], bias[vocab:] = NAN, NAN, NAN
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    loss, logprobs = linear_cross_entropy(
        hidden, weight, labels, bias=bias, reduction=reduction, return_logprob=True, backend="triton", **rest
    )
    assert loss.dtype == torch.float32 and not logprobs.requires_grad
    torch.testing.assert_close(loss.double(), want, rtol=5e-6, atol=1e-5)
    torch.testing.assert_close(logprobs.double(), each.detach(), rtol=0, atol=3e-5)
    for x, y, leaf in zip(gradients(loss, leaves, upstream), exact, leaves, strict=True):
        close(x, y, leaf)


@pytest.mark.parametrize("wanted", [(), (0,), (1,), (2,)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_wanted_gradients_of_the_loss(wanted, reduction):
    hidden, weight, labels = make()
    leaves = [hidden, weight, torch.randn(77)]
    for i in wanted:
        leaves[i].requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels, bias=leaves[2], reduction=reduction, backend="triton").sum()
    assert loss.requires_grad == bool(wanted)
    want = -linear.reference(hidden.detach(), weight.detach(), labels, bias=leaves[2].detach()).logprob
    torch.testing.assert_close(loss.detach().double(), want.mean() if reduction == "mean" else want.sum(), rtol=5e-6, atol=0)
    if wanted:
        loss.backward()
    assert [t.grad is not None for t in leaves] == [i in wanted for i in range(3)]


def test_a_loss_with_bf16_factors():
    """Off CUDA its products are torch's, so this is meaningful here: the kernel gets logits."""
    hidden, weight, labels = make()
    got = linear_cross_entropy(hidden, weight, labels, precision="bf16", backend="triton")
    want = -linear.reference(hidden.bfloat16(), weight.bfloat16(), labels).logprob.mean()
    torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=0)


@pytest.mark.parametrize("tokens", [0, 5])
def test_nothing_to_score(tokens):
    hidden, weight, _ = make(tokens)
    labels, bias = torch.full((tokens,), -100), torch.randn(77)
    hidden[:] = NAN
    logits = torch.full((tokens, 77), NAN, requires_grad=True)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    results = [
        (logprob(logits, labels, bias=bias, **EVERYTHING), [logits, bias]),
        (linear_logprob(hidden, weight, labels, bias=bias, **EVERYTHING), leaves),
    ]
    for got, inputs in results:
        holds_nothing(got, slice(None))
        assert all(bool((grad == 0).all()) for grad in gradients(got.logprob.sum() + got.lse.sum(), inputs))
    for reduction in ("mean", "sum", "none"):
        loss = linear_cross_entropy(hidden, weight, labels, bias=bias, reduction=reduction, backend="triton")
        assert bool((loss == 0).all()) and all(bool((grad == 0).all()) for grad in gradients(loss.sum(), leaves))


def test_one_token_one_id_and_no_width():
    for tokens, width, vocab in ((1, 1, 1), (3, 0, 9)):
        hidden, weight, labels = torch.randn(tokens, width), torch.randn(vocab, width), torch.randint(vocab, (tokens,))
        agrees(linear_logprob(hidden, weight, labels, **EVERYTHING), linear.reference(hidden, weight, labels))


def test_refusals():
    hidden, weight, labels = make(3)
    with pytest.raises(InputError, match="fp8"):
        linear_logprob(hidden, weight, labels, precision="fp8", backend="triton")
    with pytest.raises(InputError, match="bf16"):
        logprob(hidden @ weight.T, labels, precision="bf16", backend="triton")
    with pytest.raises(InputError, match="fp64"):
        logprob(torch.randn(3, 5).double(), torch.zeros(3, dtype=torch.long), backend="triton")
    with pytest.raises(InputError, match="fp64"):
        linear_logprob(hidden.double(), weight, labels, backend="triton")
    labels[1] = 77
    for reduction in ("mean", "none"):
        with pytest.raises(InputError, match="label 77 of token 1"):
            linear_cross_entropy(hidden, weight, labels, reduction=reduction, backend="triton")


def test_a_tensor_that_is_not_on_a_gpu_needs_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(InputError, match="cannot run on cpu"):
        logprob(torch.randn(3, 5), torch.zeros(3, dtype=torch.long), backend="triton")


def test_second_derivative_is_refused():
    hidden, weight, labels = make(4)
    hidden.requires_grad_()
    for reduction in ("mean", "none"):
        loss = linear_cross_entropy(hidden, weight, labels, reduction=reduction, backend="triton").sum()
        (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
        with pytest.raises(RuntimeError, match="no autograd formula"):
            grad.sum().backward()


def test_opcheck():
    """Schemas, shapes of fake outputs and aliases, as torch.compile relies on them."""
    hidden, weight, labels = make(5, 8, 12)
    labels[2] = -100
    leaves = [t.requires_grad_() for t in (hidden, weight, torch.randn(12))]
    logits, tests = torch.randn(5, 12, requires_grad=True), ("test_schema", "test_autograd_registration", "test_faketensor")
    options = (3.0, 0.5, -100, 11, 0)
    labels.clamp_(max=10)
    torch.library.opcheck(
        torch.ops.lldfast.logprob, (logits, labels, leaves[2], *options, None, "triton", True, True), test_utils=tests
    )
    args = (*leaves[:2], labels, leaves[2], *options, None, "triton")
    torch.library.opcheck(torch.ops.lldfast.linear_logprob, (*args, True, True), test_utils=tests)
    torch.library.opcheck(torch.ops.lldfast.linear_cross_entropy, (*args, True, True, True), test_utils=tests)
