"""What a Hugging Face configuration says, under the several names that its classes have for one thing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Names of the context length.
CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "seq_length", "max_seq_len")
UNLIMITED = 1 << 30  # a state-space model has no context length


def context_length_of(model: Any) -> int:
    return config_int(text_config(model), CONTEXT_FIELDS, UNLIMITED)


def text_config(model: Any) -> Any:
    config = model.config
    return config.gettext_config() if hasattr(config, "gettext_config") else config


def config_int(config: Any, names: Sequence[str], default: int) -> int:
    values = [getattr(config, name, None) for name in names]
    return next((v for v in values if isinstance(v, int) and v > 0), default)
