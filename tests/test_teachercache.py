from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from lldfast.data.mixture import DomainMixture
from lldfast.data.shards import DTYPES
from lldfast.distill import cache as teachercache
from lldfast.distill.cache import CacheSpec, CacheWriter, TeacherCache
from lldfast.errors import CorruptError, InputError, WriteError

K, T = 5, 16
SPEC = CacheSpec(
    k=K,
    block_size=T,
    vocab_size=257,
    dtype="uint16",
    teacher={"name": "teacher", "hash": "t" * 32, "dtype": "float32"},
    tokenizer={"name": "bytes", "hash": "b" * 32},
    corpus_hash="c" * 16,
    windows={"Prose": 7, "DM/Maths": 3, "none": 0},
)


def numbers(n: int, seed: int, spec: CacheSpec = SPEC) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What a teacher could say of n windows: ids, logprob, rest."""
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(0, 3, (n, spec.block_size, spec.vocab_size)))
    values, ids = torch.log_softmax(logits, -1).topk(spec.k)
    rest = torch.log1p(-values.exp().sum(-1))
    return ids.numpy(), values.float().numpy(), rest.float().numpy()


def write(folder: Path, spec: CacheSpec = SPEC, pieces: int = 2) -> dict[str, tuple[np.ndarray, ...]]:
    """A finished cache, and what is in it."""
    content = {domain: numbers(n, seed, spec) for seed, (domain, n) in enumerate(spec.windows.items())}
    with CacheWriter(folder, spec) as writer:
        for domain, n in spec.windows.items():
            for first in range(writer.done[domain], n, pieces):
                writer.append(domain, *(part[first : first + pieces] for part in content[domain]))
        writer.finish()
    return content


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache", write(tmp_path / "cache")


def edit(folder: Path, change) -> None:
    stored = json.loads((folder / "cache.json").read_text())
    change(stored)
    (folder / "cache.json").write_text(json.dumps(stored))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def test_round_trip(cache):
    folder, content = cache
    opened = TeacherCache(folder)
    opened.verify()
    assert (opened.path, opened.k, opened.block_size, opened.vocab_size, opened.dtype) == (folder, K, T, 257, np.uint16)
    assert opened.domains == list(SPEC.windows) and opened.windows == SPEC.windows
    assert (opened.corpus_hash, opened.teacher, opened.tokenizer) == (SPEC.corpus_hash, SPEC.teacher, SPEC.tokenizer)
    for domain, (ids, logprob, rest) in content.items():
        assert np.array_equal(opened.part(domain, "ids"), ids.reshape(-1, K))
        assert np.array_equal(opened.part(domain, "logprob"), logprob.reshape(-1, K))
        assert np.array_equal(opened.part(domain, "rest"), rest.reshape(-1))
    assert not (folder / "progress.json").exists() and "3 domains, 10 windows of 16" in repr(opened)


def test_a_stranger_reads_the_files(cache):
    folder, content = cache
    ids, logprob, rest = content["DM/Maths"]
    assert np.array_equal(np.fromfile(folder / "DM%2FMaths.ids.bin", "<u2"), ids.ravel())
    assert np.array_equal(np.fromfile(folder / "DM%2FMaths.logprob.bin", "<f4"), logprob.ravel())
    assert np.array_equal(np.fromfile(folder / "DM%2FMaths.rest.bin", "<f4"), rest.ravel())
    stored = json.loads((folder / "cache.json").read_text())
    assert stored["format"] == "lldfast-teacher-cache" and stored["temperature"] == 1.0
    assert stored["domains"]["DM/Maths"]["ids"] == "DM%2FMaths.ids.bin"


def test_rows_go_by_the_callers_names(cache):
    folder, content = cache
    opened = TeacherCache(folder)
    names, windows = ["none", "DM/Maths", "Prose"], [(2, 6), (1, 0), (2, 0), (1, 2)]
    ids, logprob, rest = opened.rows(np.array([d for d, _ in windows]), np.array([T * w for _, w in windows]), names)
    assert ids.dtype == torch.int64 and logprob.dtype == rest.dtype == torch.float32
    assert ids.shape == logprob.shape == (4, T, K) and rest.shape == (4, T)
    for row, (d, w) in enumerate(windows):
        for found, expected in zip((ids, logprob, rest), content[names[d]], strict=True):
            assert np.array_equal(found[row].numpy(), expected[w])
    empty = opened.rows(np.array([], np.int64), np.array([], np.int64), names)
    assert [tuple(part.shape) for part in empty] == [(0, T, K), (0, T, K), (0, T)]


@pytest.mark.parametrize(
    ("domain", "start", "message"),
    [
        ("Prose", 5, r"token 5 of domain 'Prose' does not begin a cached window; there are 7 of 16 tokens"),
        ("Prose", 7 * T, "token 112 of domain 'Prose'"),
        ("Prose", -T, "token -16 of domain 'Prose'"),
        ("none", 0, "token 0 of domain 'none'.* there are 0 of 16"),
        ("Code", 0, "has no domain 'Code'; it has: Prose, DM/Maths, none"),
    ],
)
def test_rows_that_are_not_there(cache, domain, start, message):
    with pytest.raises(InputError, match=message):
        TeacherCache(cache[0]).rows(np.array([0]), np.array([start]), [domain])


def test_uint32_and_the_whole_vocabulary(tmp_path):
    spec = dataclasses.replace(SPEC, k=6, vocab_size=6, dtype="uint32", windows={"a": 2})
    write(tmp_path, spec)
    opened = TeacherCache(tmp_path)
    assert opened.part("a", "ids").dtype == DTYPES["uint32"] and (tmp_path / "a.ids.bin").stat().st_size == 2 * T * 6 * 4


def test_statistics(cache):
    folder, content = cache
    opened = TeacherCache(folder)
    _, logprob, rest = (part.astype(np.float64) for part in content["Prose"])
    p, r = np.exp(logprob), np.exp(rest)
    mass, entropy = opened.statistics("Prose")
    assert mass == pytest.approx(r.mean(), rel=1e-12)
    assert entropy == pytest.approx((-(p * logprob).sum(-1) - r * rest).mean(), rel=1e-12)
    assert all(math.isnan(value) for value in opened.statistics("none"))
    assert opened.n_bytes("Prose") == 7 * T * (K * 6 + 4) and opened.n_bytes("none") == 0


def test_statistics_without_a_rest(tmp_path):
    with CacheWriter(tmp_path, dataclasses.replace(SPEC, k=2, vocab_size=2, windows={"a": 1})) as writer:
        half = np.full((1, T, 2), math.log(0.5))
        writer.append("a", np.tile(np.arange(2), (1, T, 1)), half, np.full((1, T), -np.inf))
        writer.finish()
    assert TeacherCache(tmp_path).statistics("a") == (0.0, pytest.approx(math.log(2)))


class Killed(Exception):
    pass


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("at", [1, 3, 5])
def test_a_killed_writer_goes_on(tmp_path, monkeypatch, hard, at):
    """After a hard kill what was committed is there; after an error everything that was appended."""
    write(tmp_path / "whole")
    if hard:
        monkeypatch.setattr(CacheWriter, "__exit__", lambda self, *_: None)
    append, calls = CacheWriter.append, []

    def killed(self, domain, ids, logprob, rest):
        if len(calls) == at:
            # In the middle: one part is written, the others are not.
            self._select(domain)
            self._handles["ids"].write(b"x" * 1000)
            self._handles["ids"].flush()
            raise Killed
        calls.append(domain)
        append(self, domain, ids, logprob, rest)
        if hard and len(calls) == at - 1:
            self.commit()

    monkeypatch.setattr(CacheWriter, "append", killed)
    with pytest.raises(Killed):
        write(tmp_path / "broken")
    monkeypatch.undo()
    with pytest.raises(InputError, match="is unfinished: run the same `lldfast teach` again"):
        TeacherCache(tmp_path / "broken")
    done = CacheWriter(tmp_path / "broken", SPEC).done
    # The last piece of Prose is one window. Going to the next domain commits too.
    windows = {1: (2, 0), 3: (6, 0), 5: (7, 2)}[at]
    committed = {1: (0, 0), 3: (4, 0), 5: (7, 0)}[at]
    assert tuple(done.values())[:2] == (committed if hard else windows)
    write(tmp_path / "broken")
    assert files(tmp_path / "broken") == files(tmp_path / "whole")


def test_commits_by_the_clock(tmp_path, monkeypatch):
    monkeypatch.setattr(teachercache, "COMMIT_SECONDS", 0.0)
    writer = CacheWriter(tmp_path, SPEC)
    writer.append("Prose", *numbers(2, 0))
    assert json.loads((tmp_path / "progress.json").read_text())["done"] == {"Prose": 2, "DM/Maths": 0, "none": 0}
    writer._close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 4}, "holds an unfinished teacher cache whose k is 5, not 4"),
        ({"corpus_hash": "d" * 16}, "corpus_hash is 'c+', not 'd+'"),
        ({"teacher": {"hash": "u" * 32, "dtype": "float32"}}, "teacher hash is 't+', not 'u+'"),
        ({"teacher": {"hash": "t" * 32, "dtype": "bfloat16"}}, "teacher dtype is 'float32', not 'bfloat16'"),
        ({"tokenizer": {"hash": "x"}}, "tokenizer hash is 'b+', not 'x'"),
        ({"windows": {"Prose": 7}}, "domains is .* not"),
        ({"windows": {**SPEC.windows, "Prose": 8}}, "domain 'Prose' has 7 windows, not 8"),
    ],
)
def test_going_on_with_something_else(tmp_path, change, message):
    with CacheWriter(tmp_path, SPEC) as writer:
        writer.append("Prose", *numbers(2, 0))
    with pytest.raises(InputError, match=message):
        CacheWriter(tmp_path, dataclasses.replace(SPEC, **change))
    moved = dataclasses.replace(SPEC, teacher={**SPEC.teacher, "name": "renamed"})
    assert CacheWriter(tmp_path, moved).done["Prose"] == 2


def test_going_on_without_the_files(tmp_path):
    with CacheWriter(tmp_path, SPEC) as writer:
        writer.append("Prose", *numbers(2, 0))
    (tmp_path / "Prose.rest.bin").write_bytes(b"")
    with (
        CacheWriter(tmp_path, SPEC) as writer,
        pytest.raises(CorruptError, match=r"Prose\.rest\.bin: domain 'Prose' has 0 bytes on disk where progress\.json says 128"),
    ):
        writer.append("Prose", *numbers(2, 0))


@pytest.mark.parametrize("change", [{"done": {"Prose": 9}}, {"done": {}}, {"k": 0}, {"format": "x"}, {"version": 2}])
def test_damaged_progress(tmp_path, change):
    CacheWriter(tmp_path, SPEC)
    path = tmp_path / "progress.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CorruptError, match=r"progress\.json"):
        CacheWriter(tmp_path, SPEC)


def test_writer_refuses(tmp_path):
    ids, logprob, rest = numbers(8, 0)
    with CacheWriter(tmp_path, SPEC) as writer:
        with pytest.raises(InputError, match="domain 'Prose': window 8 of 7"):
            writer.append("Prose", ids, logprob, rest)
        with pytest.raises(InputError, match=r"domain 'Prose': rest has shape \(2, 15\), not \(2, 16\)"):
            writer.append("Prose", ids[:2], logprob[:2], rest[:2, 1:])
        with pytest.raises(InputError, match="domain 'Prose' has 0 of 7 windows"):
            writer.finish()
    assert not (tmp_path / "cache.json").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, where every write meets a full disk")
def test_disk_full(tmp_path):
    (tmp_path / "Prose.rest.bin").symlink_to("/dev/full")
    with (
        CacheWriter(tmp_path, SPEC) as writer,
        pytest.raises(WriteError, match=r"cannot write .*Prose\.rest\.bin"),
    ):
        writer.append("Prose", *numbers(2, 0))
        writer.commit()
    assert json.loads((tmp_path / "progress.json").read_text())["done"]["Prose"] == 0


@pytest.mark.parametrize("part", ["ids", "logprob", "rest"])
def test_truncated(cache, part):
    path = cache[0] / f"Prose.{part}.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(CorruptError, match=rf"Prose\.{part}\.bin: domain 'Prose' has .* where cache\.json says .* truncated"):
        TeacherCache(cache[0])


def test_missing_file(cache):
    (cache[0] / "DM%2FMaths.rest.bin").unlink()
    with pytest.raises(CorruptError, match=r"rest\.bin: the file of domain 'DM/Maths' is missing"):
        TeacherCache(cache[0])


@pytest.mark.parametrize("part", ["ids", "logprob", "rest"])
def test_one_flipped_bit(cache, part):
    path = cache[0] / f"DM%2FMaths.{part}.bin"
    data = bytearray(path.read_bytes())
    data[50] ^= 1
    path.write_bytes(data)
    opened = TeacherCache(cache[0])  # sizes are right
    with pytest.raises(CorruptError, match=rf"{part}\.bin: checksum .* \(domain 'DM/Maths'\)"):
        opened.verify()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format="other"), "is not a lldfast-teacher-cache file"),
        (lambda m: m.update(version=2), "format version 2"),
        (lambda m: m.update(dtype="int7"), "int7"),
        (lambda m: m.update(k=300), "k=300"),
        (lambda m: m.update(block_size=0), "block_size=0"),
        (lambda m: m.update(temperature=2.0), "temperature=2"),
        (lambda m: m.update(vocab_size=float("inf")), "field is missing or wrong"),
        (lambda m: m.pop("tokenizer"), "tokenizer"),
        (lambda m: m["tokenizer"].pop("hash"), "hash"),
        (lambda m: m["domains"]["Prose"].pop("rest_xxh3"), "rest_xxh3"),
        (lambda m: m["domains"]["Prose"].update(windows=-1), "field is missing or wrong"),
        (lambda m: m["domains"]["Prose"].update(ids="../secret.bin"), "not the name of a file in this folder"),
        (lambda m: m.update(domains={}), "lists no domain"),
        (lambda m: m.update(domains=[]), "field is missing or wrong"),
    ],
)
def test_corrupted_header(cache, change, message):
    edit(cache[0], change)
    with pytest.raises(CorruptError, match=message) as caught:
        TeacherCache(cache[0])
    assert "cache.json" in str(caught.value)


def test_no_cache(tmp_path):
    with pytest.raises(InputError, match=r"has no cache\.json; it is not a teacher cache"):
        TeacherCache(tmp_path)


def test_check_names_both_sides(tmp_path, shards):
    windows = {domain: n // T for domain, n in shards.n_tokens.items()}
    spec = dataclasses.replace(SPEC, tokenizer=shards.tokenizer, corpus_hash=shards.corpus_hash, windows=windows)
    write(tmp_path / "right", spec)
    TeacherCache(tmp_path / "right").check(shards, T)
    with pytest.raises(InputError, match="right has windows of 16 tokens, not of 32"):
        TeacherCache(tmp_path / "right").check(shards, 32)
    for name, change, message in [
        ("tokenizer", {"tokenizer": {"name": "gpt2", "hash": "beef"}}, r"'gpt2' \(hash beef\).* made with 'bytes' \(hash b+\)"),
        ("corpus", {"corpus_hash": "0" * 16}, f"from the corpus 0000000000000000, but .* is the corpus {shards.corpus_hash}"),
        ("domains", {"windows": {"Prose": 2}}, r"lacks the domain 'Code \(Python\)' of .*; it has: Prose"),
    ]:
        write(tmp_path / name, dataclasses.replace(spec, **change))
        with pytest.raises(InputError, match=message) as caught:
            TeacherCache(tmp_path / name).check(shards, T)
        assert str(tmp_path / name) in str(caught.value) and str(shards.path) in str(caught.value)
    TeacherCache(tmp_path / "domains").check(shards, T, ["Prose"])


@pytest.mark.parametrize("limit", [None, 2])
def test_an_aligned_mixture_reads_it(tmp_path, shards, limit):
    """Every row of the mixture has its rows in the cache, and they are those of its own window."""
    windows = {domain: min(n // T, limit or n) for domain, n in shards.n_tokens.items()}
    spec = dataclasses.replace(SPEC, k=1, tokenizer=shards.tokenizer, corpus_hash=shards.corpus_hash, windows=windows)
    with CacheWriter(tmp_path, spec) as writer:
        for domain, n in windows.items():
            own = np.asarray(shards.tokens(domain)[: n * T]).reshape(n, T, 1)  # a teacher that repeats the last token
            writer.append(domain, own, np.zeros(own.shape), np.full((n, T), -np.inf))
        writer.finish()
    cache = TeacherCache(tmp_path)
    cache.check(shards, T)
    even = dict.fromkeys(shards.domains, 0.25)
    visited = None if limit is None else cache.windows
    mixture = DomainMixture(shards, even, block_size=T, batch_size=8, aligned=True, windows=visited)
    for _ in range(20):
        batch = mixture.next_batch()
        assert torch.equal(cache.rows(batch.domain, batch.start, mixture.domains)[0][:, :, 0], batch.x)
