import itertools
import random
import re

import pytest

from lldfast.data.making import evalplan
from lldfast.data.making.evalplan import Candidates, Unit, cut, plan_domain, quotas, texts_of
from lldfast.errors import InputError


def candidates(texts: list[str], seed: int = 0, limit: int = 1000) -> Candidates:
    found = Candidates(limit)
    for i, text in enumerate(texts):
        found.add(seed, i, text.encode())
    return found


def random_text(seed: int, n: int) -> str:
    draw = random.Random(seed)
    return "".join(draw.choice("abcdefghij éß漢 ") for _ in range(n))


@pytest.mark.parametrize("seed", range(5))
def test_chunks_are_whole_characters_and_of_the_right_size(seed):
    raw = random_text(seed, 5000).encode()
    chunks = cut(raw)
    assert [start for start, _ in chunks[1:]] == [end for _, end in chunks[:-1]]
    for start, end in chunks:
        assert 256 < end - start <= 1024
        assert raw[start:end].decode() in raw.decode()
    assert all(end - start > 1020 for start, end in chunks[:-1])  # at most a character is missing


@pytest.mark.parametrize(("n", "sizes"), [(0, []), (256, []), (257, [257]), (1024, [1024]), (1280, [1024]), (1281, [1024, 257])])
def test_limits_of_a_chunk(n, sizes):
    assert [end - start for start, end in cut(b"a" * n)] == sizes


