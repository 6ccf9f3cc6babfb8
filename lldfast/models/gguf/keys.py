"""The keys `{architecture}.*` of a GGUF file: each is taken, known not to matter, or refused by name."""

from __future__ import annotations

import math
from typing import Any

from lldfast.errors import InputError
from lldfast.models.gguf.reader import GGUFFile

_REQUIRED = object()

# Keys of any architecture that change nothing at these values: what llama.cpp computes without the key.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.scale": (0.0,),
    "attention.sliding_window": (0,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "logit_scale": (0.0, 1.0),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "expert_shared_count": (0,),
    "expert_weights_scale": (0.0, 1.0),
    "expert_weights_norm": (False,),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),
    "ssm.dt_b_c_rms": (False,),
}


class Keys:
    """The model's keys, without their prefix. `finish` refuses whatever was neither taken nor known not to matter."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        prefix = f"{file.architecture}."
        self._left = {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}

    def take(self, suffix: str, default: Any = _REQUIRED) -> Any:
        """The value of a key. One that is a list of equal values, one a layer, is that value.

        Raises:
            InputError: the key is absent and has no default, or its values differ between layers.
        """
        if suffix not in self._left:
            if default is _REQUIRED:
                raise InputError(f"{self.file.path}: the metadata lack {self.name(suffix)}")
            return default
        value = self._left.pop(suffix)
        if isinstance(value, list):
            if len({*value}) != 1:
                raise self.refusal(suffix, f"it differs between layers: {value[:8]}")
            value = value[0]
        if isinstance(value, float) and not math.isfinite(value):
            raise self.refusal(suffix, f"{value} is not finite")
        return value

    def is_list(self, suffix: str) -> bool:
        """Whether the key, not taken yet, has one value a layer."""
        return isinstance(self._left.get(suffix), list)

    def take_list(self, suffix: str) -> Any:
        return self._left.pop(suffix, None)

    def ignore(self, *suffixes: str) -> None:
        for suffix in suffixes:
            self._left.pop(suffix, None)

    def name(self, suffix: str) -> str:
        return f"{self.file.architecture}.{suffix}"

    def refusal(self, suffix: str, why: str) -> InputError:
        return InputError(
            f"{self.file.path}: {self.name(suffix)}: {why}. Such a model cannot be converted without changing what it computes;"
            " use the folder that the file was made from"
        )

    def finish(self) -> None:
        """Raises:
        InputError: keys are left that say something that nothing has applied.
        """
        for suffix, value in self._left.items():
            if value not in NEUTRAL.get(suffix, ()):
                raise self.refusal(suffix, f"the key (value {str(value)[:60]}) is not known for a {self.file.architecture} model")
