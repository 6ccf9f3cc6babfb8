"""Distillation losses of the alpha-mixture family: D(p, r), D(q, r), D(r, p), D(r, q) of teacher p, student q, assistant r.

options.py defines r and the presets, math.py the formulas. From hidden states and heads no [T, V] tensor of either model is ever
alive. Backends: C++ on a CPU, Triton on a GPU, torch anywhere; all compute in fp32 (torch: fp64 for fp64 inputs).
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from lldfast.errors import InputError
from lldfast.ops.autocast import autocast_factors
from lldfast.ops.check import check_bias, check_precision, check_reduction, check_tensors, check_transform
from lldfast.ops.dispatch import choose
from lldfast.ops.distill import linear as distill_linear
from lldfast.ops.distill import logits as distill_logits
from lldfast.ops.distill import math as distill_math
from lldfast.ops.distill import topk as distill_topk
from lldfast.ops.distill.head import HeadOptions
from lldfast.ops.distill.linear import RunningTeacher
from lldfast.ops.distill.options import DistillOptions, check_recorded
from lldfast.ops.distill.rows import vocabularies
from lldfast.ops.distill.spec import Spec, resolve
from lldfast.ops.distill.sweep import Student
from lldfast.ops.distill.topk import RecordedTeacher


class DistillTokens(NamedTuple):
    """Per token, in the labels' shape (or that of the tokens), detached; 0 where ignored. In nats.

    divergence: D of the two distributions that `order` names. ce: -log q(label) at temperature 1; 0 where ce_weight is 0.
    """

    divergence: Tensor
    ce: Tensor


@overload
def distill_loss(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, labels: Tensor | None = None,
    *, return_tokens: Literal[False] = False, **options: Any,
) -> Tensor: ...  # fmt: skip
@overload
def distill_loss(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, labels: Tensor | None = None,
    *, return_tokens: Literal[True], **options: Any,
) -> tuple[Tensor, DistillTokens]: ...  # fmt: skip
def distill_loss(  # type: ignore[misc]
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor | None = None,
    *,
    divergence: str | None = None,
    order: str | None = None,
    alpha: float | None = None,
    lam: float | None = None,
    temperature: float | None = None,
    ce_weight: float | None = None,
    detach_assistant: bool | None = None,
    ab: tuple[float, float] | None = None,
    beta: float | None = None,
    divergence_alpha: float | None = None,
    preset: str | None = None,
    reduction: str = "mean",
    token_weights: Tensor | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    ignore_index: int = -100,
    valid_vocab: int | None = None,
    precision: str | None = None,
    chunk_bytes: int | None = None,
    return_tokens: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, DistillTokens]:
    """Distillation loss in nats per token, from hidden states [..., d_s], [..., d_t] and heads [V_s, d_s], [V_t, d_t].

    Each token's loss is `D(A, B) + ce_weight * CE(labels)`, both from one sweep over the vocabulary; the mean is over the tokens
    that count (weighted by token_weights; 0 if there are none). Differentiable by student_hidden, student_weight and
    student_bias, with sums in fp32; the teacher gets no gradient, whatever it requires. For "mean" and "sum" the gradient comes
    from the same sweep as the loss, for "none" the logits are computed again.

    Args:
        labels: int32 or int64 [...]; `ignore_index` leaves a token out of everything. None: every token counts, no cross entropy.
        divergence, ..., divergence_alpha: the loss's settings, as `lldfast.ops.distill.options.DistillOptions` documents them;
            None takes the preset's, then the default there: KL(p || r) at alpha -1 and lam 0.1.
        preset: kl, rkl, skl, srkl, jsd (lam is its beta), taid, ab, amid, kl+ce; settings given beside it replace its own.
        token_weights: floating-point [...], what a token's loss is multiplied by.
        softcap, logit_scale, student_bias: of the student's head as in `linear_logprob`; teacher_...: of the teacher's.
        valid_vocab: size of the vocabulary both models share: rows behind it are padding. Without it, ids that one model lacks
            have logit -inf there.
        precision: as in `linear_logprob`, for both heads; None: inputs as they are.
        chunk_bytes: bound on one model's chunk of logits; None: 8 MiB on a CPU (but at least 256 tokens), 512 MiB on a GPU.
        return_tokens: give (loss, DistillTokens).
        backend: "auto", "cpp", "triton" or "torch".

    Raises:
        InputError: shapes, dtypes or devices do not fit, a label is out of range, a setting makes no sense, or the vocabularies
            differ where that makes the loss infinite.
    """
    options = DistillOptions.of(
        preset, divergence=divergence, order=order, alpha=alpha, lam=lam, temperature=temperature, ce_weight=ce_weight,
        detach_assistant=detach_assistant, ab=ab, beta=beta, divergence_alpha=divergence_alpha,
    )  # fmt: skip
    shape = student_hidden.shape[:-1]
    inputs = {
        "student_hidden": student_hidden, "student_weight": student_weight, "teacher_hidden": teacher_hidden,
        "teacher_weight": teacher_weight, "student_bias": student_bias, "teacher_bias": teacher_bias,
    }  # fmt: skip
    check_tensors(inputs, labels, shape)
    _check_sizes(
        student_hidden=student_hidden, student_weight=student_weight, teacher_hidden=teacher_hidden, teacher_weight=teacher_weight
    )
    check_precision(precision)
    if teacher_hidden.shape[:-1] != shape:
        raise InputError(f"student_hidden are of {tuple(shape)} tokens, teacher_hidden of {tuple(teacher_hidden.shape[:-1])}")
    heads = (("student", student_hidden, student_weight, student_bias), ("teacher", teacher_hidden, teacher_weight, teacher_bias))
    for name, hidden, weight, bias in heads:
        if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
            raise InputError(
                f"{name}_weight has shape {tuple(weight.shape)}, {name}_hidden has width {hidden.shape[-1]}: it must be [V, d]"
            )
        check_bias(bias, weight.shape[0])
    check_transform(softcap, logit_scale)
    check_transform(teacher_softcap, teacher_logit_scale, "teacher_")
    tensors = (student_hidden, student_weight, teacher_hidden, teacher_weight)
    spec = _resolve(options, labels, reduction, backend, tensors, ignore_index, valid_vocab, chunk_bytes)
    check_support(spec, *vocabularies(spec, student_weight.shape[0], teacher_weight.shape[0]))
    h, w, of_student = autocast_factors(student_hidden, student_weight, precision)
    th, tw, of_teacher = autocast_factors(_fixed(teacher_hidden), _fixed(teacher_weight), precision)
    student = Student(_flat(h), w, student_bias, None if labels is None else labels.reshape(-1))
    teacher = RunningTeacher(
        _flat(th), tw, None if teacher_bias is None else _fixed(teacher_bias), HeadOptions(softcap, logit_scale, of_student),
        HeadOptions(teacher_softcap, teacher_logit_scale, of_teacher), spec,
    )  # fmt: skip
    return _linear_loss(student, teacher, options.ce_weight, labels, token_weights, shape, reduction, return_tokens)


@overload
def distill_loss_from_logits(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None, *, return_tokens: Literal[False] = False,
    **options: Any,
) -> Tensor: ...  # fmt: skip
@overload
def distill_loss_from_logits(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None, *, return_tokens: Literal[True], **options: Any
) -> tuple[Tensor, DistillTokens]: ...
def distill_loss_from_logits(  # type: ignore[misc]
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    divergence: str | None = None,
    order: str | None = None,
    alpha: float | None = None,
    lam: float | None = None,
    temperature: float | None = None,
    ce_weight: float | None = None,
    detach_assistant: bool | None = None,
    ab: tuple[float, float] | None = None,
    beta: float | None = None,
    divergence_alpha: float | None = None,
    preset: str | None = None,
    reduction: str = "mean",
    token_weights: Tensor | None = None,
    ignore_index: int = -100,
    valid_vocab: int | None = None,
    chunk_bytes: int | None = None,
    return_tokens: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, DistillTokens]:
    """Distillation loss of student logits [..., V_s] against teacher logits [..., V_t], in nats; see `distill_loss`.

    The gradient has the dtype of the student's logits and is computed from them in fp32; the teacher gets none.
    """
    options = DistillOptions.of(
        preset, divergence=divergence, order=order, alpha=alpha, lam=lam, temperature=temperature, ce_weight=ce_weight,
        detach_assistant=detach_assistant, ab=ab, beta=beta, divergence_alpha=divergence_alpha,
    )  # fmt: skip
    shape = student_logits.shape[:-1]
    check_tensors({"student_logits": student_logits, "teacher_logits": teacher_logits}, labels, shape)
    _check_sizes(student_logits=student_logits, teacher_logits=teacher_logits)
    if teacher_logits.shape[:-1] != shape:
        raise InputError(f"student_logits are of {tuple(shape)} tokens, teacher_logits of {tuple(teacher_logits.shape[:-1])}")
    tensors = (student_logits, teacher_logits)
    spec = _resolve(options, labels, reduction, backend, tensors, ignore_index, valid_vocab, chunk_bytes)
    check_support(spec, *vocabularies(spec, student_logits.shape[-1], teacher_logits.shape[-1]))
    y = None if labels is None else labels.reshape(-1)
    tokens = distill_logits.forward(_flat(student_logits), _flat(_fixed(teacher_logits)), y, *spec)
    weights = _weights(labels, token_weights, ignore_index, shape, tokens[0].detach())
    return _finish(tokens, None, weights, options.ce_weight, reduction, shape, return_tokens)


@overload
def distill_loss_topk(
    student_hidden: Tensor, student_weight: Tensor, ids: Tensor, logprob: Tensor, left: Tensor, labels: Tensor | None = None,
    *, return_tokens: Literal[False] = False, **options: Any,
) -> Tensor: ...  # fmt: skip
@overload
def distill_loss_topk(
    student_hidden: Tensor, student_weight: Tensor, ids: Tensor, logprob: Tensor, left: Tensor, labels: Tensor | None = None,
    *, return_tokens: Literal[True], **options: Any,
) -> tuple[Tensor, DistillTokens]: ...  # fmt: skip
def distill_loss_topk(
    student_hidden: Tensor,
    student_weight: Tensor,
    ids: Tensor,
    logprob: Tensor,
    left: Tensor,
    labels: Tensor | None = None,
    *,
    preset: str | None = None,
    reduction: str = "mean",
    token_weights: Tensor | None = None,
    student_bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    valid_vocab: int | None = None,
    precision: str | None = None,
    chunk_bytes: int | None = None,
    return_tokens: bool = False,
    **given: Any,
) -> Tensor | tuple[Tensor, DistillTokens]:
    """`distill_loss` against a teacher's recorded top k: ids and log-probabilities [..., k], log of the mass left [...].

    The ids that were not recorded count as one event (lldfast.ops.distill.topk); k = V is exact. Settings of the loss and other
    options as there. torch computes it on every device.

    Raises:
        InputError: as `distill_loss`; also for alpha >= 1 with lam in (0, 1), where the minimum is at p = q only if the teacher's
            whole support is known, and for another temperature than that of the record, 1. That the ids of a token differ and
            that its probabilities sum to 1 is not checked.
    """
    options = DistillOptions.of(preset, **given)
    check_recorded(options)
    shape = student_hidden.shape[:-1]
    inputs = {
        "student_hidden": student_hidden, "student_weight": student_weight, "logprob": logprob, "left": left,
        "student_bias": student_bias,
    }  # fmt: skip
    check_tensors(inputs, labels, shape)
    _check_sizes(student_hidden=student_hidden, student_weight=student_weight)
    check_precision(precision)
    fits = ids.shape == logprob.shape and ids.shape[:-1] == shape and left.shape == shape and ids.shape[-1:] != (0,)
    if ids.dtype not in (torch.int32, torch.int64) or not fits:
        raise InputError(
            f"of {tuple(shape)} tokens ids (int32 or int64) and logprob must be [..., k] and left [...], not {ids.dtype} "
            f"{tuple(ids.shape)}, {tuple(logprob.shape)}, {tuple(left.shape)}"
        )
    if student_weight.dim() != 2 or student_weight.shape[1] != student_hidden.shape[-1]:
        raise InputError(f"student_weight has shape {tuple(student_weight.shape)}: it must be [V, {student_hidden.shape[-1]}]")
    check_bias(student_bias, student_weight.shape[0])
    tensors = (student_hidden, student_weight)
    spec = _resolve(options, labels, reduction, "torch", tensors, ignore_index, valid_vocab, chunk_bytes)
    h, w, precision = autocast_factors(student_hidden, student_weight, precision)
    student = Student(_flat(h), w, student_bias, None if labels is None else labels.reshape(-1))
    teacher = RecordedTeacher(
        _flat(_fixed(ids)), _flat(_fixed(logprob)), _fixed(left).reshape(-1), HeadOptions(softcap, logit_scale, precision), spec
    )
    return _linear_loss(student, teacher, options.ce_weight, labels, token_weights, shape, reduction, return_tokens)


def _resolve(
    options: DistillOptions, labels: Tensor | None, reduction: str, backend: str, tensors: tuple[Tensor, ...], ignore_index: int,
    valid_vocab: int | None, chunk_bytes: int | None,
) -> Spec:  # fmt: skip
    """What the ops take of the loss and of the call's other options, checked."""
    check_reduction(reduction)
    spec = resolve(
        options, ignore_index=ignore_index, valid_vocab=valid_vocab, chunk_bytes=chunk_bytes,
        backend=choose("distill", backend, *tensors),
    )  # fmt: skip
    if spec.ce and labels is None:
        raise InputError(f"ce_weight={options.ce_weight} needs labels")
    return spec


