"""Distillation losses of the alpha-mixture family: D(p, r), D(q, r), D(r, p), D(r, q) of teacher p, student q, assistant r.

distill_spec.py defines r and the presets, distill_math.py the formulas. From hidden states and heads no [T, V] tensor of either
model is ever alive. Backends: C++ on a CPU, Triton on a GPU, torch anywhere; all compute in fp32 (torch: fp64 for fp64 inputs).
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from lldfast.errors import InputError
from lldfast.ops.autocast import autocast_factors
from lldfast.ops.check import check_bias, check_precision, check_tensors
from lldfast.ops.chunks import accumulate_dtype
from lldfast.ops.dispatch import choose
from lldfast.ops.distill import linear as distill_linear
from lldfast.ops.distill import logits as distill_logits
from lldfast.ops.distill import math as distill_math
from lldfast.ops.distill.linear import Heads
from lldfast.ops.distill.rows import vocabularies
from lldfast.ops.distill.spec import Spec, check_recorded, resolve, settings


class DistillTokens(NamedTuple):
    """Per token, in the labels' shape (or that of the tokens), detached; 0 where ignored. In nats.

    divergence: D of the two distributions that `order` names. ce: -log q(label) at temperature 1; 0 where ce_weight is 0.
    """

    divergence: Tensor
    ce: Tensor


def reference(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None, *, preset: str | None = None,
    token_weights: Tensor | None = None, ignore_index: int = -100, valid_vocab: int | None = None, reduction: str = "mean",
    **given: Any,
) -> Tensor:  # fmt: skip
    """The oracle of `distill_loss_from_logits`: textbook formulas in fp64 under plain autograd, finite logits only."""
    chosen = settings(preset, **given)
    lam, alpha, temperature = float(chosen["lam"]), float(chosen["alpha"]), chosen["temperature"]
    zs, zt = (z.double()[..., :valid_vocab] for z in (student_logits, _fixed(teacher_logits)))
    vocab = max(zs.shape[-1], zt.shape[-1])
    q, p = (
        torch.nn.functional.pad(torch.log_softmax(z / temperature, -1), (0, vocab - z.shape[-1]), value=-1e30) for z in (zs, zt)
    )
    a = (1 - alpha) / 2
    if lam in (0.0, 1.0):
        r = p if lam else q
    elif math.isinf(alpha):
        r = torch.maximum(p, q) if alpha < 0 else torch.minimum(p, q)
    elif a == 0:
        r = lam * p + (1 - lam) * q
    else:
        r = torch.logaddexp(math.log(lam) + a * p, math.log(1 - lam) + a * q) / a
    r = torch.log_softmax(r, -1)
    r = r.detach() if chosen["detach_assistant"] else r
    first, second = ({"p": p, "q": q, "r": r}[name] for name in chosen["order"])
    loss = _textbook(first, second, chosen)
    if chosen["ce_weight"]:
        assert labels is not None
        index = labels.clamp(0, zs.shape[-1] - 1)[..., None].long()
        loss = loss - chosen["ce_weight"] * torch.log_softmax(zs, -1).gather(-1, index)[..., 0]
    kept = torch.ones_like(loss) if labels is None else (labels != ignore_index).double()
    weights = kept if token_weights is None else torch.where(kept > 0, token_weights.double(), 0.0)
    loss = torch.where(kept > 0, weights * loss, 0.0)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / torch.where(weights.sum() != 0, weights.sum(), 1.0)


def _textbook(a: Tensor, b: Tensor, chosen: dict[str, Any]) -> Tensor:
    kind = chosen["divergence"]
    if kind == "rkl":
        a, b, kind = b, a, "kl"
    if kind == "kl":
        return (a.exp() * (a - b)).sum(-1)
    if kind in ("js", "jsd"):
        beta = chosen["beta"]
        m = torch.logaddexp(math.log(beta) + a, math.log(1 - beta) + b)
        return (beta * a.exp() * (a - m) + (1 - beta) * b.exp() * (b - m)).sum(-1)
    if kind == "alpha":
        alpha = chosen["alpha"] if chosen["divergence_alpha"] is None else chosen["divergence_alpha"]
        x, y = (1 - alpha) / 2, (1 + alpha) / 2
    else:
        x, y = chosen["ab"]
    if x == 0 and y == 0:
        return ((a - b).square() / 2).sum(-1)
    if x == 0 or y == 0:
        a, b, x = (a, b, x) if y == 0 else (b, a, y)
        return (((x * a).exp() * x * (a - b) - (x * a).exp() + (x * b).exp()) / x**2).sum(-1)
    if x + y == 0:
        return (((x * (a - b)).exp() - 1 - x * (a - b)) / x**2).sum(-1)
    s = x + y
    return (-((x * a + y * b).exp() - x / s * (s * a).exp() - y / s * (s * b).exp()) / (x * y)).sum(-1)


@torch.compiler.assume_constant_result
def _finite(lacks: str, *spec: Any) -> bool:
    """Whether the loss is finite where the other model has an id more."""
    short, long = torch.zeros(1, 1, dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64)
    pair = (short, long) if lacks == "student" else (long, short)
    loss, *_ = distill_math.rows(*pair, None, Spec(*spec), None, None)
    return math.isfinite(loss.item())


def _check_sizes(**inputs: Tensor) -> None:
    """Refuse what has no tokens' dimension, or no vocabulary or width."""
    for name, x in inputs.items():
        least = 2 if name.endswith("weight") else 1
        if x.dim() < least or x.shape[-1] == 0 or (least == 2 and x.shape[0] == 0):
            raise InputError(f"{name} has shape {tuple(x.shape)}: every dimension but that of the tokens must be at least 1")


