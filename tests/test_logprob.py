"""ops/logprob.py against its fp64 oracle: shapes, dtypes, extremes, shards, gradients."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from lldfast.errors import InputError
from lldfast.ops import chunks
from lldfast.ops import logprob as module
from lldfast.ops.logprob import logprob, merge_vocab_shards, reference

SHAPES = [(0, 7), (1, 1), (1, 2), (2, 17), (15, 63), (16, 64), (17, 65), (31, 127), (33, 129), (127, 257), (128, 507), (9, 1000)]
EVERYTHING = {"return_lse": True, "return_argmax": True, "return_entropy": True}


@pytest.fixture(params=["torch", "cpp"], autouse=True)
def backend(request, force_backend):
    force_backend(module, request.param)
    return request.param


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def close(got, want, lse, factor=2e-6):
    assert got.dtype == torch.float32 and got.shape == want.shape
    gap = (got.double() - want).abs()
    assert bool((gap <= factor * (1 + lse.abs())).all()), float(gap.max())


def agrees(logits, labels, factor=2e-6, **options):
    got, want = logprob(logits, labels, **EVERYTHING, **options), reference(logits, labels, **options)
    close(got.logprob, want.logprob, want.lse, factor)
    close(got.lse, want.lse, want.lse, factor)
    close(got.entropy, want.entropy, want.lse, 10 * factor)
    assert torch.equal(got.argmax, want.argmax)
    assert bool((got.logprob <= 0).all())
    return got


@pytest.mark.parametrize("tokens,vocab", SHAPES)
def test_shapes(tokens, vocab):
    agrees(torch.randn(tokens, vocab) * 3, torch.randint(vocab, (tokens,)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_logits_are_computed_with_in_fp32(dtype):
    agrees((torch.randn(40, 333) * 5).to(dtype), torch.randint(333, (40,)), 5e-6)


def test_fp64_stays_fp64():
    logits, labels = torch.randn(5, 9, dtype=torch.float64), torch.randint(9, (5,))
    got = logprob(logits, labels).logprob
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, reference(logits, labels).logprob, rtol=1e-14, atol=1e-14)


def test_against_cross_entropy_of_torch():
    logits, labels = torch.randn(50, 100), torch.randint(100, (50,))
    torch.testing.assert_close(-logprob(logits, labels).logprob, F.cross_entropy(logits, labels, reduction="none"))


def test_chunks_give_what_one_chunk_gives(monkeypatch):
    logits, labels = torch.randn(100, 50), torch.randint(50, (100,))
    whole = logprob(logits, labels, **EVERYTHING)
    monkeypatch.setitem(chunks.CHUNK_BYTES, "cpu", 50 * 4 * 7)
    for a, b in zip(whole, logprob(logits, labels, **EVERYTHING), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_label_positions_and_dtypes(dtype):
    logits = torch.randn(4, 130)
    agrees(logits, torch.tensor([0, 129, 64, 128], dtype=dtype))


@pytest.mark.parametrize("ignore", [-100, -1, 3])
def test_ignored_tokens_hold_zero(ignore):
    logits, labels = torch.randn(6, 10), torch.tensor([1, ignore, 9, ignore, 0, 4])
    logits[1] = math.nan  # never looked at
    got = logprob(logits, labels, ignore_index=ignore, **EVERYTHING)
    rest = labels != ignore
    assert bool((got.logprob[~rest] == 0).all() and (got.argmax[~rest] == -1).all() and (got.entropy[~rest] == 0).all())
    want = reference(logits[rest], labels[rest])
    close(got.logprob[rest], want.logprob, want.lse)


def test_all_ignored_and_no_tokens():
    assert torch.equal(logprob(torch.randn(3, 5), torch.full((3,), -100)).logprob, torch.zeros(3))
    assert logprob(torch.randn(0, 5), torch.zeros(0, dtype=torch.long)).logprob.shape == (0,)


@pytest.mark.parametrize("bad", [-1, 10, -99])
def test_label_out_of_range(bad):
    with pytest.raises(InputError, match=rf"label {bad} of token 2 is outside the vocabulary \[0, 10\)"):
        logprob(torch.randn(4, 10), torch.tensor([0, -100, bad, 1]))


@pytest.mark.parametrize("value", [-50.0, 50.0])
def test_equal_logits(value):
    got = logprob(torch.full((3, 507), value), torch.tensor([0, 250, 506]), **EVERYTHING)
    torch.testing.assert_close(got.logprob, torch.full((3,), -math.log(507)), rtol=2e-7, atol=0)
    assert got.argmax.tolist() == [0, 0, 0]  # a tie: the lowest id


def test_padding_may_hold_anything():
    logits, labels = torch.randn(5, 20), torch.randint(13, (5,))
    want = logprob(logits[:, :13], labels, **EVERYTHING)
    logits[:, 13:] = math.nan
    for a, b in zip(logprob(logits, labels, valid_vocab=13, **EVERYTHING), want, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(InputError, match="label 13"):
        logprob(logits, torch.full((5,), 13), valid_vocab=13)


def test_extreme_logits():
    rising = torch.linspace(-1e4, 1e4, 1000).repeat(2, 1)
    agrees(rising, torch.tensor([0, 999]))
    agrees(torch.randn(4, 100) + 1e4, torch.randint(100, (4,)))
    agrees(torch.randn(4, 100) * 1e5, torch.randint(100, (4,)))  # above fp16's range
    certain = torch.zeros(1, 50)
    certain[0, 7] = 200
    assert float(logprob(certain, torch.tensor([7])).logprob) == 0.0


def test_infinities_and_nan_stay_in_their_row():
    logits = torch.randn(5, 8)
    logits[1, 3] = -math.inf
    logits[2] = -math.inf
    logits[3, 5] = math.nan
    got = logprob(logits, torch.tensor([0, 3, 1, 2, 7]), **EVERYTHING)
    assert float(got.logprob[1]) == -math.inf and float(got.lse[2]) == -math.inf
    assert math.isnan(got.logprob[2]) and math.isnan(got.logprob[3])
    want = reference(logits, torch.tensor([0, 3, 1, 2, 7]))
    fine = torch.tensor([0, 4])
    close(got.logprob[fine], want.logprob[fine], want.lse[fine])
    assert math.isfinite(got.entropy[1])


@pytest.mark.parametrize("options", [{"softcap": 5.0}, {"logit_scale": 0.25}, {"softcap": 30.0, "logit_scale": 1.7}])
def test_softcap_scale_bias(options):
    logits, labels = torch.randn(30, 70) * 4, torch.randint(70, (30,))
    agrees(logits, labels, **options)
    agrees(logits, labels, bias=torch.randn(70), **options)


def test_strides_and_more_dimensions():
    base = torch.randn(11, 4, 60)
    labels = torch.randint(30, (4, 10))
    shifted = base.transpose(0, 1)[:, 1:, ::2]
    got = logprob(shifted, labels)
    want = reference(shifted, labels)
    assert got.logprob.shape == (4, 10)
    close(got.logprob, want.logprob, want.lse)
    one = torch.randn(1, 25)
    assert torch.equal(logprob(one.expand(6, 25), torch.full((6,), 3)).logprob, logprob(one, torch.tensor([3])).logprob.expand(6))


@pytest.mark.parametrize("cuts", [[10, 37], [0, 50], [50, 50], [1]])
def test_vocabulary_shards_merge_to_the_whole(cuts):
    logits, labels = torch.randn(20, 50) * 3, torch.randint(50, (20,))
    labels[4] = -100
    want = logprob(logits, labels, **EVERYTHING)
    edges = [0, *cuts, 50]
    parts = [logprob(logits[:, a:b], labels, vocab_start=a, valid_vocab=50, **EVERYTHING) for a, b in itertools.pairwise(edges)]
    got = merge_vocab_shards(parts)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6 * (1 + float(want.lse.abs().max())))
    with pytest.raises(InputError, match="return_lse"):
        merge_vocab_shards([logprob(logits, labels)])


def test_shard_with_padding():
    logits, labels = torch.randn(6, 64), torch.tensor([0, 31, 32, 49, 10, 40])
    logits[:, 50:] = math.nan
    parts = [logprob(logits[:, a : a + 32], labels, vocab_start=a, valid_vocab=50, return_lse=True) for a in (0, 32)]
    torch.testing.assert_close(merge_vocab_shards(parts).logprob, logprob(logits[:, :50], labels).logprob, rtol=2e-6, atol=2e-6)


def test_rerun_is_bit_equal():
    logits, labels = torch.randn(64, 1000), torch.randint(1000, (64,))
    assert torch.equal(logprob(logits, labels).logprob, logprob(logits.clone(), labels.clone()).logprob)


OPTIONS = [{}, {"softcap": 2.0}, {"logit_scale": 0.5}, {"valid_vocab": 9}, {"softcap": 3.0, "logit_scale": 2.0, "valid_vocab": 9}]


@pytest.mark.parametrize("options", OPTIONS)
def test_gradcheck(options):
    logits = torch.randn(5, 11, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(11, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 8, -100, 4, 4])

    def both(z, b):
        result = logprob(z, labels, bias=b, return_lse=True, **options)
        return result.logprob, result.lse

    assert torch.autograd.gradcheck(both, (logits, bias))


def test_gradient_of_shards():
    whole = torch.randn(6, 20, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 5, 12, 19, -100, 7])
    parts = [logprob(whole[:, a:b], labels, vocab_start=a, valid_vocab=20, return_lse=True) for a, b in ((0, 6), (6, 6), (6, 20))]
    got = torch.autograd.grad(merge_vocab_shards(parts).logprob.sum(), whole)[0]
    want = torch.autograd.grad(reference(whole, labels).logprob.sum(), whole)[0]
    torch.testing.assert_close(got, want)


def test_second_derivative_is_refused():
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(logprob(logits, torch.tensor([0, 1, 2])).logprob.sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()


def test_opcheck(backend):
    logits, bias = torch.randn(5, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    labels = torch.tensor([1, 2, -100, 7, 0])
    options = (3.0, 0.5, -100, 8, 0, None, backend)
    torch.library.opcheck(torch.ops.lldfast.logprob, (logits, labels, bias, *options, True, True))


def test_compile_fullgraph():
    logits, labels = torch.randn(6, 30, requires_grad=True), torch.randint(30, (6,))
    compiled = torch.compile(lambda z: logprob(z, labels, return_lse=True), fullgraph=True, backend="aot_eager")
    got, want = compiled(logits), logprob(logits, labels, return_lse=True)
    assert torch.equal(got.logprob, want.logprob) and torch.equal(got.lse, want.lse)
    a, b = (torch.autograd.grad(x.logprob.sum(), logits)[0] for x in (got, want))
    assert torch.equal(a, b)


def test_meta():
    got = logprob(torch.empty(3, 4, 9, device="meta"), torch.empty(3, 4, dtype=torch.long, device="meta"), return_entropy=True)
    assert got.logprob.shape == (3, 4) and got.entropy.device.type == "meta"


@pytest.mark.parametrize(
    "change,message",
    [
        ({"labels": torch.zeros(3)}, "labels must be int32 or int64"),
        ({"labels": torch.zeros(4, dtype=torch.long)}, "labels have shape"),
        ({"logits": torch.zeros(3, 5, dtype=torch.long)}, "logits must be a floating-point"),
        ({"bias": torch.zeros(4)}, "bias has shape"),
        ({"softcap": 0.0}, "softcap must be positive"),
        ({"precision": "fp8"}, "precision='fp8'"),
        ({"backend": "abacus"}, "abacus"),
        ({"valid_vocab": 0}, "valid_vocab"),
        ({"labels": torch.zeros(3, dtype=torch.long, device="meta")}, "labels are on meta"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {"logits": torch.zeros(3, 5), "labels": torch.zeros(3, dtype=torch.long), **change}
    with pytest.raises(InputError, match=message):
        logprob(arguments.pop("logits"), arguments.pop("labels"), **arguments)


def test_dtensor_is_refused():
    class Sharded(torch.Tensor):
        placements = ()
        device_mesh = None

    with pytest.raises(InputError, match="DTensor"):
        logprob(torch.zeros(3, 5).as_subclass(Sharded), torch.zeros(3, dtype=torch.long))


def test_the_tail_of_a_large_vocabulary_is_not_lost():
    """One large logit, then very many small ones: a serial fp32 sum drops them, always in the same direction."""
    logits = torch.randn(8, 100_000) - 8
    logits[:, 0] = 6
    labels = torch.randint(100_000, (8,))
    gap = logprob(logits, labels).logprob.double() - reference(logits, labels).logprob
    assert float(gap.abs().max()) < 2e-6


def test_scales_are_numbers():
    logits, labels = torch.randn(3, 5), torch.tensor([0, 1, 2])
    for change in ({"logit_scale": torch.tensor(2.0)}, {"softcap": torch.tensor(2.0)}):
        with pytest.raises(InputError, match="must be a number"):
            logprob(logits, labels, **change)
    for change in ({"softcap": 1e-50}, {"softcap": math.inf}, {"softcap": math.nan}):
        with pytest.raises(InputError, match="softcap must be positive and finite"):
            logprob(logits, labels, **change)
    for number in (math.inf, math.nan):
        with pytest.raises(InputError, match="logit_scale must be finite"):
            logprob(logits, labels, logit_scale=number)


def test_merged_entropy_claims_no_gradient():
    logits = torch.randn(4, 20, requires_grad=True)
    labels = torch.tensor([0, 5, 12, 19])
    options = {"valid_vocab": 20, "return_lse": True, "return_entropy": True}
    shards = [logprob(logits[:, i : i + 10], labels, vocab_start=i, **options) for i in (0, 10)]
    merged = merge_vocab_shards(shards)
    assert merged.logprob.requires_grad and not merged.entropy.requires_grad
    torch.testing.assert_close(merged.entropy.double(), reference(logits, labels).entropy.detach(), rtol=1e-5, atol=1e-5)
