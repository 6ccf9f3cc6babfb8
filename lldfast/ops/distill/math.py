"""Rows of student and teacher logits -> loss per token and the gradient by the student's logits, in torch.

Per vocabulary entry, with P = log p, Q = log q, R = log r normalised (options.py), (A, B) the two of them that `order` names
and delta = A - B; e^A, e^B are written A^, B^:

    assistant, u = a (P - Q), e = expm1(-|u|), c = lam where u <= 0 else 1 - lam:
        R~ = (Q where u <= 0 else P) + log1p(c e) / a          w = dR~/dQ = (1 - lam) (1 where u <= 0 else 1 + e) / (1 + c e)
    KL:  l = A^ delta            dl/dA = A^ (delta + 1)         dl/dB = -A^
    JS:  M = log(x A^ + (1 - x) B^):  dl/dA = x A^ (A - M)      dl/dB = (1 - x) B^ (B - M)       l = dl/dA + dl/dB
    AB:  t = -|delta|, S = e^((x + y) max(A, B)), ex = expm1(x t) / x, ey = expm1(y t) / y (t at exponent 0):
         delta >= 0:  dl/dA = -S ey                 dl/dB = S e^(y t) ex
         delta <  0:  dl/dA = S e^(x t) ey          dl/dB = -S ex
         l = (dl/dA + dl/dB) / (x + y);  where that cancels, with es = expm1((x + y) t) / (x + y):
         l = S (es - ey) / x for delta >= 0, S (es - ex) / y for delta < 0;  at x = y = 0: delta^2 / 2
     e^(x t) ey with y < 0 is 0 times infinity where t is large: there it is e^((x + y) t) expm1(-y t) / -y. Never 1 + x ex.

An entry that both models exclude (-inf) counts nothing, and A^ = 0 makes a term 0 whose limit is 0. With g = dl/dR, d = dl/dQ
where the loss names q itself, the sums over the vocabulary G = sum g, H = sum(w g) - G sum(w r) + sum d give

    dloss/dlogit_j = (h_j - q_j H) / temperature,  h = w (g - r G) + d   (w = 0 for a detached assistant)
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lldfast.ops.chunks import NEG_INF
from lldfast.ops.distill.spec import AB, GEOMETRIC, JS, KL, MAXIMUM, MINIMUM, POWER, PR, QR, RP, STUDENT, TEACHER, Spec


class Terms(NamedTuple):
    """Per entry: loss, dl/dR, dl/dQ (None: the loss does not name q)."""

    loss: Tensor
    g: Tensor
    d: Tensor | None


def power_mean(p: Tensor, q: Tensor, a: float, lam: float) -> tuple[Tensor, Tensor]:
    """log (lam e^(a p) + (1 - lam) e^(a q))^(1/a) of logs p, q, and its derivative by q; -inf where both are."""
    delta = torch.where(p == q, 0.0, p - q)  # -inf - -inf is no difference
    u = a * delta
    up = u > 0
    e, far = torch.expm1(-u.abs()), torch.exp(-u.abs())
    mixed = torch.where(up, (1 - lam) * e, lam * e)
    # 1 + mixed, which near lam 0 and 1 is a small sum of two positive numbers and no difference.
    whole = torch.where(up, lam + (1 - lam) * far, (1 - lam) + lam * far)
    mean = torch.where(up, p, q) + torch.where(mixed < -0.5, whole.log(), torch.log1p(mixed)) / a
    return mean, (1 - lam) * torch.where(up, far, torch.ones_like(e)) / whole


def assistant(p: Tensor, q: Tensor, spec: Spec) -> tuple[Tensor, Tensor | float]:
    """log r [R, V], normalised, from log p and log q, and w = dR~/dQ."""
    w: Tensor | float
    if spec.assistant == STUDENT:
        return q, 1.0
    if spec.assistant == TEACHER:
        return p, 0.0
    if spec.assistant == POWER:
        r, w = power_mean(p, q, spec.a, spec.lam)
    elif spec.assistant == GEOMETRIC:
        r, w = spec.lam * p + (1 - spec.lam) * q, 1 - spec.lam
    else:
        assert spec.assistant in (MAXIMUM, MINIMUM)
        r = torch.maximum(p, q) if spec.assistant == MAXIMUM else torch.minimum(p, q)
        w = torch.where(p == q, 1 - spec.lam, (r == q).to(q.dtype))
    if not spec.normalised:
        r = r - torch.logsumexp(r, -1, keepdim=True)
    return r, w


def divergence(a: Tensor, b: Tensor, spec: Spec) -> tuple[Tensor, Tensor, Tensor]:
    """(l, dl/dA, dl/dB) of D(A, B) per entry, from logs a and b."""
    no_a, no_b = a == NEG_INF, b == NEG_INF
    delta = torch.where(no_a & no_b, 0.0, a - b)
    if spec.divergence == KL:
        mass = a.exp()
        # A mass too small for a number against none at all is infinite too.
        loss = torch.where(no_a, 0.0, torch.where(delta == math.inf, math.inf, mass * delta))
        return loss, loss + mass, -mass
    if spec.divergence == JS:
        m, _ = power_mean(a, b, 1.0, spec.x)
        of_a = torch.where(no_a, 0.0, spec.x * a.exp() * (a - m))
        of_b = torch.where(no_b, 0.0, (1 - spec.x) * b.exp() * (b - m))
        return of_a + of_b, of_a, of_b
    assert spec.divergence == AB
    x, y, s = spec.x, spec.y, spec.x + spec.y
    first = delta >= 0
    t = -delta.abs()
    scale = (s * torch.where(first, a, b)).exp() if s else torch.ones_like(t)
    scale = torch.where(no_a & no_b, 0.0, scale)
    ex, ey = torch.expm1(x * t) / x if x else t, torch.expm1(y * t) / y if y else t
    of_a = scale * torch.where(first, -ey, _far(x, y, t, ey))
    of_b = scale * torch.where(first, _far(y, x, t, ex), -ex)
    if s > 0:  # A^x B^y and A^s are 0 where A is, whatever the factors look like
        of_a = torch.where(no_a, 0.0, of_a) if x > 0 else of_a
        of_b = torch.where(no_b, 0.0, of_b) if y > 0 else of_b
    if x == y == 0:
        return delta.square() / 2, of_a, of_b
    if 2 * abs(s) < max(abs(x), abs(y)):
        es = torch.expm1(s * t) / s if s else t
        return scale * torch.where(first, (es - ey) / x, (es - ex) / y), of_a, of_b
    return (of_a + of_b) / s, of_a, of_b


def _far(x: float, y: float, t: Tensor, ey: Tensor) -> Tensor:
    """e^(x t) ey of ey = expm1(y t) / y and t <= 0."""
    return (x * t).exp() * ey if y >= 0 else ((x + y) * t).exp() * torch.expm1(-y * t) / -y


def terms(p: Tensor, q: Tensor, r: Tensor, spec: Spec) -> Terms:
    """The loss of `order` and its derivatives by R and by Q."""
    other = p if spec.order in (PR, RP) else q
    forward = spec.order in (PR, QR)  # r is the second argument
    loss, of_a, of_b = divergence(other, r, spec) if forward else divergence(r, other, spec)
    g, d = (of_b, of_a) if forward else (of_a, of_b)
    return Terms(loss, g, None if other is p else d)


def token_loss(p: Tensor, q: Tensor, spec: Spec) -> tuple[Tensor, Tensor]:
    """Loss of each token [R] and h [R, V], its gradient by log q with the entries taken as free, from log p and log q."""
    r, w = assistant(p, q, spec)
    loss, g, d = terms(p, q, r, spec)
    h = torch.zeros_like(q) if d is None else d
    if not spec.detach and spec.assistant != TEACHER:
        h = h + w * (g - r.exp() * g.sum(-1, keepdim=True))
    return loss.sum(-1), h


def log_softmax(z: Tensor, vocab: int, temperature: float) -> Tensor:
    """log softmax(z / temperature) of rows z [R, >= n] over their first n columns, -inf from there to `vocab`."""
    z = z / temperature if temperature != 1.0 else z
    out = z - torch.logsumexp(z, -1, keepdim=True)
    return out if out.shape[-1] == vocab else torch.nn.functional.pad(out, (0, vocab - out.shape[-1]), value=NEG_INF)


def rows(
    student: Tensor, teacher: Tensor, y: Tensor | None, spec: Spec, g_divergence: Tensor | None, g_ce: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(divergence [R], cross entropy [R], dlogits [R, V_s]) of logits student [R, V_s] and teacher [R, V_t], in their dtype.

    Columns are all real; where one model has more of them, the other excludes those. dlogits: gradient of
    sum(g_divergence divergence + g_ce cross entropy), None without g_divergence. y: labels [R], needed for cross entropy.
    """
    vocab = max(student.shape[-1], teacher.shape[-1])
    q, p = log_softmax(student, vocab, spec.temperature), log_softmax(teacher, vocab, spec.temperature)
    total, h = token_loss(p, q, spec)
    ce = torch.zeros_like(total)
    plain = q if spec.temperature == 1.0 else None  # log softmax at temperature 1
    if spec.ce:
        assert y is not None
        plain = log_softmax(student, vocab, 1.0) if plain is None else plain
        ce = -plain.gather(-1, y[:, None])[:, 0]
    if g_divergence is None:
        return total, ce, None
    dz = (h - q.exp() * h.sum(-1, keepdim=True)) * (g_divergence / spec.temperature)[:, None]
    if spec.ce and g_ce is not None:
        assert plain is not None and y is not None
        of_ce = plain.exp()
        of_ce.scatter_(-1, y[:, None], torch.expm1(-ce)[:, None])  # p - 1, which a rounded p would lose near 1
        dz = dz + g_ce[:, None] * of_ce
    dz = torch.where(q == NEG_INF, 0.0, dz)  # a logit of -inf stays there
    return total, ce, dz[:, : student.shape[-1]]