def _check_sizes(**inputs: Tensor) -> None:
    """Refuse what has no tokens' dimension, or no vocabulary or width."""
    for name, x in inputs.items():
        least = 2 if name.endswith("weight") else 1
        if x.dim() < least or x.shape[-1] == 0 or (least == 2 and x.shape[0] == 0):
            raise InputError(f"{name} has shape {tuple(x.shape)}: every dimension but that of the tokens must be at least 1")


def check_support(spec: Spec, student: int, teacher: int) -> None:
    """Refuse vocabularies of different sizes where the ids that only one model has make every loss infinite.

    Raises:
        InputError: naming both sizes and the way out.
    """
    if student == teacher:
        return
    lacks = "student" if student < teacher else "teacher"
    # Numbers that change in training and change nothing here are no constants to a compiler.
    if not _finite(lacks, *spec._replace(lam=0.5, temperature=1.0, ce=False)):
        raise InputError(
            f"the student has {student} ids and the teacher {teacher}: with this divergence the ids that the {lacks} lacks make "
            "every loss infinite. If the surplus is padding, give valid_vocab (the tokenizer's size); if not, the two models do "
            "not share a vocabulary"
        )


@torch.compiler.assume_constant_result
def _finite(lacks: str, *spec: Any) -> bool:
    """Whether the loss is finite where the other model has an id more."""
    short, long = torch.zeros(1, 1, dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64)
    pair = (short, long) if lacks == "student" else (long, short)
    loss, *_ = distill_math.rows(*pair, None, Spec(*spec), None, None)
    return math.isfinite(loss.item())


