"""The options of an estimate of G: names, types, defaults, meanings and limits, for `gram.estimate`, the configuration of a run
and the command line alike. Nothing here needs torch."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lldfast.errors import InputError

Mode = Literal["auto", "exact", "sharded", "bf16", "int8", "int4", "fold"]
MODES: tuple[Mode, ...] = get_args(Mode)


@dataclass
class GramOptions:
    """How G is estimated, in the terms of a configuration file; `keywords` gives those of `gram.estimate`.

    What an estimate is made for (delta, tau) is no option, and a run has a seed and rules a ridge of their own.

    Attributes:
        mode: "exact" keeps the K rows of J in fp32, "sharded" each rank's slice of them, "bf16", "int8" and "int4" rounded rows,
            "fold" a sketch of each row; "auto" takes the first of them that fits the budget.
        k: numbers per sketch, a power of two; "auto" is as few as keep the weights within target_kl. Modes auto and fold.
        groups: groups of texts per domain, from whose differences noise is told and error bars are made.
        debias: take the noise of finitely many texts out of the diagonal.
        precondition: "adamw" makes G J M^-1 J^T with the second moment of the run's optimizer, whose steps that describes.
        budget_mb: memory for rows or sketches, MiB; unset: 2048 in mode auto, else no limit.
        target_kl: of k "auto": expected KL between the weights of the true G and of the sketched one, nats.
        batch_tokens: tokens of a batch, whose activations the backward pass holds.
    """

    mode: Mode = "auto"
    k: int | Literal["auto"] = "auto"
    groups: int = 8
    debias: bool = True
    precondition: Literal["none", "adamw"] = "none"
    budget_mb: float | None = None
    target_kl: float = 1e-4
    batch_tokens: int = 4096

    def check(self, section: str = "") -> None:
        """Refuse values that make no sense, alone or together.

        Args:
            section: what stands before the names in messages ("gram.").

        Raises:
            InputError: naming the option.
        """
        check_values(
            mode=self.mode,
            k=self.k,
            groups=self.groups,
            batch_tokens=self.batch_tokens,
            target_kl=self.target_kl,
            section=section,
        )
        if self.k != "auto" and self.mode not in ("auto", "fold"):
            raise InputError(f"{section}k is the size of a sketch: mode {self.mode!r} has none ({section}mode fold has)")
        if self.debias and self.groups == 1:
            raise InputError(f"{section}debias compares groups of texts: {section}groups must be >= 2 (or {section}debias false)")
        if self.budget_mb is not None and not 0 < self.budget_mb < math.inf:
            raise InputError(f"{section}budget_mb must be > 0 and finite, or null, got {self.budget_mb}")

    def keywords(self) -> dict[str, Any]:
        """Keyword arguments of `gram.estimate`; "adamw" stands for an optimizer that is yet to be put in its place."""
        return {
            "mode": self.mode,
            "k": self.k,
            "groups": self.groups,
            "debias": self.debias,
            "precondition": None if self.precondition == "none" else self.precondition,
            "budget_bytes": None if self.budget_mb is None else int(self.budget_mb * 2**20),
            "target_kl": self.target_kl,
            "batch_tokens": self.batch_tokens,
        }


def check_values(*, mode: str, k: int | str, groups: int, batch_tokens: int, target_kl: float, section: str = "") -> None:
    """Each value alone, as `gram.estimate` and `GramOptions.check` take them.

    Raises:
        InputError: naming the option, with `section` before it.
    """
    if mode not in MODES:
        raise InputError(f"{section}mode must be one of {', '.join(MODES)}, got {mode!r}")
    if k != "auto" and not (_natural(k) and not int(k) & (int(k) - 1)):
        raise InputError(f"{section}k must be a power of two or auto, got {k!r}")
    for name, value in (("groups", groups), ("batch_tokens", batch_tokens)):
        if not _natural(value):
            raise InputError(f"{section}{name} must be an integer >= 1, got {value!r}")
    if not 0 < target_kl < math.inf:
        raise InputError(f"{section}target_kl must be > 0 and finite, got {target_kl!r}")


def _natural(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= 1
