"""csrc/cpu/linear_logprob: every instruction set and precision against the fp64 oracle; the same bits whatever the company."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from lldfast.backends import extension
from lldfast.ops import native
from lldfast.ops.chunks import Outputs
from lldfast.ops.linear_logprob import linear_cross_entropy, linear_logprob, reference

C = extension()
pytestmark = pytest.mark.skipif(C is None, reason="lldfast._C is not built")
ISAS = [] if C is None else list(C.supported_isas())
KINDS = [(isa, precision) for isa in ISAS for precision in ("fp32", "bf16", "bf16x3")]
LIMIT = {"fp32": 2e-6, "bf16": 5e-6, "bf16x3": 1e-4}
# tokens, width, vocabulary: around the blocks of 32 and 16, the slabs of 96 and 384 columns, the splits of 8192 rows
SHAPES = [
    (1, 1, 1), (2, 8, 2), (15, 31, 17), (16, 32, 63), (17, 33, 64), (31, 64, 65), (33, 123, 127), (127, 32, 129), (128, 8, 257),
    (129, 97, 507), (65, 768, 513), (40, 400, 1000), (700, 31, 1025), (5, 16, 8191), (33, 24, 8193), (3, 40, 17000),
    (8, 2048, 70),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def threads(monkeypatch):
    """threads(n): that many for calls of any size."""

    def use(n):
        monkeypatch.setattr(native, "_threads", lambda work: n)

    use(2)
    return use


def make(tokens, d, vocab, precision="fp32"):
    hidden, weight = torch.randn(tokens, d), torch.randn(vocab, d) * 2 / math.sqrt(d)
    if precision == "bf16":
        hidden, weight = hidden.bfloat16(), weight.bfloat16()
    return hidden, weight, torch.randint(vocab, (tokens,))


def forward(hidden, weight, labels, isa, precision, rows=None, bias=None, softcap=None, logit_scale=1.0, vocab=None, extra=True):
    out = Outputs.zeros(hidden, len(hidden), torch.float32, extra, extra)
    vocab = len(weight) if vocab is None else vocab
    native.linear_logprob_fwd(hidden, weight, labels, rows, vocab, bias, softcap, logit_scale, precision, out, isa)
    return out


def backward(
    hidden, weight, labels, scores, g, h, isa, precision, rows=None, bias=None, softcap=None, logit_scale=1.0, vocab=None
):
    dh, dw, db = torch.zeros_like(hidden), torch.zeros_like(weight), torch.zeros(len(weight))
    native.linear_logprob_bwd(
        hidden, weight, labels, rows, len(weight) if vocab is None else vocab, bias, softcap, logit_scale, precision,
        scores.logprob, scores.lse, g, h, dh, dw, db, isa,
    )  # fmt: skip
    return dh, dw, db


def agrees(got, want, precision):
    limit = LIMIT[precision] * (1 + want.lse.abs())
    assert bool(((got.logprob.double() - want.logprob).abs() <= limit).all()), float((got.logprob - want.logprob).abs().max())
    assert bool(((got.lse.double() - want.lse).abs() <= limit).all())
    assert bool(((got.entropy.double() - want.entropy).abs() <= 10 * limit).all())
    assert bool((got.logprob <= 0).all())
    # The largest logit's id, or that of one as large to within the error.
    assert bool(((got.top.double() - want.max_logit).abs() <= limit + 4e-6 * want.max_logit.abs()).all())


def distance(a, b):
    return float((a.double() - b).norm() / b.norm().clamp(min=1e-12))


@pytest.mark.parametrize("isa,precision", KINDS)
@pytest.mark.parametrize("tokens,d,vocab", SHAPES)
def test_forward(threads, isa, precision, tokens, d, vocab):
    hidden, weight, labels = make(tokens, d, vocab, precision)
    agrees(forward(hidden, weight, labels, isa, precision), reference(hidden, weight, labels), precision)


@pytest.mark.parametrize("isa,precision", KINDS)
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "logit_scale": 1.5}, {"bias": True, "logit_scale": 0.5}])
def test_gradients(threads, isa, precision, options):
    tokens, d, vocab = 601, 70, 1100  # several chunks of tokens and of the vocabulary
    hidden, weight, labels = make(tokens, d, vocab, precision)
    options = {**options, "bias": torch.randn(vocab)} if "bias" in options else options
    leaves = [x.double().requires_grad_() for x in (hidden, weight, *([options["bias"]] if "bias" in options else []))]
    with_leaves = {**options, **({"bias": leaves[2]} if "bias" in options else {})}
    want = reference(leaves[0], leaves[1], labels, **with_leaves)
    g, h = torch.randn(tokens), torch.randn(tokens)
    grads = torch.autograd.grad((g * want.logprob + h * want.lse).sum(), leaves)
    got = forward(hidden, weight, labels, isa, precision, **options)
    agrees(got, reference(hidden, weight, labels, **options), precision)
    # bf16 gradients of bf16 inputs: half of a last place of 8 bits; bf16x3 takes its gradients in fp32
    limit = 3e-3 if precision == "bf16" else 2e-5
    for a, b in zip(backward(hidden, weight, labels, got, g, h, isa, precision, **options), grads, strict=False):
        assert distance(a, b) < limit


@pytest.mark.parametrize("isa,precision", KINDS)
def test_a_tokens_bits_do_not_depend_on_its_company(threads, isa, precision):
    hidden, weight, labels = make(150, 50, 9000, precision)
    threads(1)
    want = forward(hidden, weight, labels, isa, precision)
    for n in (2, 3, 5):
        threads(n)
        for a, b in zip(forward(hidden, weight, labels, isa, precision), want, strict=True):
            assert torch.equal(a, b)
    order = torch.randperm(150)
    for part in order.split(37):
        got = forward(hidden[part], weight, labels[part], isa, precision)
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b[part])
    rows = order[:70].sort().values
    got = forward(hidden, weight, labels, isa, precision, rows=rows)
    assert torch.equal(got.logprob[rows], want.logprob[rows]) and bool((got.logprob[order[70:]] == 0).all())


@pytest.mark.parametrize("isa,precision", KINDS)
def test_gradient_bits_do_not_depend_on_the_threads(threads, isa, precision):
    hidden, weight, labels = make(1300, 40, 700, precision)
    bias, g, h = torch.randn(700), torch.randn(1300), torch.randn(1300)
    labels[:400] = 3  # many tokens to one row
    scores = forward(hidden, weight, labels, isa, precision, bias=bias)
    threads(1)
    want = backward(hidden, weight, labels, scores, g, h, isa, precision, bias=bias)
    for n in (2, 3, 7):
        threads(n)
        got = backward(hidden, weight, labels, scores, g, h, isa, precision, bias=bias)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("isa,precision", KINDS)
def test_rows_that_do_not_count(threads, isa, precision):
    hidden, weight, labels = make(90, 33, 300, precision)
    weight[257:] = math.nan
    hidden[::3] = math.nan
    rows = torch.tensor([i for i in range(90) if i % 3])
    labels %= 257
    want = reference(hidden[rows], weight[:257], labels[rows])
    got = forward(hidden, weight, labels, isa, precision, rows=rows, vocab=257)
    agrees(Outputs(*(x[rows] for x in got)), want, precision)
    g, h = torch.ones(90), torch.zeros(90)
    dh, dw, db = backward(hidden, weight, labels, got, g, h, isa, precision, rows=rows, bias=torch.zeros(300), vocab=257)
    assert bool(dh[::3].eq(0).all()) and bool(dw[257:].eq(0).all()) and bool(db[257:].eq(0).all())
    assert all(bool(x.isfinite().all()) for x in (dh, dw, db))


@pytest.mark.parametrize("isa,precision", KINDS)
@pytest.mark.parametrize("level", [-50.0, 50.0])
def test_equal_logits_far_from_zero(threads, isa, precision, level):
    # Padding that counted as logits of 0 would change these sums.
    hidden = torch.full((5, 1), level)
    weight, labels = torch.ones(2049, 1), torch.tensor([0, 31, 32, 2047, 2048])
    if precision == "bf16":
        hidden, weight = hidden.bfloat16(), weight.bfloat16()
    got = forward(hidden, weight, labels, isa, precision)
    torch.testing.assert_close(got.logprob, torch.full((5,), -math.log(2049)), rtol=0, atol=1e-4)
    assert got.argmax.tolist() == [0] * 5  # the lowest of a tie
    torch.testing.assert_close(got.entropy, torch.full((5,), math.log(2049)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("isa,precision", [(isa, p) for isa, p in KINDS if p != "bf16x3"])
def test_labels_and_ties_at_the_edges_of_panels_and_splits(threads, isa, precision):
    vocab = 16500
    edges = [0, 15, 16, 31, 32, 8191, 8192, 16383, 16384, vocab - 1]
    weight = torch.full((vocab, 2), -1.0)
    for i, edge in enumerate(edges):
        weight[edge] = torch.tensor([1.0 + i, 1.0 + i])
    hidden, labels = torch.ones(len(edges), 2), torch.tensor(edges)
    if precision == "bf16":
        hidden, weight = hidden.bfloat16(), weight.bfloat16()
    agrees(forward(hidden, weight, labels, isa, precision), reference(hidden, weight, labels), precision)
    weight[edges] = 3.0
    assert forward(hidden, weight, labels, isa, precision).argmax.tolist() == [0] * len(edges)
    weight[:8192] = -1.0
    assert forward(hidden, weight, labels, isa, precision).argmax.tolist() == [8192] * len(edges)


@pytest.mark.parametrize("isa,precision", [(isa, p) for isa, p in KINDS if p != "bf16x3"])
def test_extreme_logits(threads, isa, precision):
    hidden = torch.tensor([[1e4], [-1e4], [1.0], [0.0], [-1.0], [math.nan], [300.0]])
    weight = torch.cat([torch.linspace(-9, 9, 76)[:, None], torch.tensor([[1e-3], [-1e-3]])])
    weight[3], weight[40] = 8.9, -8.9
    labels = torch.tensor([3, 40, 5, 0, 77, 1, 3])
    if precision == "bf16":
        hidden, weight = hidden.bfloat16(), weight.bfloat16()
    got, want = forward(hidden, weight, labels, isa, precision), reference(hidden, weight, labels)
    assert got.logprob.isnan().tolist() == got.lse.isnan().tolist() == [False] * 5 + [True, False]  # confined to its token
    keep = [0, 1, 2, 3, 4, 6]
    error = (got.logprob.double() - want.logprob)[keep].abs()
    assert bool((error <= 1e-6 * (1 + want.lse.abs() + want.logprob.abs())[keep]).all())
    # -inf: entries, and everything
    bias = torch.full((78,), -math.inf)
    bias[[7, 9]] = 0.0
    some = forward(hidden[2:3], weight, torch.tensor([9]), isa, precision, bias=bias)
    assert abs(float(some.logprob) - float(reference(hidden[2:3], weight, torch.tensor([9]), bias=bias).logprob)) < 1e-5
    assert forward(hidden[2:3], weight, torch.tensor([8]), isa, precision, bias=bias).logprob.tolist() == [-math.inf]
    none = forward(hidden[2:3], weight, torch.tensor([9]), isa, precision, bias=bias.fill_(-math.inf))
    assert none.lse.tolist() == [-math.inf] and bool(none.logprob.isnan())


# The scalar code is nobody's default, so one process with it shows that the choice is obeyed.
@pytest.mark.parametrize("isa", [isa if isa == "scalar" else pytest.param(isa, marks=pytest.mark.slow) for isa in ISAS])
def test_a_forced_instruction_set_is_used(isa):
    code = (
        "import torch, lldfast as lld; from lldfast.backends import isa; torch.manual_seed(0)\n"
        "h, w, y = torch.randn(40, 24).bfloat16(), torch.randn(90, 24).bfloat16(), torch.randint(90, (40,))\n"
        "a = lld.linear_logprob(h, w, y, backend='cpp').logprob; b = lld.linear_logprob(h, w, y, backend='torch').logprob\n"
        "assert float((a - b).abs().max()) < 5e-5; print(isa())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "LLDFAST_ISA": isa}, capture_output=True, text=True, check=False
    )
    assert run.stdout.strip() == isa, run.stderr


def test_inputs_that_are_not_contiguous():
    hidden, weight, labels = make(60, 48, 100, "bf16")
    want = linear_logprob(hidden, weight, labels, backend="cpp").logprob
    wide = torch.zeros(60, 100, dtype=torch.bfloat16)
    wide[:, 3:51] = hidden  # a shifted view: rows that start at odd addresses
    spread = torch.zeros(100, 96, dtype=torch.bfloat16)
    spread[:, ::2] = weight
    for h, w in ((wide[:, 3:51], weight), (hidden.T.contiguous().T, spread[:, ::2]), (hidden.view(3, 20, 48), weight)):
        got = linear_logprob(h, w, labels.view(h.shape[:-1]), backend="cpp").logprob
        assert torch.equal(got.flatten(), want)
    one = linear_logprob(hidden[:1].expand(60, 48), weight, labels, backend="cpp").logprob
    assert torch.equal(one[:1], want[:1])


def test_a_changed_weight_is_seen():
    hidden, weight, labels = make(60, 32, 100, "bf16")
    before = linear_logprob(hidden, weight, labels, backend="cpp").logprob
    weight[5] += 3
    after = linear_logprob(hidden, weight, labels, backend="cpp").logprob
    assert not torch.equal(before, after)
    agree = reference(hidden, weight, labels).logprob
    torch.testing.assert_close(after.double(), agree, rtol=0, atol=5e-5)


def test_after_a_fork(threads):
    hidden, weight, labels = make(200, 32, 500, "bf16")
    want = linear_logprob(hidden, weight, labels, backend="cpp").logprob
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(linear_logprob(hidden, weight, labels, backend="cpp").logprob, want) else 1)
    assert os.waitpid(child, 0)[1] == 0


PEAK = """
import sys, torch, lldfast as lld
tokens, d, vocab, train = map(int, sys.argv[1:])
torch.set_num_threads(1)
h, w = torch.randn(tokens, d).bfloat16(), torch.empty(vocab, d, dtype=torch.bfloat16).normal_()
y = torch.randint(vocab, (tokens,))
def kilobytes(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))
def run(h, w, y):
    h, w = h.detach().requires_grad_(bool(train)), w.detach().requires_grad_(bool(train))
    loss = lld.linear_cross_entropy(h, w, y, backend="cpp")
    if train:
        loss.backward()
