"""csrc/cpu/logprob: given logits, every instruction set against the fp64 oracle."""

import math

import pytest
import torch

from lldfast.backends import extension
from lldfast.ops import native
from lldfast.ops.chunks import Outputs
from lldfast.ops.logprob import reference

C = extension()
pytestmark = [pytest.mark.skipif(C is None, reason="lldfast._C is not built"), pytest.mark.usefixtures("threads")]
ISAS = [isa for isa in ([] if C is None else C.supported_isas()) if isa != "amx"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def forward(logits, labels, isa, rows=None, vocab=None, extra=True, **options):
    o = {"bias": None, "softcap": None, "logit_scale": 1.0, **options}
    out = Outputs.zeros(logits, len(logits), torch.float32, extra, extra)
    native.logprob_fwd(
        logits, labels, rows, logits.shape[1] if vocab is None else vocab, o["bias"], o["softcap"], o["logit_scale"], out, isa
    )
    return out


def agrees(got, want, factor):
    limit = factor * (1 + want.lse.abs())
    assert bool(((got.logprob.double() - want.logprob).abs() <= limit).all())
    assert bool(((got.lse.double() - want.lse).abs() <= limit).all())
    assert bool(((got.entropy.double() - want.entropy).abs() <= 10 * limit).all())
    assert torch.equal(got.argmax, want.argmax) and bool((got.logprob <= 0).all())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens,vocab", [(1, 1), (2, 2), (3, 17), (7, 64), (9, 65), (17, 257), (5, 2047), (5, 2048), (3, 5001)])
def test_forward(isa, dtype, tokens, vocab):
    logits, labels = (torch.randn(tokens, vocab) * 3).to(dtype), torch.randint(vocab, (tokens,))
    agrees(forward(logits, labels, isa), reference(logits, labels), 2e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"softcap": 4.0, "logit_scale": 1.5}, {"bias": True, "logit_scale": 0.5}])
def test_gradients(isa, dtype, options):
    tokens, vocab = 70, 2500
    logits, labels = (torch.randn(tokens, vocab) * 3).to(dtype), torch.randint(vocab, (tokens,))
    bias = torch.randn(vocab) if "bias" in options else None
    leaves = [logits.double().requires_grad_()] + ([bias.double().requires_grad_()] if bias is not None else [])
    want = reference(leaves[0], labels, **{**options, "bias": leaves[1] if bias is not None else None})
    g, h = torch.randn(tokens), torch.randn(tokens)
    grads = torch.autograd.grad((g * want.logprob + h * want.lse).sum(), leaves)
    options = {"softcap": None, "logit_scale": 1.0, **options, "bias": bias}
    scores = forward(logits, labels, isa, **options)
    d_logits, d_bias = torch.empty_like(logits), torch.zeros(vocab if bias is not None else 0)
    arguments = (options["bias"], options["softcap"], options["logit_scale"], scores.logprob, scores.lse, g, h)
    native.logprob_bwd(logits, labels, None, vocab, *arguments, d_logits, d_bias, isa)
    limit = {torch.float32: 1e-6, torch.bfloat16: 3e-3, torch.float16: 3e-4}[dtype]
    for a, b in zip((d_logits, d_bias), grads, strict=False):
        assert float((a.double() - b).norm() / b.norm()) < limit
    in_place = logits.clone()
    native.logprob_bwd(in_place, labels, None, vocab, *arguments, in_place, torch.zeros(0), isa)
    assert torch.equal(in_place, d_logits)


@pytest.mark.parametrize("isa", ISAS)
def test_bits_do_not_depend_on_the_company(threads, isa):
    logits, labels = torch.randn(61, 4100), torch.randint(4100, (61,))
    threads(1)
    want = forward(logits, labels, isa)
    for n in (2, 5):
        threads(n)
        assert all(torch.equal(a, b) for a, b in zip(forward(logits, labels, isa), want, strict=True))
    part = torch.randperm(61)[:20]
    assert all(torch.equal(a, b[part]) for a, b in zip(forward(logits[part], labels[part], isa), want, strict=True))


@pytest.mark.parametrize("isa", ISAS)
def test_columns_and_rows_that_do_not_count(isa):
    logits, labels = torch.randn(30, 2100), torch.randint(2050, (30,))
    logits[:, 2050:] = math.nan
    logits[::4] = math.nan
    rows = torch.tensor([i for i in range(30) if i % 4])
    got = forward(logits, labels, isa, rows=rows, vocab=2050)
    agrees(Outputs(*(x[rows] for x in got)), reference(logits[rows][:, :2050], labels[rows]), 2e-6)
    assert bool(got.logprob[::4].eq(0).all())


@pytest.mark.parametrize("isa", ISAS)
def test_extremes(isa):
    vocab = 2 * 2048 + 5
    logits = torch.stack([
        torch.full((vocab,), -50.0),
        torch.full((vocab,), 50.0),
        torch.arange(vocab, dtype=torch.float32),  # every piece has a new maximum
        torch.full((vocab,), -math.inf),
        torch.full((vocab,), 1e4),
        torch.full((vocab,), math.nan),
        torch.full((vocab,), -math.inf),
        torch.linspace(-7e4, 7e4, vocab),
    ])  # fmt: skip
    logits[3, 3000:3003] = torch.tensor([1.0, 2.0, 2.0])
    logits[4, 7] = -1e4
    labels = torch.tensor([0, vocab - 1, vocab - 1, 3001, 8, 1, 1, vocab - 2])
    got, want = forward(logits, labels, isa), reference(logits, labels)
    assert got.logprob.isnan().tolist() == [False] * 5 + [True, True, False]
    assert got.lse[6] == -math.inf and got.lse[5].isnan()
    keep = [0, 1, 2, 3, 4, 7]
    assert bool(((got.logprob.double() - want.logprob)[keep].abs() <= 2e-6 * (1 + want.lse.abs())[keep]).all())
    assert got.argmax[keep].tolist() == want.argmax[keep].tolist()
    assert bool(((got.entropy.double() - want.entropy)[keep].abs() <= 1e-4).all())
