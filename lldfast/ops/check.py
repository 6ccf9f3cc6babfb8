"""Checks of arguments that the ops share: each raises an InputError whose message names the argument."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lldfast.errors import InputError

PRECISIONS = (None, "fp32", "bf16", "bf16x3")
REDUCTIONS = ("mean", "sum", "none")


def check_tensors(inputs: dict[str, Tensor | None], labels: Tensor | None, rows: Sequence[int]) -> None:
    """Refuse inputs that are no floating-point tensors on one device, and labels that are no integers of shape `rows`."""
    present = {name: x for name, x in (*inputs.items(), ("labels", labels)) if x is not None}
    where = "labels" if labels is not None else next(iter(present))
    for name, tensor in present.items():
        if hasattr(tensor, "placements") and hasattr(tensor, "device_mesh"):
            raise InputError(f"{name} is a DTensor: pass its local part (to_local()), with vocab_start for a vocabulary shard")
        if name != "labels" and not tensor.is_floating_point():
            raise InputError(f"{name} must be a floating-point tensor, not {tensor.dtype}")
        if tensor.device != present[where].device:
            verb = "are" if where == "labels" else "is"
            raise InputError(f"{name} is on {tensor.device} but {where} {verb} on {present[where].device}")
    if labels is None:
        return
    if labels.dtype not in (torch.int32, torch.int64):
        raise InputError(f"labels must be int32 or int64, not {labels.dtype}")
    if tuple(labels.shape) != tuple(rows):
        raise InputError(f"labels have shape {tuple(labels.shape)}, the inputs have {tuple(rows)} tokens")


def check_bias(bias: Tensor | None, vocab: int) -> None:
    """Refuse a bias that is not [vocab]."""
    if bias is not None and tuple(bias.shape) != (vocab,):
        raise InputError(f"bias has shape {tuple(bias.shape)}, the vocabulary dimension has {vocab}")


def check_transform(softcap: float | None, logit_scale: float, prefix: str = "") -> None:
    """Refuse a softcap or a scale that leaves no finite logits; prefix: of the arguments' names."""
    if softcap is not None and not 1e-30 <= softcap <= 1e30:
        raise InputError(f"{prefix}softcap must be positive and finite, not {softcap}")
    if not -1e30 <= logit_scale <= 1e30:
        raise InputError(f"{prefix}logit_scale must be finite, not {logit_scale}")


def check_scoring(
    inputs: dict[str, Tensor | None],
    labels: Tensor,
    rows: Sequence[int],
    softcap: float | None,
    logit_scale: float,
    valid_vocab: int | None,
    vocab_start: int,
) -> None:
    """Refuse what cannot be scored. `rows` is the shape that labels must have."""
    check_tensors(inputs, labels, rows)
    for name, number in (("softcap", softcap), ("logit_scale", logit_scale)):
        if isinstance(number, Tensor):
            raise InputError(f"{name} must be a number: to learn a scale, multiply the hidden states (and the bias) by it")
    check_transform(softcap, logit_scale)
    if vocab_start < 0 or (valid_vocab is not None and valid_vocab < 1):
        raise InputError(f"vocab_start must be >= 0 and valid_vocab >= 1, not {vocab_start} and {valid_vocab}")


def check_precision(precision: str | None, known: tuple[str | None, ...] = PRECISIONS) -> None:
    """Refuse a precision that is not among `known`."""
    if precision not in known:
        names = ", ".join(repr(name) for name in known if name is not None)
        raise InputError(f"precision={precision!r} is not one of {names}, or None")


def check_reduction(reduction: str) -> None:
    """Refuse a reduction that is not among REDUCTIONS."""
    if reduction not in REDUCTIONS:
        raise InputError(f"reduction={reduction!r} is not 'mean', 'sum' or 'none'")