run(h[:40], w[:100], y[:40] % 100)  # imports and first-call costs
open("/proc/self/clear_refs", "w").write("5")  # the peak starts again
before = kilobytes("VmRSS")
run(h, w, y)
print((kilobytes("VmHWM") - before) / 1024)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's record of peak memory")
@pytest.mark.parametrize(
    "tokens,d,vocab,train,most",
    [
        (2048, 32, 16384, True, 1 + 32),
        pytest.param(1024, 768, 50304, False, 16, marks=[pytest.mark.slow, pytest.mark.alone]),
        pytest.param(1024, 768, 50304, True, 77 + 32, marks=[pytest.mark.slow, pytest.mark.alone]),
    ],
)
def test_peak_memory(tokens, d, vocab, train, most):
    """Extra MB, where bf16 logits take 67 in the first case, else 103: scratch only; for training dW (1, 77) and scratch."""
    arguments = [str(int(x)) for x in (tokens, d, vocab, train)]
    run = subprocess.run([sys.executable, "-c", PEAK, *arguments], capture_output=True, text=True, check=True)
    assert 0 < float(run.stdout) < most


# The least product still has a ninth split of the vocabulary, which is a single row, and a ragged width.
BIG = [(31, 64, 50257), (1000, 768, 50304), (9, 32, 128256), (3, 2048, 151936), (2, 31, 262144)]