@pytest.mark.parametrize("space", [" ", "\t\r\n", "\u00a0", "\u3000", "\u2003\x1c \u2028"])
def test_white_space_is_no_text(space):
    raw = (space * 1024).encode()
    raw = raw[: len(raw) // 1024 * 1024 // len(space.encode()) * len(space.encode())]
    assert cut(raw) == []
    assert len(cut(raw + b"a" * 1500)) in (1, 2)


@pytest.mark.parametrize("space", [" ", "\u00a0", "\u3000", "\u2003\n"])
@pytest.mark.parametrize("seed", range(3))
def test_ranges_of_white_space_are_not_chosen(space, seed):
    """A domain of a few huge documents, most of them white space: what is chosen has the texts that it is chosen for."""
    draw = random.Random(seed)
    texts = ["".join(draw.choice([random_text(i, 1500), space * 3000, "é" * 700]) for i in range(60)) for _ in range(3)]
    chosen = plan_domain("d", candidates(texts), 20, 0.5, seed, set())
    assert chosen.held_out_by == "ranges"
    for unit in chosen.units:
        raw = texts[unit.document].encode()
        start, end = evalplan.boundary(raw, unit.start), evalplan.boundary(raw, unit.end)
        found = texts_of(raw[start:end], unit, seed)
        assert len(found) == unit.take and all(text.strip() for text in found)


@pytest.mark.parametrize("seed", range(20))
def test_white_space_is_found_where_a_search_finds_it(seed):
    draw = random.Random(seed)
    kinds = ["abc ", "漢字", "ひらがな\u3000", " " * 300, "\u3000" * 84, "\u3000" * 86, "\u00a0 " * 90, "\n" * 256, "\t" * 257]
    text = "".join(draw.choice(kinds) for _ in range(40))
    spans = [(len(text[: m.start()].encode()), len(text[: m.end()].encode())) for m in re.finditer(r"\s+", text)]
    assert evalplan.blank_of(text.encode()) == tuple(span for span in spans if span[1] - span[0] > 256)


def test_the_draw_depends_on_contents_not_on_order():
    texts = [random_text(i, 1500) for i in range(300)]
    shuffled = random.Random(1).sample(texts, len(texts))

    def draw(documents: list[str], seed: int) -> set[tuple[str, str]]:
        return {(u.digest, u.part) for u in plan_domain("d", candidates(documents, seed), 20, 0.5, seed, set()).units}

    assert draw(texts, 0) == draw(shuffled, 0) != draw(texts, 1)


def test_a_bounded_heap_finds_what_a_sort_finds():
    texts = [random_text(i, 1100) for i in range(400)]
    full, few = candidates(texts).sorted(), candidates([*texts, *texts[:50]], limit=30).sorted()
    assert [c.digest for c in few] == [c.digest for c in full[:30]]
    assert all(c.document < 400 for c in few)  # the first of two copies


@pytest.mark.parametrize(("quota", "share"), [(20, 0.5), (21, 0.5), (20, 0.9), (2, 0.5), (3, 0.01), (40, 0.25)])
def test_both_parts_get_exactly_their_texts(quota, share):
    chosen = plan_domain("d", candidates([random_text(i, 3000) for i in range(400)]), quota, share, 0, set())
    taken = {part: sum(u.take for u in chosen.units if u.part == part) for part in ("estimate", "measure")}
    estimate = min(max(round(share * quota), 1), quota - 1)
    assert taken == {"estimate": estimate, "measure": quota - estimate}
    assert chosen.held_out_by == "documents"
    assert len({u.document for u in chosen.units}) == len(chosen.units) == quota  # one text a document while there are many


def test_more_texts_a_document_before_a_tenth_of_the_domain_is_lost():
    found = candidates([random_text(i, 8000) for i in range(100)])
    chosen = plan_domain("d", found, 40, 0.5, 0, set())
    assert chosen.held_out_by == "documents"
    assert sum(u.end - u.start for u in chosen.units) <= found.n_bytes / 10
    assert sum(u.take for u in chosen.units) == 40 and max(u.take for u in chosen.units) > 1


def test_few_huge_documents_are_held_out_by_ranges():
    found = candidates([random_text(i, 200_000) for i in range(3)])
    chosen = plan_domain("irc", found, 32, 0.5, 0, set())
    assert chosen.held_out_by == "ranges"
    assert sum(u.take for u in chosen.units) == 32
    assert all(u.end - u.start == 8192 for u in chosen.units)
    spans = sorted((u.document, u.start, u.end) for u in chosen.units)
    assert all(a[0] != b[0] or a[2] <= b[1] for a, b in itertools.pairwise(spans))


def test_small_domain_gives_what_it_can():
    found = candidates([random_text(i, 400) for i in range(10)])
    chosen = plan_domain("tiny", found, 100, 0.5, 0, set())
    assert 2 <= sum(u.take for u in chosen.units) <= 5
    assert sum(u.end - u.start for u in chosen.units) <= found.n_bytes / 2


@pytest.mark.parametrize("texts", [["short"], ["a" * 300], ["a" * 300, "b" * 300], ["ab " * 60] * 500])
def test_too_small_a_domain_is_named(texts):
    with pytest.raises(InputError, match="'tiny' is too small for evaluation texts"):
        plan_domain("tiny", candidates(texts), 2, 0.5, 0, set())


def test_documents_of_another_domain_are_not_taken_twice():
    texts = [random_text(i, 1100) for i in range(50)]
    first = {u.digest for u in plan_domain("a", candidates(texts), 10, 0.5, 0, set()).units}
    second = {u.digest for u in plan_domain("b", candidates(texts), 10, 0.5, 0, first).units}
    assert len(first) == len(second) == 10 and not first & second


def test_quotas():
    sizes = {"a": 700_000, "b": 299_000, "c": 1000}
    assert quotas(sizes, 100, None) == {"a": 70, "b": 30, "c": 2}
    assert sum(quotas({name: size for name, size in sizes.items() if name != "c"}, 101, None).values()) == 101
    assert quotas(sizes, None, 24) == {"a": 24, "b": 24, "c": 24}
    assert sum(quotas(sizes, None, None).values()) == pytest.approx(1_000_000 / 10 / 1024, abs=3)
    assert sum(quotas({"a": 10**9, "b": 10**9}, None, None).values()) == evalplan.DEFAULT_TEXTS


def test_texts_of_a_unit():
    raw = random_text(3, 6000).encode()
    every = texts_of(raw, Unit(0, "d", 0, len(raw), 99, "measure"), seed=0)
    some = texts_of(raw, Unit(0, "d", 0, len(raw), 3, "measure"), seed=0)
    assert len(some) == 3 and [t for t in every if t in some] == some
