"""What a program says to whoever runs it: errors as one line, notes and progress bars on stderr, aligned tables, help texts."""

from __future__ import annotations

import inspect
import os
import re
import sys
import warnings
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lldfast.errors import ComparisonWarning, LLDError


def exit_status(command: Callable[[], object]) -> int:
    """Run a command: 0 when it is done, 1 for an error that a user can act on, printed as one line, 130 when interrupted."""
    try:
        with warnings.catch_warnings():
            if not sys.warnoptions:  # Python shows them to a program's author alone; here the one who typed the name must read it
                warnings.filterwarnings("default", category=DeprecationWarning, module=r"lldfast\b")
            shown = warnings.showwarning

            def show(message: Warning | str, category: type[Warning], filename: str, *where: Any, **options: Any) -> None:
                ours = category is UserWarning and Path(filename).is_relative_to(Path(__file__).parent)
                if ours or issubclass(category, ComparisonWarning):  # about the user's models; a line of code would say nothing
                    note(f"warning: {message}")
                else:
                    shown(message, category, filename, *where, **options)

            warnings.showwarning = show
            command()
        return 0
    except BrokenPipeError:  # `lldfast ... | head`: nobody reads on, and the flush at exit must not complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (LLDError, OSError) as error:  # an OSError is the machine's (no permission, name too long) and names its file
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)  # libraries' messages have several lines
        return 1
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 130


def note(text: str) -> None:
    """A line on stderr, above the progress bar where there is one."""
    tqdm.write(text, file=sys.stderr)


def progress_bar(
    what: str, total: float | None = None, *, unit: str, done: int = 0, scale: bool = True, show: bool = True
) -> tqdm:
    """A bar on stderr, for a `with` block that calls `update(n)` on it; nothing is shown where `show` is false.

    Args:
        total: of the whole work; None where it is not known.
        unit: of the counts, with a space before a word (" tokens").
        done: what an earlier run did, which is no part of this run's speed.
        scale: write 12.3k for 12,345.
    """
    return tqdm(desc=what, total=total, initial=done, unit=unit, unit_scale=scale, disable=not show)


def aligned(rows: Sequence[Sequence[str]], *, left: Collection[int] = (0,), least: Sequence[int] = ()) -> list[str]:
    """Rows of cells as lines: two spaces between the columns, each as wide as its widest cell.

    Args:
        rows: the titles too, where there are any. All have the same number of cells.
        left: the columns that start at their left edge; the others end at their right one, as numbers do.
        least: the first columns' least widths, in characters.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    widths = [max(width, *least[i : i + 1], 0) for i, width in enumerate(widths)]
    lines = ([c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))] for row in rows)
    return ["  ".join(line).rstrip() for line in lines]


def option_help(cls: type) -> dict[str, str]:
    """What the fields of a dataclass mean, by name: the "Attributes:" of its docstring and of its bases' docstrings.

    An entry is `name: text`, or `one, other: text` for several names, and goes on in the lines that are indented further.
    """
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        _, _, section = (inspect.cleandoc(base.__doc__ or "")).partition("\nAttributes:\n")
        for names, text in re.findall(r"^    (\w+(?:, \w+)*): (.*(?:\n {5,}.*)*)", section, re.MULTILINE):
            found |= dict.fromkeys(names.split(", "), " ".join(text.split()).rstrip("."))
    return found