@pytest.mark.parametrize("tokens,d,vocab", [(5, 33, 65537), *(pytest.param(*shape, marks=pytest.mark.slow) for shape in BIG)])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16x3"])
def test_big_vocabularies(threads, precision, tokens, d, vocab):
    hidden, weight, labels = make(tokens, d, vocab, precision)
    agrees(forward(hidden, weight, labels, "", precision), reference(hidden, weight, labels), precision)


def test_rows_of_the_weight_more_than_two_billion_elements_apart(threads):
    """Memory that is never touched costs nothing: three rows, the last behind element 2^31."""
    apart, d = 2**30 + 8, 40
    memory = torch.from_numpy(np.zeros(2 * apart + d, dtype=np.int16)).view(torch.bfloat16)  # torch.zeros would touch it all
    weight = memory.as_strided((3, d), (apart, 1))
    weight.copy_(torch.randn(3, d))
    hidden, labels = torch.randn(4, d).bfloat16(), torch.tensor([2, 1, 0, 2])
    agrees(forward(hidden, weight, labels, "", "bf16"), reference(hidden, weight, labels), "bf16")


@pytest.mark.slow
@pytest.mark.alone
def test_weights_of_more_than_two_billion_elements():
    vocab, d = 70_000, 32_768  # 2.3e9 elements, 4.6 GB
    weight = torch.zeros(vocab, d, dtype=torch.bfloat16)
    weight[-1, -1], weight[-2, 0] = 4.0, 2.0
    hidden = torch.ones(2, d, dtype=torch.bfloat16)
    got = linear_logprob(hidden, weight, torch.tensor([vocab - 1, vocab - 2]), backend="cpp").logprob
    total = math.log(vocab - 2 + math.exp(4) + math.exp(2))
    torch.testing.assert_close(got, torch.tensor([4 - total, 2 - total]), rtol=0, atol=1e-5)


