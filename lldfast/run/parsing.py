"""From files and a command line to a configuration: a recipe, `--config FILE`, `--section.key value`, one over the other."""

from __future__ import annotations

import dataclasses
import json
from argparse import ArgumentError, ArgumentParser
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from lldfast.errors import InputError, deprecated
from lldfast.ops.distill.options import DistillOptions
from lldfast.run.config import Config
from lldfast.terminal import option_help

DEFAULT_RECIPE = "demo"

# Keys of the configuration that have another name now: they go on working, with a DeprecationWarning.
RENAMED_KEYS = {"lld.normalise": "lld.gram_scale", "lld.normalize": "lld.per"}
RENAMED_SECTIONS = {old.split(".")[0] for old in RENAMED_KEYS}


def present_names(stored: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A configuration read from a file with former keys under their present names, and the former keys that it had.

    Raises:
        InputError: a key is there under both names.
    """
    found = []
    for old, new in RENAMED_KEYS.items():
        section, key = old.split(".")
        present = new.split(".")[1]
        values = _section(stored.get(section))
        if isinstance(values, dict) and key in values:
            renamed = {**stored, section: _with_name(values, key, present)}
        elif old in stored:  # `lld.tau: 2`, which the parser takes as it takes `lld: {tau: 2}`
            renamed = _with_name(stored, old, new)
        else:
            continue
        if new in stored or (isinstance(values, dict) and present in values):
            raise InputError(f"{old} is the former name of {new}: give only {new}")
        stored = renamed
        found.append(old)
    return stored, found


def _with_name(values: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    """`values` with one key called otherwise, at its place."""
    return {new if name == old else name: value for name, value in values.items()}


def _section(value: Any) -> Any:
    """The settings of a section, which the parser also takes as the name of a file that holds them, or as their text."""
    if not isinstance(value, str):
        return value
    try:
        return yaml.safe_load(Path(value).read_text(encoding="utf-8") if Path(value).is_file() else value)
    except (OSError, ValueError, yaml.YAMLError):
        return value  # the parser says what is wrong with it


def with_defaults(stored: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run that an earlier version wrote, with the defaults of those it did not have: what the run used."""
    return _over(dataclasses.asdict(Config()), present_names(stored)[0])


def _over(defaults: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """`given` over `defaults`, section by section; a dict that is a value (target.mixture) is taken as it is."""
    merged = dict(defaults)
    for key, value in given.items():
        section = isinstance(value, dict) and isinstance(defaults.get(key), dict)
        merged[key] = _over(defaults[key], value) if section else value
    return merged


def recipe_path(name: str) -> Path:
    """A shipped recipe's file, or a path given as such.

    Raises:
        InputError: no such recipe; the message lists those there are.
    """
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise InputError(f"recipe file {name} does not exist")
        return Path(name)
    folder = Path(str(resources.files("lldfast") / "recipes"))
    path = folder / f"{name}.yaml"
    if not path.is_file():
        raise InputError(f"unknown recipe {name!r}: choose from {', '.join(sorted(p.stem for p in folder.glob('*.yaml')))}")
    return path


def _arguments(argv: list[str]) -> list[str]:
    """The command line as the parser takes it: the recipe in front, people's spellings in YAML's, former keys renamed."""
    args: list[str] = []
    recipe: str | None = None
    has_config = False
    rest = iter(argv)
    for arg in rest:
        key, equals, value = arg.partition("=")
        if not arg or (key.startswith("--") and equals and not value):
            # "--data.path=$UNSET" would otherwise mean null, and train on something else
            raise InputError(f"{key or (args[-1] if args else 'an option')} needs a value (null unsets an option)")
        if key.removeprefix("--") in RENAMED_KEYS:
            deprecated(key, f"--{RENAMED_KEYS[key.removeprefix('--')]}", stacklevel=4)
            key = f"--{RENAMED_KEYS[key.removeprefix('--')]}"
            arg = key + equals + value
        if key.removeprefix("--") in RENAMED_SECTIONS:
            value = value or next(rest, "")
            section = key.removeprefix("--")
            stored, found = present_names({section: value})
            for old in found:
                deprecated(f"{key} {{{old.removeprefix(section + '.')}: ...}}", f"--{RENAMED_KEYS[old]}", stacklevel=4)
            args += [f"{key}={json.dumps(stored[section])}" if found else f"{key}={value}"] if value else [key]
        elif key in ("--recipe", "--method", "--methods", "--config"):
            value = value or next(rest, "")
            if not value or value.startswith("--"):
                raise InputError(f"{key} needs a value")
            if key == "--recipe":
                recipe = value
            elif key == "--config":
                has_config = True
                args.append(_config_argument(value))
            else:
                names = value.strip("[] ").split(",")
                args.append("--methods=[" + ", ".join(name.strip().strip("'\"") for name in names) + "]")
        elif key in ("--data.source", "--lld.tau", "--lld.tau_end", "--distill.alpha"):
            value = value or next(rest, "")
            if key == "--data.source" and not value.startswith("["):
                value = json.dumps([value])  # a single file needs no brackets
            # YAML spells infinity with a dot, people do not
            args.append(f"{key}={'.inf' if value == 'inf' else '-.inf' if value == '-inf' else value}")
        else:
            args.append(arg)
    if recipe is None and not has_config:
        recipe = DEFAULT_RECIPE
    if recipe is not None:
        args = [_config_argument(str(recipe_path(recipe))), f"--recipe={recipe}", *args]
    return args


def _config_argument(path: str) -> str:
    """`--config=FILE`; the content itself under present names, which the parser takes too, where FILE has former keys."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"--config {path} is not a text file ({error})") from None
    except (OSError, ValueError, yaml.YAMLError):
        return f"--config={path}"  # the parser says what is wrong with it
    if not isinstance(content, dict):
        return f"--config={path}"
    renamed, found = present_names(content)
    for old in found:
        deprecated(f"{path}: {old}", RENAMED_KEYS[old], stacklevel=5)
    return f"--config={yaml.safe_dump(renamed)}" if found else f"--config={path}"


def parse_config(argv: list[str], prog: str = "lldfast train") -> Config:
    """Defaults < `--recipe NAME` (demo unless --config is given) < `--config FILE` < `--section.key value`.

    Raises:
        InputError: an unknown option or key, or a value that makes no sense.
    """
    import jsonargparse

    args = _arguments(argv)
    about = "Train with a designed domain mixture: Algorithm 1, pass 2 and the baselines."
    parser = jsonargparse.ArgumentParser(prog=prog, description=about, exit_on_error=False)
    parser.add_argument("--config", action="config", help="a YAML file, over the recipe")
    parser.add_class_arguments(Config)
    _explain(parser)
    try:
        parsed = parser.parse_args(args)
        for f in dataclasses.fields(Config):
            if dataclasses.is_dataclass(f.default_factory) and not isinstance(parsed[f.name], jsonargparse.Namespace):
                raise InputError(f"{f.name} is a section of the configuration, got {parsed[f.name]!r}")
        values = parser.instantiate(parsed)
    except ArgumentError as error:
        raise InputError(f"{' '.join(str(error).split())} ({prog} --help lists the options)") from None
    config = Config(**{f.name: values[f.name] for f in dataclasses.fields(Config)})
    config.check()
    return config


def _explain(parser: ArgumentParser) -> None:
    """Give every option the help text of its field; jsonargparse does it only where docstring_parser is installed."""
    sections = {name: type(value) for name, value in vars(Config()).items() if dataclasses.is_dataclass(value)}
    meaning = {f"{name}.{key}": text for name, section in sections.items() for key, text in option_help(section).items()}
    meaning |= option_help(Config)
    for key, text in option_help(DistillOptions).items():  # settings of the loss, which the section passes on
        meaning.setdefault(f"distill.{key}", f"{text}; unset: the preset's")
    for action in parser._actions:
        if action.dest in meaning:
            action.help = meaning[action.dest].replace("%", "%%")
