"""What a method's name means: where its domain weights come from and what it minimises.

MIXTURE                                 cross entropy on that mixture
[MIXTURE+]distill[-PRESET][+ce]         a distillation loss on it (uniform if unnamed), alone or with cross entropy
"""

from __future__ import annotations

import dataclasses
import functools
import re
from dataclasses import dataclass

from lldfast.errors import InputError
from lldfast.ops.distill.options import PRESETS
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


@functools.cache  # a name is parsed once
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
