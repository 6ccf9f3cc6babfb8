"""The distillation ops as functions: heads, weights, labels, layouts, autograd, memory, and what peers' users complain of."""

import itertools
import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from lldfast.backends import extension
from lldfast.errors import InputError
from lldfast.ops.dispatch import choose
from lldfast.ops.distill.head import HeadOptions
from lldfast.ops.distill.linear import RunningTeacher
from lldfast.ops.distill.loss import distill_loss, distill_loss_from_logits, distill_loss_topk
from lldfast.ops.distill.options import DistillOptions
from lldfast.ops.distill.oracle import reference
from lldfast.ops.distill.spec import resolve
from lldfast.ops.distill.sweep import Student
from lldfast.ops.distill.topk import RecordedTeacher

PLACES = [("cpu", "torch"), ("cpu", "cpp"), ("cuda", "auto"), ("cuda", "torch")]


class Place(NamedTuple):
    device: str
    backend: str


@pytest.fixture(params=PLACES, ids=["torch", "cpp", "cuda-auto", "cuda-torch"])
def at(request):
    place = Place(*request.param)
    if place.device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    if place.backend == "cpp" and extension() is None:
        pytest.skip("lldfast._C is not built")
    return place


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


class Inputs(NamedTuple):
    hidden: torch.Tensor
    weight: torch.Tensor
    teacher_hidden: torch.Tensor
    teacher_weight: torch.Tensor
    labels: torch.Tensor


TORCH = Place("cpu", "torch")


def make(at=TORCH, tokens=12, vocab=30, teacher_vocab=None, d=8, teacher_d=5, dtype=torch.float32):
    teacher_vocab = teacher_vocab or vocab
    shapes = ((tokens, d), (vocab, d), (tokens, teacher_d), (teacher_vocab, teacher_d))
    made = [(torch.randn(shape) * (1 if i % 2 else 1.5 / shape[1] ** 0.25)).to(dtype) for i, shape in enumerate(shapes)]
    return Inputs(*(x.to(at.device) for x in made), torch.randint(min(vocab, teacher_vocab), (tokens,)).to(at.device))


def logits(h, w, bias=None, softcap=None, scale=1.0):
    z = (h.double() @ w.double().T + (0 if bias is None else bias.double())) * scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def exact(
    hidden, weight, teacher_hidden, teacher_weight, labels=None, *, student_bias=None, teacher_bias=None, softcap=None,
    logit_scale=1.0, teacher_softcap=None, teacher_logit_scale=1.0, chunk_bytes=None, **options,
):  # fmt: skip
    """`distill_loss` by fp64 logits and the oracle."""
    student = logits(hidden, weight, student_bias, softcap, logit_scale)
    teacher = logits(teacher_hidden, teacher_weight, teacher_bias, teacher_softcap, teacher_logit_scale)
    return reference(student, teacher, labels, **options)


def close(got, want, factor=1e-5):
    got, want = got.detach(), want.detach().to(got.device).double()
    assert got.shape == want.shape
    gap = float((got.double() - want).abs().max()) if got.numel() else 0.0
    assert gap <= factor * (1e-2 + float(want.abs().max() if want.numel() else 0)), gap


def agrees(at, inputs, factor=1e-5, bias=None, upstream=None, **options):
    """Loss and gradients of the linear op against the oracle's, of both ops against each other; the loss."""
    leaves = [x.detach().clone().requires_grad_() for x in (inputs[0], inputs[1], *([] if bias is None else [bias]))]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    results = []
    for function, (h, w, *b) in ((distill_loss, leaves), (exact, wide)):
        more = {"backend": at.backend} if function is distill_loss else {}
        loss = function(h, w, *inputs[2:], student_bias=b[0] if b else None, **options, **more)
        g = torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype).expand_as(loss)
        results.append((loss, *torch.autograd.grad(loss, (h, w, *b), g)))
    for a, b in zip(*results, strict=True):
        close(a, b, factor)
    assert [x.dtype for x in results[0][1:]] == [x.dtype for x in leaves]
    return results[0][0]


