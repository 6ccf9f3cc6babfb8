"""A distillation loss by its settings -> plain numbers that the custom ops and every backend take."""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

from lldfast.errors import InputError
from lldfast.ops.distill.options import ORDERS, DistillOptions

# What r is: the teacher, the student, a power mean with exponent a, the geometric mean, the larger, the smaller of both.
TEACHER, STUDENT, POWER, GEOMETRIC, MAXIMUM, MINIMUM = range(6)
# The order (A, B) of D(A, B).
PR, QR, RP, RQ = range(4)
# Divergences of kernels; the others are one of them with its arguments exchanged, or a case of alpha-beta.
KL, JS, AB = range(3)

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


def resolve(
    options: DistillOptions,
    *,
    ignore_index: int = -100,
    valid_vocab: int | None = None,
    chunk_bytes: int | None = None,
    backend: str = "torch",
) -> Spec:
    """The loss and the options of a call as a Spec; warns of a loss that is known to collapse in training.

    Raises:
        InputError: naming the option that makes no sense.
    """
    for name, whole in (("chunk_bytes", chunk_bytes), ("valid_vocab", valid_vocab)):
        if whole is not None and (not isinstance(whole, int) or whole < 1):
            raise InputError(f"{name} must be a whole number of at least 1, not {whole!r}")
    if not isinstance(ignore_index, int):
        raise InputError(f"ignore_index must be a whole number, not {ignore_index!r}")
    order, divergence, x, y = ORDERS.index(options.order), KL, 0.0, 0.0
    if options.kind == "rkl":
        order = _EXCHANGED[order]
    elif options.kind == "js":
        divergence, x = JS, float(options.beta)
    elif options.kind in ("ab", "alpha"):
        divergence, (x, y) = AB, options.exponents
    assistant, a = _assistant(float(options.alpha), float(options.lam))
    on_intersection = assistant in (GEOMETRIC, MINIMUM) or (assistant == POWER and a < 0)
    if on_intersection and divergence != JS and order in (QR, RP):
        warnings.warn(
            f"order={options.order!r} of divergence {options.kind!r} with alpha={options.alpha:g} >= 1 is mode-seeking, toward "
            "an assistant on the intersection of both supports: training is known to collapse there",
            stacklevel=4,  # the caller of distill_loss
        )
    return Spec(
        assistant, a, float(options.lam), order, divergence, x, y, options.detach_assistant, float(options.temperature),
        options.ce_weight > 0, ignore_index, valid_vocab, chunk_bytes or 0, backend,
    )  # fmt: skip


def depends(spec: Spec) -> bool:
    """Whether the loss compares two distributions: at lam = 1 (0) r is the teacher (the student) itself."""
    return not (spec.assistant == TEACHER and spec.order in (PR, RP)) and not (
        spec.assistant == STUDENT and spec.order in (QR, RQ)
    )


def _assistant(alpha: float, lam: float) -> tuple[int, float]:
    if lam in (0.0, 1.0):
        return (STUDENT if lam == 0 else TEACHER), 0.0
    if math.isinf(alpha):
        return (MAXIMUM if alpha < 0 else MINIMUM), 0.0
    a = (1 - alpha) / 2
    # Nearer than this the power mean is the geometric one: they differ by a/2 lam (1 - lam) (log p - log q)^2.
    return (GEOMETRIC, 0.0) if abs(a) < 1e-12 else (POWER, a)
