"""The ops behind `distill_loss_topk`: a recorded teacher, its k largest log-probabilities and the mass that is left.

The ids that were not recorded are one event: both distributions are compared on k + 1 events, the last with the mass the teacher
has left and the student's probability of all those ids. That is the divergence of the full distributions if the tail has
the student's shape, and for every f-divergence a lower bound of it; with k = V it is exact.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lldfast.errors import InputError
from lldfast.ops.chunks import NEG_INF, accumulate_dtype
from lldfast.ops.distill.head import HeadOptions
from lldfast.ops.distill.math import token_loss
from lldfast.ops.distill.register import register
from lldfast.ops.distill.rows import vocabulary
from lldfast.ops.distill.spec import SPEC, Spec
from lldfast.ops.distill.sweep import Student, Upstream, sweep
from lldfast.ops.grads import Grads


class RecordedTeacher(NamedTuple):
    """Per token the teacher's likeliest ids [T, k], their log-probabilities [T, k] and the log of the mass left [T].

    student_head: what the student's head does; spec: the loss.
    """

    ids: Tensor
    logprob: Tensor
    left: Tensor
    student_head: HeadOptions
    spec: Spec

    @classmethod
    def read(cls, ids: Tensor, logprob: Tensor, left: Tensor, *rest: Any) -> RecordedTeacher:
        n = len(HeadOptions._fields)
        return cls(ids, logprob, left, HeadOptions(*rest[:n]), Spec(*rest[n:]))

    def arguments(self) -> tuple[Any, ...]:
        """Those of the ops behind the student's."""
        return self.ids, self.logprob, self.left, *self.student_head, *self.spec

    def dtype(self, student: Student) -> torch.dtype:
        return accumulate_dtype(student.hidden, student.weight, self.logprob)

    def zero_grads(self, student: Student, needs: tuple[bool, bool, bool]) -> Grads:
        return Grads.zeros(student.hidden, student.weight, self.dtype(student), *needs)

    def sweep(self, student: Student, upstream: Upstream | None, grads: Grads | None) -> tuple[Tensor, Tensor]:
        spec, vocab, dtype = self.spec, vocabulary(self.spec, len(student.weight)), self.dtype(student)
        if self.ids.numel() and (int(self.ids.min()) < 0 or int(self.ids.max()) >= vocab):
            low, high = int(self.ids.min()), int(self.ids.max())
            raise InputError(f"the teacher's ids reach from {low} to {high}: the vocabulary is [0, {vocab})")
        ids = self.ids.long()

        def of_rows(z: Tensor, at: slice | Tensor, *rest: Tensor | None) -> tuple[Tensor, Tensor]:
            return rows(spec, z, ids[at], self.logprob[at].to(dtype), self.left[at].to(dtype), *rest)

        return sweep(spec, student, self.student_head, of_rows, upstream, grads, dtype=dtype, columns=vocab)


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


forward, weighted_sum = register(
    "distill_topk", f"Tensor ids, Tensor logprob, Tensor left, {HeadOptions.schema()}, {SPEC}", RecordedTeacher.read
)
