"""A Hugging Face model from its folder or hub id, with every weight accounted for.

transformers fills weights that a checkpoint lacks with random values and leaves out those that it has no place for, and says
both in its log. Here either is an error that names them, so that a model is what its files say or is not loaded. Names that a
compiler or a trainer has put around the model's are taken off where what remains fits exactly.
"""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from lldfast.backends import require
from lldfast.errors import CorruptError, InputError, LLDError, MissingDependencyError
from lldfast.models.checkpoint_files import Stored, open_tensors, stored_tensors, weight_files
from lldfast.models.hf_config import text_config
from lldfast.models.wrappers import has_wrappers, plain_names, without_leading

NAMED = 3  # tensors that an error names; it counts the others
# Tensors that files of older versions have and no model needs: they follow from the configuration.
DERIVED = re.compile(
    r"(^|\.)(rotary_emb\.(inv_freq|cos_cached|sin_cached)"  # tables of rotary positions
    r"|(attn|attention|self_attn|self_attention)\.(bias|masked_bias|causal_mask)"  # the causal mask and its fill value
    r"|position_ids|(decoder|encoder)\.version)$"
)
ROTARY_ROUNDING = (0.01, 1e-7)  # relative, of a table in bf16, and absolute, of one in fp16

Report = Mapping[str, Collection[Any]]


def load_pretrained(spec: str | Path, dtype: torch.dtype, *, trust_remote_code: bool = False) -> nn.Module:
    """The causal language model of a folder or hub id, in evaluation mode, on the CPU.

    Args:
        trust_remote_code: run Python code that the model brings along. Without it nothing is run and nobody is asked.

    Raises:
        InputError: it cannot be loaded, or weights are missing, unused or of another shape (they are named).
        CorruptError: a file is truncated or unreadable.
        MissingDependencyError: transformers, or a package that this model needs, is not installed.
    """
    transformers = require("transformers", "Hugging Face models need")
    options = {"trust_remote_code": trust_remote_code}
    if Path(spec).is_dir():
        return _from_folder(Path(spec), dtype, options)
    with explained(spec):
        module, report = _plain(str(spec), dtype, options)
    if getattr(module, "peft_config", None):  # transformers then reports on the adapter alone
        raise InputError(f"{spec} is an adapter: download it, and give its folder")
    if problems(report):  # all files are here by now: look at them
        with explained(spec):
            folder = Path(transformers.utils.cached_file(str(spec), "config.json")).parent
        return _from_folder(folder, dtype, options)
    return module


def _from_folder(folder: Path, dtype: torch.dtype, options: Mapping[str, Any]) -> nn.Module:
    with explained(folder):  # asked first, since it says best what is no model, or one with code of its own
        config = require("transformers", "Hugging Face models need").AutoConfig.from_pretrained(str(folder), **options)
    files = weight_files(folder)
    stored = stored_tensors(files)
    names = {name: name for name in stored}
    blank = _Blank(config, options)
    with explained(folder):
        if has_wrappers(names):
            names = plain_names(names, blank.names)
            module, report = _renamed(blank, files, names, dtype)
        else:
            module, report = _plain(str(folder), dtype, options)
        if problems(report):
            shorter = without_leading(names, blank.names)
            if shorter is not None:
                names = shorter
                module, report = _renamed(blank, files, names, dtype)
    check_loaded(report, folder, module)
    _check_dtypes(module, stored, names)
    _check_rotary(module, files, stored)
    changed = [(name, plain) for name, plain in names.items() if name != plain]
    if changed:
        module.name_or_path = module.config.name_or_path = str(folder)
        before, after = changed[0]
        warnings.warn(
            f"{folder}: {len(changed)} weights are named as a compiler or trainer wraps them ({before}); read as {after}, "
            "and so on, all fit",
            stacklevel=5,
        )
    return module


class _Blank:
    """The model's class and the names of its weights, from its configuration alone."""

    def __init__(self, config: Any, options: Mapping[str, Any]) -> None:
        self.config, self.options = config, options
        self._model: Any = None

    @property
    def model(self) -> Any:
        if self._model is None:
            auto = require("transformers", "Hugging Face models need").AutoModelForCausalLM
            with torch.device("meta"):
                self._model = auto.from_config(self.config, **self.options)
        return self._model

    @property
    def names(self) -> set[str]:
        return set(self.model.state_dict())


# A wrong shape is asked to be reported like the other faults: the error that transformers raises names no tensor.
_REPORTED = {"output_loading_info": True, "ignore_mismatched_sizes": True}


def _plain(spec: str, dtype: torch.dtype, options: Mapping[str, Any]) -> tuple[Any, Report]:
    auto = require("transformers", "Hugging Face models need").AutoModelForCausalLM
    with _named_conversions():
        found: tuple[Any, Report] = auto.from_pretrained(spec, dtype=dtype, **_REPORTED, **options)
    return found


def _renamed(blank: _Blank, files: Sequence[Path], names: Mapping[str, str], dtype: torch.dtype) -> tuple[Any, Report]:
    with open_tensors(files) as values, _named_conversions():
        renamed = {names[name]: value for name, value in values.items()}
        found: tuple[Any, Report] = type(blank.model).from_pretrained(
            None, config=blank.model.config, state_dict=renamed, dtype=dtype, **_REPORTED
        )
    return found


