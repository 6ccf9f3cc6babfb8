"""What a Hugging Face configuration says, under the several names that its classes have for one thing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch.nn as nn

from lldfast.models.wrappers import learnt_prompt

# Names of the context length.
CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "seq_length", "max_seq_len")
UNLIMITED = 1 << 30  # a state-space model has no context length


def context_length_of(model: Any) -> int:
    """Most tokens of a text at once; a learnt prompt in front of it takes places too."""
    found = config_int(text_config(model), CONTEXT_FIELDS, UNLIMITED)
    for name, part in model.named_modules():
        # RoBERTa and its kin begin to count after the padding's own place in the table.
        if name.endswith("position_embeddings") and isinstance(part, nn.Embedding) and part.padding_idx is not None:
            found = min(found, part.num_embeddings - part.padding_idx - 1)
    return found - learnt_prompt(model)


def text_config(model: Any) -> Any:
    """Of the part that reads and writes text; None for a module without a configuration."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def config_int(config: Any, names: Sequence[str], default: int) -> int:
    values = [getattr(config, name, None) for name in names]
    return next((v for v in values if isinstance(v, int) and v > 0), default)


def scalars(config: Any, prefix: str = "") -> Iterator[tuple[str, bool | int | float | str | None]]:
    """(dotted name, value) of every single value in a configuration, those of nested ones and of lists too."""
    items: Any = config.items() if isinstance(config, Mapping) else vars(config).items() if hasattr(config, "__dict__") else ()
    if isinstance(config, (list, tuple)):
        items = enumerate(config)
    for key, value in list(items):
        name = f"{prefix}{key}"
        if value is None or isinstance(value, (bool, int, float, str)):
            yield name, value
        elif isinstance(value, (Mapping, list, tuple)) or hasattr(value, "to_dict"):
            yield from scalars(value, name + ".")


def rope_parameters(config: Any) -> list[Mapping[str, Any]]:
    """Of each kind of layer that has its own; older configurations call them `rope_scaling`, and their type `type`."""
    for name in ("rope_parameters", "rope_scaling"):
        found = getattr(config, name, None)
        if isinstance(found, Mapping):
            nested = [value for value in found.values() if isinstance(value, Mapping)]
            return nested or [found]
    return []
