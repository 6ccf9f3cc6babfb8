"""Rotary positions of a GGUF file as the `rope_parameters` of a Hugging Face configuration.

llama.cpp turns pair i of a head at position p by the angle p * base^(-2i/n) / (divisor_i * factor) and multiplies cosine and
sine by `attn_factor`. The divisors are tensors: `rope_freqs` (llama 3), or `rope_factors_long` and `rope_factors_short`, of which
texts beyond `original_context_length` take the long ones. "longrope" of transformers is the same formula with the divisors listed
in config.json, so it holds any of them exactly and a saved folder keeps them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from lldfast.errors import InputError
from lldfast.models.gguf.keys import Keys

FREQS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
DIVISORS = (FREQS, LONG, SHORT)
Rope = dict[str, Any]


def rope_parameters(keys: Keys, head_dim: int, context_length: int, *, partial: bool = False, linear: bool = True) -> Rope:
    """The flat `rope_parameters`: rope_type, rope_theta and what belongs to the type.

    Args:
        partial: whether the model can turn the first `rope.dimension_count` dimensions of a head only.
        linear: whether the model knows the types "linear" and "yarn"; if not, "longrope" says the same as "linear".

    Raises:
        InputError: a key or tensor whose effect is not known, by name.
    """
    file = keys.file
    dimensions = keys.take("rope.dimension_count", head_dim)
    found: Rope = {"rope_type": "default", "rope_theta": keys.take("rope.freq_base", 10000.0)}
    if partial:
        found["partial_rotary_factor"] = dimensions / head_dim
        if int(head_dim * found["partial_rotary_factor"]) != dimensions:
            raise keys.refusal("rope.dimension_count", f"{dimensions} of {head_dim} is no share that a configuration can state")
    elif dimensions != head_dim:
        raise keys.refusal("rope.dimension_count", f"{dimensions} of a head's {head_dim} dimensions; the model turns all")

    factor, kind = _scaling(keys)
    original = keys.take("rope.scaling.original_context_length", context_length)
    attention = keys.take("rope.scaling.attn_factor", 1.0) or 1.0
    keys.ignore("rope.scaling.finetuned")  # whether the model was trained with the scaling: nothing is computed from it
    divisors = _divisors(keys, dimensions // 2)
    if kind == "yarn":
        if divisors or not linear:
            raise keys.refusal("rope.scaling.type", "yarn is not known for this model, or not beside divisors of frequencies")
        return found | _yarn(keys, factor, original, attention)
    if kind == "longrope" and not (LONG in file.tensors and SHORT in file.tensors):
        raise keys.refusal("rope.scaling.type", f"longrope needs the tensors {LONG} and {SHORT}")
    long, short = divisors or ([1.0] * (dimensions // 2),) * 2
    if factor != 1.0:
        long, short = ([value * factor for value in values] for values in (long, short))
    if divisors or attention != 1.0 or (factor != 1.0 and not linear):
        return found | {
            "rope_type": "longrope", "long_factor": long, "short_factor": short, "attention_factor": float(attention),
            "factor": 1.0, "original_max_position_embeddings": original,
        }  # fmt: skip
    return found | ({"rope_type": "linear", "factor": factor} if factor != 1.0 else {})


def _scaling(keys: Keys) -> tuple[float, str]:
    """(factor, type). Without a type llama.cpp takes a factor as linear; "none" switches it off."""
    kind = keys.take("rope.scaling.type", "linear")
    old = keys.take("rope.scale_linear", 0.0)
    factor = keys.take("rope.scaling.factor", old) or 1.0
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise keys.refusal("rope.scaling.type", f"{kind!r} is not known")
    if not (math.isfinite(factor) and factor > 0):
        raise keys.refusal("rope.scaling.factor", f"{factor} is no factor")
    return (1.0 if kind == "none" else float(factor)), str(kind)


def _divisors(keys: Keys, pairs: int) -> tuple[list[float], list[float]] | None:
    """(long, short) divisors of the frequencies, or None where the file has none that change anything."""
    tensors = keys.file.tensors
    present = [name for name in DIVISORS if name in tensors]
    if not present:
        return None
    if present not in ([FREQS], [LONG, SHORT]):
        raise InputError(
            f"{keys.file.path}: tensors {', '.join(present)} without their counterpart, or more than one kind of them"
        )
    read = {}
    for name in present:
        values = keys.file.values(name).reshape(-1).astype(np.float64)
        if len(values) != pairs or not np.all(np.isfinite(values) & (values > 0)):
            raise InputError(f"{keys.file.path}: tensor {name} must hold {pairs} positive divisors of the rotary frequencies")
        read[name] = values.tolist()
    if FREQS in read:
        return None if set(read[FREQS]) == {1.0} else (read[FREQS], read[FREQS])
    return read[LONG], read[SHORT]


def _yarn(keys: Keys, factor: float, original: int, attention: float) -> Rope:
    for suffix, neutral in {"yarn_log_multiplier": (0.0,), "yarn_attn_factor": (1.0,), "yarn_ext_factor": (1.0, -1.0)}.items():
        value = keys.take(f"rope.scaling.{suffix}", neutral[0])
        if value not in neutral:
            raise keys.refusal(f"rope.scaling.{suffix}", f"{value} has no counterpart in transformers")
    if factor <= 1.0:
        raise keys.refusal("rope.scaling.factor", f"yarn needs a factor above 1, got {factor}")
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
        "attention_factor": float(attention * (0.1 * math.log(factor) + 1.0)),  # llama.cpp multiplies both
        "beta_fast": float(keys.take("rope.scaling.yarn_beta_fast", 32.0)),
        "beta_slow": float(keys.take("rope.scaling.yarn_beta_slow", 1.0)),
    }