SETTINGS = [
    *({"preset": name} for name in ("kl", "rkl", "skl", "srkl", "jsd", "taid", "ab", "amid", "kl+ce")),
    {"alpha": 3.0, "lam": 0.4, "order": "rq"}, {"alpha": 0.99999, "order": "rp", "temperature": 2.0},
    {"alpha": math.inf, "lam": 0.3}, {"divergence": "alpha", "divergence_alpha": 2.0, "order": "qr", "ce_weight": 0.5},
]  # fmt: skip


@pytest.mark.pairwise
@pytest.mark.parametrize("chosen", SETTINGS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_heads_equal_given_logits_equal_the_oracle(at, reduction, chosen):
    inputs = make(at)
    inputs.labels[3] = -100
    loss = agrees(at, inputs, reduction=reduction, **chosen)
    student = logits(*inputs[:2]).float().requires_grad_()
    teacher = logits(*inputs[2:4]).float()
    given = distill_loss_from_logits(student, teacher, inputs.labels, reduction=reduction, backend=at.backend, **chosen)
    close(given, loss)
    wide = student.detach().double().requires_grad_()
    want = reference(wide, teacher, inputs.labels, reduction=reduction, **chosen)
    upstream = torch.randn(want.shape, device=at.device)
    close(torch.autograd.grad(given, student, upstream)[0], torch.autograd.grad(want, wide, upstream.double())[0])


HEADS = [
    {"softcap": 2.0}, {"logit_scale": 0.3}, {"teacher_softcap": 1.5}, {"teacher_logit_scale": 2.0},
    {"softcap": 3.0, "logit_scale": 2.0, "teacher_softcap": 2.0, "teacher_logit_scale": 0.5},
]  # fmt: skip


@pytest.mark.pairwise
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("options", HEADS)
def test_softcap_scale_bias(at, options, reduction):
    inputs = make(at)
    bias, teacher_bias = torch.randn(2, 30, device=at.device)
    agrees(at, inputs, preset="skl", reduction=reduction, **options)
    agrees(at, inputs, bias=bias, teacher_bias=teacher_bias, preset="kl+ce", reduction=reduction, **options)


@pytest.mark.parametrize("vocab,teacher_vocab,d,teacher_d", [(1, 1, 1, 1), (2, 2, 3, 1), (17, 17, 31, 64), (129, 129, 64, 7),
                                                             (33, 40, 8, 5), (40, 33, 8, 5), (1025, 1025, 16, 24)])  # fmt: skip
def test_shapes(at, vocab, teacher_vocab, d, teacher_d):
    for tokens in (1, 17):
        agrees(at, make(at, tokens, vocab, teacher_vocab, d, teacher_d), preset="jsd", ce_weight=0.1)


def test_labels_are_optional_and_may_be_int32(at):
    inputs = make(at)
    agrees(at, inputs._replace(labels=None), preset="amid")
    inputs.labels[[0, 5]] = -100
    assert torch.equal(
        *(distill_loss(*inputs[:4], y, preset="kl+ce", backend=at.backend) for y in (inputs.labels, inputs.labels.int()))
    )


@pytest.mark.parametrize("ignore_index", [-100, -1, 4])
def test_ignored_tokens_are_not_computed(at, ignore_index):
    inputs = make(at)
    inputs.labels[inputs.labels == ignore_index] = 5
    want = distill_loss(*(x[1::2] if i % 2 == 0 else x for i, x in enumerate(inputs)), preset="kl+ce", backend=at.backend)
    inputs.labels[::2] = ignore_index
    inputs.hidden[::2] = math.nan
    hidden = inputs.hidden.requires_grad_()
    loss, tokens = distill_loss(*inputs, preset="kl+ce", ignore_index=ignore_index, return_tokens=True, backend=at.backend)
    close(loss, want)
    loss.backward()
    for x in (*tokens, hidden.grad):
        assert bool((x[::2] == 0).all()) and bool(torch.isfinite(x).all()) and bool((x[1::2] != 0).any())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_token_weights(at, reduction):
    inputs = make(at)
    inputs.labels[2] = -100
    weights = torch.rand(12, device=at.device)
    weights[[4, 5]] = 0
    got = agrees(at, inputs, preset="kl+ce", token_weights=weights, reduction=reduction)
    weights[2] = math.nan  # the ignored token's
    agrees(at, inputs, preset="kl+ce", token_weights=weights, reduction=reduction)
    each = distill_loss(*inputs, preset="kl+ce", reduction="none", backend=at.backend)
    weights[2] = 0
    if reduction == "mean":
        close(got, (each * weights).sum() / weights.sum())
    student, teacher = logits(*inputs[:2]).float(), logits(*inputs[2:4]).float()
    options = {"preset": "kl+ce", "token_weights": weights, "reduction": reduction, "backend": at.backend}
    close(distill_loss_from_logits(student, teacher, inputs.labels, **options), got)


def test_returned_tokens(at):
    inputs = make(at)
    inputs.weight.requires_grad_()
    want = [exact(*inputs, preset="kl", reduction="none"), F.cross_entropy(logits(*inputs[:2]), inputs.labels, reduction="none")]
    for reduction in ("mean", "sum", "none"):
        options = {"preset": "kl+ce", "ce_weight": 0.5, "reduction": reduction, "return_tokens": True, "backend": at.backend}
        loss, tokens = distill_loss(*inputs, **options)
        assert loss.requires_grad and not any(x.requires_grad for x in tokens)
        for a, b in zip(tokens, want, strict=True):
            close(a, b)
        both = want[0] + 0.5 * want[1]
        close(loss, both if reduction == "none" else getattr(both, reduction)())
    _, tokens = distill_loss(*inputs, preset="kl", return_tokens=True, backend=at.backend)
    assert bool((tokens.ce == 0).all())


def test_strides_and_more_dimensions(at):
    hidden, weight, teacher_hidden, teacher_weight, _ = make(at, 40)
    labels = torch.randint(30, (4, 9), device=at.device)
    views = [x.view(10, 4, -1).transpose(0, 1)[:, 1:] for x in (hidden, teacher_hidden)]  # shifted by one position
    heads = [w.T.contiguous().T for w in (weight, teacher_weight)]
    options = {"preset": "kl+ce", "reduction": "none", "backend": at.backend}
    got = distill_loss(views[0], heads[0], views[1], heads[1], labels, **options)
    assert got.shape == (4, 9)
    close(got, exact(views[0], weight, views[1], teacher_weight, labels, preset="kl+ce", reduction="none"))
    agrees(at, Inputs(views[0], heads[0], views[1], heads[1], labels), preset="skl")
    every = [torch.randn(4, 10, 60, device=at.device)[:, 1:, ::2] for _ in range(2)]
    close(distill_loss_from_logits(*every, labels, **options), reference(*every, labels, preset="kl+ce", reduction="none"))
    one = torch.randn(2, 1, 30, device=at.device)
    leaf = one[:1].clone().requires_grad_()
    loss = distill_loss_from_logits(leaf.expand(1, 6, 30), one[1:].expand(1, 6, 30), preset="skl", backend=at.backend)
    close(loss, reference(*one, preset="skl"))
    wide = one[:1].double().requires_grad_()
    close(torch.autograd.grad(loss, leaf)[0], torch.autograd.grad(reference(wide, one[1:], preset="skl"), wide)[0])


@pytest.mark.parametrize("student,teacher", [("bfloat16", "float32"), ("float32", "float16"), ("float16", "bfloat16")])
def test_mixed_dtypes(at, student, teacher):
    made = make(at)
    inputs = [x.to(getattr(torch, student if i < 2 else teacher)) for i, x in enumerate(made[:4])]
    inputs = Inputs(*inputs, made.labels)
    factor = {"bfloat16": 2**-8, "float16": 2**-11, "float32": 1e-5}[student]  # of the gradients: one rounding
    agrees(at, inputs, factor=2 * factor, preset="skl")
    close(distill_loss(*inputs, preset="skl", backend=at.backend), exact(*inputs, preset="skl"), 2e-5)
    z = [logits(*inputs[:2]).to(inputs[0].dtype).requires_grad_(), logits(*inputs[2:4]).to(inputs[2].dtype)]
    loss = distill_loss_from_logits(*z, preset="skl", backend=at.backend)
    assert loss.dtype == torch.float32 and torch.autograd.grad(loss, z[0])[0].dtype == z[0].dtype
    close(loss, reference(*z, preset="skl"))


def test_heads_of_two_dtypes_and_fp64_of_one_model():
    inputs = make()
    agrees(TORCH, inputs._replace(weight=inputs.weight.bfloat16()), factor=2**-7, preset="skl")
    double = inputs._replace(teacher_hidden=inputs.teacher_hidden.double(), teacher_weight=inputs.teacher_weight.double())
    loss = distill_loss(*double, preset="skl")
    assert loss.dtype == torch.float64 and abs(float(loss - exact(*inputs, preset="skl"))) < 1e-12


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("ignored", [0, 5])
def test_autocast_is_the_precision_bf16(at, reduction, ignored):
    inputs = make(at, 40, d=16)
    inputs.labels[:ignored] = -100
    leaves = [x.requires_grad_() for x in inputs[:2]]

    def gradients(**options):
        loss = distill_loss(*inputs, preset="kl+ce", reduction=reduction, backend=at.backend, **options).sum()
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    plain, exactly = gradients(precision="bf16"), gradients()
    with torch.autocast(at.device, torch.bfloat16):
        cast, asked = gradients(), gradients(precision="fp32")  # the backward too, as where a trainer calls it inside
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True)) and not torch.equal(plain[0], exactly[0])
    assert all(torch.equal(a, b) for a, b in zip(asked, exactly, strict=True))
    rounded = [x.detach().bfloat16() for x in inputs[:4]]
    close(plain[0], exact(*rounded, inputs.labels, preset="kl+ce", reduction=reduction).sum(), 2e-5)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_only_wanted_gradients_and_none_of_the_teacher(at, wanted):
    inputs = make(at)
    leaves = [*inputs[:2], torch.randn(30, device=at.device)]
    teacher = [*inputs[2:4], torch.randn(30, device=at.device)]
    for x in (*(leaves[i] for i in wanted), *teacher):
        x.requires_grad_()
    for reduction in ("mean", "none"):
        options = {"student_bias": leaves[2], "teacher_bias": teacher[2], "reduction": reduction, "backend": at.backend}
        distill_loss(*leaves[:2], *teacher[:2], preset="amid", **options).sum().backward()
    assert [x.grad is not None for x in leaves] == [i in wanted for i in range(3)]
    assert all(x.grad is None for x in teacher)


