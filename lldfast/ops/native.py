"""Calls of the compiled modules lldfast._C and lldfast._cuda: tensors go as addresses, so one build serves every torch.

Rows of inputs may lie anywhere, but their columns must be contiguous; what is not is copied. `rows` are the indices of the
tokens to score, or None for all of them. Labels are those of the shard, int64; results of other rows stay as they are.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lldfast.backends import compiled_module, extension
from lldfast.ops.distill.spec import Spec

# Fewer multiply-adds than this, and starting threads takes longer than they save.
ONE_THREAD = 1 << 24

Matrix = tuple[int, str, int]
NO_MATRIX: Matrix = (0, "float32", 0)


def columns_contiguous(x: Tensor) -> Tensor:
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def _matrix(x: Tensor | None) -> Matrix:
    return NO_MATRIX if x is None or x.numel() == 0 else (x.data_ptr(), str(x.dtype).removeprefix("torch."), x.stride(0))


def _address(x: Tensor | None) -> int:
    return 0 if x is None or x.numel() == 0 else x.data_ptr()


def _threads(work: int) -> int:
    return 1 if work < ONE_THREAD else torch.get_num_threads()


def _module() -> Any:
    module = extension()
    assert module is not None  # dispatch.choose() asked
    return module


def _fp32(x: Tensor | None, size: int) -> Tensor | None:
    return None if x is None else x[:size].float().contiguous()


def logprob_fwd(
    logits: Tensor, labels: Tensor, rows: Tensor | None, vocab: int, bias: Tensor | None, softcap: float | None,
    logit_scale: float, out: Sequence[Tensor], isa: str = "",
) -> None:  # fmt: skip
    """Fills out = (logprob, lse, argmax, entropy, max logit), fp32 and int64 [T], from logits [T, V]; not the empty ones."""
    logits, bias = columns_contiguous(logits), _fp32(bias, vocab)
    tokens = len(logits) if rows is None else len(rows)
    _module().logprob_fwd(
        _matrix(logits), _address(rows), tokens, vocab, _address(labels), _address(bias), softcap or 0.0, logit_scale,
        _threads(64 * tokens * vocab), isa, [_address(x) for x in out],
    )  # fmt: skip


def logprob_bwd(
    logits: Tensor, labels: Tensor, rows: Tensor | None, vocab: int, bias: Tensor | None, softcap: float | None,
    logit_scale: float, logprob: Tensor, lse: Tensor, g: Tensor, h: Tensor, d_logits: Tensor, d_bias: Tensor, isa: str = "",
) -> None:  # fmt: skip
    """Fills d_logits [T, V] and d_bias [V] where they are not empty; columns behind `vocab` and other rows stay as they are."""
    logits, bias = columns_contiguous(logits), _fp32(bias, vocab)
    tokens = len(logits) if rows is None else len(rows)
    _module().logprob_bwd(
        _matrix(logits), _address(rows), tokens, vocab, _address(labels), _address(bias), softcap or 0.0, logit_scale,
        _threads(64 * tokens * vocab), isa, _address(logprob), _address(lse), _address(g), _address(h), _matrix(d_logits),
        _address(d_bias),
    )  # fmt: skip


def linear_precision(precision: str | None, hidden: Tensor, weight: Tensor) -> str:
    """None: products of the inputs as they are, which for two bf16 inputs is what bf16 instructions compute."""
    return precision or ("bf16" if hidden.dtype == weight.dtype == torch.bfloat16 else "fp32")


def linear_logprob_fwd(
    hidden: Tensor, weight: Tensor, labels: Tensor, rows: Tensor | None, vocab: int, bias: Tensor | None, softcap: float | None,
    logit_scale: float, precision: str | None, out: Sequence[Tensor], isa: str = "",
) -> None:  # fmt: skip
    """As `logprob_fwd`, from hidden [T, d] and weight [V, d]."""
    hidden, weight, bias = columns_contiguous(hidden), columns_contiguous(weight), _fp32(bias, vocab)
    tokens, width = len(hidden) if rows is None else len(rows), hidden.shape[1]
    _module().linear_logprob_fwd(
        _matrix(hidden), _address(rows), tokens, width, _matrix(weight), vocab, _address(labels), _address(bias), softcap or 0.0,
        logit_scale, linear_precision(precision, hidden, weight), _threads(tokens * vocab * width), isa,
        [_address(x) for x in out],
    )  # fmt: skip


def linear_logprob_bwd(
    hidden: Tensor, weight: Tensor, labels: Tensor, rows: Tensor | None, vocab: int, bias: Tensor | None, softcap: float | None,
    logit_scale: float, precision: str | None, logprob: Tensor, lse: Tensor, g: Tensor, h: Tensor, dh: Tensor, dw: Tensor,
    db: Tensor, isa: str = "",
) -> None:  # fmt: skip
    """Fills dh [T, d], dw [V, d] in their dtypes and db [V] fp32 where they are not empty; sums are in fp32."""
    hidden, weight, bias = columns_contiguous(hidden), columns_contiguous(weight), _fp32(bias, vocab)
    tokens, width = len(hidden) if rows is None else len(rows), hidden.shape[1]
    _module().linear_logprob_bwd(
        _matrix(hidden), _address(rows), tokens, width, _matrix(weight), vocab, _address(labels), _address(bias), softcap or 0.0,
        logit_scale, linear_precision(precision, hidden, weight), _threads(tokens * vocab * width), isa, _address(logprob),
        _address(lse), _address(g), _address(h), _matrix(dh), _matrix(dw), _address(db),
    )  # fmt: skip


def _distill_spec(spec: Spec) -> tuple[Any, ...]:
    """The fields of Spec that csrc/cpu/distill/distill_spec.h has."""
    return tuple(spec)[: Spec._fields.index("ignore_index")]


def _bytes(x: Tensor) -> tuple[int, int]:
    """First and last address of a matrix, the latter exclusive."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