def test_training_loss_of_bf16_is_near_fp64():
    hidden, weight, labels = make(300, 64, 1000, "bf16")
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    linear_cross_entropy(*leaves, labels, backend="cpp").backward()
    (-reference(*wide, labels).logprob.mean()).backward()
    for a, b in zip(leaves, wide, strict=True):
        assert a.grad.dtype == torch.bfloat16
        assert distance(a.grad, b.grad) < 3e-3  # of which the rounding of the result to bf16 is 1.7e-3


@pytest.mark.parametrize("isa,precision", KINDS)
def test_gradients_of_tokens_that_are_nearly_certain(threads, isa, precision):
    """Where p is near 1, g - g p is a difference of near equals: it must come from logprob, and only from rounded factors."""
    n = 64
    hidden = torch.eye(n) * 16 + 0.1 * torch.randn(n, n)
    weight, labels = torch.eye(n) + 0.1 * torch.randn(n, n), torch.arange(n)
    if precision == "bf16":  # fp32 inputs that are rounded, as under autocast
        rounded = [hidden.bfloat16(), weight.bfloat16()]
    else:
        rounded = [hidden, weight]
    leaves = [x.double().requires_grad_() for x in rounded]
    want = reference(*leaves, labels)
    assert float(want.logprob.detach().exp().min()) > 0.98
    grads = torch.autograd.grad(-want.logprob.mean(), leaves)
    got = forward(hidden, weight, labels, isa, precision)
    found = backward(hidden, weight, labels, got, torch.full((n,), -1 / n), torch.zeros(n), isa, precision)
    for a, b in zip(found, grads, strict=False):
        assert distance(a, b) < 5e-3


