"""The settings of a distillation loss, and the methods of the literature as settings.

Teacher p, student q, a = (1 - alpha) / 2. The alpha-mixture assistant (AMiD) is

    r ~ (lam p^a + (1 - lam) q^a)^(1/a),   r ~ p^lam q^(1-lam) at alpha = 1,   max (min) of p and q at alpha = -inf (+inf),

normalised, and the loss of a token D(p, r), D(q, r), D(r, p) or D(r, q) by `order`. lam = 0 makes r = q, lam = 1 makes r = p.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from lldfast.errors import InputError

DIVERGENCES = ("kl", "rkl", "js", "ab", "alpha")
ORDERS = ("pr", "qr", "rp", "rq")

# What a caller names beside a preset replaces its entry; lam of "jsd" is its beta.
PRESETS: dict[str, dict[str, Any]] = {
    "kl": {"divergence": "kl", "order": "pr", "lam": 0.0},  # forward KL(p || q)
    "rkl": {"divergence": "kl", "order": "qr", "lam": 1.0},  # reverse KL(q || p)
    "skl": {"divergence": "kl", "order": "pr", "alpha": -1.0, "lam": 0.1},  # DistiLLM, skew
    "srkl": {"divergence": "kl", "order": "qr", "alpha": -1.0, "lam": 0.9},  # DistiLLM, skew reverse
    "jsd": {"divergence": "js", "order": "pr", "lam": 0.5},  # GKD
    "taid": {"divergence": "kl", "order": "rq", "alpha": 1.0, "lam": 0.5, "detach_assistant": True},  # lam rises in training
    "ab": {"divergence": "ab", "order": "pr", "lam": 0.0, "ab": (0.2, 0.7)},  # ABKD
    "amid": {"divergence": "ab", "order": "pr", "alpha": -5.0, "lam": 0.1, "ab": (0.2, 0.7)},  # AMiD
    "kl+ce": {"divergence": "kl", "order": "pr", "lam": 0.0, "ce_weight": 1.0},  # the baseline "with CE" of the LLD paper
}


@dataclass(frozen=True)
class DistillOptions:
    """Which loss a token has: D(A, B) + ce_weight * CE(label), in nats. `of` starts from a preset.

    Attributes:
        divergence: D: "kl" KL(A || B), "rkl" KL(B || A), "js" (or "jsd") Jensen-Shannon, "ab" alpha-beta, "alpha" Amari's.
        order: which two of teacher p, student q and assistant r are (A, B): "pr", "qr", "rp", "rq".
        alpha: exponent of the assistant, also infinite; 1 is the geometric mean, -1 the arithmetic one.
        lam: the teacher's share of the assistant, in [0, 1]: 0 makes it the student, 1 the teacher.
        temperature: both models' logits are divided by it, but those of the cross entropy are not. The loss is not multiplied by
            its square.
        ce_weight: of the cross entropy of the labels, >= 0; 0 leaves it out.
        detach_assistant: no gradient through r.
        ab: the two exponents of the alpha-beta divergence.
        beta: weight of Jensen-Shannon on A, between 0 and 1: beta KL(A || M) + (1 - beta) KL(B || M), M = beta A + (1 - beta) B.
        divergence_alpha: of Amari's divergence; None: alpha.

    Raises:
        InputError: naming the setting that makes no sense.
    """

    divergence: str = "kl"
    order: str = "pr"
    alpha: float = -1.0
    lam: float = 0.1
    temperature: float = 1.0
    ce_weight: float = 0.0
    detach_assistant: bool = False
    ab: tuple[float, float] = (0.2, 0.7)
    beta: float = 0.5
    divergence_alpha: float | None = None

    @classmethod
    def of(cls, preset: str | None = None, **given: Any) -> DistillOptions:
        """Defaults < the preset < what is given and not None.

        Raises:
            InputError: an unknown preset or setting, or one that makes no sense.
        """
        for name in given:
            if name not in NAMES:
                raise InputError(f"distillation has no setting {name!r}; it has {', '.join(NAMES)}")
        if preset is not None and (not isinstance(preset, str) or preset not in PRESETS):
            raise InputError(f"preset={preset!r} is not one of {', '.join(PRESETS)}")
        # NumPy's scalars are numbers too.
        named = {name: x.item() if hasattr(x, "item") else x for name, x in given.items() if x is not None}
        chosen = (PRESETS[preset] if preset else {}) | named
        if preset == "jsd":
            chosen = {"beta": chosen["lam"]} | chosen | {"lam": 0.0}
        return cls(**chosen)

    def __post_init__(self) -> None:
        if self.divergence not in (*DIVERGENCES, "jsd"):
            raise InputError(f"divergence={self.divergence!r} is not one of {', '.join(DIVERGENCES)}")
        if self.order not in ORDERS:
            raise InputError(f"order={self.order!r} is not one of {', '.join(ORDERS)}")
        for name in ("alpha", "lam", "temperature", "ce_weight", "beta"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
                raise InputError(f"{name} must be a number, not {value!r}")
        if not 0 <= self.lam <= 1:
            raise InputError(f"lam is the teacher's share of the assistant: it must be in [0, 1], not {self.lam}")
        if not 1e-6 <= self.temperature <= 1e6:
            raise InputError(f"temperature must be positive and finite, not {self.temperature}")
        if not 0 <= self.ce_weight < math.inf:
            raise InputError(f"ce_weight must be >= 0 and finite, not {self.ce_weight}")
        if not isinstance(self.detach_assistant, bool):
            raise InputError(f"detach_assistant must be true or false, not {self.detach_assistant!r}")
        if self.kind == "js" and not 0 < self.beta < 1:
            raise InputError(f"beta must lie between 0 and 1, not {self.beta}")
        if self.kind in ("ab", "alpha"):
            self.exponents  # noqa: B018  (raises)

    @property
    def kind(self) -> str:
        """One of DIVERGENCES."""
        return "js" if self.divergence == "jsd" else self.divergence

    @property
    def exponents(self) -> tuple[float, float]:
        """The two of the alpha-beta divergence that "ab" and "alpha" are.

        D_alpha(A, B) = 4 / (1 - alpha^2) (1 - sum A^((1-alpha)/2) B^((1+alpha)/2)) is alpha-beta with exponents that sum to 1.

        Raises:
            InputError: they are no finite numbers, or too small.
        """
        if self.kind == "ab":
            return _pair(self.ab)
        alpha = self.alpha if self.divergence_alpha is None else self.divergence_alpha
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
            raise InputError(f"the alpha-divergence needs a finite divergence_alpha, not {alpha!r}")
        x = (1 - alpha) / 2
        return x, 1 - x


NAMES = tuple(field.name for field in dataclasses.fields(DistillOptions))


def _pair(ab: Any) -> tuple[float, float]:
    try:
        x, y = () if isinstance(ab, str) else (float(value) for value in ab)  # type: ignore[misc]
    except (TypeError, ValueError):
        raise InputError(f"ab must be the two exponents of the alpha-beta divergence, not {ab!r}") from None
    if not (math.isfinite(x) and math.isfinite(y)):
        raise InputError(f"ab must be finite, not {ab!r}")
    if 0 < max(abs(x), abs(y)) < 1e-4:
        raise InputError(f"ab={ab!r}: exponents this small leave no digits of the loss; (0, 0) is their limit")
    return x, y


def check_recorded(options: DistillOptions) -> None:
    """Refuse settings that need more of the teacher than its recorded top k.

    Raises:
        InputError: saying why.
    """
    if options.alpha >= 1 and 0 < options.lam < 1:
        raise InputError(
            f"alpha={options.alpha:g} needs the teacher's full distribution: the assistant lives on the intersection of both "
            "supports, and a truncated one moves the minimum away from p = q. Use alpha < 1 or a running teacher"
        )
    if options.temperature != 1:
        raise InputError(f"temperature={options.temperature}: a recorded teacher has temperature 1; its tail cannot be rescaled")
