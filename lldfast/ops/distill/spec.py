"""A distillation loss by name -> plain numbers that every backend takes.

Teacher p, student q, a = (1 - alpha) / 2. The alpha-mixture assistant (AMiD) is

    r ~ (lam p^a + (1 - lam) q^a)^(1/a),   r ~ p^lam q^(1-lam) at alpha = 1,   max (min) of p and q at alpha = -inf (+inf),

normalised, and the loss of a token D(p, r), D(q, r), D(r, p) or D(r, q) by `order`. lam = 0 makes r = q, lam = 1 makes r = p.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

from lldfast.errors import InputError

# What r is: the teacher, the student, a power mean with exponent a, the geometric mean, the larger, the smaller of both.
TEACHER, STUDENT, POWER, GEOMETRIC, MAXIMUM, MINIMUM = range(6)
# The order (A, B) of D(A, B).
PR, QR, RP, RQ = range(4)
# Divergences of kernels; the others are one of them with its arguments exchanged, or a case of alpha-beta.
KL, JS, AB = range(3)

DIVERGENCES = ("kl", "rkl", "js", "ab", "alpha")
ORDERS = ("pr", "qr", "rp", "rq")
_EXCHANGED = {PR: RP, RP: PR, QR: RQ, RQ: QR}

# The fields of Spec, as torch.library's schemas want them.
SPEC = (
    "int assistant, float a, float lam, int order, int divergence, float x, float y, bool detach, float temperature, bool ce, "
    "int ignore_index, int? valid_vocab, int chunk_bytes, str backend"
)


class Spec(NamedTuple):
    """The arguments of the custom ops behind their tensors.

    divergence JS: x is beta. divergence AB: x and y are its two exponents. ce: whether cross entropy is wanted. chunk_bytes: of a
    chunk of one model's logits; 0 is the device's default.
    """

    assistant: int
    a: float
    lam: float
    order: int
    divergence: int
    x: float
    y: float
    detach: bool
    temperature: float
    ce: bool
    ignore_index: int
    valid_vocab: int | None
    chunk_bytes: int
    backend: str

    @property
    def normalised(self) -> bool:
        """Whether r sums to 1 as it stands: p and q themselves, and their arithmetic mean."""
        return self.assistant in (TEACHER, STUDENT) or (self.assistant == POWER and self.a == 1.0)


# The methods of the literature in these terms; what a caller names beside a preset replaces its entry.
PRESETS: dict[str, dict[str, Any]] = {
    "kl": {"divergence": "kl", "order": "pr", "lam": 0.0},  # forward KL(p || q)
    "rkl": {"divergence": "kl", "order": "qr", "lam": 1.0},  # reverse KL(q || p)
    "skl": {"divergence": "kl", "order": "pr", "alpha": -1.0, "lam": 0.1},  # DistiLLM, skew
    "srkl": {"divergence": "kl", "order": "qr", "alpha": -1.0, "lam": 0.9},  # DistiLLM, skew reverse
    "jsd": {"divergence": "js", "order": "pr", "lam": 0.5},  # GKD; lam is its beta
    "taid": {"divergence": "kl", "order": "rq", "alpha": 1.0, "lam": 0.5, "detach_assistant": True},  # lam rises in training
    "ab": {"divergence": "ab", "order": "pr", "lam": 0.0, "ab": (0.2, 0.7)},  # ABKD
    "amid": {"divergence": "ab", "order": "pr", "alpha": -5.0, "lam": 0.1, "ab": (0.2, 0.7)},  # AMiD
    "kl+ce": {"divergence": "kl", "order": "pr", "lam": 0.0, "ce_weight": 1.0},  # the baseline "with CE" of the LLD paper
}
DEFAULTS: dict[str, Any] = {
    "divergence": "kl", "order": "pr", "alpha": -1.0, "lam": 0.1, "temperature": 1.0, "ce_weight": 0.0, "detach_assistant": False,
    "ab": (0.2, 0.7), "beta": 0.5, "divergence_alpha": None,
}  # fmt: skip


def settings(preset: str | None = None, **given: Any) -> dict[str, Any]:
    """All settings of a loss: DEFAULTS < the preset < what is given and not None.

    Raises:
        InputError: an unknown preset or setting.
    """
    unknown = sorted(given.keys() - DEFAULTS.keys())
    if unknown:
        raise InputError(f"distillation has no setting {unknown[0]!r}; it has {', '.join(DEFAULTS)}")
    if preset is not None and (not isinstance(preset, str) or preset not in PRESETS):
        raise InputError(f"preset={preset!r} is not one of {', '.join(PRESETS)}")
    numpy_too = {name: x.item() if hasattr(x, "item") else x for name, x in given.items() if x is not None}
    chosen = DEFAULTS | (PRESETS[preset] if preset else {}) | numpy_too
    if preset == "jsd":  # D_JS,beta(p, q) = beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q
        if given.get("beta") is None:
            chosen["beta"] = chosen["lam"]
        chosen["lam"] = 0.0
    return chosen


def resolve(
    *,
    divergence: str,
    order: str,
    alpha: float,
    lam: float,
    temperature: float,
    ce_weight: float,
    detach_assistant: bool,
    ab: tuple[float, float],
    beta: float,
    divergence_alpha: float | None,
    ignore_index: int = -100,
    valid_vocab: int | None = None,
    chunk_bytes: int | None = None,
    backend: str = "torch",
) -> Spec:
    """`settings` and the options of a call, checked, as a Spec.

    Raises:
        InputError: naming the setting that makes no sense.
    """
    divergence = {"jsd": "js"}.get(divergence, divergence)
    if divergence not in DIVERGENCES:
        raise InputError(f"divergence={divergence!r} is not one of {', '.join(DIVERGENCES)}")
    if order not in ORDERS:
        raise InputError(f"order={order!r} is not one of {', '.join(ORDERS)}")
    given = {"alpha": alpha, "lam": lam, "temperature": temperature, "ce_weight": ce_weight, "beta": beta}
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
            raise InputError(f"{name} must be a number, not {value!r}")
    if not 0 <= lam <= 1:
        raise InputError(f"lam is the teacher's share of the assistant: it must be in [0, 1], not {lam}")
    if not 1e-6 <= temperature <= 1e6:
        raise InputError(f"temperature must be positive and finite, not {temperature}")
    if not 0 <= ce_weight < math.inf:
        raise InputError(f"ce_weight must be >= 0 and finite, not {ce_weight}")
    for name, whole in (("chunk_bytes", chunk_bytes), ("valid_vocab", valid_vocab)):
        if whole is not None and (not isinstance(whole, int) or whole < 1):
            raise InputError(f"{name} must be a whole number of at least 1, not {whole!r}")
    if not isinstance(ignore_index, int):
        raise InputError(f"ignore_index must be a whole number, not {ignore_index!r}")
    if not isinstance(detach_assistant, bool):
        raise InputError(f"detach_assistant must be true or false, not {detach_assistant!r}")
    place, kind, x, y = ORDERS.index(order), KL, 0.0, 0.0
    if divergence == "rkl":
        place = _EXCHANGED[place]
    elif divergence == "js":
        if not 0 < beta < 1:
            raise InputError(f"beta must lie between 0 and 1, not {beta}")
        kind, x = JS, float(beta)
    elif divergence in ("ab", "alpha"):
        kind = AB
        x, y = _exponents(ab) if divergence == "ab" else _amari(alpha if divergence_alpha is None else divergence_alpha)
    assistant, a = _assistant(float(alpha), float(lam))
    on_intersection = assistant in (GEOMETRIC, MINIMUM) or (assistant == POWER and a < 0)
    if on_intersection and kind != JS and place in (QR, RP):
        warnings.warn(
            f"order={order!r} of divergence {divergence!r} with alpha={alpha:g} >= 1 is mode-seeking, toward an assistant on the "
            "intersection of both supports: training is known to collapse there",
            stacklevel=4,
        )
    return Spec(
        assistant, a, float(lam), place, kind, x, y, bool(detach_assistant), float(temperature), ce_weight > 0, ignore_index,
        valid_vocab, chunk_bytes or 0, backend,
    )  # fmt: skip


def depends(spec: Spec) -> bool:
    """Whether the loss compares two distributions: at lam = 1 (0) r is the teacher (the student) itself."""
    return not (spec.assistant == TEACHER and spec.order in (PR, RP)) and not (
        spec.assistant == STUDENT and spec.order in (QR, RQ)
    )


def check_recorded(chosen: dict[str, Any]) -> None:
    """Refuse settings that need more of the teacher than its recorded top k.

    Raises:
        InputError: saying why.
    """
    if chosen["alpha"] >= 1 and 0 < chosen["lam"] < 1:
        raise InputError(
            f"alpha={chosen['alpha']:g} needs the teacher's full distribution: the assistant lives on the intersection of both "
            "supports, and a truncated one moves the minimum away from p = q. Use alpha < 1 or a running teacher"
        )
    if chosen["temperature"] != 1:
        raise InputError(
            f"temperature={chosen['temperature']}: a recorded teacher has temperature 1; its tail cannot be rescaled"
        )


def _assistant(alpha: float, lam: float) -> tuple[int, float]:
    if lam in (0.0, 1.0):
        return (STUDENT if lam == 0 else TEACHER), 0.0
    if math.isinf(alpha):
        return (MAXIMUM if alpha < 0 else MINIMUM), 0.0
    a = (1 - alpha) / 2
    # Nearer than this the power mean is the geometric one: they differ by a/2 lam (1 - lam) (log p - log q)^2.
    return (GEOMETRIC, 0.0) if abs(a) < 1e-12 else (POWER, a)


def _exponents(ab: Any) -> tuple[float, float]:
    try:
        x, y = () if isinstance(ab, str) else (float(value) for value in ab)  # type: ignore[misc]
    except (TypeError, ValueError):
        raise InputError(f"ab must be the two exponents of the alpha-beta divergence, not {ab!r}") from None
    if not (math.isfinite(x) and math.isfinite(y)):
        raise InputError(f"ab must be finite, not {ab!r}")
    if 0 < max(abs(x), abs(y)) < 1e-4:
        raise InputError(f"ab={ab!r}: exponents this small leave no digits of the loss; (0, 0) is their limit")
    return x, y


def _amari(alpha: float) -> tuple[float, float]:
    """D_alpha(A, B) = 4 / (1 - alpha^2) (1 - sum A^((1-alpha)/2) B^((1+alpha)/2)): alpha-beta with exponents that sum to 1."""
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise InputError(f"the alpha-divergence needs a finite divergence_alpha, not {alpha!r}")
    x = (1 - alpha) / 2
    return x, 1 - x
