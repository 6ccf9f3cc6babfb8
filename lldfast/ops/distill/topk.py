"""Rows of student logits against a recorded teacher: its k largest log-probabilities and the mass that is left.

The ids that were not recorded are one event: both distributions are compared on k + 1 events, the last with the mass the teacher
has left and the student's probability of all those ids. That is the divergence of the full distributions if the tail has
the student's shape, and for every f-divergence a lower bound of it; with k = V it is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lldfast.ops.chunks import NEG_INF
from lldfast.ops.distill.math import token_loss
from lldfast.ops.distill.spec import Spec


def rows(
    spec: Spec, z: Tensor, ids: Tensor, logprob: Tensor, left: Tensor, y: Tensor | None, g_divergence: Tensor | None,
    g_ce: Tensor | None, out: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(divergence [R], cross entropy [R]) of logits z [R, V] against ids, logprob [R, k] and the log of the mass left [R].

    out [R, V], which may be z itself, gets the gradient of sum(g_divergence divergence + g_ce cross entropy).
    """
    lse = torch.logsumexp(z, -1, keepdim=True)
    # Not 1 minus the k: near 1 that difference would be rounding alone.
    tail = torch.logsumexp(z.scatter(-1, ids, NEG_INF), -1, keepdim=True)
    q = torch.cat((z.gather(-1, ids), tail), -1) - lse  # [R, k + 1]
    divergence, h = token_loss(torch.cat((logprob, left[:, None]), -1), q, spec)
    h = torch.where(q == NEG_INF, 0.0, h)
    ce = torch.zeros_like(divergence)
    if spec.ce:
        assert y is not None
        ce = (lse - z.gather(-1, y[:, None]))[:, 0]
    if out is None or g_divergence is None:
        return divergence, ce
    total, mass = h.sum(-1, keepdim=True), q.exp()
    # Inside the tail the student keeps its shape: dq_tail / dlogit_j = q_j (1 - q_tail).
    of_tail = torch.where(mass[:, -1:] > 0, h[:, -1:] / mass[:, -1:], 0.0)
    at_top = (h[:, :-1] - mass[:, :-1] * total) * g_divergence[:, None]
    p = (z - lse).exp_()
    dz = p * ((of_tail - total) * g_divergence[:, None])
    dz.scatter_(-1, ids, at_top)
    if spec.ce and g_ce is not None:
        assert y is not None
        p.scatter_(-1, y[:, None], torch.expm1(-ce)[:, None])
        dz += g_ce[:, None] * p
    out.copy_(dz)
    return divergence, ce