def test_without_gradients_nothing_is_kept(at):
    inputs = make(at)
    assert not distill_loss(*inputs, backend=at.backend).requires_grad
    inputs.weight.requires_grad_()
    with torch.no_grad():
        assert not distill_loss(*inputs, backend=at.backend).requires_grad
    inputs.teacher_weight.requires_grad_()
    assert not distill_loss(inputs.hidden, inputs.weight.detach(), *inputs[2:], backend=at.backend).requires_grad


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_upstream_gradients_and_retained_graphs(at, reduction):
    inputs = make(at)
    agrees(at, inputs, upstream=torch.tensor(-3.5, device=at.device), preset="srkl", reduction=reduction)
    if reduction == "none":
        agrees(at, inputs, upstream=torch.randn(12, device=at.device), preset="kl+ce", reduction=reduction)
    inputs.weight.requires_grad_()
    loss = distill_loss(*inputs, preset="srkl", reduction=reduction, backend=at.backend).sum()
    loss.backward(retain_graph=True)
    once = inputs.weight.grad.clone()
    loss.backward()
    torch.testing.assert_close(inputs.weight.grad, 2 * once)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivative_is_refused(at, reduction):
    inputs = make(at)
    hidden, z = inputs.hidden.requires_grad_(), torch.randn(2, 3, 7, device=at.device)
    student = z[0].requires_grad_()
    options = {"reduction": reduction, "backend": at.backend}
    losses = ((distill_loss(*inputs, **options), hidden), (distill_loss_from_logits(student, z[1].detach(), **options), student))
    for loss, leaf in losses:
        (grad,) = torch.autograd.grad(loss.sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="no autograd formula"):
            grad.sum().backward()


