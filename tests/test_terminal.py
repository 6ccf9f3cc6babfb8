"""What programs print: errors as one line with an exit status, aligned tables, bars, help texts out of docstrings."""

import dataclasses
import sys

import pytest

from lldfast.errors import CorruptError, InputError
from lldfast.terminal import aligned, exit_status, note, option_help, progress_bar


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (InputError("no such\n  domain"), 1, "error: no such domain\n"),
        (CorruptError("x.bin is cut off"), 1, "error: x.bin is cut off\n"),
        (PermissionError(13, "Permission denied", "x"), 1, "error: [Errno 13] Permission denied: 'x'\n"),
        (KeyboardInterrupt(), 130, "interrupted; run the same command again to go on\n"),
    ],
)
def test_errors_are_one_line(error, status, line, capsys):
    def command():
        raise error

    assert exit_status(command) == status
    assert capsys.readouterr() == ("", line)


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        exit_status(lambda: 1 / 0)
    with pytest.raises(SystemExit):  # argparse's usage errors have a status of their own
        exit_status(lambda: sys.exit(2))
    assert exit_status(lambda: "whatever is returned") == 0


def test_aligned_columns():
    rows = [("domain", "texts", "weight"), ("Prose", "1,234", "0.5"), ("a longer name", "1", "0.25 +- 0.01")]
    assert aligned(rows, left={0, 2}, least=(0, 7)) == [
        "domain           texts  weight",
        "Prose            1,234  0.5",
        "a longer name        1  0.25 +- 0.01",
    ]
    assert aligned([("a", "1"), ("b", "10")]) == ["a   1", "b  10"]
    assert aligned([]) == []
    with pytest.raises(ValueError):
        aligned([("a", "1"), ("b",)])


def test_notes_and_bars_go_to_stderr(capsys):
    with progress_bar("reading", 30, unit=" texts", done=10, scale=False) as bar:
        bar.update(20)
    note("device: cpu, float32")
    with progress_bar("nothing", 1, unit="B", show=False) as bar:
        bar.update(1)
    out, err = capsys.readouterr()
    assert out == "" and "reading: 100%" in err and "30/30" in err and err.endswith("\ndevice: cpu, float32\n")
    assert "nothing" not in err


def test_help_comes_from_docstrings():
    @dataclasses.dataclass
    class Base:
        """What both have.

        Attributes:
            seed: of the draw: the same
                for all.
        """

        seed: int = 0

    @dataclasses.dataclass
    class Options(Base):
        """More.

        Attributes:
            every, until: steps. Both count from 0.
        """

        every: int = 1
        until: int = 2
        said_nowhere: int = 3

    both = "steps. Both count from 0"
    assert option_help(Options) == {"seed": "of the draw: the same for all", "every": both, "until": both}
