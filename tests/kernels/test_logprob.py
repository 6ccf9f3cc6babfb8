"""lldfast_kernels.logprob in the interpreter, against the fp64 oracle: shapes, alignment, extremes, gradients."""

import itertools

import pytest
import torch

from lldfast.ops.logprob import reference

pytestmark = [
    pytest.mark.usefixtures("interpreted"),
    # The kernels' infinities are meant; on a GPU nobody hears of them.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]

TOKENS, VOCABS = (0, 1, 2, 15, 17, 33), (1, 2, 17, 63, 65, 129, 257, 507)
# A covering subset: each T and each V, with several of the other.
SHAPES = [(t, v) for i, t in enumerate(TOKENS) for j, v in enumerate(VOCABS) if (i + j) % 3 == 0]
NAMES = ("logprob", "lse", "argmax", "entropy", "max_logit")
OPTIONS = [{}, {"softcap": 5.0}, {"logit_scale": 0.3}, {"softcap": 9.0, "logit_scale": 1.7}]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def forward(logits, labels, **options):
    from lldfast_kernels.logprob import logprob_fwd

    return logprob_fwd(logits, labels, **{"argmax": True, "entropy": True} | options)


def backward(*args, **options):
    from lldfast_kernels.logprob import logprob_bwd

    return logprob_bwd(*args, **options)


def tolerance(dtype):
    return 2e-6 if dtype == torch.float32 else 5e-6


def oracle(logits, labels, vocab=None, bias=None, **options):
    """reference() on the real columns; foreign labels go behind them, where they score -inf."""
    vocab = logits.shape[1] if vocab is None else vocab
    labels = torch.where((labels < 0) | (labels >= vocab), vocab, labels)
    return reference(logits[:, :vocab], labels, bias=None if bias is None else bias[:vocab], ignore_index=-1, **options)


def agrees(got, want, factor):
    for name, scale in (("logprob", 1), ("lse", 1), ("entropy", 10), ("max_logit", 1)):
        x, y = got[NAMES.index(name)].double(), getattr(want, name)
        assert x.shape == y.shape and bool((x.isnan() == y.isnan()).all()), name
        same = (x == y) | y.isnan() | ((x - y).abs() <= scale * factor * (1 + want.lse.abs()))
        assert bool(same.all()), (name, float((x - y).abs().max()))
    sound = ~want.lse.isnan()
    assert torch.equal(got[2][sound], want.argmax[sound])
    assert not bool((got[0] > 0).any())


@pytest.mark.parametrize("tokens,vocab", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_shapes(tokens, vocab, dtype):
    logits, labels = (torch.randn(tokens, vocab) * 3).to(dtype), torch.randint(vocab, (tokens,))
    agrees(forward(logits, labels), oracle(logits, labels), tolerance(dtype))


@pytest.mark.parametrize("options", OPTIONS)
def test_options(options):
    logits, labels, bias = torch.randn(9, 300) * 4, torch.randint(300, (9,)), torch.randn(300)
    agrees(forward(logits, labels, bias=bias, **options), oracle(logits, labels, bias=bias, **options), 2e-6)


def test_tanh_keeps_the_digits_of_small_logits():
    logits, labels = torch.randn(4, 100) * 1e-3, torch.randint(100, (4,))
    got = backward(torch.ones(4), torch.zeros(4), logits, labels, forward(logits, labels, softcap=30.0)[1], softcap=30.0)[0]
    x = logits.double().requires_grad_()
    want = torch.autograd.grad(reference(x, labels, softcap=30.0).logprob.sum(), x)[0]
    torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=1e-8)


def test_bf16_is_read_as_it_is():
    logits, labels = (torch.randn(7, 131) * 3).bfloat16(), torch.randint(131, (7,))
    agrees(forward(logits, labels), oracle(logits, labels), 5e-6)


def test_labels_at_the_edges_and_of_other_shards():
    vocab = 300
    labels = torch.tensor([0, vocab - 1, 63, 64, 127, 128, 255, 256, -1, -100, vocab, 2**40])
    logits = torch.randn(len(labels), vocab)
    got = forward(logits, labels)
    agrees(got, oracle(logits, labels), 2e-6)
    assert bool((got[0][8:] == float("-inf")).all()) and bool(got[0][:8].isfinite().all())
    assert torch.equal(got[0][:8], forward(logits[:8], labels[:8].int())[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_value_does_not_depend_on_place_alignment_or_count(dtype):
    """The same logits at every offset from a 16-byte boundary, in every row, alone or not: the same bits."""
    vocab = 509
    row, bias = (torch.randn(vocab) * 3).to(dtype), torch.randn(vocab)
    wanted = forward(row[None], torch.tensor([77]), bias=bias)
    for stride, shift in itertools.product((vocab, 512), (0, 3)):
        memory = torch.full((shift + 9 * stride + 8,), float("nan"), dtype=dtype)
        logits = memory.as_strided((9, vocab), (stride, 1), shift)
        logits.copy_(row.expand(9, vocab))
        for got, want in zip(forward(logits, torch.full((9,), 77), bias=bias), wanted):
            assert torch.equal(got, want.expand(9)), (stride, shift)


@pytest.mark.parametrize("value", [-50.0, 50.0])
@pytest.mark.parametrize("vocab", [63, 257])
def test_the_tail_adds_nothing(value, vocab):
    logits, labels = torch.full((3, vocab), value), torch.tensor([0, vocab // 2, vocab - 1])
    got = forward(logits, labels)
    agrees(got, oracle(logits, labels), 2e-6)
    assert got[2].tolist() == [0, 0, 0]  # all tie


def test_padding_may_hold_nan():
    logits, bias, labels = torch.randn(5, 384), torch.randn(384), torch.tensor([0, 1, 299, 300, 383])
    logits[:, 300:], bias[300:] = float("nan"), float("nan")
    got = forward(logits, labels, bias=bias, vocab=300)
    agrees(got, oracle(logits, labels, 300, bias), 2e-6)
    for x in (logits, logits.clone()):
        d_logits, d_bias = backward(
            torch.ones(5), torch.ones(5), logits, labels, got[1], bias=bias, vocab=300, need_bias=True, out=x
        )
        assert bool((d_logits[:, 300:] == 0).all()) and bool((d_bias[300:] == 0).all())
        assert bool(d_logits.isfinite().all()) and bool(d_bias.isfinite().all())
        logits = torch.randn(5, 384)


def test_infinities_and_nan_stay_in_their_rows():
    logits, labels = torch.randn(8, 200), torch.arange(8)
    logits[0, 10:] = float("-inf")
    logits[1] = float("-inf")
    logits[2, 5] = float("nan")
    logits[3, ::2] = torch.finfo(torch.float32).min
    logits[4] = torch.finfo(torch.float32).min
    logits[5, :] = float("-inf")
    logits[5, 5] = 3.0
    logits[6, 6] = float("-inf")
    got, want = forward(logits, labels), oracle(logits, labels)
    agrees(got, want, 2e-6)
    assert got[0][1].isnan() and got[1][1] == float("-inf") and got[2][1] == 0
    assert all(bool(x[2].isnan()) for x in (got[0], got[1], got[3], got[4]))
    assert got[0][5] == 0 and got[3][5] == 0


@pytest.mark.parametrize("offset", [1e4, -1e4, 6.5e4])
def test_offsets(offset):
    logits, labels = torch.randn(6, 257) + offset, torch.randint(257, (6,))
    got, want = forward(logits, labels), oracle(logits, labels)
    agrees(got, want, 2e-6)
    # relative to the maximum nothing is lost
    assert bool(((got[0] - want.logprob).abs() <= 4e-6 * (1 + want.logprob.abs())).all())


def test_certain_tokens_and_rising_logits():
    logits = torch.stack([torch.arange(300.0), -torch.arange(300.0), torch.eye(300)[7] * 100])
    agrees(forward(logits, torch.tensor([299, 0, 7])), oracle(logits, torch.tensor([299, 0, 7])), 2e-6)


def test_argmax_takes_the_lowest_of_a_tie():
    logits, labels = torch.zeros(4, 507), torch.zeros(4, dtype=torch.int64)
    logits[1, [300, 70, 506]] = 1.0
    logits[2, [5, 69, 133]] = 2.0  # lanes alike, modulo 64
    logits[3, 506] = 1.0
    assert forward(logits, labels)[2].tolist() == [0, 70, 5, 506]


def test_strides():
    labels = torch.randint(130, (6,))
    base = torch.randn(6, 260)
    for logits in (base[:, ::2], base[:, 1:131], torch.randn(130, 6).T, torch.randn(1, 130).expand(6, 130), base[:, 130:][::1]):
        agrees(forward(logits, labels), oracle(logits, labels), 2e-6)


def test_what_was_not_asked_for_is_empty():
    logits, labels = torch.randn(3, 40), torch.tensor([1, 2, 3])
    logprob, lse, argmax, entropy, top = forward(logits, labels, argmax=False, entropy=False)
    assert argmax.shape == entropy.shape == (0,) and argmax.dtype == torch.int64
    for got, want in zip((logprob, lse, top), [forward(logits, labels)[i] for i in (0, 1, 4)]):
        assert torch.equal(got, want)


@pytest.mark.parametrize("logits,vocab", [(torch.zeros(3, 0), None), (torch.full((3, 9), float("nan")), 0)])
def test_an_empty_vocabulary(logits, vocab):
    labels = torch.tensor([0, -1, 5])
    logprob, lse, argmax, entropy, top = forward(logits, labels, vocab=vocab)
    for x in (logprob, lse, top):
        assert bool((x == float("-inf")).all())
    assert argmax.tolist() == [-1] * 3 and entropy.tolist() == [0.0] * 3
    grads = backward(torch.ones(3), torch.ones(3), logits, labels, lse, vocab=vocab, need_bias=True)
    assert grads[0].shape == logits.shape and bool((grads[0] == 0).all()) and bool((grads[1] == 0).all())


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("tokens,vocab,dtype", [(1, 1, torch.float32), (7, 65, torch.float16), (9, 507, torch.float32)])
def test_gradients(tokens, vocab, dtype, options):
    logits, bias, labels = torch.randn(tokens, vocab).to(dtype) * 3, torch.randn(vocab), torch.randint(vocab, (tokens,))
    g, h = torch.randn(tokens), torch.randn(tokens)
    x, b = logits.double().requires_grad_(), bias.double().requires_grad_()
    want = reference(x, labels, bias=b, **options)
    d_x, d_b = torch.autograd.grad((g * want.logprob + h * want.lse).sum(), (x, b))
    args = (g, h, logits, labels, forward(logits, labels, bias=bias, **options)[1])
    got, d_bias = backward(*args, bias=bias, need_bias=True, **options)
    rounding = 2e-6 if dtype == torch.float32 else 1e-3
    assert got.dtype == dtype and d_bias.dtype == torch.float32
    torch.testing.assert_close(got.double(), d_x, rtol=rounding, atol=5e-6)
    torch.testing.assert_close(d_bias.double(), d_b, rtol=2e-6, atol=5e-6)
    only = backward(*args, bias=bias, need_logits=False, need_bias=True, **options)
    assert only[0].numel() == 0 and torch.equal(only[1], d_bias)
    in_place = logits.clone()
    again = backward(*args[:2], in_place, *args[3:], bias=bias, need_bias=True, out=in_place, **options)
    assert again[0] is in_place and torch.equal(in_place, got) and torch.equal(again[1], d_bias)


def test_gradients_of_no_tokens():
    none = torch.zeros(0)
    d_logits, d_bias = backward(none, none, torch.zeros(0, 70), none.long(), none, need_bias=True)
    assert d_logits.shape == (0, 70) and d_bias.tolist() == [0.0] * 70


def test_padding_that_fills_whole_tiles_gets_zeros():
    logits, labels = torch.randn(2, 507), torch.tensor([3, 9])
    got = backward(torch.ones(2), torch.ones(2), logits, labels, forward(logits, labels, vocab=10)[1], vocab=10)[0]
    assert bool((got[:, 10:] == 0).all()) and torch.equal(got[:, :10], torch.nn.functional.one_hot(labels, 10).float())


@pytest.mark.parametrize("shift,stride", [(0, 131), (3, 131), (1, 136)])
def test_gradient_between_other_alignments(shift, stride):
    vocab = 131
    memory = torch.zeros(shift + 6 * stride)
    logits, out = memory.as_strided((6, vocab), (stride, 1), shift), torch.zeros(6, 140)[:, 5 : 5 + vocab]
    logits.copy_(torch.randn(6, vocab))
    labels = torch.tensor([0, 130, 64, -1, 131, 7])  # of other shards: no label in the gradient
    lse, g = forward(logits, labels)[1], torch.randn(6)
    want = -g[:, None] * torch.softmax(logits.double(), 1)
    want[[0, 1, 2, 5], labels[[0, 1, 2, 5]]] += g[[0, 1, 2, 5]]
    for target in (out, None, logits):
        got = backward(g.double().float(), torch.zeros(()).expand(6), logits, labels, lse, out=target)[0]
        torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"logits": torch.zeros(3)}, r"\[T, V\]"),
        ({"logits": torch.zeros(3, 5).double()}, "float64"),
        ({"labels": torch.zeros(2, dtype=torch.int64)}, r"shape \(3,\)"),
        ({"labels": torch.zeros(3)}, "int32 or int64"),
        ({"bias": torch.zeros(4)}, r"\(5,\)"),
        ({"vocab": 6}, "vocab"),
    ],
)
def test_refusals(change, message):
    args = {"logits": torch.zeros(3, 5), "labels": torch.zeros(3, dtype=torch.int64)} | change
    with pytest.raises(ValueError, match=message):
        forward(**args)