def _fixed(x: Tensor) -> Tensor:
    """Of the teacher: no gradient; one that inference mode made is copied, since autograd cannot keep it."""
    if torch.compiler.is_compiling():
        return x.detach()
    return x.clone() if x.is_inference() and torch.is_grad_enabled() and not torch.is_inference_mode_enabled() else x.detach()


def _flat(x: Tensor) -> Tensor:
    """[..., n] -> [T, n]."""
    return x.reshape(-1, x.shape[-1])


def _linear_loss(
    student: Student, teacher: RunningTeacher | RecordedTeacher, ce_weight: float, labels: Tensor | None,
    token_weights: Tensor | None, shape: torch.Size, reduction: str, return_tokens: bool,
) -> Any:  # fmt: skip
    """The reduced loss from the ops of the teacher's kind; labels and token_weights as they were given, [...]."""
    ops = distill_topk if isinstance(teacher, RecordedTeacher) else distill_linear
    like = student.hidden.new_zeros((), dtype=teacher.dtype(student))
    weights = _weights(labels, token_weights, teacher.spec.ignore_index, shape, like)
    arguments = (*student, *teacher.arguments())
    on = torch.is_grad_enabled()
    needs = [on and x is not None and x.requires_grad for x in (student.hidden, student.weight, student.bias)]
    if reduction == "none" or not any(needs):
        return _finish(ops.forward(*arguments), None, weights, ce_weight, reduction, shape, return_tokens)
    if reduction == "mean":
        scale = weights.sum()
        weights = weights / torch.where(scale != 0, scale, 1.0)
    total, divergence, ce, *_ = ops.weighted_sum(weights, ce_weight, *arguments, *needs)
    return _finish((divergence, ce), total, weights, ce_weight, "sum", shape, return_tokens)


