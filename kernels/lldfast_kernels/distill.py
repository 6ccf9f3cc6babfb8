"""Distillation loss per token of given logits and its gradient by the student's, in one launch: distill_math.py per entry.

student logits [R, V_s], teacher logits [R, V_t] (fp32, bf16, fp16, each its own; an id that one lacks is -inf there), labels [R]
-> divergence, cross entropy [R] fp32; with g_divergence, g_ce [R] also out [R, V_s], the gradient of their weighted sum, which
may lie in the student's own memory.

A program has a row and takes the vocabulary tile by tile, up to four times, each time in the other direction: what it read last
is in the L2 cache still.

    1. maximum and sum of exponentials of both models
    2. those of r~, where r is not normalised by itself
    3. loss, G = sum g, H = sum (w g + d), W = sum w r
    4. dloss/dlogit = (w (g - r G) + d - q (H - G W)) / temperature

KL toward a mixture with constant w, and KL of a constant r to q, need no sums for 4 and get their loss there: forward KL reads
the logits twice. Without a gradient there is no 4.

Numerics. All in fp32. Logits count relative to their maximum; lane i of a program sums over the columns that are congruent to i
modulo BLOCK_V, and lanes meet at the end of a sweep. No sum depends on R or on the row's place.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Arguments of a kernel have no Python type.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lldfast_kernels import tuning
from lldfast_kernels.common import FLOATS, INTERPRETED, LOG2E, capability, on_device, per_token
from lldfast_kernels.distill_math import (
    AB,
    GEOMETRIC,
    JS,
    KL,
    NEG_INF,
    PR,
    QR,
    RQ,
    STUDENT,
    TEACHER,
    exp,
    expm1,
    terms,
)

# A lane's maximum before its first logit. Not -inf: inf - inf is NaN; and finfo.min, a usual mask value, must still count.
LOWEST = tl.constexpr(-3.4028234663852886e38)
# The gradient's form: it takes the sums; it is 0; w (r - p); q - r.
SUMS, ZERO, MIXED, PLAIN = (tl.constexpr(i) for i in range(4))


@triton.jit
def _read(ptr, col, V, MASKED: tl.constexpr, LAST: tl.constexpr):
    """A tile of logits; of those read for the last time none is worth a place in the cache."""
    if MASKED:
        return tl.load(ptr + col, mask=col < V, other=NEG_INF).to(tl.float32)
    elif LAST:
        return tl.load(ptr + col, eviction_policy="evict_first").to(tl.float32)
    else:
        return tl.load(ptr + col).to(tl.float32)


@triton.jit
def _add_exp(z, m, s, k):
    """One more number per lane with one exponential: m the maximum, s = sum 2^(k (z - m)). A NaN stays in s."""
    d = z - m
    up = d > 0
    e = tl.exp2(tl.abs(d) * -k)
    return tl.where(up, z, m), tl.where(up, s * e + 1.0, s + e)


@triton.jit
def _join(m, s, k):
    """The lanes' maximum, and the log of their sum relative to it."""
    top = tl.max(m, 0)
    log_s = tl.log(tl.sum(s * tl.exp2((m - top) * k), 0))
    return top, tl.where(log_s < 0, tl.where(log_s == NEG_INF, log_s, 0.0), log_s)  # an approximate log may miss 0 from below


@triton.jit
def _logs(student_ptr, teacher_ptr, col, V_S, V_T, top_q, log_q, top_p, log_p, inv_t, MASKED: tl.constexpr, LAST: tl.constexpr):
    """A tile of logs Q and P, and of the student's logits relative to their maximum."""
    z = _read(student_ptr, col, V_S, MASKED, LAST) - top_q
    p = _read(teacher_ptr, col, V_T, MASKED, LAST) - top_p
    return z * inv_t - log_q, p * inv_t - log_p, z


