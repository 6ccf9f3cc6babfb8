"""The rules of conftest.py: which part of a product is the user's tier, and that an `alone` test is alone."""

import fcntl
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest


def pairs(rows):
    return {pair for row in rows for pair in itertools.combinations(enumerate(row), 2)}


def values(rows):
    return {value for row in rows for value in enumerate(row)}


@pytest.fixture(scope="module")
def conftest(pytestconfig):
    return next(p for p in pytestconfig.pluginmanager.get_plugins() if hasattr(p, "MOST_WORKERS"))


@pytest.mark.parametrize("sizes", [(1,), (5,), (2, 3), (3, 3, 11), (3, 2, 12), (2, 2, 2, 2, 2), (10, 4, 7, 5)])
def test_every_pair_of_a_product_is_covered(conftest, sizes):
    rows = list(itertools.product(*map(range, sizes)))
    chosen = [rows[i] for i in conftest.cover(rows)]
    assert pairs(chosen) == pairs(rows) and values(chosen) == values(rows) and len(set(chosen)) == len(chosen)
    largest = sorted(sizes)[-2:]
    least = largest[0] * largest[-1] if len(sizes) > 1 else sizes[0]
    assert least <= len(chosen) <= 1.5 * least + 2
    assert conftest.cover(rows) == conftest.cover(rows)


def test_only_what_occurs_is_asked_for(conftest):
    rows = [(0, 0, 0), (1, 1, 0), (1, 1, 1)]  # columns that go together, as "k,n" of one parametrize
    assert conftest.cover(rows) == [0, 1, 2]
    assert conftest.cover([(1, 2)]) == [0] and conftest.cover([]) == []


SEEN = []


@pytest.mark.pairwise
@pytest.mark.parametrize("a", range(4))
@pytest.mark.parametrize("b,c", [(0, 0), (1, 5), (2, 6)])
@pytest.mark.parametrize("d", [0, 1])
def test_a_pairwise_test(a, b, c, d):
    SEEN.append((a, b, c, d))


def test_saw_its_pairs(pytestconfig):
    if len(SEEN) < 12:
        pytest.skip("chosen without the tests that it looks at")
    everything = [(a, *bc, d) for a in range(4) for bc in ((0, 0), (1, 5), (2, 6)) for d in (0, 1)]
    assert pairs(SEEN) == pairs(everything)
    assert len(SEEN) == (12 if "not slow" in pytestconfig.getoption("markexpr") else 24)


def test_a_product_within_a_test(request, product):
    got = product("abc", [None, 1], (x for x in range(5)))
    assert pairs(got) == pairs(itertools.product("abc", [None, 1], range(5)))
    assert len(set(got)) == len(got) == {"pairs": 15, "all": 30}[request.node.callspec.params["product"]]


@pytest.mark.parametrize("kind", ["beside others", pytest.param("alone", marks=[pytest.mark.slow, pytest.mark.alone])])
@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="there are no other workers")
def test_nobody_enters_beside_an_alone_test(kind, tmp_path_factory):
    with (tmp_path_factory.getbasetemp().parent / "room.lock").open() as room:
        with pytest.raises(BlockingIOError):
            fcntl.flock(room, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if kind == "alone":
            with pytest.raises(BlockingIOError):
                fcntl.flock(room, fcntl.LOCK_SH | fcntl.LOCK_NB)
        else:
            fcntl.flock(room, fcntl.LOCK_SH | fcntl.LOCK_NB)


def test_workers(conftest, monkeypatch):
    for processors, workers in ((1, 0), (2, 2), (3, 3), (64, 4)):
        monkeypatch.setattr(conftest.os, "sched_getaffinity", lambda pid, n=processors: set(range(n)))
        assert conftest.pytest_xdist_auto_num_workers() == workers


@pytest.mark.slow
def test_the_bare_command_is_enough(repository):
    """`pytest`, which does not put the current folder on the path, runs what `python -m pytest` runs, children too."""
    command = [str(Path(sys.executable).with_name("pytest")), "-q", "-n", "0", "-m", "", "tests/test_files.py"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:]
