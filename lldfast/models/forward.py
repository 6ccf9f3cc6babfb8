"""A Hugging Face module run on token ids: its logits, or what goes into its output layer.

The hidden states are caught where they enter the output layer, in a run of the whole model in which that layer gets none of
them. So they are what the layer multiplies in this model, whatever is between it and the layers below (a norm, a projection, a
scale), and whatever is wrapped around it; and no logits are made.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from lldfast.errors import InputError

# What a model raises that cannot do what it is asked for; an assertion is one of its own.
MODEL_ERRORS = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError)


def in_short(error: Exception) -> str:
    """Its kind and the beginning of its message, in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"


def wrapped(module: Any) -> list[nn.Module]:
    """The module, and the model in it where peft put one."""
    inner = getattr(module, "get_base_model", lambda: module)()
    return [module] if inner is module else [module, inner]


def run(module: Any, ids: Tensor) -> Any:
    """The module's own output object for ids [B, T], without a cache of keys and values."""
    accepted = inspect.signature(module.forward).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values())
    return module(input_ids=ids, **({"use_cache": False} if takes_any or "use_cache" in accepted else {}))


def full_logits(module: Any, ids: Tensor) -> Tensor:
    """ids [B, T] -> [B, T, V]. What a prompt learnt in front of a text adds comes first, and is left out.

    Raises:
        InputError: the module returns no logits, or not one row of them for each token.
    """
    out = run(module, ids)
    logits = getattr(out, "logits", None)
    if not isinstance(logits, Tensor):
        raise InputError(f"{type(module).__name__} returns no logits for token ids alone: it is no causal language model")
    return of_the_text(logits, ids, type(module).__name__)


def head_input(module: Any, ids: Tensor) -> Tensor:
    """ids [B, T] -> what the output layer multiplies, [B, T, d]; differentiable when gradients are on.

    Raises:
        InputError: the output layer is not used exactly once.
    """
    layer, seen = module.get_output_embeddings(), []

    def catch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        # Appended to the layer's hooks, this one sees what the others made of its input.
        x = args[0] if args else next(iter(kwargs.values()))
        seen.append(x)
        return (x[:0], *args[1:]), {} if not args else kwargs

    handle = layer.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        run(module, ids)
    finally:
        handle.remove()
    name = type(module).__name__
    if len(seen) != 1 or not isinstance(seen[0], Tensor) or seen[0].dim() != 3:
        raise InputError(f"{name} uses its output layer {len(seen)} times, or not on hidden states [B, T, d]")
    return of_the_text(seen[0], ids, name)


def of_the_text(values: Tensor, ids: Tensor, name: str) -> Tensor:
    """[B, T, ...] of ids [B, T], without the rows of a learnt prompt in front of it."""
    if values.dim() != 3 or len(values) != len(ids) or values.shape[1] < ids.shape[1]:
        raise InputError(f"{name} gives values of shape {tuple(values.shape)} for tokens of shape {tuple(ids.shape)}")
    return values[:, values.shape[1] - ids.shape[1] :]


@torch.no_grad()
def forget_lengths(module: Any, like: Tensor) -> None:
    """Run one token, after which rope frequencies that grew with a longer text are the original ones."""
    run(module, like[:1, :1])
