"""The ops behind `distill_loss`: a running teacher, whose logits are made chunk by chunk beside the student's.

With the three products of the student (sweep.py) a loss with its gradient costs four. Where the C++ kernels have AMX, both
models' products and the loss are one kernel, which holds tiles of the logits alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lldfast.backends import extension
from lldfast.ops import native
from lldfast.ops.chunks import accumulate_dtype
from lldfast.ops.distill import rows as distill_rows
from lldfast.ops.distill.head import BlockedHead, HeadOptions
from lldfast.ops.distill.register import empty_grads, register
from lldfast.ops.distill.spec import SPEC, Spec
from lldfast.ops.distill.sweep import Student, Upstream, sweep
from lldfast.ops.grads import Grads


class RunningTeacher(NamedTuple):
    """hidden [T, d_t], weight [V_t, d_t] and bias [V_t] of the teacher; what both heads do, and the loss."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    student_head: HeadOptions
    head: HeadOptions
    spec: Spec

    @classmethod
    def read(cls, hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> RunningTeacher:
        n = len(HeadOptions._fields)
        return cls(hidden, weight, bias, HeadOptions(*rest[:n]), HeadOptions(*rest[n : 2 * n]), Spec(*rest[2 * n :]))

    def arguments(self) -> tuple[Any, ...]:
        """Those of the ops behind the student's."""
        return self.hidden, self.weight, self.bias, *self.student_head, *self.head, *self.spec

    def dtype(self, student: Student) -> torch.dtype:
        return accumulate_dtype(student.hidden, student.weight, self.hidden, self.weight)

    def fits_fused(self, student: Student) -> bool:
        """Whether `native.distill_linear` takes the call and is fast: AMX for both heads' products."""
        (h, w, bias, _), (th, tw) = student, (self.hidden, self.weight)
        if len(set(distill_rows.vocabularies(self.spec, len(w), len(tw)))) > 1:
            return False
        if self.spec.backend != "cpp" or bias is not None or self.bias is not None:
            return False
        if any(head.softcap is not None or head.logit_scale != 1.0 for head in (self.student_head, self.head)):
            return False
        if min(h.shape[1], th.shape[1], len(w)) == 0:
            return False
        factors = ((self.student_head.precision, h, w), (self.head.precision, th, tw))
        module: Any = extension()
        all_bf16 = all(native.linear_precision(*given) == "bf16" for given in factors)
        return all_bf16 and module is not None and module.isa() == "amx"

    def zero_grads(self, student: Student, needs: tuple[bool, bool, bool]) -> Grads:
        if self.fits_fused(student):  # it writes each row once, as it is to be
            return Grads(*(torch.zeros_like(x) for x in empty_grads(student, needs)))
        return Grads.zeros(student.hidden, student.weight, self.dtype(student), *needs)

    def sweep(self, student: Student, upstream: Upstream | None, grads: Grads | None) -> tuple[Tensor, Tensor]:
        if self.fits_fused(student):
            return self._fused(student, upstream, grads)
        spec, dtype = self.spec, self.dtype(student)
        vocabularies = distill_rows.vocabularies(spec, len(student.weight), len(self.weight))
        teacher = BlockedHead(self.hidden, self.weight, self.bias, vocabularies[1], self.head, dtype)

        def rows(z: Tensor, at: slice | Tensor, *rest: Tensor | None) -> tuple[Tensor, Tensor]:
            return distill_rows.run(spec, z, teacher.logits(teacher.cast(self.hidden[at])), *rest)

        return sweep(spec, student, self.student_head, rows, upstream, grads, dtype=dtype, columns=max(vocabularies))

    def _fused(self, student: Student, upstream: Upstream | None, grads: Grads | None) -> tuple[Tensor, Tensor]:
        h, w, _, labels = student
        vocab = distill_rows.vocabulary(self.spec, len(w))
        divergence, ce = (h.new_zeros(len(h), dtype=self.dtype(student)) for _ in range(2))
        g_divergence, g_ce = upstream or (None, None)
        dh, dw = (None, None) if grads is None else (grads.hidden, grads.weight)
        native.distill_linear(
            h, w, self.hidden, self.weight, labels, distill_rows.kept(self.spec, labels, vocab), vocab, self.spec,
            self.student_head.precision, self.head.precision, g_divergence, g_ce, divergence, ce, dh, dw,
        )  # fmt: skip
        return divergence, ce


forward, weighted_sum = register(
    "distill_linear",
    "Tensor teacher_hidden, Tensor teacher_weight, Tensor? teacher_bias, "
    f"{HeadOptions.schema()}, {HeadOptions.schema('teacher_')}, {SPEC}",
    RunningTeacher.read,
)