def _weights(labels: Tensor | None, token_weights: Tensor | None, ignore_index: int, shape: torch.Size, like: Tensor) -> Tensor:
    """[T]: what each token counts; 0 where ignored.

    Raises:
        InputError: token_weights of another shape, device or kind.
    """
    kept = like.new_ones(shape).reshape(-1) if labels is None else (labels != ignore_index).reshape(-1).to(like.dtype)
    if token_weights is None:
        return kept
    if not isinstance(token_weights, Tensor):
        raise InputError(f"token_weights must be a tensor, not {type(token_weights).__name__}")
    if tuple(token_weights.shape) != tuple(shape):
        raise InputError(f"token_weights have shape {tuple(token_weights.shape)}, the inputs have {tuple(shape)} tokens")
    if token_weights.device != like.device or not token_weights.is_floating_point():
        raise InputError(f"token_weights must be floating-point numbers on {like.device}")
    # Not a product: an ignored token may have any weight, also NaN.
    return torch.where(kept > 0, token_weights.detach().reshape(-1).to(like.dtype), 0.0)


def _finish(
    tokens: tuple[Tensor, Tensor], total: Tensor | None, weights: Tensor, ce_weight: float, reduction: str, shape: torch.Size,
    return_tokens: bool,
) -> Any:  # fmt: skip
    """The reduced loss from the tokens' parts, and the tokens themselves on request. total: their weighted sum, where known."""
    divergence, ce = tokens
    if reduction == "none":
        loss = (weights * (divergence + ce_weight * ce)).reshape(shape)
    else:
        if total is None:
            total = (weights * (divergence + ce_weight * ce)).sum(dtype=torch.float64).to(divergence.dtype)
        scale = weights.sum()
        loss = total if reduction == "sum" else total / torch.where(scale != 0, scale, 1.0)
    if not return_tokens:
        return loss
    return loss, DistillTokens(divergence.detach().reshape(shape), ce.detach().reshape(shape))
