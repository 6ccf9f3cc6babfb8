"""Options that several commands share, each stated once, and what is made of them."""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lldfast.terminal import note, option_help

if TYPE_CHECKING:
    import torch

    from lldfast.data.evalset import EvalSet
    from lldfast.models.scorer import Scorer

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="lldfast checkpoint folder, Hugging Face folder or id, .gguf, asset:..., package:...")


def add_data(parser: argparse.ArgumentParser, what: str = "a prepared folder") -> None:
    parser.add_argument("--data", required=True, help=what)


def add_eval_data(parser: argparse.ArgumentParser) -> None:
    add_data(parser, "a prepared folder, or an eval.parquet")


def add_batch_tokens(parser: argparse.ArgumentParser, default: int = 16_384) -> None:
    parser.add_argument("--batch-tokens", type=int, default=default, help=f"most tokens at once (default: {default:,})")


def add_bos(parser: argparse.ArgumentParser) -> None:
    what = "token before each text: one always, what the tokenizer does, none (default: auto)"
    parser.add_argument("--bos", choices=["auto", "native", "none"], default="auto", help=what)


def add_device(parser: argparse.ArgumentParser) -> None:
    """--device and --dtype, of the model."""
    what = "auto (cuda where there is one, else cpu), cpu, cuda, cuda:1, ... (default: auto)"
    parser.add_argument("--device", default="auto", help=what)
    what = "of the model's weights (default: float32)"
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help=what)


def add_fields(parser: argparse.ArgumentParser, cls: type, spelling: Mapping[str, str] | None = None) -> None:
    """An option for every field of the dataclass `cls`: type, default and help are the field's.

    Args:
        spelling: {field: option} where the option is not --the-name-of-the-field.
    """
    hints, meaning, spelling = typing.get_type_hints(cls), option_help(cls), spelling or {}
    for field in dataclasses.fields(cls):
        kinds = [kind for kind in _members(hints[field.name]) if kind is not type(None)]
        assert len(kinds) == 1, f"{cls.__name__}.{field.name}: an option has one type, or one and None"
        many = typing.get_origin(kinds[0]) is list
        parser.add_argument(
            spelling.get(field.name, f"--{field.name.replace('_', '-')}"),
            dest=field.name,
            metavar=field.name.upper(),
            type=typing.get_args(kinds[0])[0] if many else kinds[0],
            nargs="+" if many else None,
            default=field.default,
            help=meaning[field.name].replace("%", "%%") + ("" if field.default is None else " (default: %(default)s)"),
        )


def values_of(options: argparse.Namespace, cls: type) -> dict[str, Any]:
    """What was given for the options of `add_fields`: {field: value}."""
    return {field.name: getattr(options, field.name) for field in dataclasses.fields(cls)}


def _members(hint: Any) -> tuple[Any, ...]:
    """The types of a union; a type that is none, alone."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def device_of(options: argparse.Namespace) -> torch.device:
    """The device of --device, which stderr names.

    Raises:
        InputError: it cannot be used here.
    """
    from lldfast.backends import describe_device, pick_device

    device = pick_device(options.device, "--device")
    note(f"device: {describe_device(device, options.dtype)}")
    return device


def scorer_of(options: argparse.Namespace) -> Scorer:
    """The model of `add_model`, loaded as `add_device` and `add_bos` say.

    Raises:
        InputError: no such model, or the device cannot be used here.
    """
    from lldfast.models.scorer import load_scorer
    from lldfast.run.place import resolve_location

    model = resolve_location(options.model)
    return load_scorer(model, device=device_of(options), dtype=options.dtype, bos=options.bos)


def evalset_of(options: argparse.Namespace) -> EvalSet:
    """The evaluation corpus of `add_eval_data`.

    Raises:
        InputError: there is none.
    """
    from lldfast.data.evalset import EvalSet

    path = Path(options.data)
    return EvalSet.load(path / "eval.parquet" if path.is_dir() else path)
