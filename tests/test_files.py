import errno
import json
import os
import subprocess
import sys

import pytest

from lldfast.errors import BusyError, CorruptError, InputError, WriteError
from lldfast.files import atomic_folder, atomic_path, check_writable, folder_lock, read_json, write_json


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
