import errno
import json
import os
import subprocess
import sys
from urllib.parse import unquote

import pytest

from lldfast.errors import BusyError, CorruptError, InputError, WriteError
from lldfast.files import (
    LONGEST_STEM,
    atomic_folder,
    atomic_path,
    check_writable,
    file_stem,
    file_stems,
    folder_lock,
    read_json,
    write_json,
)


def test_a_failed_write_leaves_the_old_content(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    with pytest.raises(ZeroDivisionError), atomic_path(path) as temporary:
        temporary.write_text("half")
        _ = 1 / 0
    assert read_json(path) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_disk_full_names_the_file_and_keeps_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})

    def full(fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WriteError, match=r"a\.json: No space left"):
        write_json(path, {"new": 2})
    with pytest.raises(WriteError, match="folder"), atomic_folder(tmp_path / "folder") as temporary:
        (temporary / "x").write_text("y")
    monkeypatch.undo()
    assert read_json(path) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_nan_is_not_json(tmp_path):
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert not list(tmp_path.iterdir())


def test_read_json_says_what_is_wrong(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_json(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text('{"x": ')
    with pytest.raises(CorruptError, match=r"bad\.json"):
        read_json(tmp_path / "bad.json")


def test_folder_is_published_whole_and_replaced(tmp_path):
    target = tmp_path / "out"
    for n in (1, 2):
        with atomic_folder(target) as temporary:
            (temporary / "f").write_text(str(n))
            if n == 2:
                assert (target / "f").read_text() == "1"
    assert (target / "f").read_text() == "2"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


# Text, not a function of this file: a child could import this file only if it were started where the tests lie.
HOLD = """
import sys
from lldfast.files import folder_lock
with folder_lock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_second_writer_is_refused_and_a_dead_one_forgotten(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(BusyError, match=f"pid {process.pid}"), folder_lock(tmp_path):
            pass
        process.kill()
    with folder_lock(tmp_path):
        assert json.dumps(str(os.getpid())).strip('"') in (tmp_path / ".lock").read_text()


def test_bad_json_and_bad_places_are_named(tmp_path):
    with pytest.raises(InputError, match=r"x\.json: the content cannot be written as JSON"):
        write_json(tmp_path / "x.json", {"a": object()})
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        read_json(tmp_path)
    (tmp_path / "x.json").write_text('{"a": 1, "b": {"c": 2, "c": 3}}')
    with pytest.raises(CorruptError, match=r"x\.json repeats the key 'c'"):
        read_json(tmp_path / "x.json")
    with pytest.raises(InputError, match="not the name of a file"), atomic_path(""):
        pass
    with pytest.raises(InputError, match=r"x\.json is a file, where a folder is needed"), folder_lock(tmp_path / "x.json"):
        pass


def test_check_writable_finds_out_before_the_work(tmp_path):
    check_writable(tmp_path / "deep" / "v.parquet")
    assert list((tmp_path / "deep").iterdir()) == []
    for place in ("", tmp_path):
        with pytest.raises(InputError, match="not the name of a file"):
            check_writable(place)
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match=r"cannot write .*file/v\.parquet"):
        check_writable(tmp_path / "file" / "v.parquet")


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        *((plain, plain) for plain in ("Pile-CC", "Wikipedia (en)", "a.b", "C++ & more, v1.2_x", "CONSOLE", "com10")),
        ("DM/Maths", "DM%2FMaths"),
        ("../up", "%2E.%2Fup"),
        (".hidden", "%2Ehidden"),
        ("..", "%2E%2E"),
        (".", "%2E"),
        (" ", "%20"),
        (" a ", "%20a%20"),
        ("-rf", "%2Drf"),
        ("a.", "a%2E"),
        ("100%", "100%25"),
        ("é\n", "%C3%A9%0A"),
        (':*?<>|\\"', "%3A%2A%3F%3C%3E%7C%5C%22"),
        ("CON", "%43ON"),
        ("nul.txt", "%6Eul.txt"),
        ("Com1 .x", "%43om1 .x"),
        ("lpt9", "%6Cpt9"),
    ],
)
def test_names_that_every_system_holds(name, stem):
    assert file_stem(name) == stem and unquote(stem) == name


def test_names_stay_apart():
    names = ["a/b", "a%2Fb", "a b", "a\tb", ".", "..", "%2E", "a.b", "Pile-CC", "pile-cc", "PILE-CC", "con", "CON"]
    names += ["é", "e\u0301", "É", "K", "\u212a"]  # the last is the Kelvin sign, which some systems take for a K
    names += ["漢" * 60, "漢" * 61, "漢" * 60 + "a", "x" * 300, "X" * 300, "x" * LONGEST_STEM, "x" * LONGEST_STEM + "y"]
    names += [file_stems(["Pile-CC", "pile-cc"])["pile-cc"]]  # a name that looks like the stem of another
    stems = file_stems(names)
    assert stems == file_stems(reversed(names)) and stems["PILE-CC"] == "PILE-CC"
    assert len({stem.lower() for stem in stems.values()}) == len(names)
    for name, stem in stems.items():
        assert stem.isascii() and len(stem) <= LONGEST_STEM
        start, marker, _ = stem.partition("%~")
        assert name.startswith(unquote(start, errors="ignore")) if marker else unquote(stem) == name


@pytest.mark.parametrize(("name", "message"), [("", "an empty name"), ("a\ud800", "not valid Unicode .* at character 1")])
def test_names_that_no_file_can_have(name, message):
    with pytest.raises(InputError, match=message):
        file_stem(name)
