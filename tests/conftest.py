"""The two tiers of the tests, and shared fixtures: unwritten memory shows, threads are few, small token shards are at hand.

`pytest` runs the user's tier, which has a witness of every invariant and takes two minutes on two cores. `pytest -m ""` runs
everything, `pytest -m "not slow or pairwise"` whole products without what is slow by itself.
"""

from __future__ import annotations

import fcntl
import itertools
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lldfast.backends import extension
from lldfast.data.shards import ShardWriter, TokenShards, write_manifest
from lldfast.ops import native

# Programs that tests start must import the installed package too, not the checkout they are started in, which has no extension.
os.environ["PYTHONSAFEPATH"] = "1"
# One thread each: beside other workers more of them would only wait.
os.environ.setdefault("OMP_NUM_THREADS", "1")

MakeShards = Callable[..., TokenShards]

# Files that take longest, in that order. A worker has one file at a time, so a long one must not be the last to start.
FIRST = ("test_train.py", "test_report.py", "test_prepare.py", "test_train_distill.py", "kernels")
MOST_WORKERS = 4  # each has a torch of its own in memory, and some tests use two threads


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """As many as this process has processors, up to a few; 0, which is no worker at all, on a single one."""
    count = min(len(os.sched_getaffinity(0)), MOST_WORKERS)
    return count if count > 1 else 0


@pytest.hookimpl(tryfirst=True)  # before -m leaves out what is slow
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what a cover of the pairs of a `pairwise` test's parameters does not need as slow; long files first."""
    families = defaultdict(list)
    for item in items:
        if item.get_closest_marker("pairwise") and hasattr(item, "callspec"):
            families[item.nodeid.partition("[")[0]].append(item)
    for family in families.values():
        # A value is told by its identity: not all can be compared or hashed.
        needed = cover([tuple(map(id, item.callspec.params.values())) for item in family])  # type: ignore[attr-defined]
        for i in set(range(len(family))).difference(needed):
            family[i].add_marker(pytest.mark.slow)
    place = {name: i for i, name in enumerate(FIRST)}
    items.sort(key=lambda item: min(place.get(part, len(FIRST)) for part in item.path.parts[-2:]))


def cover(rows: Sequence[tuple[Any, ...]]) -> list[int]:
    """Indices of some rows, in order, in which every value of a column and every pair of values of two columns occurs that occurs
    in `rows`. Greedy: the row that adds most, of equals the first; so the same rows always give the same choice.
    """
    news = [{*enumerate(row), *itertools.combinations(enumerate(row), 2)} for row in rows]
    missing, chosen = set().union(*news), []
    while missing:
        best = max(range(len(rows)), key=lambda i: len(news[i] & missing))
        missing -= news[best]
        chosen.append(best)
    return sorted(chosen)


@pytest.fixture(params=["pairs", pytest.param("all", marks=[pytest.mark.slow, pytest.mark.pairwise])])
def product(request: pytest.FixtureRequest) -> Callable[..., list[tuple[Any, ...]]]:
    """product(*values): for loops within a test. Tuples of every pair of values of two arguments; of all, in the slow tier."""

    def combine(*values: Iterable[Any]) -> list[tuple[Any, ...]]:
        options = [list(v) for v in values]
        places = list(itertools.product(*(range(len(v)) for v in options)))
        chosen = places if request.param == "all" else [places[i] for i in cover(places)]
        return [tuple(v[i] for v, i in zip(options, place, strict=True)) for place in chosen]

    return combine


@pytest.fixture(autouse=True)
def _alone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Under pytest-xdist no other test runs beside one that is marked `alone`.

    Every test holds the room for as long as it takes, an `alone` one for itself. All pass the door one by one, and an `alone` one
    keeps it closed until the room is empty: it would wait for ever where others come and go.
    """
    if "PYTEST_XDIST_WORKER" not in os.environ:
        yield
        return
    alone = request.node.get_closest_marker("alone") is not None
    folder = tmp_path_factory.getbasetemp().parent  # that of all workers
    with (folder / "door.lock").open("w") as door, (folder / "room.lock").open("w") as room:
        fcntl.flock(door, fcntl.LOCK_EX)
        fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(door, fcntl.LOCK_UN)
        yield
        fcntl.flock(room, fcntl.LOCK_UN)  # closing would not do while a process that the test started lives


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.empty gives NaN (floats) or the least integer, so that an output nobody wrote cannot pass for a zero."""
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, _poison(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, _poison(getattr(torch.Tensor, name)))
    yield


