"""What distill.py does per vocabulary entry: teacher p, student q, assistant r, as logs P, Q, R in fp32.

The formulas are those of lldfast/ops/distill/math.py, written so that no digits cancel: a difference of logs such as P - R comes
from P - Q, not from R, and 1 + c expm1(-|u|) near 0 from the exponential itself. An entry that both models exclude (-inf) counts
nothing, a term whose factor is 0 is 0 where the limit is, NaN stays NaN.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Arguments of a kernel have no Python type.

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from lldfast_kernels.common import INTERPRETED, LOG2E

INTERPRETER = tl.constexpr(INTERPRETED)
NEG_INF = tl.constexpr(float("-inf"))
INF = tl.constexpr(float("inf"))

# What r is, the order (A, B) of D(A, B), and D: the numbers of the caller's spec.
TEACHER, STUDENT, POWER, GEOMETRIC, MAXIMUM, MINIMUM = (tl.constexpr(i) for i in range(6))
PR, QR, RP, RQ = (tl.constexpr(i) for i in range(4))
KL, JS, AB = (tl.constexpr(i) for i in range(3))


@triton.jit
def exp(x):
    return tl.exp2(x * LOG2E)


@triton.jit
def _expm1_near(x):
    """|x| <= 1/2: least relative error of its degree, 3e-9."""
    c = 0.50000006 + x * (0.16666663 + x * (0.04166532 + x * (0.0083336346 + x * (0.0013997324 + x * 0.00019841190))))
    return x + x * x * c


@triton.jit
def expm1(x):
    """Relative error about 2e-7. The interpreter has no libdevice, whose own is several times as long."""
    return tl.where(tl.abs(x) < 0.5, _expm1_near(x), exp(x) - 1.0)


@triton.jit
def _log1p_near(y):
    """-0.4 <= y <= 0: relative error 1.4e-8."""
    c = -0.3548098 + y * (-0.33930937 + y * -0.6834003)
    c = -0.5000043 + y * (0.333116 + y * (-0.25416172 + y * (0.16149637 + y * c)))
    return y + y * y * c


@triton.jit
def _log(x):
    """Relative error 3e-7 where x is below 0.6, in two instructions; tl.log has thirty."""
    if INTERPRETER:
        return tl.log(x)
    else:
        return libdevice.fast_logf(x)


@triton.jit
def mixture(u, lam, rest):
    """(log(lam e^u + rest) or, where u > 0, that less u, from lam + rest = 1; e^-|u|; the sum under that log)."""
    low = tl.exp2(tl.abs(u) * -LOG2E)
    up = u > 0
    c = tl.where(up, rest, lam)
    total = tl.where(up, lam, rest) + c * low
    y = c * tl.where(low > 0.61, _expm1_near(-tl.abs(u)), low - 1.0)
    return tl.where(y > -0.4, _log1p_near(y), _log(total)), low, total


@triton.jit
def assistant(p, q, delta, a, inv_a, lam, rest, ASSISTANT: tl.constexpr):
    """(R~, P - R~, Q - R~, dR~/dQ) before r is normalised; delta = P - Q, 0 where both are -inf."""
    if ASSISTANT == STUDENT:
        return q, delta, tl.zeros_like(q), 1.0
    elif ASSISTANT == TEACHER:
        return p, tl.zeros_like(p), -delta, 0.0
    elif ASSISTANT == GEOMETRIC:
        return lam * p + rest * q, rest * delta, -lam * delta, rest
    elif ASSISTANT == POWER:
        u = a * delta
        log, low, total = mixture(u, lam, rest)
        log *= inv_a
        up = u > 0
        w = rest * tl.where(up, low, 1.0) / total
        return tl.where(up, p, q) + log, tl.where(up, 0.0, delta) - log, tl.where(up, -delta, 0.0) - log, w
    else:
        # Not maximum(): of a number and NaN it takes the number.
        teacher = (delta > 0) if ASSISTANT == MAXIMUM else (delta < 0)
        gap = tl.where(delta == delta, 0.0, delta)
        w = tl.where(delta == 0, rest, tl.where(teacher, 0.0, 1.0))
        return tl.where(teacher, p, q) + gap, tl.where(teacher, gap, delta), tl.where(teacher, -delta, gap), w


@triton.jit
def _far(x, y, s, inv_y, t, ey, Y: tl.constexpr):
    """e^(x t) ey of ey = expm1(y t) / y, which with y < 0 is 0 times infinity where t is large."""
    if Y < 0:
        return exp(s * t) * (expm1(-y * t) * -inv_y)
    else:
        return exp(x * t) * ey


@triton.jit
def divergence(
    a, b, delta, x, y, s, inv_x, inv_y, inv_s,
    DIVERGENCE: tl.constexpr, X: tl.constexpr, Y: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """(l, dl/dA, dl/dB) of D(A, B); delta = A - B. s = x + y, for JS y = 1 - x.

    X, Y, S are the signs of x, y, s; S is 2 or -2 where l by s would cancel.
    """
    no_a = a == NEG_INF
    no_b = b == NEG_INF
    delta = tl.where(no_a & no_b, 0.0, delta)
    if DIVERGENCE == KL:
        mass = exp(a)
        # Mass below the least number against none at all is infinite too, not 0 times infinity.
        loss = tl.where(no_a, 0.0, tl.where(delta == INF, INF, mass * delta))
        return loss, loss + mass, -mass
    elif DIVERGENCE == JS:
        log, _low, _total = mixture(delta, x, y)
        up = delta > 0
        of_a = tl.where(no_a, 0.0, x * exp(a) * (tl.where(up, 0.0, delta) - log))
        of_b = tl.where(no_b, 0.0, y * exp(b) * (tl.where(up, -delta, 0.0) - log))
        return of_a + of_b, of_a, of_b
    else:
        first = delta >= 0
        t = -tl.abs(delta)
        ex = t
        ey = t
        if X != 0:
            ex = expm1(x * t) * inv_x
        if Y != 0:
            ey = expm1(y * t) * inv_y
        scale = 1.0
        if S != 0:
            scale = tl.where(no_a & no_b, 0.0, exp(s * tl.where(first, a, b)))
        of_a = scale * tl.where(first, -ey, _far(x, y, s, inv_y, t, ey, Y))
        of_b = scale * tl.where(first, _far(y, x, s, inv_x, t, ex, X), -ex)
        if S > 0:  # A^x B^y and A^s are 0 where A is, whatever the factors look like
            if X > 0:
                of_a = tl.where(no_a, 0.0, of_a)
            if Y > 0:
                of_b = tl.where(no_b, 0.0, of_b)
        if S == 1 or S == -1:
            loss = (of_a + of_b) * inv_s
        elif X != 0:
            es = t
            if S != 0:
                es = expm1(s * t) * inv_s
            loss = scale * tl.where(first, (es - ey) * inv_x, (es - ex) * inv_y)
        else:
            loss = 0.5 * delta * delta
        return loss, of_a, of_b


@triton.jit
def terms(
    p, q, log_norm, a, inv_a, lam, rest, x, y, s, inv_x, inv_y, inv_s,
    ASSISTANT: tl.constexpr, ORDER: tl.constexpr, DIVERGENCE: tl.constexpr,
    X: tl.constexpr, Y: tl.constexpr, S: tl.constexpr, NORMALISED: tl.constexpr,
):  # fmt: skip
    """(loss, R, dR~/dQ, dl/dR, dl/dQ where the loss names q, else 0) from logs P, Q and log_norm = log sum e^R~."""
    delta = tl.where(p == q, 0.0, p - q)  # -inf - -inf is no difference
    r, of_p, of_q, w = assistant(p, q, delta, a, inv_a, lam, rest, ASSISTANT)
    if not NORMALISED:
        r -= log_norm
        of_p += log_norm
        of_q += log_norm
    if ORDER == PR:
        loss, _of_p, g = divergence(p, r, of_p, x, y, s, inv_x, inv_y, inv_s, DIVERGENCE, X, Y, S)
        return loss, r, w, g, 0.0
    elif ORDER == QR:
        loss, d, g = divergence(q, r, of_q, x, y, s, inv_x, inv_y, inv_s, DIVERGENCE, X, Y, S)
        return loss, r, w, g, d
    elif ORDER == RP:
        loss, g, _of_p = divergence(r, p, -of_p, x, y, s, inv_x, inv_y, inv_s, DIVERGENCE, X, Y, S)
        return loss, r, w, g, 0.0
    else:
        loss, g, d = divergence(r, q, -of_q, x, y, s, inv_x, inv_y, inv_s, DIVERGENCE, X, Y, S)
        return loss, r, w, g, d
