"""The section `distill` of a run's configuration: which loss a distilled method minimises at a step, and who teaches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from lldfast.errors import InputError
from lldfast.ops.distill.options import NAMES, DistillOptions, check_recorded
from lldfast.ops.distill.spec import depends, resolve
from lldfast.run.methods import LOSSES, Method


@dataclass
class DistillConfig:
    """The loss and the teacher of the distilled methods.

    divergence, order, ..., divergence_alpha are the settings of `lldfast.ops.distill.options.DistillOptions`; null takes the
    preset's, then the default there.

    Attributes:
        teacher: a model as target.model; unset: that one. It needs the data's tokenizer.
        cache: a folder of `lldfast teach`, read in place of a running teacher.
        dtype, device: of a running teacher; device unset: where the student is.
        preset: kl, rkl, skl, srkl, jsd, taid, ab or amid, for methods that name none.
        lam_end: lam moves to it linearly over the run (TAID: 1).
        ce_weight: of the methods with +ce.
    """

    teacher: str | None = None
    cache: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str | None = None
    preset: str = "kl"
    divergence: str | None = None
    order: str | None = None
    alpha: float | None = None
    lam: float | None = None
    lam_end: float | None = None
    temperature: float | None = None
    ce_weight: float = 1.0
    detach_assistant: bool | None = None
    ab: list[float] | None = None
    beta: float | None = None
    divergence_alpha: float | None = None

    def loss(self, method: Method, step: int = 0, steps: int = 1) -> dict[str, Any]:
        """Keyword arguments of `distill_loss` for a distilled method at a step.

        Raises:
            InputError: naming the setting that makes no sense.
        """
        given = {name: getattr(self, name) for name in NAMES if name != "ce_weight"}
        preset = method.preset or self.preset
        if preset not in LOSSES:
            raise InputError(f"distill.preset {preset!r} is unknown; choose from {', '.join(LOSSES)}")
        # A preset that a method names is meant as published, but for TAID, whose lam moves.
        if self.lam_end is not None and steps > 1 and method.preset in (None, "taid"):
            start, share = DistillOptions.of(preset, **given), step / (steps - 1)
            first = start.beta if preset == "jsd" else start.lam
            given["lam"] = min(max((1 - share) * first + share * self.lam_end, 0.0), 1.0)  # both ends exactly
            given["beta"] = None if preset == "jsd" else given["beta"]
        return {"preset": preset, "ce_weight": self.ce_weight if method.ce else 0.0, **given}

    def options(self, method: Method, step: int = 0, steps: int = 1) -> DistillOptions:
        """`loss` with every setting, checked.

        Raises:
            InputError: as `loss`.
        """
        return DistillOptions.of(**self.loss(method, step, steps))

    def record(self, method: Method) -> dict[str, Any]:
        """The settings of a method's loss for its weights file; JSON has no infinities."""
        chosen = self.loss(method) | {"lam_end": self.lam_end}
        return {name: str(x) if isinstance(x, float) and math.isinf(x) else x for name, x in chosen.items()}

    def check(self, methods: list[Method]) -> None:
        """Refuse values that could only fail later.

        Raises:
            InputError: naming the parameter.
        """
        distilled = [method for method in methods if method.distilled]
        if not (0 <= self.ce_weight < math.inf):
            raise InputError(f"distill.ce_weight must be >= 0 and finite, got {self.ce_weight}")
        if self.lam_end is not None and not 0 <= self.lam_end <= 1:
            raise InputError(f"distill.lam_end must be in [0, 1], got {self.lam_end}")
        if self.teacher and self.cache:
            raise InputError("give distill.teacher or distill.cache, not both")
        for method in distilled:
            for step in range(3):
                options = self.options(method, step, 3)
                spec = resolve(options)
                if self.cache:
                    check_recorded(options)
                if step == 2 and not depends(spec):
                    raise InputError(
                        f"method {method.name!r}: order {options.order!r} at lam {options.lam:g} compares a model with "
                        "itself (distill.lam, distill.lam_end)"
                    )
        seen: dict[tuple[Any, ...], str] = {}
        for method in distilled:
            moving = self.lam_end is not None and method.preset in (None, "taid")
            key = (method.mixture, method.ce, method.preset or self.preset, moving)
            if key in seen:
                raise InputError(f"methods {seen[key]!r} and {method.name!r} are the same")
            seen[key] = method.name