def _poison(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = make(*args, **kwargs)
        if tensor.device.type == "meta":
            return tensor
        with torch.no_grad():
            if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
                return tensor.fill_(float("nan"))
            if tensor.dtype in (torch.int64, torch.int32, torch.int16):
                return tensor.fill_(torch.iinfo(tensor.dtype).min)
        return tensor

    return poisoned


@pytest.fixture
def force_backend(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, str], None]:
    """force_backend(module of an op, name): "auto" becomes it on a CPU, except for fp64 inputs, which only torch takes."""

    def force(module: Any, name: str) -> None:
        if name == "cpp" and extension() is None:
            pytest.skip("lldfast._C is not built")
        original = module.choose

        def choose(op: str, backend: str, *tensors: torch.Tensor) -> str:
            fixed = backend == "auto" and tensors[0].device.type == "cpu" and original(op, backend, *tensors) != "torch"
            return original(op, name if fixed else backend, *tensors)

        monkeypatch.setattr(module, "choose", choose)

    return force


@pytest.fixture
def broken_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that is there and cannot be used, on any machine: who chooses it fails, and says what was chosen."""
    zeros = torch.zeros

    def refused(*size: Any, device: Any = None, **options: Any) -> torch.Tensor:
        if device is not None and torch.device(device).type == "cuda":
            raise RuntimeError("out of order")
        return zeros(*size, device=device, **options)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", refused)


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """threads(n): the C++ kernels use n, whatever the work; 2 until it is called. Random numbers start from seed 0."""
    torch.manual_seed(0)

    def use(n: int) -> None:
        monkeypatch.setattr(native, "_threads", lambda work: n)

    use(2)
    return use


@pytest.fixture(scope="session")
def make_shards() -> MakeShards:
    """make_shards(folder, {domain: documents}, vocab_size=257, eot=256, dtype="uint16"): a document is its tokens without EOT."""

    def make(
        folder: Path,
        documents: Mapping[str, Sequence[Sequence[int] | np.ndarray]],
        vocab_size: int = 257,
        eot: int = 256,
        dtype: str = "uint16",
    ) -> TokenShards:
        tokenizer = {
            "name": "bytes",
            "kind": "bytes",
            "hash": "b" * 32,
            "vocab_size": vocab_size,
            "eot": eot,
            "bos": None,
            "file": None,
        }
        entries = {}
        for domain, texts in documents.items():
            with ShardWriter(folder / "shards", domain, dtype) as writer:
                for text in texts:
                    writer.add(np.append(np.asarray(text, dtype=np.int64), eot), n_bytes=len(text))
                entries[domain] = writer.close()
        write_manifest(folder / "shards", tokenizer, vocab_size, entries)
        return TokenShards(folder)

    return make


@pytest.fixture(scope="session")
def sample_texts() -> dict[str, list[str]]:
    """Four small domains that differ in kind and in size, one with a name that no file system likes."""
    rng = np.random.default_rng(7)
    words = ["the", "of", "and", "model", "data", "gradient", "river", "stone", "quiet", "light", "market", "in", "to", "a"]
    prose = [" ".join(rng.choice(words, size=int(n))) + "." for n in rng.integers(20, 60, 40)]
    code = [f"def f_{i}(x):\n    y = x * {i}\n    return y + {i * 7 % 13}\n" for i in range(50)]
    maths = [f"{a} + {b} = {a + b}; {a} * {b} = {a * b}\n" for a, b in rng.integers(0, 999, (70, 2)).tolist()]
    greek = ["γνῶθι σεαυτόν, μηδὲν ἄγαν " * int(n) for n in rng.integers(1, 6, 15)]
    return {"Prose": prose, "Code (Python)": code, "DM/Maths": maths, "Ελληνικά": greek}


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory, make_shards: MakeShards, sample_texts: dict[str, list[str]]) -> TokenShards:
    """The sample texts as byte tokens (vocabulary 257, EOT 256). Shared by the session: do not write into it."""
    documents = {domain: [list(text.encode()) for text in texts] for domain, texts in sample_texts.items()}
    return make_shards(tmp_path_factory.mktemp("prepared"), documents)


@pytest.fixture(scope="session")
def repository() -> Path:
    return Path(__file__).resolve().parent.parent