@pytest.mark.pairwise
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("teacher_vocab", [30, 34])
def test_compile_fullgraph(at, reduction, teacher_vocab):
    inputs = make(at, teacher_vocab=teacher_vocab)
    leaves = [x.requires_grad_() for x in inputs[:2]]

    def loss(h, w):
        options = {"preset": "kl+ce", "alpha": -1.0, "lam": 0.1, "reduction": reduction, "backend": at.backend}
        from_heads = distill_loss(h * 2, w, *inputs[2:], **options).sum()
        return from_heads + distill_loss_from_logits(h @ w.T, inputs[2] @ inputs[3].T, inputs[4], **options).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*leaves), loss(*leaves))
    for a, b in zip(torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(loss(*leaves), leaves), strict=True):
        torch.testing.assert_close(a, b)


def check_ops(forward, weighted_sum, student, teacher):
    arguments = (*student, *teacher.arguments())
    torch.library.opcheck(forward, arguments)
    weights = torch.rand(len(student.hidden), device=student.hidden.device)
    torch.library.opcheck(weighted_sum, (weights, 0.5, *arguments, True, True, True))


def test_opcheck(at):
    inputs = make(at, 6, 9)
    inputs.hidden.requires_grad_(), inputs.weight.requires_grad_()
    inputs.labels[2] = -100
    bias, teacher_bias = torch.randn(2, 9, device=at.device)
    bias = bias.clone().requires_grad_()
    backend = choose("distill", at.backend, inputs.hidden)
    spec = resolve(DistillOptions.of("kl+ce", alpha=0.3, lam=0.2), valid_vocab=8, backend=backend)
    inputs.labels.clamp_(max=7)
    student = Student(inputs.hidden, inputs.weight, bias, inputs.labels)
    heads = HeadOptions(3.0, 0.5), HeadOptions(2.0, 1.5)
    running = RunningTeacher(inputs.teacher_hidden, inputs.teacher_weight, teacher_bias, *heads, spec)
    ops = torch.ops.lldfast
    check_ops(ops.distill_linear, ops.distill_linear_sum, student, running)
    z = [torch.randn(6, 9, device=at.device) for _ in range(2)]
    torch.library.opcheck(ops.distill_logits, (z[0].requires_grad_(), z[1], inputs.labels, *spec))


