"""What a method's name means: where its domain weights come from and what it minimises.

MIXTURE                                 cross entropy on that mixture
[MIXTURE+]distill[-PRESET][+ce]         a distillation loss on it (uniform if unnamed), alone or with cross entropy
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Any, Literal

from lldfast.errors import InputError
from lldfast.ops.distill.spec import DEFAULTS, PRESETS, check_recorded, depends, resolve, settings
from lldfast.weights.rules import RULES

FIXED_METHODS = ("uniform", "proportional", "fixed", "ground-truth")
# A method says itself whether it adds cross entropy.
LOSSES = tuple(name for name in PRESETS if not name.endswith("+ce"))
_DISTILLED = re.compile(r"(?:(?P<mixture>.+)\+)?distill(?:-(?P<preset>[^+]+))?(?P<ce>\+ce)?")


@dataclass(frozen=True)
class Method:
    """`rule` is None for weights fixed beforehand, `passes` is 2 when pass 1 comes first; `mixture` names the weights' source.

    preset: of a distilled method's loss, None for that of the configuration. ce: whether cross entropy is minimised.
    """

    name: str
    rule: str | None = None
    passes: int = 1
    stages: int = 1
    mixture: str = ""
    distilled: bool = False
    preset: str | None = None
    ce: bool = True

    @property
    def objective(self) -> str:
        return ("distill+ce" if self.ce else "distill") if self.distilled else "ce"


def parse_method(name: str) -> Method:
    """Mixtures: uniform, proportional, fixed (lld.weights), ground-truth (the target's known mixture); a rule (iterative,
    spread, mirror, adjusted, adjusted-spread, adjusted-trust, adjusted-fit); `RULE-aggregated` and `RULE-two-stage`, which
    train anew with the fixed weights of that rule's pass 1 ("aggregated" and "two-stage" alone mean iterative, the paper's;
    "mirror-fixed" is an alias of "mirror-aggregated"). Distillation: "distill", "distill+ce", "distill-amid", and on another
    mixture "aggregated+distill", "mirror-fixed+distill-skl+ce".

    Raises:
        InputError: unknown name; the message lists what there is.
    """
    found = _DISTILLED.fullmatch(name)
    if found is None:
        return _mixture(name)
    preset = found["preset"]
    if preset is not None and preset not in LOSSES:
        raise InputError(f"unknown method {name!r}: distill-PRESET takes {', '.join(LOSSES)}")
    of_data = _mixture(found["mixture"] or "uniform")
    return dataclasses.replace(of_data, name=name, distilled=True, preset=preset, ce=found["ce"] is not None)


def _mixture(name: str) -> Method:
    if name in FIXED_METHODS:
        return Method(name, mixture=name)
    if name in RULES:
        return Method(name, name, mixture=name)
    if name in ("aggregated", "two-stage"):
        return Method(name, "iterative", 2, 1 if name == "aggregated" else 2, name)
    for suffix, stages in (("-aggregated", 1), ("-fixed", 1), ("-two-stage", 2)):
        if name.endswith(suffix) and name[: -len(suffix)] in RULES:
            return Method(name, name[: -len(suffix)], 2, stages, name)
    rules = ", ".join(RULES)
    raise InputError(
        f"unknown method {name!r}: choose from {', '.join(FIXED_METHODS)}; {rules}; aggregated, two-stage; "
        "RULE-aggregated (or RULE-fixed), RULE-two-stage; [MIXTURE+]distill[-PRESET][+ce]"
    )


@dataclass
class DistillConfig:
    """The loss and the teacher of the distilled methods; see `lldfast.distill_loss`. Settings that are null take the preset's.

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
        given = {name: getattr(self, name) for name in DEFAULTS if name != "ce_weight"}
        preset = method.preset or self.preset
        if preset not in LOSSES:
            raise InputError(f"distill.preset {preset!r} is unknown; choose from {', '.join(LOSSES)}")
        # A preset that a method names is meant as published, but for TAID, whose lam moves.
        if self.lam_end is not None and steps > 1 and method.preset in (None, "taid"):
            first, share = settings(preset, **given)["beta" if preset == "jsd" else "lam"], step / (steps - 1)
            given["lam"] = min(max((1 - share) * first + share * self.lam_end, 0.0), 1.0)  # both ends exactly
            given["beta"] = None if preset == "jsd" else given["beta"]
        return {"preset": preset, "ce_weight": self.ce_weight if method.ce else 0.0, **given}

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
                chosen = settings(**self.loss(method, step, 3))
                spec = resolve(**chosen)
                if self.cache:
                    check_recorded(chosen)
                if step == 2 and not depends(spec):
                    raise InputError(
                        f"method {method.name!r}: order {chosen['order']!r} at lam {chosen['lam']:g} compares a model with "
                        "itself (distill.lam, distill.lam_end)"
                    )
        seen: dict[tuple[Any, ...], str] = {}
        for method in distilled:
            moving = self.lam_end is not None and method.preset in (None, "taid")
            key = (method.mixture, method.ce, method.preset or self.preset, moving)
            if key in seen:
                raise InputError(f"methods {seen[key]!r} and {method.name!r} are the same")
            seen[key] = method.name