@pytest.mark.parametrize("isa", ISAS)
def test_a_large_bias_and_a_ragged_end(threads, isa):
    hidden, weight, labels = make(33, 64, 100)
    bias = torch.zeros(100)
    bias[3], bias[5] = 89.0, 3e38
    got = forward(hidden, weight, labels, isa, "fp32", bias=bias)
    dh, dw, db = backward(hidden, weight, labels, got, -torch.ones(33), torch.zeros(33), isa, "fp32", bias=bias)
    assert all(bool(x.isfinite().all()) for x in (dh, dw, db))


@pytest.mark.slow
def test_threads_that_cannot_start_are_an_error():
    code = (
        "import resource, torch, lldfast as lld\n"
        "h, w, y = torch.randn(300, 256).bfloat16(), torch.randn(2000, 256).bfloat16(), torch.randint(0, 2000, (300,))\n"
        "want = lld.linear_logprob(h, w, y, backend='cpp').logprob; torch.set_num_threads(32)\n"
        "size = int(open('/proc/self/statm').read().split()[0]) * 4096 + 40 * 2**20\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size, resource.getrlimit(resource.RLIMIT_AS)[1]))\n"
        "try:\n    lld.linear_logprob(h, w, y, backend='cpp')\n"
        "except (RuntimeError, MemoryError) as error:\n    print(type(error).__name__)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0 and run.stdout.strip() in ("RuntimeError", "MemoryError"), run.stderr
