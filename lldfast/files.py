"""Files that survive a kill at any moment: atomic writes, folders published by one rename, a lock for writers.

Everything that lasts is written to a temporary name in the same folder, flushed to disk, and renamed: a reader sees the
old content or the new one, never a part.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lldfast.errors import BusyError, CorruptError, InputError, WriteError

# Of 255 bytes, which most file systems allow, a dozen stay for the endings that are put behind a stem.
LONGEST_STEM = 240
# Windows opens a device under these names, whatever follows their first dot.
_DEVICES = re.compile(r"(?:CON|PRN|AUX|NUL|(?:COM|LPT)[0-9])(?= *(?:\.|$))", re.IGNORECASE)
_UNSAFE = re.compile(r"[^A-Za-z0-9 ._()&+,-]|^[ .-]|[ .]$")


def file_stem(name: str) -> str:
    """The file name, without an ending, that stands for any name on every system: ASCII, at most `LONGEST_STEM` characters.

    Letters, digits and ` ._()&+,-` stay. All else, a first blank, dot or dash, a last blank or dot, and the first letter of
    a Windows device's name is written as %XX of its UTF-8 bytes, so that `urllib.parse.unquote` gives the name back. What
    would be too long is cut and ends in "%~" and a hash of the name, which then must be kept elsewhere.

    Raises:
        InputError: the name is empty or not valid Unicode.
    """
    if not name:
        raise InputError("an empty name cannot be the name of a file")
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"the name {name!r:.100} is not valid Unicode ({error.reason} at character {error.start})") from None
    stem = _UNSAFE.sub(_escaped, name)
    if _DEVICES.match(stem):
        stem = f"%{ord(stem[0]):02X}{stem[1:]}"
    return stem if len(stem) <= LONGEST_STEM else _with_hash(stem, name)


def file_stems(names: Iterable[str]) -> dict[str, str]:
    """`file_stem` of each name, no two of which a file system without upper and lower case would take for one.

    Of names that differ in case alone the first in sorted order keeps its stem; the others get "%~" and their hash.

    Raises:
        InputError: a name is empty or not valid Unicode.
    """
    stems, taken = {}, set()
    for name in sorted(set(names)):
        stem = file_stem(name)
        stems[name] = _with_hash(stem, name) if stem.lower() in taken else stem
        taken.add(stems[name].lower())
    return stems


def _escaped(match: re.Match[str]) -> str:
    return "".join(f"%{byte:02X}" for byte in match[0].encode())


def _with_hash(stem: str, name: str) -> str:
    ending = f"%~{hashlib.blake2b(name.encode(), digest_size=8).hexdigest()}"
    return re.sub(r"%[0-9A-F]?$", "", stem[: LONGEST_STEM - len(ending)]) + ending  # no half of an escape


@contextlib.contextmanager
def explain_write_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn an OSError of the block (disk full, read-only) into a `WriteError` that names `path`."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        raise WriteError(error.errno, f"cannot write {path}: {error.strerror or error}") from error


def fsync_folder(folder: Path) -> None:
    """Make a rename inside `folder` durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` when the block succeeds, delete it when it raises.

    Raises:
        WriteError: the block or the rename failed with an OSError.
    """
    final = Path(path)
    if not final.name:
        raise InputError(f"{str(path)!r} is not the name of a file to write")
    temporary = final.with_name(f".{final.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
    with explain_write_errors(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            fd = os.open(temporary, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
            os.replace(temporary, final)
            fsync_folder(final.parent)
        finally:
            temporary.unlink(missing_ok=True)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Fail now, not after hours of work, when a file could not be written at `path` (its folder is made).

    Raises:
        InputError: `path` is empty or a folder.
        WriteError: its folder cannot be made or refuses new files.
    """
    final = Path(path)
    if not final.name or final.is_dir():
        raise InputError(f"{str(path)!r} is not the name of a file to write")
    probe = final.with_name(f".{final.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
    with explain_write_errors(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON, atomically.

    Raises:
        InputError: `value` cannot be JSON. NaN cannot either, and would hide an error.
        WriteError: the file cannot be written.
    """
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: the content cannot be written as JSON ({error})") from None
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read JSON.

    Raises:
        InputError: there is no such file, or it cannot be read.
        CorruptError: the file is not JSON, or an object in it repeats a key (of which JSON would keep the last, silently).
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            names = [key for key, _ in pairs]
            raise CorruptError(f"{path} repeats the key {next(key for key in names if names.count(key) > 1)!r}")
        return value

    try:
        return json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=unique)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptError(f"{path} is not valid JSON ({error})") from None


@contextlib.contextmanager
def folder_lock(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Hold the writer's lock of `folder` (created if absent); the kernel frees it when the process dies.

    Raises:
        BusyError: another process holds it; the message names its host and pid.
        InputError: `folder` is a file.
        WriteError: it cannot be created.
    """
    folder = Path(folder)
    if folder.is_file():
        raise InputError(f"{folder} is a file, where a folder is needed")
    with explain_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / ".lock").open("a+", encoding="utf-8")
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            handle.seek(0)
            owner = handle.read().strip() or "unknown"
            raise BusyError(f"{folder} is being written by another process ({owner})") from None
        handle.truncate(0)
        handle.write(f"host {socket.gethostname()}, pid {os.getpid()}")
        handle.flush()
        try:
            yield
        finally:
            handle.truncate(0)


@contextlib.contextmanager
def atomic_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder beside `folder`; publish it under that name when the block succeeds.

    A `folder` that exists already is replaced: it is moved aside, and removed once the new one stands.
    """
    final = Path(folder)
    temporary = final.with_name(f".{final.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
    with explain_write_errors(final):
        temporary.mkdir(parents=True)
        try:
            yield temporary
            for item in temporary.rglob("*"):
                if item.is_file():
                    fd = os.open(item, os.O_RDONLY)
                    try:
                        os.fsync(fd)
                    finally:
                        os.close(fd)
            old = final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}.old")
            if final.exists():
                os.rename(final, old)
            os.rename(temporary, final)
            fsync_folder(final.parent)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