@contextlib.contextmanager
def _named_conversions() -> Iterator[None]:
    """Name the weights that cannot be put together from the file's (those of experts are): transformers does in its log only.

    Its log is not shown: what it says of weights is asked for and checked here, and in part it advises to go on.
    """
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addHandler(handler)
    shown, logger.propagate = logger.propagate, False
    try:
        yield
    except RuntimeError:
        # Rows of a table: the weight's name, what is wrong with it between the codes of a colour, and a traceback.
        names = re.findall(r"^(\S[^|]*?) *\|[^|\n]*CONVERSION", "\n".join(said), re.MULTILINE)
        if not names:
            raise
        raise InputError(f"parts of {_count(names)} are missing or of another shape: {_some(names)}") from None
    finally:
        logger.removeHandler(handler)
        logger.propagate = shown


def problems(report: Report) -> list[str]:
    """What does not fit, in sentences.

    Args:
        report: names by "missing_keys" and "unexpected_keys", and (name, shape in the file, shape in the model) in
            "mismatched_keys", as transformers gives them with output_loading_info; a part may be absent.
    """
    missing = sorted(report.get("missing_keys", ()))
    unused = sorted(name for name in report.get("unexpected_keys", ()) if not DERIVED.search(name))
    shapes = [f"{name} is {list(a)} in the file and {list(b)} in the model" for name, a, b in _triples(report)]
    found = []
    if missing:
        found.append(f"{_count(missing)} that the model has {'is' if len(missing) == 1 else 'are'} missing: {_some(missing)}")
    if unused:
        found.append(f"the model has no place for {_count(unused)}: {_some(unused)}")
    if shapes:
        found.append(f"{_count(shapes)} {'has' if len(shapes) == 1 else 'have'} another shape: {_some(shapes)}")
    return found + [" ".join(str(text).split()) for text in report.get("error_msgs", ())]


def check_loaded(report: Report, what: object, module: nn.Module | None = None) -> None:
    """Make sure that a load has found every weight of the model and used every weight of the files.

    Args:
        report: as in `problems`.
        what: the checkpoint, for the message.
        module: the model, whose class the message names.

    Raises:
        InputError: it has not; the first few tensors are named.
    """
    found = problems(report)
    if not found:
        return
    kind = "" if module is None else f" as {type(module).__name__}"
    named = getattr(getattr(module, "config", None), "architectures", None) or []
    other = f" (its config.json is of {', '.join(map(str, named))})" if named and type(module).__name__ not in named else ""
    raise InputError(f"{what} cannot be loaded{kind}{other}: {'; '.join(found)}")


def _check_dtypes(module: Any, stored: Mapping[str, Stored], names: Mapping[str, str]) -> None:
    """Integers in the place of a plain weight are codes of a quantisation that config.json does not tell of."""
    if getattr(module.config, "quantization_config", None) is not None:
        return
    own = module.state_dict()
    for name, tensor in stored.items():
        target = own.get(names[name], own.get(f"{module.base_model_prefix}.{names[name]}"))
        if not tensor.floating and target is not None and target.is_floating_point():
            raise InputError(f"{tensor.file}: the weight {name} is stored in integers, and config.json says nothing of how")


def _check_rotary(module: Any, files: Sequence[Path], stored: Mapping[str, Stored]) -> None:
    """Tables of rotary frequencies in a file, which transformers passes over, must be those that it makes from config.json.

    A trainer that has scaled the positions without saying so in config.json leaves its only trace there. Where config.json does
    say so, an older version's table is of the frequencies before scaling, and says nothing.
    """
    names = [name for name in stored if name.endswith("rotary_emb.inv_freq")]
    own = [value.float() for name, value in module.named_buffers() if name.endswith("inv_freq")]
    if not names or not own or _scales_positions(text_config(module)):
        return
    with open_tensors(files) as values:
        for name in names:
            table = torch.as_tensor(values[name][:]).float()
            if not any(table.shape == o.shape and torch.allclose(table, o, *ROTARY_ROUNDING) for o in own):
                raise InputError(f"{stored[name].file}: {name} is not the table of rotary positions that config.json gives")


def _scales_positions(config: Any) -> bool:
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(of_layers for of_layers in rope.values() if isinstance(of_layers, Mapping))]
    return any(kind.get("rope_type", "default") != "default" for kind in kinds)


@contextlib.contextmanager
def explained(spec: object, failed: str = "") -> Iterator[None]:
    """Errors of other libraries as ours.

    Args:
        spec: what is loaded, which every message names.
        failed: what an error that is not told apart begins with.

    Raises:
        MissingDependencyError: for an ImportError.
        InputError: for any other.
    """
    try:
        yield
    except (CorruptError, InputError) as error:
        raise type(error)(f"{spec}: {error}") from None
    except (LLDError, MemoryError):
        raise
    except ImportError as error:
        raise MissingDependencyError(f"{spec} needs a package that is not installed: {' '.join(str(error).split())}") from error
    except Exception as error:  # transformers, the hub's client and torch raise whatever they meet
        reason = " ".join(str(error).split()).partition(" Model type should be one of")[0] or type(error).__name__
        if "trust_remote_code=True" in reason:
            raise InputError(
                f"{spec} brings Python code of its own (auto_map in config.json), which is not run unasked; read it, and pass "
                "trust_remote_code=True to load_model (--trust-remote-code) to run it"
            ) from None
        if isinstance(error, KeyError):
            reason = f"there is no {reason}"
        raise InputError(f"{failed or f'transformers cannot load {spec} as a causal language model'}: {reason}") from error


def _triples(report: Report) -> list[tuple[str, Sequence[int], Sequence[int]]]:
    return sorted(report.get("mismatched_keys", ()), key=lambda triple: str(triple[0]))


def _count(items: Sequence[object]) -> str:
    return "1 weight" if len(items) == 1 else f"{len(items)} weights"


def _some(items: Sequence[str]) -> str:
    more = len(items) - NAMED
    return ", ".join(items[:NAMED]) + (f" and {more} more" if more > 0 else "")