def _apart(out: Tensor, x: Tensor) -> bool:
    """Whether writing a row of out leaves other rows of x alone, and its own until it is read."""
    if out.data_ptr() == x.data_ptr() and out.dtype == x.dtype and out.stride() == x.stride():
        return True
    (a, b), (c, d) = _bytes(out), _bytes(x)
    return b <= c or d <= a


def distill_rows(
    student: Tensor, teacher: Tensor, y: Tensor | None, spec: Spec, g_divergence: Tensor | None, g_ce: Tensor | None,
    out: Tensor | None, isa: str = "",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`distill_rows.run` for fp32, bf16 and fp16: (divergence, cross entropy), fp32 [R]; the gradient goes to `out` [R, V_s]."""
    rows = len(student)
    divergence, ce = (torch.empty(rows, dtype=torch.float32) for _ in range(2))
    if rows == 0:
        return divergence, ce
    student, teacher = columns_contiguous(student), columns_contiguous(teacher)
    y = y.long().contiguous() if spec.ce and y is not None else None
    gs = [None if g is None or out is None else g.float().contiguous() for g in (g_divergence, g_ce)]
    to = out
    if out is not None and not (columns_contiguous(out) is out and _apart(out, student) and _apart(out, teacher)):
        to = torch.empty_like(out, memory_format=torch.contiguous_format)
    _module().distill_rows(
        _matrix(student), student.shape[1], _matrix(teacher), teacher.shape[1], rows, _address(y), _distill_spec(spec),
        _address(gs[0]), _address(gs[1]), divergence.data_ptr(), ce.data_ptr(), _matrix(to),
        _threads(64 * rows * max(student.shape[1], teacher.shape[1])), isa,
    )  # fmt: skip
    if out is not None and to is not out:
        assert to is not None
        out.copy_(to)
    return divergence, ce


def distill_linear(
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, labels: Tensor | None, rows: Tensor | None,
    vocab: int, spec: Spec, precision: str | None, teacher_precision: str | None, g_divergence: Tensor | None,
    g_ce: Tensor | None, divergence: Tensor, ce: Tensor, dh: Tensor | None, dw: Tensor | None, isa: str = "",
) -> None:  # fmt: skip
    """Fills divergence and ce, fp32 [T], and where they are not empty dh [T, d] and dw [V, d] with the gradient of
    sum(g_divergence divergence + g_ce ce), from hidden states [T, d] and heads [V, d] of both models; vocab: rows of both heads
    that are real. Heads without bias, softcap and scale; precision fp32 or bf16."""
    hidden, weight = columns_contiguous(hidden), columns_contiguous(weight)
    teacher_hidden, teacher_weight = columns_contiguous(teacher_hidden), columns_contiguous(teacher_weight)
    tokens, width = len(hidden) if rows is None else len(rows), hidden.shape[1] + teacher_hidden.shape[1]
    if tokens == 0:
        return
    heads = [
        (_matrix(h), _matrix(w), h.shape[1], linear_precision(given, h, w))
        for h, w, given in ((hidden, weight, precision), (teacher_hidden, teacher_weight, teacher_precision))
    ]
    y = labels.long().contiguous() if spec.ce and labels is not None else None
    gs = [None if g is None else g.float().contiguous() for g in (g_divergence, g_ce)]
    _module().distill_linear(
        *heads, _address(rows), tokens, vocab, _address(y), _distill_spec(spec), _address(gs[0]), _address(gs[1]),
        divergence.data_ptr(), ce.data_ptr(), _matrix(dh), _matrix(dw), _threads(tokens * vocab * width), isa,
    )  # fmt: skip


def sketch_fold(
    out: Tensor, g: Tensor, offset: int, seed: int, scale: Tensor | None, dots: Sequence[Tensor], isa: str = ""
) -> Tensor:
    """Adds the fold of the flat g to out, fp64 [k]; gives |g scale|^2 and the inner products, fp64 [1 + len(dots)]."""
    first, second = (*dots, None, None)[:2]
    sums = _module().sketch_fold(
        g.data_ptr(), str(g.dtype).removeprefix("torch."), g.numel(), offset, out.data_ptr(), len(out), seed, _address(scale),
        _address(first), _address(second), _threads(16 * g.numel()), isa,
    )  # fmt: skip
    return torch.tensor(sums[: 1 + len(dots)], dtype=torch.float64)


def _samples(x: Tensor) -> tuple[int, str, int, int, int]:
    return (x.data_ptr(), str(x.dtype).removeprefix("torch."), x.shape[2], x.stride(0), x.stride(1))


def sketch_outer(out: Tensor, a: Tensor, b: Tensor, offset: int, seed: int, scale: Tensor | None, isa: str = "") -> Tensor:
    """Adds the fold of b_n^T a_n of a [N, T, I] and b [N, T, O] to out[n], fp64 [N, k]; gives their squares, fp64 [N]."""
    a, b = columns_contiguous(a), columns_contiguous(b)
    squares = torch.zeros(len(a), dtype=torch.float64)
    _module().sketch_outer(
        _samples(a), _samples(b), len(a), a.shape[1], offset, out.data_ptr(), out.shape[1], seed, _address(scale),
        min(_threads(a.numel() * b.shape[2]), len(a)), isa, squares.data_ptr(),
    )  # fmt: skip
    return squares


def sketch_rows(out: Tensor, rows: Tensor, sample: Tensor, place: Tensor, seed: int, isa: str = "") -> None:
    """Adds rows [R, width], fp32, which lie at place [R] of the flat space, to out[sample], fp64 [N, k]; sample ascends."""
    begin = torch.searchsorted(sample.contiguous(), torch.arange(len(out) + 1))
    _module().sketch_rows(
        rows.data_ptr(), rows.shape[1], begin.data_ptr(), place.data_ptr(), len(out), out.data_ptr(), out.shape[1], seed,
        min(_threads(64 * rows.numel()), len(out)), isa,
    )  # fmt: skip


def cuda_logprob_fwd(
    logits: Tensor, labels: Tensor, rows: Tensor | None, vocab: int, bias: Tensor | None, softcap: float | None,
    logit_scale: float, out: Sequence[Tensor],
) -> None:  # fmt: skip
    """`logprob_fwd` on the GPU, on torch's current stream; `labels` and `out` hold the scored rows only."""
    logits, bias = columns_contiguous(logits), _fp32(bias, vocab)
    module: Any = compiled_module("_cuda")
    size = module.logprob_workspace_bytes(len(labels), vocab)
    workspace = torch.empty(size, dtype=torch.uint8, device=logits.device)
    address, dtype, stride = _matrix(logits)
    module.logprob_fwd(
        address, dtype, stride, len(labels), vocab, _address(rows), _address(labels), _address(bias), softcap or 0.0, logit_scale,
        *[_address(x) for x in out], _address(workspace), torch.cuda.current_stream(logits.device).cuda_stream,
    )  # fmt: skip


def cuda_logprob_bwd(
    logits: Tensor, labels: Tensor, rows: Tensor | None, vocab: int, bias: Tensor | None, softcap: float | None,
    logit_scale: float, lse: Tensor, g: Tensor, h: Tensor, d_logits: Tensor, d_bias: Tensor,
) -> None:  # fmt: skip
    """`logprob_bwd` on the GPU; labels, lse, g and h hold the scored rows only."""
    logits, bias = columns_contiguous(logits), _fp32(bias, vocab)
    module: Any = compiled_module("_cuda")
    address, dtype, stride = _matrix(logits)
    d_address, _, d_stride = _matrix(d_logits)
    module.logprob_bwd(
        address, dtype, stride, len(labels), vocab, _address(rows), _address(labels), _address(bias), softcap or 0.0, logit_scale,
        _address(lse), _address(g), _address(h), d_address, d_stride, d_logits.shape[-1] if d_address else vocab,
        _address(d_bias), torch.cuda.current_stream(logits.device).cuda_stream,
    )  # fmt: skip


def cuda_sketch_fold(out: Tensor, g: Tensor, offset: int, seed: int, scale: Tensor | None, dots: Sequence[Tensor]) -> Tensor:
    """`sketch_fold` on the GPU, on torch's current stream; g is not empty."""
    module: Any = compiled_module("_cuda")
    size = module.sketch_workspace_bytes(len(g), offset, len(out), len(dots))
    workspace = torch.empty(size, dtype=torch.uint8, device=g.device)
    sums = torch.empty(1 + len(dots), dtype=torch.float64, device=g.device)
    scale = None if scale is None else scale.contiguous()
    first, second = ([other.contiguous() for other in dots] + [None, None])[:2]
    module.sketch_fold(
        g.data_ptr(), str(g.dtype).removeprefix("torch."), len(g), offset, seed, _address(scale), _address(first),
        _address(second), out.data_ptr(), len(out), sums.data_ptr(), workspace.data_ptr(),
        torch.cuda.current_stream(g.device).cuda_stream,
    )  # fmt: skip
    return sums