@triton.jit(do_not_specialize=["V_S", "V_T"])
def distill_rows_kernel(
    student_ptr, teacher_ptr, label_ptr, g_ptr, gce_ptr, divergence_ptr, ce_ptr, out_ptr,
    V_S, V_T, stride_sr, stride_tr, stride_or, inv_t, a, inv_a, lam, rest, x, y, s, inv_x, inv_y, inv_s,
    ASSISTANT: tl.constexpr, ORDER: tl.constexpr, DIVERGENCE: tl.constexpr,
    X: tl.constexpr, Y: tl.constexpr, S: tl.constexpr, NORMALISED: tl.constexpr, DETACH: tl.constexpr, CE: tl.constexpr,
    TEMPERED: tl.constexpr, GRAD: tl.constexpr, FORM: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One row. FORM: of its gradient. TEMPERED: the temperature is not 1, so cross entropy has a sum of its own."""
    row = tl.program_id(0)
    student_ptr += row.to(tl.int64) * stride_sr
    teacher_ptr += row.to(tl.int64) * stride_tr
    whole = tl.minimum(V_S, V_T) // BLOCK_V  # tiles that need no mask
    ragged = whole * BLOCK_V
    V = tl.maximum(V_S, V_T)
    lane = tl.arange(0, BLOCK_V)
    k = inv_t * LOG2E

    m_q = tl.full([BLOCK_V], LOWEST, tl.float32)
    m_p = tl.full([BLOCK_V], LOWEST, tl.float32)
    s_q = tl.zeros([BLOCK_V], tl.float32)
    s_p = tl.zeros([BLOCK_V], tl.float32)
    s_1 = tl.zeros([BLOCK_V], tl.float32)
    for i in range(whole):
        z = _read(student_ptr, i * BLOCK_V + lane, V_S, False, False)
        p = _read(teacher_ptr, i * BLOCK_V + lane, V_T, False, False)
        if CE and TEMPERED:
            _m, s_1 = _add_exp(z, m_q, s_1, LOG2E)
        m_q, s_q = _add_exp(z, m_q, s_q, k)
        m_p, s_p = _add_exp(p, m_p, s_p, k)
    for at in range(ragged, V, BLOCK_V):
        z = _read(student_ptr, at + lane, V_S, True, False)
        p = _read(teacher_ptr, at + lane, V_T, True, False)
        if CE and TEMPERED:
            _m, s_1 = _add_exp(z, m_q, s_1, LOG2E)
        m_q, s_q = _add_exp(z, m_q, s_q, k)
        m_p, s_p = _add_exp(p, m_p, s_p, k)
    top_q, log_q = _join(m_q, s_q, k)
    top_p, log_p = _join(m_p, s_p, k)

    label = -1
    ce = 0.0
    log_1 = log_q
    if CE:
        if TEMPERED:
            _m, log_1 = _join(m_q, s_1, LOG2E)
        of_label = tl.load(label_ptr + row)
        inside = (of_label >= 0) & (of_label < V_S)
        z_y = tl.load(student_ptr + of_label, mask=inside, other=NEG_INF).to(tl.float32)
        label = of_label.to(tl.int32)
        ce = log_1 - (z_y - top_q)
    tl.store(ce_ptr + row, ce)

    log_norm = 0.0
    if not NORMALISED:
        m = tl.full([BLOCK_V], LOWEST, tl.float32)
        sum_r = tl.zeros([BLOCK_V], tl.float32)
        for at in range(ragged, V, BLOCK_V):
            Q, P, z = _logs(student_ptr, teacher_ptr, at + lane, V_S, V_T, top_q, log_q, top_p, log_p, inv_t, True, False)
            _loss, R, _w, _g, _d = terms(
                P, Q, 0.0, a, inv_a, lam, rest, x, y, s, inv_x, inv_y, inv_s, ASSISTANT, ORDER, DIVERGENCE, X, Y, S, True
            )
            m, sum_r = _add_exp(R, m, sum_r, LOG2E)
        for i in range(whole):
            col = (whole - 1 - i) * BLOCK_V + lane
            Q, P, z = _logs(student_ptr, teacher_ptr, col, V_S, V_T, top_q, log_q, top_p, log_p, inv_t, False, False)
            _loss, R, _w, _g, _d = terms(
                P, Q, 0.0, a, inv_a, lam, rest, x, y, s, inv_x, inv_y, inv_s, ASSISTANT, ORDER, DIVERGENCE, X, Y, S, True
            )
            m, sum_r = _add_exp(R, m, sum_r, LOG2E)
        top_r, log_r = _join(m, sum_r, LOG2E)
        log_norm = top_r + log_r

    loss = tl.zeros([BLOCK_V], tl.float32)
    G = 0.0
    H = 0.0
    if FORM == SUMS or not GRAD:
        sum_g = tl.zeros([BLOCK_V], tl.float32)
        sum_h = tl.zeros([BLOCK_V], tl.float32)
        sum_w = tl.zeros([BLOCK_V], tl.float32)
        # After the sweep for r~ this one goes upward again.
        FLIP: tl.constexpr = 1 if NORMALISED else 0
        for i in range(whole):
            col = (FLIP * (whole - 1 - 2 * i) + i) * BLOCK_V + lane
            Q, P, z = _logs(student_ptr, teacher_ptr, col, V_S, V_T, top_q, log_q, top_p, log_p, inv_t, False, False)
            part, R, w, g, d = terms(
                P, Q, log_norm, a, inv_a, lam, rest, x, y, s, inv_x, inv_y, inv_s,
                ASSISTANT, ORDER, DIVERGENCE, X, Y, S, NORMALISED,
            )  # fmt: skip
            loss += part
            if GRAD:
                if not DETACH:
                    sum_g += g
                    sum_h += w * g
                    sum_w += w * exp(R)
                sum_h += d
        for at in range(ragged, V, BLOCK_V):
            Q, P, z = _logs(student_ptr, teacher_ptr, at + lane, V_S, V_T, top_q, log_q, top_p, log_p, inv_t, True, False)
            part, R, w, g, d = terms(
                P, Q, log_norm, a, inv_a, lam, rest, x, y, s, inv_x, inv_y, inv_s,
                ASSISTANT, ORDER, DIVERGENCE, X, Y, S, NORMALISED,
            )  # fmt: skip
            loss += part
            if GRAD:
                if not DETACH:
                    sum_g += g
                    sum_h += w * g
                    sum_w += w * exp(R)
                sum_h += d
        if GRAD:
            G = tl.sum(sum_g, 0)
            H = tl.sum(sum_h, 0) - G * tl.sum(sum_w, 0)

    if GRAD:
        out_ptr += row.to(tl.int64) * stride_or
        g_loss = tl.load(g_ptr + row) * inv_t
        g_ce = 0.0
        of_hit = 0.0
        if CE:
            g_ce = tl.load(gce_ptr + row)
            of_hit = g_ce * expm1(-ce)  # p - 1, which a rounded p would lose near 1
        for i in range(whole):
            col = (whole - 1 - i) * BLOCK_V + lane
            Q, P, z = _logs(student_ptr, teacher_ptr, col, V_S, V_T, top_q, log_q, top_p, log_p, inv_t, False, True)
            part, dz = _gradient(
                P, Q, z, col, label, log_norm, log_1, G, H, g_loss, g_ce, of_hit,
                a, inv_a, lam, rest, x, y, s, inv_x, inv_y, inv_s,
                ASSISTANT, ORDER, DIVERGENCE, X, Y, S, NORMALISED, DETACH, CE, TEMPERED, FORM,
            )  # fmt: skip
            loss += part
            tl.store(out_ptr + col, dz.to(out_ptr.dtype.element_ty), eviction_policy="evict_first")
        for at in range(ragged, V, BLOCK_V):
            col = at + lane
            Q, P, z = _logs(student_ptr, teacher_ptr, col, V_S, V_T, top_q, log_q, top_p, log_p, inv_t, True, True)
            part, dz = _gradient(
                P, Q, z, col, label, log_norm, log_1, G, H, g_loss, g_ce, of_hit,
                a, inv_a, lam, rest, x, y, s, inv_x, inv_y, inv_s,
                ASSISTANT, ORDER, DIVERGENCE, X, Y, S, NORMALISED, DETACH, CE, TEMPERED, FORM,
            )  # fmt: skip
            loss += part
            tl.store(out_ptr + col, dz.to(out_ptr.dtype.element_ty), mask=col < V_S)
    tl.store(divergence_ptr + row, tl.sum(loss, 0))


@triton.jit
def _gradient(
    P, Q, z, col, label, log_norm, log_1, G, H, g_loss, g_ce, of_hit, a, inv_a, lam, rest, x, y, s, inv_x, inv_y, inv_s,
    ASSISTANT: tl.constexpr, ORDER: tl.constexpr, DIVERGENCE: tl.constexpr,
    X: tl.constexpr, Y: tl.constexpr, S: tl.constexpr, NORMALISED: tl.constexpr, DETACH: tl.constexpr, CE: tl.constexpr,
    TEMPERED: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """(loss, where it is not known yet, and the gradient by the student's logits) of a tile."""
    part, R, w, g, d = terms(
        P, Q, log_norm, a, inv_a, lam, rest, x, y, s, inv_x, inv_y, inv_s, ASSISTANT, ORDER, DIVERGENCE, X, Y, S, NORMALISED
    )
    q = exp(Q)
    if FORM == ZERO:
        dz = tl.zeros_like(q)
    elif FORM == MIXED:
        dz = w * (exp(R) - exp(P)) * g_loss
    elif FORM == PLAIN:
        dz = (q - exp(R)) * g_loss
    else:
        part = tl.zeros_like(q)
        h = d - q * H
        if not DETACH:
            h += w * (g - exp(R) * G)
        dz = h * g_loss
    if CE:
        if TEMPERED:
            q = exp(z - log_1)
        dz += tl.where(col == label, of_hit, g_ce * q)
    return part, tl.where(Q == NEG_INF, 0.0, dz)  # a logit of -inf stays there


def constants(spec: Any, grad: bool) -> dict[str, Any]:
    """What the kernel is compiled for, from the caller's spec. Its numbers, such as lam, are none of it: they may change."""
    kind, x, y = spec.divergence, spec.x, spec.y
    powers = kind == AB.value
    toward_p = kind == KL.value and spec.order == PR.value and spec.assistant in (STUDENT.value, GEOMETRIC.value)
    detach = bool(spec.detach) or spec.assistant == TEACHER.value
    form = SUMS
    if detach and spec.order not in (QR.value, RQ.value):
        form = ZERO
    elif detach and kind == KL.value and spec.order == RQ.value:
        form = PLAIN
    elif not detach and toward_p:
        form = MIXED
    x_sign, y_sign, s_sign = ((n > 0) - (n < 0) if powers else 0 for n in (x, y, x + y))
    s_sign *= 2 if 2 * abs(x + y) < max(abs(x), abs(y)) else 1  # by x + y the loss would cancel
    return {
        "ASSISTANT": spec.assistant, "ORDER": spec.order, "DIVERGENCE": kind, "X": x_sign, "Y": y_sign, "S": s_sign,
        "NORMALISED": bool(spec.normalised), "DETACH": detach, "CE": bool(spec.ce), "TEMPERED": spec.temperature != 1.0,
        "GRAD": grad, "FORM": form.value if grad else SUMS.value,
    }  # fmt: skip


def _numbers(spec: Any) -> tuple[float, ...]:
    """inv_t, a, 1 / a, lam, 1 - lam, x, y, x + y and the reciprocals of these three."""
    x, y = spec.x, 1 - spec.x if spec.divergence == JS.value else spec.y
    inverse = (1 / n if n else 0.0 for n in (x, y, x + y))
    return 1 / spec.temperature, spec.a, 1 / spec.a if spec.a else 0.0, spec.lam, 1 - spec.lam, x, y, x + y, *inverse


def tile_of(spec: Any, device: tuple[int, int] | None, *dtypes: torch.dtype) -> tuning.Tile:
    """KL against p or q itself has a few exponentials an entry, the rest up to ten; cross entropy takes registers."""
    simple = spec.divergence == KL.value and spec.assistant in (STUDENT.value, TEACHER.value) and not spec.ce
    return tuning.tile("distill_kl" if simple else "distill", device, max(dtypes, key=lambda dtype: dtype.itemsize))


def _check(student: Tensor, teacher: Tensor, y: Tensor | None, ce: bool, out: Tensor | None) -> None:
    for name, z in (("student", student), ("teacher", teacher), ("out", out)):
        if z is None:
            continue
        if z.dim() != 2 or len(z) != len(student):
            raise ValueError(f"{name} must be [{len(student)}, V], not {tuple(z.shape)}")
        if z.dtype not in FLOATS:
            raise ValueError(f"{name} must be float32, float16 or bfloat16, not {z.dtype}")
        if z.device != student.device:
            raise ValueError(f"{name} is on {z.device}, student is on {student.device}")
        if z.shape[1] == 0 or z.shape[1] >= 2**31 - 2**16:  # column numbers, and a tile more, are int32
            raise ValueError(f"{name} has a vocabulary of {z.shape[1]}")
        if z.stride(1) != 1 and z.shape[1] > 1:
            raise ValueError(f"{name} must have column stride 1, not {z.stride(1)}")
    if out is not None and out.shape != student.shape:
        raise ValueError(f"out must have the student's shape {tuple(student.shape)}, not {tuple(out.shape)}")
    if student.device.type != "cuda" and not INTERPRETED:
        raise ValueError(f"tensors are on {student.device}: kernels run on a CUDA device, or under TRITON_INTERPRET=1")
    if ce and y is None:
        raise ValueError("cross entropy needs labels")
    if y is not None and (
        y.shape != student.shape[:1] or y.dtype not in (torch.int32, torch.int64) or y.device != student.device
    ):
        raise ValueError(f"y must be int64 of shape ({len(student)},) on {student.device}, not {y.dtype} {tuple(y.shape)}")


def distill_rows(
    student: Tensor,
    teacher: Tensor,
    y: Tensor | None,
    spec: Any,
    g_divergence: Tensor | None,
    g_ce: Tensor | None,
    out: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(divergence [R], cross entropy [R]), fp32; the gradient goes to `out`, where that is given, with g_divergence and g_ce.

    spec: the numbers of a loss by name, as in lldfast/ops/distill/spec.py. Cross entropy is 0 where it wants none, and inf where
    the label lies outside the student's vocabulary. g_ce None: zeros.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    _check(student, teacher, y, bool(spec.ce), out)
    divergence, ce = (student.new_empty(len(student), dtype=torch.float32) for _ in range(2))
    if len(student) == 0:
        return divergence, ce
    flags = constants(spec, out is not None)
    if out is not None:
        if g_divergence is None:
            raise ValueError("out needs g_divergence")
        g_divergence = per_token("g_divergence", g_divergence, divergence)
        g_ce = torch.zeros_like(ce) if g_ce is None else per_token("g_ce", g_ce, divergence)
    tile = tile_of(spec, capability(student), student.dtype, teacher.dtype)
    with on_device(student):
        distill_rows_kernel[(len(student),)](
            student, teacher, y.contiguous() if y is not None and spec.ce else None,
            g_divergence if flags["GRAD"] else None, g_ce if flags["GRAD"] and spec.ce else None, divergence, ce, out,
            student.shape[1], teacher.shape[1], student.stride(0), teacher.stride(0), 0 if out is None else out.stride(0),
            *_numbers(spec), **flags, BLOCK_V=tile.BLOCK_V, num_warps=tile.num_warps,
        )  # fmt: skip
    return divergence, ce
