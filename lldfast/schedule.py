"""When things happen in a run: the learning rate, and the step set S at which weights are estimated."""

from __future__ import annotations

import math

from lldfast.errors import InputError


def estimation_steps(total: int, *, every: int | None = None, dense_until: int | None = None) -> list[int]:
    """The step set S: 0, powers of two up to `dense_until`, then every `every` steps, all below `total`.

    For 10,000 steps and more the defaults are the paper's: 0, 1, 2, 4, ..., 512, 1000, 2000, ... (20 steps for 10,000).
    A shorter run keeps the shape: ten equal intervals, with the powers of two inside the first.

    Raises:
        InputError: total, every or dense_until is not positive.
    """
    if total < 1:
        raise InputError(f"a run needs at least one step, got {total}")
    if every is None:
        every = min(1000, max(1, math.ceil(total / 10)))
    if every < 1:
        raise InputError(f"every must be >= 1, got {every}")
    if dense_until is None:
        dense_until = min(512, every - 1)
    if dense_until < 0:
        raise InputError(f"dense_until must be >= 0, got {dense_until}")
    steps = {0} | set(range(every, total, every))
    power = 1
    while power <= dense_until:
        steps.add(power)
        power *= 2
    return sorted(step for step in steps if step < total)


def learning_rate(step: int, total: int, *, peak: float, final: float, warmup: int) -> float:
    """Linear warm-up to `peak` over `warmup` steps, then cosine decay to `final` at the last step."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - 1 - warmup)
    return final + 0.5 * (peak - final) * (1 + math.cos(math.pi * min(1.0, progress)))
