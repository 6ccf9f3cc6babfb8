"""Options that several commands share, each stated once, and what is made of them."""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lldfast.terminal import note, option_help

if TYPE_CHECKING:
    import torch

    from lldfast.data.evalset import EvalSet
    from lldfast.models.language_model import LanguageModel

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def add_model(parser: argparse.ArgumentParser) -> None:
    what = "lldfast checkpoint folder, Hugging Face folder or id, PEFT adapter's folder, .gguf, asset:..., package:..."
    parser.add_argument("model", help=what)
    what = "another than the model's own: gpt2, bytes, a tokenizer.json, a model's folder, a hub id"
    parser.add_argument("--tokenizer", help=what)
    what = "run the Python code that a Hugging Face model brings along; read it first"
    parser.add_argument("--trust-remote-code", action="store_true", help=what)


def add_data(parser: argparse.ArgumentParser, what: str = "a prepared folder") -> None:
    parser.add_argument("--data", required=True, help=what)


def add_eval_data(parser: argparse.ArgumentParser) -> None:
    add_data(parser, "a prepared folder, or an eval.parquet")


def add_batch_tokens(parser: argparse.ArgumentParser, default: int = 16_384) -> None:
    parser.add_argument("--batch-tokens", type=int, default=default, help=f"most tokens at once (default: {default:,})")


def add_bos(parser: argparse.ArgumentParser) -> None:
    what = "token before each text: one always, what the tokenizer does, none (default: auto)"
    parser.add_argument("--bos", choices=["auto", "native", "none"], default="auto", help=what)


def add_anyway(parser: argparse.ArgumentParser) -> None:
    what = "go on where scores were not made alike, also below their noise floor; what differs is still said"
    parser.add_argument("--anyway", action="store_true", help=what)


def add_device(parser: argparse.ArgumentParser) -> None:
    """--device and --dtype, of the model."""
    what = "auto (cuda where there is one, else cpu), cpu, cuda, cuda:1, ... (default: auto)"
    parser.add_argument("--device", default="auto", help=what)
    what = "of the model's weights (default: float32)"
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help=what)


def add_fields(
    parser: argparse.ArgumentParser,
    cls: type,
    *,
    leave_out: Collection[str] = (),
    spelling: Mapping[str, str] | None = None,
    keep_unset: bool = False,
) -> None:
    """An option for every field of the dataclass `cls`: type, default and help are the field's. A switch that is on is --no-NAME,
    one that is off --NAME.

    Args:
        leave_out: fields that the command has no option for.
        spelling: {field: option} where the option is not --the-name-of-the-field.
        keep_unset: what is not given is None, whatever the field's default is: `values_of` then tells what was given.
    """
    hints, meaning, spelling = typing.get_type_hints(cls), option_help(cls), spelling or {}
    for field in dataclasses.fields(cls):
        if field.name in leave_out:
            continue
        name, default = spelling.get(field.name, f"--{field.name.replace('_', '-')}"), None if keep_unset else field.default
        text = meaning[field.name].replace("%", "%%")
        if field.type in (bool, "bool"):
            if field.default:
                parser.add_argument(f"--no-{name[2:]}", dest=field.name, action="store_false", help=f"do not {text}")
            else:
                parser.add_argument(name, dest=field.name, action="store_true", help=text)
            continue
        text += "" if default is None else " (default: %(default)s)"
        reading = {"metavar": field.name.upper(), **_reading(hints[field.name])}
        parser.add_argument(name, dest=field.name, default=default, help=text, **reading)


def _reading(hint: Any) -> dict[str, Any]:
    """argparse's type, nargs and choices for a type: one, a list of one, names, or a number and names ("auto")."""
    kinds = [kind for kind in _members(hint) if kind is not type(None)]
    words = [word for kind in kinds if typing.get_origin(kind) is typing.Literal for word in typing.get_args(kind)]
    plain = [kind for kind in kinds if typing.get_origin(kind) is not typing.Literal]
    if not plain:
        return {"choices": words, "metavar": None}
    assert len(plain) == 1, f"{hint}: an option has one type, beside words and None"
    kind = plain[0]
    if typing.get_origin(kind) is list:
        return {"type": typing.get_args(kind)[0], "nargs": "+"}
    if not words:
        return {"type": kind}

    def number_or_word(text: str) -> Any:
        return text if text in words else kind(text)

    number_or_word.__name__ = f"{kind.__name__} or {' or '.join(words)}"  # what argparse's message says was expected
    return {"type": number_or_word}


def values_of(options: argparse.Namespace, cls: type) -> dict[str, Any]:
    """What the options of `add_fields` say, {field: value}; fields without an option, and without a value, are left out."""
    found = {field.name: getattr(options, field.name, None) for field in dataclasses.fields(cls)}
    return {name: value for name, value in found.items() if value is not None}


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


def model_of(options: argparse.Namespace) -> LanguageModel:
    """The model of `add_model`, loaded as `add_device` says, and `add_bos` where the command has that.

    Raises:
        InputError: no such model, or the device cannot be used here.
    """
    from lldfast.models.loading import load_model
    from lldfast.run.place import resolve_location

    model = resolve_location(options.model)
    how = {"tokenizer": options.tokenizer, "trust_remote_code": options.trust_remote_code}
    return load_model(model, device=device_of(options), dtype=options.dtype, bos=getattr(options, "bos", "auto"), **how)


def teacher_of(options: argparse.Namespace) -> Any:
    """The model of `add_model` for a function that loads it itself, after its other checks; loaded here where options say how."""
    from lldfast.run.place import resolve_location

    plain = options.tokenizer is None and not options.trust_remote_code
    return resolve_location(options.model) if plain else model_of(options)


def evalset_of(options: argparse.Namespace) -> EvalSet:
    """The evaluation corpus of `add_eval_data`.

    Raises:
        InputError: there is none.
    """
    from lldfast.data.evalset import EvalSet

    path = Path(options.data)
    return EvalSet.load(path / "eval.parquet" if path.is_dir() else path)
