"""What a training step minimises: cross entropy, or a distillation loss against a running or a recorded teacher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from lldfast.distill.cache import TeacherCache
from lldfast.errors import InputError
from lldfast.models.head import Head
from lldfast.models.language_model import LanguageModel
from lldfast.ops.distill.loss import DistillTokens, distill_loss, distill_loss_from_logits, distill_loss_topk
from lldfast.ops.distill.options import DistillOptions
from lldfast.ops.linear_logprob import linear_cross_entropy


class Rows(NamedTuple):
    """Rows of a batch: tokens x and next tokens y [B, T], each row's domain (a number) and where it begins there, both [B]."""

    x: Tensor
    y: Tensor
    domain: np.ndarray
    start: np.ndarray


class Objective(Protocol):
    """(step, hidden [B, T, d], head [V, d], valid_vocab, rows) -> (mean loss, what each token contributed [B, T], detached)."""

    def __call__(self, step: int, hidden: Tensor, weight: Tensor, vocab: int, rows: Rows) -> tuple[Tensor, Tensor]: ...


def cross_entropy(step: int, hidden: Tensor, weight: Tensor, vocab: int, rows: Rows) -> tuple[Tensor, Tensor]:
    """The Objective of plain training."""
    loss, logprob = linear_cross_entropy(hidden, weight, rows.y, valid_vocab=vocab, return_logprob=True)
    return loss, -logprob


class Distillation:
    """The Objective of a distilled method.

    Args:
        options: the loss at a step of the run.
        teacher: a LanguageModel that runs, or a TeacherCache.
        domains: names that the rows' domain numbers stand for.
    """

    def __init__(
        self, options: Callable[[int], DistillOptions], teacher: LanguageModel | TeacherCache, *, domains: list[str]
    ) -> None:
        self.options, self.teacher, self.domains = options, teacher, domains
        self._head = TeacherHead()

    def __call__(self, step: int, hidden: Tensor, weight: Tensor, vocab: int, rows: Rows) -> tuple[Tensor, Tensor]:
        chosen = self.options(step)
        options = vars(chosen) | {"valid_vocab": vocab, "return_tokens": True}
        if isinstance(self.teacher, TeacherCache):
            ids, logprob, left = (x.to(hidden.device) for x in self.teacher.rows(rows.domain, rows.start, self.domains))
            loss, tokens = distill_loss_topk(hidden, weight, ids, logprob, left, rows.y, **options)
        else:
            loss, tokens = self._running(self.teacher, hidden, weight, rows, options)
        return loss, tokens.divergence + chosen.ce_weight * tokens.ce

    def _running(
        self, teacher: LanguageModel, hidden: Tensor, weight: Tensor, rows: Rows, options: dict[str, Any]
    ) -> tuple[Tensor, DistillTokens]:
        ids = rows.x.to(teacher.device)
        own_dtype = torch.autocast(teacher.device.type, enabled=False)  # distill.dtype, whatever the student computes in
        if not teacher.separate_head:  # its logits are alive for these rows, and so are the student's
            teacher.note_full_logits(ids.numel())
            with torch.no_grad(), own_dtype:
                logits = teacher.logits(ids).to(hidden.device)
            return distill_loss_from_logits(hidden @ weight.T, logits, rows.y, **options)
        with torch.no_grad(), own_dtype:
            theirs = teacher.hidden(ids).to(hidden.device)
        of_teacher = self._head.options(teacher.head(), hidden.device)
        return distill_loss(hidden, weight, theirs, labels=rows.y, **of_teacher, **options)


class TeacherHead:
    """The teacher's head where the student is: copied to another device once for as long as it is the same."""

    def __init__(self) -> None:
        self._copied: tuple[Any, ...] = ()
        self._copies: tuple[Tensor, Tensor | None] | None = None

    def options(self, head: Head, device: torch.device) -> dict[str, Any]:
        """Keyword arguments of `distill_loss`."""
        parts = (head.weight, head.bias)
        now = (device, *((id(x), None if x is None or x.is_inference() else x._version) for x in parts), head.valid_vocab)
        if self._copies is None or now != self._copied:
            weight, bias = (None if x is None else x[: head.valid_vocab].detach().to(device) for x in parts)
            assert weight is not None
            self._copied, self._copies = now, (weight, bias)
        weight, bias = self._copies
        return {
            "teacher_weight": weight,
            "teacher_bias": bias,
            "teacher_softcap": head.softcap,
            "teacher_logit_scale": head.logit_scale,
        }


def teacher_identity(teacher: LanguageModel | TeacherCache) -> dict[str, Any]:
    """Who teaches, for provenance; a cache recorded it."""
    return teacher.teacher if isinstance(teacher, TeacherCache) else teacher.identity


def fingerprint(teacher: LanguageModel | TeacherCache | None) -> str | None:
    """What a checkpoint keeps of its teacher: the hash of the weights, and how much of it was recorded."""
    if teacher is None:
        return None
    return str(teacher_identity(teacher)["hash"]) + (f", top {teacher.k}" if isinstance(teacher, TeacherCache) else "")


def check_same_teacher(method: str, before: Any, now: Any) -> None:
    """Refuse to go on with another teacher than the one that a checkpoint was trained against.

    Raises:
        InputError: naming both.
    """
    if before != now:
        raise InputError(f"method {method!r} was trained against the teacher {before}, now it is {now}: use another --out")