def record(teacher_hidden, teacher_weight, k):
    """(ids, logprob, left) of the teacher's k likeliest ids."""
    each = torch.log_softmax(teacher_hidden @ teacher_weight.T, -1)
    logprob, ids = each.topk(k)
    return ids, logprob, each.scatter(-1, ids, -math.inf).logsumexp(-1)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_opcheck_of_a_record(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    inputs = make(Place(device, "torch"), 6, 9)
    inputs.hidden.requires_grad_(), inputs.weight.requires_grad_()
    inputs.labels[2] = -100
    bias = torch.randn(9, device=device).requires_grad_()
    spec = resolve(DistillOptions.of("kl+ce", alpha=0.3, lam=0.2))
    student = Student(inputs.hidden, inputs.weight, bias, inputs.labels)
    recorded = RecordedTeacher(*record(*inputs[2:4], 3), HeadOptions(3.0, 0.5), spec)
    check_ops(torch.ops.lldfast.distill_topk, torch.ops.lldfast.distill_topk_sum, student, recorded)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile_fullgraph_of_a_record(reduction):
    inputs = make()
    recorded = record(*inputs[2:4], 5)
    leaves = [x.requires_grad_() for x in inputs[:2]]

    def loss(h, w):
        return distill_loss_topk(h * 2, w, *recorded, inputs.labels, preset="kl+ce", lam=0.1, reduction=reduction).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*leaves), loss(*leaves))
    for a, b in zip(torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(loss(*leaves), leaves), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivative_against_a_record_is_refused(reduction):
    inputs = make()
    hidden = inputs.hidden.requires_grad_()
    loss = distill_loss_topk(*inputs[:2], *record(*inputs[2:4], 5), reduction=reduction)
    (grad,) = torch.autograd.grad(loss.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()


def test_bf16_weight_gradient_is_accumulated_in_fp32(at):
    inputs = make(at, 4096, 40, d=16, dtype=torch.bfloat16)
    agrees(at, inputs, factor=2**-8, preset="skl", reduction="sum")  # one rounding to bf16, not thousands


@pytest.mark.parametrize("chunk_bytes", [1, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_chunks(at, chunk_bytes, dtype):
    inputs = make(at, 50, dtype=dtype)
    inputs.labels[[0, 17, 49]] = -100
    factor = 1e-5 if dtype == torch.float32 else 2**-7
    agrees(at, inputs, factor=factor, preset="amid", ce_weight=0.5, chunk_bytes=chunk_bytes)
    z = [torch.randn(50, 30, device=at.device) for _ in range(2)]
    want, got = (distill_loss_from_logits(*z, inputs.labels, backend=at.backend, chunk_bytes=n) for n in (None, chunk_bytes))
    close(got, want, 1e-6)


# What users of other implementations report.


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_an_all_masked_batch_and_no_tokens_are_a_loss_of_zero(at, reduction):
    inputs = make(at)
    for function, n in ((distill_loss, 4), (distill_loss_from_logits, 2)):
        first = inputs[:4] if n == 4 else [torch.randn(12, 30, device=at.device) for _ in range(2)]
        leaf = first[0].requires_grad_()
        for labels in (torch.full((12,), -100), torch.zeros(0, dtype=torch.long)):
            tensors = [x[: len(labels)] if i % 2 == 0 or n == 2 else x for i, x in enumerate(first)]
            loss = function(*tensors, labels.to(at.device), preset="kl+ce", reduction=reduction, backend=at.backend)
            assert loss.item() == 0
            assert bool((torch.autograd.grad(loss, leaf)[0] == 0).all())


def peak_of(run, device):
    """Bytes that are alive at once while it runs."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    return max(itertools.accumulate(e.nbytes() for e in events))


def test_b_t_v_memory(at):
    """Peak of what is alive during loss and backward, both models' logits and gradients in chunks: below one [T, V] tensor."""
    tokens, d, vocab = 2048, 8, 4096
    inputs = make(at, tokens, vocab, d=d, teacher_d=d)
    inputs.hidden.requires_grad_(), inputs.weight.requires_grad_()
    options = {"preset": "amid", "chunk_bytes": 1 << 20, "backend": at.backend}
    peak = peak_of(lambda: distill_loss(*inputs, **options).backward(), at.device)
    # The torch path holds a dozen intermediate results, in pieces of 2 MiB.
    assert 1 << 20 < peak < tokens * vocab * 4 * 0.6


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_memory_against_a_record(reduction):
    tokens, d, vocab = 2048, 8, 4096
    inputs = make(tokens=tokens, vocab=vocab, d=d, teacher_d=d)
    inputs.hidden.requires_grad_(), inputs.weight.requires_grad_()
    recorded = record(*inputs[2:4], 4)

    def run():
        distill_loss_topk(*inputs[:2], *recorded, preset="amid", reduction=reduction, chunk_bytes=1 << 20).sum().backward()

    # A chunk of 1 MiB and the intermediate results of its rows.
    assert 1 << 20 < peak_of(run, "cpu") < tokens * vocab * 4 * 0.6


@pytest.mark.parametrize("student,teacher,d", [(30, 34, 6), (34, 30, 6), (151936, 152064, 2)])
def test_vocabulary_sizes_151936_and_152064(at, student, teacher, d):
    inputs = make(at, 3, student, teacher, d, d)
    lacks = "student" if student < teacher else "teacher"
    infinite = {"preset": "kl" if student < teacher else "rkl"}
    for options in (infinite, infinite | {"return_tokens": True}):
        with pytest.raises(InputError, match=f"student has {student} ids and the teacher {teacher}: .* the {lacks} lacks"):
            distill_loss(*inputs, backend=at.backend, **options)
    with pytest.raises(InputError, match=f"student has {student} ids"):
        distill_loss_from_logits(inputs.hidden @ inputs.weight.T, inputs[2] @ inputs[3].T, backend=at.backend, **infinite)
    shared = min(student, teacher)
    got = distill_loss(*inputs, valid_vocab=shared, backend=at.backend, **infinite)
    close(got, exact(inputs[0], inputs[1][:shared], inputs[2], inputs[3][:shared], **infinite))
    # Missing logits are -inf, never 0: where that is finite it needs no option, and surplus ids keep their mass.
    for preset in ("jsd", "skl" if student > teacher else "rkl"):
        agrees(at, inputs, 1e-5 if student < 100 else 3e-4, preset=preset)  # dH: an fp32 sum of 152,000 terms


@pytest.mark.parametrize("value", [-math.inf, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("chosen", SETTINGS)
def test_pads_of_minus_infinity(at, value, chosen):
    z = torch.randn(2, 5, 12, device=at.device)
    labels = torch.randint(9, (5,), device=at.device)
    padded = z.clone()
    padded[:, :, 9:] = value
    leaves = [x.clone().requires_grad_() for x in (z[0, :, :9], padded[0])]
    options = {"backend": at.backend, **chosen}
    want = distill_loss_from_logits(leaves[0], z[1, :, :9], labels, **options)
    got = distill_loss_from_logits(leaves[1], padded[1], labels, **options)
    close(got, want, 2e-6)
    slope = torch.autograd.grad(got, leaves[1])[0]
    close(slope[:, :9], torch.autograd.grad(want, leaves[0])[0], 2e-6)
    assert bool((slope[:, 9:].abs() <= (0 if value == -math.inf else 1e-37)).all())


@pytest.mark.parametrize("order", ["pr", "qr", "rp", "rq"])
@pytest.mark.parametrize("alpha", [-3.0, -1.0, 0.5, 1.0, 3.0, math.inf])
def test_one_model_alone_excludes_an_id(at, alpha, order):
    """Jensen-Shannon is finite on any supports: the limit of logits that fall, on the union or the intersection."""
    student, teacher = torch.randn(2, 6, 12, device=at.device)
    options = {"divergence": "js", "order": order, "alpha": alpha, "lam": 0.3}
    for low in (student, teacher):
        low[:3, 4] = -math.inf
        leaf = student.clone().requires_grad_()
        loss = distill_loss_from_logits(leaf, teacher, backend=at.backend, **options)
        wide = [x.double().nan_to_num(neginf=-400.0) for x in (student, teacher)]
        want = reference(wide[0].requires_grad_(), wide[1], **options)
        close(loss, want)
        close(torch.autograd.grad(loss, leaf)[0], torch.autograd.grad(want, wide[0])[0])
        low[:3, 4] = 0.5


@pytest.mark.filterwarnings("ignore:order=.* mode-seeking")
@pytest.mark.parametrize("order", ["pr", "qr", "rp", "rq"])
def test_alpha_above_one_is_not_one(at, order):
    inputs = make(at)
    losses = [agrees(at, inputs, order=order, alpha=alpha, lam=0.4).detach() for alpha in (1.0, 1.5, 3.0, 8.0)]
    assert all(float((a - b).abs() / a.abs()) > 0.01 for a, b in itertools.pairwise(losses))


@pytest.mark.parametrize("exponents", [(3.0, -2.0), (2.0, -1.0), (-1.0, 2.0), (-2.0, 3.0)])
def test_alpha_divergences_beyond_one_of_far_distributions(at, exponents):
    """e^(x t) is tiny where e^(y t) is huge: 1 + expm1(x t) in its place would be rounding alone, or 0 times infinity."""
    for gap in (12.0, 20.0, 50.0):
        low, high = torch.tensor([[0.1, 0.0, -0.2, -gap], [0.0, 0.3, 0.1, -1.0]], device=at.device)
        student, teacher = (low, high) if exponents[0] < 0 else (high, low)
        results = []
        for dtype, backend in ((torch.float32, at.backend), (torch.float64, "torch")):
            leaf = student[None].to(dtype).requires_grad_()
            options = {"divergence": "ab", "ab": exponents, "lam": 0, "backend": backend}
            loss = distill_loss_from_logits(leaf, teacher[None].to(dtype), **options)
            results.append((loss, torch.autograd.grad(loss, leaf)[0]))
        for got, want in zip(*results, strict=True):
            close(got, want, 2e-5)


@pytest.mark.parametrize("whose", [0, 2])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_nan_token_stays_nan(at, whose, reduction):
    inputs = make(at)
    inputs[whose][4, 1] = math.nan
    hidden = inputs.hidden.clone().requires_grad_()
    options = {"preset": "amid", "reduction": reduction, "return_tokens": True, "backend": at.backend}
    loss, tokens = distill_loss(hidden, *inputs[1:], **options)
    at_nan = torch.arange(12, device=at.device) == 4
    assert torch.equal(tokens.divergence.isnan(), at_nan)
    assert torch.equal(loss.isnan(), at_nan) if reduction == "none" else bool(loss.isnan())
    slope = torch.autograd.grad(loss.sum(), hidden)[0]
    assert torch.equal(slope.isnan().all(-1), at_nan) and torch.equal(slope.isnan().any(-1), at_nan)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e4])
def test_padded_heads_of_50304_for_50257_ids(at, garbage):
    for real, rows in ((50257, 50304), (13, 16)):
        inputs, bias = make(at, 5, rows, d=4), torch.randn(2, rows, device=at.device)
        inputs.labels.remainder_(real)
        cut = inputs._replace(weight=inputs.weight[:real], teacher_weight=inputs.teacher_weight[:real])
        want = [x.clone().requires_grad_() for x in cut[:2]]
        options = {"preset": "kl+ce", "alpha": -3.0, "lam": 0.2, "backend": at.backend}
        cut_biases = {"student_bias": bias[0, :real], "teacher_bias": bias[1, :real]}
        want_loss = distill_loss(*want, *cut[2:], **cut_biases, **options)
        want_slopes = torch.autograd.grad(want_loss, want)
        for x in (inputs.weight, inputs.teacher_weight, *bias):
            x[real:] = garbage
        leaves = [x.requires_grad_() for x in inputs[:2]]
        loss = distill_loss(*inputs, student_bias=bias[0], teacher_bias=bias[1], valid_vocab=real, **options)
        assert torch.equal(loss, want_loss)
        dh, dw = torch.autograd.grad(loss, leaves)
        for a, b in zip((dh, dw[:real]), want_slopes, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
        assert bool((dw[real:] == 0).all())
        z = [(inputs.hidden @ inputs.weight.T).detach(), inputs[2] @ inputs[3].T]
        z[0][:, real:] = garbage
        got = distill_loss_from_logits(*z, valid_vocab=real, preset="skl", backend=at.backend)
        assert torch.equal(got, distill_loss_from_logits(*(x[:, :real] for x in z), preset="skl", backend=at.backend))


@pytest.mark.parametrize("change,message", [
    ({"student_weight": torch.zeros(5, 7)}, "student_weight has shape"), ({"precision": "fp8"}, "precision='fp8'"),
    ({"teacher_weight": torch.zeros(5)}, "teacher_weight has shape"), ({"student_bias": torch.zeros(3)}, "bias has shape"),
    ({"teacher_hidden": torch.zeros(2, 6)}, r"of \(3,\) tokens, teacher_hidden of \(2,\)"),
    ({"labels": torch.tensor([0, 5, 0])}, "label 5 of token 1"), ({"labels": torch.zeros(3)}, "labels must be int32 or int64"),
    ({"token_weights": torch.ones(4)}, "token_weights have shape"), ({"logit_scale": math.inf}, "logit_scale must be finite"),
    ({"token_weights": torch.ones(3).int()}, "must be floating-point"), ({"teacher_softcap": 0.0}, "teacher_softcap must be"),
])  # fmt: skip
def test_bad_arguments(change, message):
    given = {
        "student_hidden": torch.zeros(3, 4), "student_weight": torch.zeros(5, 4), "teacher_hidden": torch.zeros(3, 6),
        "teacher_weight": torch.zeros(5, 6), "labels": torch.zeros(3, dtype=torch.long), **change,
    }  # fmt: skip
    with pytest.raises(InputError, match=message):
        distill_loss(**given)
