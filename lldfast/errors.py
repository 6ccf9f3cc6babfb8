"""Errors a user can act on, and warnings where a name has changed.

The command line prints errors without a traceback; library callers can catch `LLDError`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


class LLDError(Exception):
    """Base of every error that lldfast raises on purpose. Its message names the file, domain, text or parameter at fault."""


class InputError(LLDError, ValueError):
    """An argument, a configuration value or an input text is wrong."""


class CorruptError(LLDError, ValueError):
    """A file that lldfast wrote, or a compressed input, is truncated, swapped or altered."""


class BusyError(LLDError, RuntimeError):
    """Another process is writing the same folder."""


class WriteError(LLDError, OSError):
    """Writing failed (disk full, no permission). What had been published before is untouched."""


class MissingDependencyError(LLDError, ImportError):
    """An optional package is not installed; the message says which and how to install it."""


class TrainingError(LLDError, RuntimeError):
    """Training cannot go on: a loss or gradient is not finite."""


class ComparisonWarning(UserWarning):
    """What is compared was not scored under the same conditions: part of the difference is not between the models."""


def listed(names: Iterable[object], most: int = 10) -> str:
    """Names for a message, at most so many of them: "a, b, ... and 1,990 more"."""
    shown = [str(name) for name in names]
    more = len(shown) - most
    return ", ".join(shown) if more <= 0 else f"{', '.join(shown[:most])}, ... and {more:,} more"


@contextlib.contextmanager
def naming(what: object) -> Iterator[None]:
    """Put the name of a file before the message of an `InputError` or `CorruptError` of the block."""
    try:
        yield
    except (InputError, CorruptError) as error:
        raise type(error)(f"{what}: {error}") from None


def deprecated(old: str, new: str, *, stacklevel: int = 3) -> None:
    """Say that a former name is used where `new` is meant; it goes on working. `stacklevel` 3 is the caller of the caller."""
    warnings.warn(f"{old} is deprecated: use {new}", DeprecationWarning, stacklevel=stacklevel)


def renamed_arguments(**names: str) -> Callable[[F], F]:
    """Decorate a function or a class so that it takes keyword arguments by their former names too, {former: present}.

    The function then raises TypeError when it is given both.
    """

    def decorate(target: F) -> F:
        call: Any = target.__init__ if isinstance(target, type) else target  # type: ignore[misc]
        title = target.__name__

        @functools.wraps(call)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            for old in names.keys() & kwargs.keys():
                new = names[old]
                if new in kwargs:
                    raise TypeError(f"{title} was given both {old!r} and {new!r}, which is its present name")
                deprecated(f"{title}({old}=...)", f"{new}=")
                kwargs[new] = kwargs.pop(old)
            return call(*args, **kwargs)

        if not isinstance(target, type):
            return wrapper  # type: ignore[return-value]
        target.__init__ = wrapper  # type: ignore[misc]
        return target

    return decorate


class _Forwarding(MetaPathFinder, Loader):
    """Finds modules by the paths that they had; see `forward_modules`."""

    def __init__(self, former: Mapping[str, Sequence[str]]) -> None:
        self.former = former

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name in self.former else None

    def create_module(self, spec: ModuleSpec) -> None:
        """An ordinary, empty module: the one of today must keep its own name."""

    def exec_module(self, module: ModuleType) -> None:
        present = self.former[module.__name__]
        deprecated(module.__name__, " or ".join(present), stacklevel=3)  # Python skips the frames of its import system
        homes = [importlib.import_module(name) for name in present]

        def find(name: str) -> Any:
            for home in homes:
                if hasattr(home, name):
                    return getattr(home, name)
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

        module.__getattr__ = find  # type: ignore[method-assign]
        public = {name for home in homes for name in vars(home) if not name.startswith("_")}
        vars(module)["__all__"] = sorted(public)  # for `import *`


def forward_modules(former: Mapping[str, Sequence[str]]) -> None:
    """Let `import FORMER` go on working, with a DeprecationWarning: {former path: the modules that hold what it held}."""
    sys.meta_path.append(_Forwarding(former))
