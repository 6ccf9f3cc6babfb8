"""lldfast_kernels.linear_logprob in the interpreter, against the fp64 oracle. bf16 is left out: the interpreter's tl.dot is wrong
on it without a word.
"""

import pytest
import torch

from lldfast.ops.linear_logprob import reference

pytestmark = [
    pytest.mark.usefixtures("interpreted"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]

TOKENS, WIDTHS, VOCABS = (0, 1, 2, 15, 17, 33), (1, 8, 31, 33, 64), (1, 2, 17, 63, 65, 129, 257, 507)
# A covering subset: every T, d and V, each beside many of the others.
SHAPES = [(TOKENS[i % 6], WIDTHS[i % 5], VOCABS[i % 8]) for i in range(0, 240, 7)]
OPTIONS = [{}, {"softcap": 5.0}, {"logit_scale": 0.3}, {"softcap": 9.0, "logit_scale": 1.7}]
NAMES = ("logprob", "lse", "argmax", "entropy", "max_logit")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def forward(*args, **options):
    from lldfast_kernels.linear_logprob import linear_logprob_fwd

    return linear_logprob_fwd(*args, **{"argmax": True, "entropy": True} | options)


def backward(*args, **options):
    from lldfast_kernels.linear_logprob import linear_logprob_bwd

    return linear_logprob_bwd(*args, **options)


def make(tokens, width, vocab, dtype=torch.float32, scale=1.0):
    hidden = (torch.randn(tokens, width) * scale).to(dtype)
    return hidden, torch.randn(vocab, width).to(dtype), torch.randint(vocab, (tokens,))


def oracle(hidden, weight, labels, vocab=None, bias=None, **options):
    """reference() on the real rows; foreign labels go behind them, where they score -inf."""
    vocab = len(weight) if vocab is None else vocab
    labels = torch.where((labels < 0) | (labels >= vocab), vocab, labels)
    bias = None if bias is None else bias[:vocab]
    return reference(hidden, weight[:vocab], labels, bias=bias, ignore_index=-1, **options)


def agrees(got, want, factor=2e-6):
    for i, name in enumerate(NAMES):
        if name == "argmax":
            continue
        x, y = got[i].double(), getattr(want, name)
        assert x.shape == y.shape and bool((x.isnan() == y.isnan()).all()), name
        bound = factor * (10 if name == "entropy" else 1) * (1 + want.lse.abs())
        assert bool(((x == y) | y.isnan() | ((x - y).abs() <= bound)).all()), (name, float((x - y).abs().max()))
    sound = ~want.lse.isnan()
    assert torch.equal(got[2][sound], want.argmax[sound])
    assert not bool((got[0] > 0).any())


def paths(hidden):
    """Both forward kernels where descriptors can take these rows."""
    return (False, True) if hidden.dtype == torch.float16 and hidden.stride(0) % 8 == 0 else (False,)


@pytest.mark.parametrize("tokens,width,vocab", SHAPES)
def test_shapes(tokens, width, vocab):
    for dtype, factor in ((torch.float32, 2e-6), (torch.float16, 5e-6)):
        hidden, weight, labels = make(tokens, width, vocab, dtype)
        want = oracle(hidden, weight, labels)
        for tma in paths(hidden):
            agrees(forward(hidden, weight, labels, tma=tma), want, factor)


@pytest.mark.parametrize("options", OPTIONS)
def test_options(options):
    hidden, weight, labels = make(9, 40, 300, torch.float16, 0.5)
    bias = torch.randn(300)
    want = oracle(hidden, weight, labels, bias=bias, **options)
    for tma in (False, True):
        agrees(forward(hidden, weight, labels, bias=bias, tma=tma, **options), want, 5e-6)


def test_labels_at_the_edges_and_of_other_shards():
    labels = torch.tensor([0, 299, 63, 64, 127, 128, 191, 192, -1, -100, 300, 2**40])
    hidden, weight, _ = make(len(labels), 64, 300, torch.float16)
    for tma in (False, True):
        got = forward(hidden, weight, labels, tma=tma)
        agrees(got, oracle(hidden, weight, labels), 5e-6)
        assert bool((got[0][8:] == float("-inf")).all()) and bool(got[0][:8].isfinite().all())
        assert torch.equal(got[0][:8], forward(hidden[:8], weight, labels[:8].int(), tma=tma)[0])


def test_a_tokens_value_does_not_depend_on_the_others():
    # Products whose sums are exact: the interpreter's are a BLAS's, which may add in another order in another row of a tile.
    hidden, weight = (torch.randint(-8, 9, (n, 64)).to(torch.float16) / 8 for n in (40, 257))
    labels, order = torch.randint(257, (40,)), torch.randperm(40)
    for tma in (False, True):
        whole = forward(hidden, weight, labels, tma=tma)
        for part in (slice(0, 1), slice(5, 22), order):
            for got, want in zip(forward(hidden[part], weight, labels[part], tma=tma), whole):
                assert torch.equal(got, want[part])


@pytest.mark.parametrize("value", [-50.0, 50.0])
@pytest.mark.parametrize("vocab", [63, 257])
def test_the_tail_adds_nothing(value, vocab):
    hidden, weight = torch.ones(3, 8, dtype=torch.float16), torch.full((vocab, 8), value / 8, dtype=torch.float16)
    labels = torch.tensor([0, vocab // 2, vocab - 1])
    for tma in (False, True):
        got = forward(hidden, weight, labels, tma=tma)
        agrees(got, oracle(hidden, weight, labels))
        assert got[2].tolist() == [0, 0, 0]  # all tie


def test_padding_may_hold_nan():
    hidden, weight, labels = make(5, 16, 320, torch.float16)
    labels[:] = torch.tensor([0, 1, 249, 250, 319])
    bias = torch.randn(320)
    weight[250:], bias[250:] = float("nan"), float("nan")
    for tma in (False, True):
        got = forward(hidden, weight, labels, bias=bias, vocab=250, tma=tma)
        agrees(got, oracle(hidden, weight, labels, 250, bias), 5e-6)
    dh, dw, db = backward(torch.ones(5), torch.ones(5), hidden, weight, labels, got[1], bias=bias, vocab=250, need_bias=True)
    assert bool(dh.isfinite().all()) and bool(dw.isfinite().all()) and bool(db.isfinite().all())
    assert bool((dw[250:] == 0).all()) and bool((db[250:] == 0).all())


def test_infinities_and_nan_stay_in_their_rows():
    hidden, weight, labels = make(6, 8, 200)
    bias = torch.zeros(200)
    bias[10:] = float("-inf")
    hidden[2, 3] = float("nan")
    labels[:] = torch.tensor([0, 9, 1, 2, 50, 3])
    got = forward(hidden, weight, labels, bias=bias)
    agrees(got, oracle(hidden, weight, labels, bias=bias))
    assert got[0][4] == float("-inf") and all(bool(got[i][2].isnan()) for i in (0, 1, 3, 4))
    nothing = forward(hidden[:2], weight, labels[:2], bias=torch.full((200,), float("-inf")))
    assert bool(nothing[0].isnan().all()) and bool((nothing[1] == float("-inf")).all()) and nothing[2].tolist() == [0, 0]


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_offsets(offset):
    hidden, weight, labels = make(6, 16, 257)
    bias = torch.full((257,), offset)
    got, want = forward(hidden, weight, labels, bias=bias), oracle(hidden, weight, labels, bias=bias)
    agrees(got, want)


def test_certain_tokens():
    hidden, weight = torch.eye(8) * 200, torch.eye(8)
    got = forward(hidden, weight, torch.arange(8))
    assert bool((got[0] == 0).all()) and got[2].tolist() == list(range(8))


def test_argmax_takes_the_lowest_of_a_tie():
    weight = torch.zeros(507, 8)
    weight[[300, 70, 506], 0] = 1.0
    weight[[450, 5, 69], 1] = 1.0
    hidden = torch.eye(8)[:3]
    assert forward(hidden, weight, torch.zeros(3, dtype=torch.int64))[2].tolist() == [70, 5, 0]


def test_strides():
    hidden, weight, labels = make(6, 40, 130, torch.float16)
    views = [
        (hidden[:, ::2], weight[:, ::2]),
        (hidden[:, 1:33], weight[:, 8:]),
        (hidden.T.contiguous().T, weight.T.contiguous().T),
        (hidden[:1].expand(6, 40), weight[:, :]),
        (hidden[:, 8:33], weight[:, 8:33]),
    ]
    for h, w in views:
        for tma in (None, False):
            agrees(forward(h, w, labels, tma=tma), oracle(h, w, labels), 5e-6)
    agrees(forward(hidden[:, 8:33], weight[:, 8:33], labels, tma=True), oracle(hidden[:, 8:33], weight[:, 8:33], labels), 5e-6)


def test_what_was_not_asked_for_is_empty():
    hidden, weight, labels = make(3, 8, 40)
    logprob, lse, argmax, entropy, top = forward(hidden, weight, labels, argmax=False, entropy=False)
    assert argmax.shape == entropy.shape == (0,) and argmax.dtype == torch.int64
    for got, want in zip((logprob, lse, top), [forward(hidden, weight, labels)[i] for i in (0, 1, 4)]):
        assert torch.equal(got, want)


@pytest.mark.parametrize("rows,vocab", [(0, None), (9, 0)])
def test_an_empty_vocabulary(rows, vocab):
    hidden, weight, labels = torch.randn(3, 8), torch.full((rows, 8), float("nan")), torch.tensor([0, -1, 5])
    logprob, lse, argmax, entropy, top = forward(hidden, weight, labels, vocab=vocab)
    for x in (logprob, lse, top):
        assert bool((x == float("-inf")).all())
    assert argmax.tolist() == [-1] * 3 and entropy.tolist() == [0.0] * 3
    for x in backward(torch.ones(3), torch.ones(3), hidden, weight, labels, lse, vocab=vocab, need_bias=True):
        assert bool((x == 0).all())


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(
    "tokens,width,vocab,dtype", [(1, 1, 1, torch.float32), (35, 31, 129, torch.float32), (33, 64, 70, torch.float16)]
)
def test_gradients(tokens, width, vocab, dtype, options):
    hidden, weight, labels = make(tokens, width, vocab, dtype, 0.5)
    labels[0] = -1  # another shard's: no label in its gradient
    bias, g, h = torch.randn(vocab), torch.randn(tokens), torch.randn(tokens)
    leaves = [x.double().requires_grad_() for x in (hidden, weight, bias)]
    want = reference(leaves[0], leaves[1], labels, bias=leaves[2], ignore_index=-100, **options)
    loss = (torch.where(labels < 0, 0.0, g) * torch.where(labels < 0, 0.0, want.logprob) + h * want.lse).sum()
    grads = torch.autograd.grad(loss - (torch.where(labels < 0, g, 0.0) * want.lse).sum(), leaves)
    args = (g, h, hidden, weight, labels, forward(hidden, weight, labels, bias=bias, **options)[1])
    one = backward(*args, bias=bias, need_bias=True, **options)
    many = backward(*args, bias=bias, need_bias=True, chunk_bytes=1, **options)
    rounding = 5e-6 if dtype == torch.float32 else 2e-3
    for got, chunked, expected, name in zip(one, many, grads, ("hidden", "weight", "bias")):
        assert got.dtype == chunked.dtype == torch.float32
        bound = 5e-6 if name == "bias" else rounding
        torch.testing.assert_close(got.double(), expected, rtol=bound, atol=10 * bound)
        torch.testing.assert_close(chunked.double(), expected, rtol=bound, atol=10 * bound)
    for got, again in zip(many, backward(*args, bias=bias, need_bias=True, chunk_bytes=1, **options)):
        assert torch.equal(got, again)
    only = backward(*args, bias=bias, need_hidden=False, need_weight=False, need_bias=True, **options)
    assert only[0].numel() == only[1].numel() == 0 and torch.equal(only[2], one[2])


def test_dz_fills_strided_rows():
    from lldfast_kernels.linear_logprob import linear_logprob_dz

    hidden, weight, labels = make(18, 33, 70)
    lse = forward(hidden, weight, labels)[1]
    out = torch.full((18, 80), float("nan"))
    got = linear_logprob_dz(hidden, weight, labels, lse, torch.ones(18), torch.zeros(18), vocab=65, out=out[:, :65])
    want = torch.nn.functional.one_hot(labels, 70)[:, :65] - torch.exp(hidden.double() @ weight[:65].double().T - lse[:, None])
    torch.testing.assert_close(got.double(), want.double(), rtol=5e-6, atol=5e-6)
    assert bool(out[:, 65:].isnan().all())


@pytest.mark.parametrize(
    "change,message",
    [
        ({"hidden": torch.zeros(3, 4)}, "hidden must be"),
        ({"weight": torch.zeros(5, 8).half()}, "one dtype"),
        ({"hidden": torch.zeros(3, 8).double(), "weight": torch.zeros(5, 8).double()}, "float64"),
        ({"labels": torch.zeros(2, dtype=torch.int64)}, r"shape \(3,\)"),
        ({"bias": torch.zeros(4)}, r"\(5,\)"),
        ({"vocab": 6}, "vocab"),
        ({"tma": True}, "tma"),
    ],
)
def test_refusals(change, message):
    args = {"hidden": torch.zeros(3, 8), "weight": torch.zeros(5, 8), "labels": torch.zeros(3, dtype=torch.int64)} | change
    with pytest.raises(ValueError, match=message):
        forward(args.pop("hidden"), args.pop("weight"), args.pop("labels"), **args)