def _fixed(x: Tensor) -> Tensor:
    """Of the teacher: no gradient; one that inference mode made is copied, since autograd cannot keep it."""
    if torch.compiler.is_compiling():
        return x.detach()
    return x.clone() if x.is_inference() and torch.is_grad_enabled() and not torch.is_inference_mode_enabled() else x.detach()


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


def _resolve(
    labels: Tensor | None, reduction: str, backend: str, tensors: tuple[Tensor, ...], chosen: dict[str, Any], **options: Any
) -> Spec:
    if reduction not in ("mean", "sum", "none"):
        raise InputError(f"reduction={reduction!r} is not 'mean', 'sum' or 'none'")
    spec = resolve(**chosen, **options, backend=choose("distill", backend, *tensors))
    if spec.ce and labels is None:
        raise InputError(f"ce_weight={chosen['ce_weight']} needs labels")
    return spec


def _linear_loss(
    h: Tensor, w: Tensor, rest: tuple[Any, ...], dtype: torch.dtype, ce_weight: float, labels: Tensor | None,
    token_weights: Tensor | None, shape: torch.Size, reduction: str, return_tokens: bool,
) -> Any:  # fmt: skip
    """The reduced loss from the linear ops; rest: their arguments behind h [T, d] and w."""
    spec, student_bias = Spec(*rest[-len(Spec._fields) :]), rest[3]
    weights = _weights(labels, token_weights, spec.ignore_index, shape, h.new_zeros((), dtype=dtype))
    on = torch.is_grad_enabled()
    needs = [on and x is not None and x.requires_grad for x in (h, w, student_bias)]
    if reduction == "none" or not any(needs):
        return _finish(distill_linear.forward(h, w, *rest), None, weights, ce_weight, reduction, shape, return_tokens)
    if reduction == "mean":
        scale = weights.sum()
        weights = weights / torch.where(scale != 0, scale, 1.0)
    total, divergence, ce, *_ = distill_linear.weighted_sum(weights, ce_weight, h, w, *rest, *needs)
    return _finish((divergence, ce), total, weights, ce_weight, "sum", shape, return_tokens)


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
    chosen = settings(
        preset, divergence=divergence, order=order, alpha=alpha, lam=lam, temperature=temperature, ce_weight=ce_weight,
        detach_assistant=detach_assistant, ab=ab, beta=beta, divergence_alpha=divergence_alpha,
    )  # fmt: skip
    shape = student_logits.shape[:-1]
    check_tensors({"student_logits": student_logits, "teacher_logits": teacher_logits}, labels, shape)
    _check_sizes(student_logits=student_logits, teacher_logits=teacher_logits)
    if teacher_logits.shape[:-1] != shape:
        raise InputError(f"student_logits are of {tuple(shape)} tokens, teacher_logits of {tuple(teacher_logits.shape[:-1])}")
    options = {"ignore_index": ignore_index, "valid_vocab": valid_vocab, "chunk_bytes": chunk_bytes}
    spec = _resolve(labels, reduction, backend, (student_logits, teacher_logits), chosen, **options)
    check_support(spec, *vocabularies(spec, student_logits.shape[-1], teacher_logits.shape[-1]))
    s, t = (z.reshape(-1, z.shape[-1]) for z in (student_logits, _fixed(teacher_logits)))
    y = None if labels is None else labels.reshape(-1)
    tokens = distill_logits.forward(s, t, y, *spec)
    weights = _weights(labels, token_weights, ignore_index, shape, tokens[0].detach())
    return _finish(tokens, None, weights, chosen["ce_weight"], reduction, shape, return_tokens)


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
        divergence: D: "kl" KL(A || B) (the default), "rkl" KL(B || A), "js" Jensen-Shannon with weight `beta` (0.5) on A, "ab"
            alpha-beta with exponents `ab` (0.2, 0.7), "alpha" Amari's with `divergence_alpha` (None: alpha).
        order: which two of teacher p, student q and assistant r are (A, B): "pr" (the default), "qr", "rp", "rq".
        alpha, lam: of r (lldfast.ops.distill.spec); -1 and 0.1. lam 0 makes r the student, 1 the teacher; alpha may be infinite.
        temperature: of p and q, 1; the cross entropy keeps 1. The loss is not multiplied by its square.
        detach_assistant: no gradient through r.
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
    chosen = settings(
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
    for label, cap, scale in (("", softcap, logit_scale), ("teacher_", teacher_softcap, teacher_logit_scale)):
        if cap is not None and not 1e-30 <= cap <= 1e30:
            raise InputError(f"{label}softcap must be positive and finite, not {cap}")
        if not -1e30 <= scale <= 1e30:
            raise InputError(f"{label}logit_scale must be finite, not {scale}")
    options = {"ignore_index": ignore_index, "valid_vocab": valid_vocab, "chunk_bytes": chunk_bytes}
    tensors = (student_hidden, student_weight, teacher_hidden, teacher_weight)
    spec = _resolve(labels, reduction, backend, tensors, chosen, **options)
    check_support(spec, *vocabularies(spec, student_weight.shape[0], teacher_weight.shape[0]))
    h, w, student_precision = autocast_factors(student_hidden, student_weight, precision)
    th, tw, teacher_precision = autocast_factors(_fixed(teacher_hidden), _fixed(teacher_weight), precision)
    h, th = (x.reshape(-1, x.shape[-1]) for x in (h, th))
    y = None if labels is None else labels.reshape(-1)
    of_heads = Heads(softcap, logit_scale, teacher_softcap, teacher_logit_scale, student_precision, teacher_precision)
    rest = (th, tw, y, student_bias, None if teacher_bias is None else _fixed(teacher_bias), *of_heads, *spec)
    return _linear_loss(
        h, w, rest, accumulate_dtype(*tensors), chosen["ce_weight"], labels, token_weights, shape, reduction, return_tokens
    )


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
    chosen = settings(preset, **given)
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
    options = {"ignore_index": ignore_index, "valid_vocab": valid_vocab, "chunk_bytes": chunk_bytes}
    spec = _resolve(labels, reduction, "torch", (student_hidden, student_weight), chosen, **options)
    check_recorded(chosen)
    h, w, precision = autocast_factors(student_hidden, student_weight, precision)
    th, tw, rest = (_fixed(x).reshape(-1, *x.shape[len(shape) :]) for x in (logprob, ids, left))
    y = None if labels is None else labels.reshape(-1)
    arguments = (th, tw, y, student_bias, rest, *Heads(softcap, logit_scale, None, 1.0, precision, None), *spec)
    dtype = accumulate_dtype(student_hidden, student_weight, logprob)
    flat = h.reshape(-1, h.shape[-1])
    return _linear_loss(flat, w, arguments, dtype, chosen["ce_weight"], labels, token_weights, shape, reduction, return_tokens)
