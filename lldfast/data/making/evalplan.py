"""Which texts become the evaluation corpus, decided by keyed hashes of the documents' contents.

A document's place in the draw is a hash of (seed, its text): the choice does not depend on the order or number of inputs
read, every copy of a document shares its place, and one pass in constant memory finds it (only the smallest keys of each
domain are kept).

Held out are whole documents, as long as they hold little of the domain: more than one text is cut from a document only
where otherwise over a tenth of the domain would be lost to training. A domain of few, huge documents is held out by
RANGES: a range of a document's bytes goes to evaluation and the rest of it to training, never both. The parts "estimate"
and "measure" never share a document (or, in such a domain, a range).

White space is no text, in any script: chunks of nothing else are not counted on, not cut and not chosen.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import xxhash

from lldfast.data.evalset import PARTS
from lldfast.data.making.records import did_you_mean
from lldfast.data.making.sources import Source
from lldfast.errors import InputError, listed

CHUNK_BYTES = 1024
MIN_BYTES = 256  # a chunk is kept if it is longer
RANGE_BYTES = (8192, 4096, 2048, 1024)
DEFAULT_TEXTS = 10_000  # the paper's
MOST_HELD_OUT = 0.5  # never more than this share of a domain's bytes
# So much white space could make a chunk without text; a character has three bytes at most there.
BLANK = re.compile(rf"\s{{{-(-MIN_BYTES // 3)},}}")
# The bytes that white space is made of in UTF-8, as 1, and others as 0: what most texts need no closer look for.
BLANK_BYTES = bytes(i in {byte for c in map(chr, range(0x3001)) if c.isspace() for byte in c.encode()} for i in range(256))
STRIDE = 32
SLACK = 32  # bytes by which the chunks of a range begin before their grid: up to three for every character that is not cut
ENOUGH = (
    f"A domain needs three different documents of over {MIN_BYTES} bytes (a text for each part and the rest to train on), or as"
    f" many pieces of {CHUNK_BYTES:,} bytes in longer ones"
)


class Candidate(NamedTuple):
    key: int
    digest: str  # XXH3-128 of the text
    document: int
    n_bytes: int
    n_chunks: int
    blank: tuple[tuple[int, int], ...] = ()  # [start, end) in bytes of the white space that is long enough to fill a chunk


class Unit(NamedTuple):
    """Bytes [start, end) of a document, held out; `take` texts of it are used, in `part`."""

    document: int
    digest: str
    start: int
    end: int
    take: int
    part: str


Piece = tuple[Candidate, int, int, int]  # document, start, end, texts it can give


class TooSmall(InputError):
    """A domain that cannot give a text to each part and something to train on; `has` says what it has."""

    def __init__(self, domain: str, has: str) -> None:
        super().__init__(f"domain {domain!r} is too small for evaluation texts: it has {has}. {ENOUGH}")
        self.has = has


class Chosen(NamedTuple):
    held_out_by: str  # "documents" or "ranges"
    units: list[Unit]


@dataclass
class EvalPlan:
    """What the first reading of the corpus settles.

    Attributes:
        domains: by name, sorted: documents_read, bytes_read, empty_skipped, held_out_by, held_out_bytes.
        units: document number -> what of it is held out, in the order of the text.
        n_documents, n_bytes: of the whole corpus, dropped domains included.
        warnings: domains that give fewer texts than were asked for, or too few for error bars.
        dropped: domains that are left out: documents_read, bytes_read, and what they have in place of enough.
        skipped: the records that were left out (`Rejects.to_json`).
        domain_field: the label's, which a reader that begins in the middle could not tell.
    """

    domains: dict[str, dict[str, Any]]
    units: dict[int, list[Unit]]
    n_documents: int
    n_bytes: int
    warnings: list[str]
    dropped: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    skipped: dict[str, Any] = dataclasses.field(default_factory=dict)
    domain_field: str | None = None

    @functools.cached_property
    def held(self) -> frozenset[str]:
        """Digests of the documents of which something is held out; other copies of them are dropped."""
        return frozenset(unit.digest for units in self.units.values() for unit in units)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"units": {str(i): [list(unit) for unit in units] for i, units in self.units.items()}}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> EvalPlan:
        units = {int(i): [Unit(*unit) for unit in units] for i, units in content["units"].items()}
        return cls(**{**content, "units": units})


def digest_of(raw: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(raw)


def key_of(seed: int, *parts: object) -> int:
    """A uniform 64-bit number that is a pure function of its arguments."""
    return xxhash.xxh3_64_intdigest("\0".join(map(str, parts)).encode(), seed=seed % 2**64)


def boundary(raw: bytes, at: int) -> int:
    """The largest position <= `at` that does not cut a UTF-8 character."""
    if at >= len(raw):
        return len(raw)
    while at > 0 and raw[at] & 0xC0 == 0x80:
        at -= 1
    return at


def cut(raw: bytes) -> list[tuple[int, int]]:
    """[start, end) of the chunks of at most 1,024 bytes on character boundaries; those of 256 bytes or fewer, and white space,
    fall out."""
    chunks, start = [], 0
    while start < len(raw):
        end = boundary(raw, start + CHUNK_BYTES)
        if end - start > MIN_BYTES and not (BLANK_BYTES[raw[start]] and raw[start:end].decode().isspace()):
            chunks.append((start, end))
        start = end
    return chunks


def blank_of(raw: bytes) -> tuple[tuple[int, int], ...]:
    """[start, end) in bytes of the white space of a text that could fill a chunk."""
    # Such a stretch has so many bytes at every STRIDE of it.
    if b"\1" * (MIN_BYTES // STRIDE) not in raw[::STRIDE].translate(BLANK_BYTES):
        return ()
    text = raw.decode()
    found, characters, at = [], 0, 0
    for match in BLANK.finditer(text):
        at += len(text[characters : match.start()].encode())
        end = at + len(match[0].encode())
        if end - at > MIN_BYTES:
            found.append((at, end))
        characters, at = match.end(), end
    return tuple(found)


def chunks_in(candidate: Candidate, start: int, end: int) -> int:
    """Texts that a range of a document gives at least: its 1,024-byte chunks that are not all white space."""

    def is_blank(at: int) -> bool:
        return any(first <= at and at + CHUNK_BYTES - SLACK <= last for first, last in candidate.blank)

    return sum(not is_blank(at) for at in range(start, end, CHUNK_BYTES))


class Candidates:
    """The documents of one domain with the smallest keys, at most `limit`, and the domain's totals.

    Attributes:
        documents, n_bytes: of the domain.
        others: whether it has documents that are no candidates, which are never held out.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.documents, self.n_bytes, self.others = limit, 0, 0, False
        self._heap: list[tuple[int, Candidate]] = []  # largest key first
        self._held: set[str] = set()

    def add(self, seed: int, document: int, raw: bytes) -> None:
        self.documents += 1
        self.n_bytes += len(raw)
        digest = digest_of(raw)
        key = key_of(seed, digest)
        if digest in self._held or (len(self._heap) == self.limit and -self._heap[0][0] <= key):
            self.others |= digest not in self._held
            return
        n_chunks = len(cut(raw))
        if not n_chunks:
            self.others = True
            return
        heapq.heappush(self._heap, (-key, Candidate(key, digest, document, len(raw), n_chunks, blank_of(raw))))
        self._held.add(digest)
        if len(self._heap) > self.limit:
            self.others = True
            self._held.discard(heapq.heappop(self._heap)[1].digest)

    def sorted(self) -> list[Candidate]:
        return sorted(candidate for _, candidate in self._heap)

    def trains(self, units: Iterable[Unit], taken: set[str]) -> bool:
        """Whether something is left to train on without `units`, and without copies of the documents `taken`."""
        held: Counter[str] = Counter()
        for unit in units:
            held[unit.digest] += unit.end - unit.start
        return self.others or any(c.digest not in taken or 0 < held[c.digest] < c.n_bytes for _, c in self._heap)


def make_plan(
    source: Source,
    *,
    eval_texts: int | None,
    eval_per_domain: int | None,
    estimate_share: float,
    seed: int,
    most_skipped: float = 0.0,
    drop_small: bool = False,
    on_bytes: Callable[[int], object] = int,
) -> EvalPlan:
    """Read the whole source once and choose the evaluation texts; `on_bytes` hears the size of every document.

    Args:
        most_skipped: share of the records that may be skipped as bad.
        drop_small: leave out domains that are too small for evaluation texts.

    Raises:
        InputError: no documents, a domain that was asked for but is not there, domains that have only empty texts or are too
            small for evaluation texts (all of them are named), or too many bad records.
    """
    wanted = eval_per_domain or eval_texts or DEFAULT_TEXTS
    found: dict[str, Candidates] = {}
    n_documents = 0
    for document in source.documents():
        raw = document.text.encode()
        # A tenth more than could be needed: some may turn out to be held out by another domain already.
        found.setdefault(document.domain, Candidates(max(1000, wanted + wanted // 10))).add(seed, document.number, raw)
        n_documents += 1
        on_bytes(len(raw))
    source.rejects.check(most_skipped)
    _check_asked(source)
    small = {name: f"no text, its documents ({n}) are empty" for name, n in source.empty.items() if name not in found}
    if not found and not small:
        raise InputError(f"no documents in {', '.join(item.name for item in source.inputs[:5])}")
    while True:
        kept = {name: found[name] for name in sorted(found) if name not in small}
        counts = quotas({name: item.n_bytes for name, item in kept.items()}, eval_texts, eval_per_domain)
        chosen, too_small = _choose(kept, counts, estimate_share, seed)
        small |= too_small  # without these the others have other shares
        if not (too_small and drop_small):
            break
    if small and (not drop_small or not chosen):
        raise InputError(_named(small))
    units: dict[int, list[Unit]] = {}
    for choice in chosen.values():
        for unit in sorted(choice.units):
            units.setdefault(unit.document, []).append(unit)
    entries = {
        name: {
            "documents_read": found[name].documents,
            "bytes_read": found[name].n_bytes,
            "empty_skipped": source.empty[name],
            "held_out_by": choice.held_out_by,
            "held_out_bytes": _bytes(choice.units),
        }
        for name, choice in chosen.items()
    }
    dropped = {
        name: {
            "documents_read": found[name].documents if name in found else 0,
            "bytes_read": found[name].n_bytes if name in found else 0,
            "has": has,
        }
        for name, has in sorted(small.items())
    }
    left_out = [f"left out, too small for evaluation texts: {listed(map(repr, dropped))}"] if dropped else []
    option = "eval_texts" if eval_per_domain is None else "eval_per_domain"
    warnings = left_out + _fewer(chosen, counts, option) + _without_errors(chosen)
    n_bytes = sum(item.n_bytes for item in found.values())
    return EvalPlan(entries, units, n_documents, n_bytes, warnings, dropped, source.rejects.to_json(), source.domain_field)


def _check_asked(source: Source) -> None:
    missing = sorted((source.domains or set()) - source.met)
    if missing:
        known = ", ".join(sorted(source.met)) or "none"
        names = ", ".join(f"{name!r}" for name in missing)
        hints = "".join(did_you_mean(name, source.met) for name in missing)
        raise InputError(f"no document has the domain {names}; there are: {known}.{hints}")


def _choose(
    found: Mapping[str, Candidates], counts: Mapping[str, int], estimate_share: float, seed: int
) -> tuple[dict[str, Chosen], dict[str, str]]:
    """(what is held out of each domain, why for those of which nothing can be)."""
    chosen: dict[str, Chosen] = {}
    small: dict[str, str] = {}
    taken: set[str] = set()
    for name, item in found.items():
        try:
            chosen[name] = plan_domain(name, item, counts[name], estimate_share, seed, taken)
        except TooSmall as error:
            small[name] = error.has
            continue
        taken |= {unit.digest for unit in chosen[name].units}
    for name in [name for name, choice in chosen.items() if not found[name].trains(choice.units, taken)]:
        del chosen[name]
        small[name] = f"no documents to train on, the rest of its {found[name].documents} are copies of evaluation documents"
    return chosen, small


def _named(small: Mapping[str, str]) -> str:
    """Which domains cannot be used, all of them, and why."""
    way = "add text, leave the domain out, or drop what is too small (option drop_small_domains, --drop-small-domains)"
    if len(small) == 1:
        ((name, has),) = small.items()
        return f"domain {name!r} is too small for evaluation texts: it has {has}. {ENOUGH}; {way}"
    domains = ", ".join(f"{name!r} ({has})" for name, has in sorted(small.items()))
    return f"{len(small)} domains are too small for evaluation texts: {domains}. {ENOUGH}; {way}"


def _fewer(chosen: Mapping[str, Chosen], counts: Mapping[str, int], option: str) -> list[str]:
    """A warning that names the domains which give fewer texts than `counts` says."""
    got = {name: _texts(choice.units) for name, choice in chosen.items()}
    few = [f"{name!r} ({got[name]:,} of {counts[name]:,})" for name in chosen if got[name] < counts[name]]
    if not few:
        return []
    why = f"more would take half of a domain from training (option {option}, --{option.replace('_', '-')})"
    return [f"fewer evaluation texts than asked for: {listed(few)}; {why}"]


def _without_errors(chosen: Mapping[str, Chosen]) -> list[str]:
    """A warning that names the domains of which a part has a single text: one text has no spread."""
    few = [
        name for name, choice in chosen.items() if any(_texts(u for u in choice.units if u.part == part) < 2 for part in PARTS)
    ]
    if not few:
        return []
    names = listed(map(repr, few))
    way = "option eval_per_domain, --eval-per-domain"
    return [f"one evaluation text in a part: {names}; errors cannot be estimated from fewer than two ({way})"]


def quotas(n_bytes: Mapping[str, int], eval_texts: int | None, eval_per_domain: int | None) -> dict[str, int]:
    """Texts of each domain: a fixed number, or `eval_texts` in proportion to bytes (largest remainders, at least 2 each).

    With neither given: 10,000 as in the paper, but no more than a tenth of the corpus.
    """
    if eval_per_domain is not None:
        return dict.fromkeys(n_bytes, eval_per_domain)
    total = sum(n_bytes.values())
    wanted = eval_texts if eval_texts is not None else max(2 * len(n_bytes), min(DEFAULT_TEXTS, total // (10 * CHUNK_BYTES)))
    exact = {name: wanted * size / total for name, size in n_bytes.items()}
    share = {name: int(value) for name, value in exact.items()}
    for name in sorted(exact, key=lambda name: (share[name] - exact[name], name))[: wanted - sum(share.values())]:
        share[name] += 1
    return {name: max(2, count) for name, count in share.items()}


def plan_domain(domain: str, found: Candidates, quota: int, estimate_share: float, seed: int, taken: set[str]) -> Chosen:
    """Choose the held-out units of a domain; `taken` are digests that another domain holds out already.

    Raises:
        TooSmall: the domain is too small for one text in each part.
    """
    documents = [candidate for candidate in found.sorted() if candidate.digest not in taken]
    to_estimate = min(max(round(estimate_share * quota), 1), quota - 1)
    targets = {"estimate": to_estimate, "measure": quota - to_estimate}
    most = MOST_HELD_OUT * found.n_bytes
    allowed = max(found.n_bytes / 10, min(most, 2 * quota * CHUNK_BYTES))
    take, largest = 1, max((candidate.n_chunks for candidate in documents), default=0)
    while take < 2 * largest:
        units = _fill([(c, 0, c.n_bytes, min(take, c.n_chunks)) for c in documents], targets, most)
        if _texts(units) == quota and _bytes(units) <= allowed:
            return Chosen("documents", units)
        take *= 2
    best: list[Unit] = []
    for size in RANGE_BYTES:
        pieces: list[Piece] = []
        for c in documents:
            if c.n_bytes <= size:
                pieces.append((c, 0, c.n_bytes, c.n_chunks))
            else:  # the last, shorter range of a document stays in training
                ranges = [(at, at + size) for at in range(0, c.n_bytes - size + 1, size)]
                pieces += [(c, start, end, n) for start, end in ranges if (n := chunks_in(c, start, end))]
        pieces.sort(key=lambda piece: (key_of(seed, piece[0].digest, piece[1]), piece[0].digest, piece[1]))
        units = _fill(pieces, targets, most)
        if _texts(units) > _texts(best):
            best = units
        if _texts(best) == quota:
            break
    if {unit.part for unit in best} != set(targets) or _bytes(best) >= found.n_bytes:
        have = f"{len(documents)} different documents with over {MIN_BYTES} bytes of text"
        raise TooSmall(domain, f"{have}, of {found.documents} ({found.n_bytes} bytes)")
    return Chosen("ranges", best)


def _fill(pieces: Iterable[Piece], targets: Mapping[str, int], most_bytes: float) -> list[Unit]:
    """Give the pieces, in order, to the part that lacks more texts, until neither lacks any or `most_bytes` are used."""
    missing = dict(targets)
    units: list[Unit] = []
    size = 0
    for c, start, end, take in pieces:
        part = max(missing, key=lambda name: missing[name])
        if not missing[part]:
            break
        # However small the domain, each part may have one piece.
        if size + end - start > most_bytes and any(unit.part == part for unit in units):
            continue
        units.append(Unit(c.document, c.digest, start, end, min(take, missing[part]), part))
        missing[part] -= units[-1].take
        size += end - start
    return units


def _texts(units: Iterable[Unit]) -> int:
    return sum(unit.take for unit in units)


def _bytes(units: Iterable[Unit]) -> int:
    return sum(unit.end - unit.start for unit in units)


def texts_of(raw: bytes, unit: Unit, seed: int) -> list[str]:
    """The evaluation texts of a unit, in the order of the document; `raw` are the unit's own bytes."""
    chunks = cut(raw)
    if len(chunks) > unit.take:
        chunks = sorted(sorted(chunks, key=lambda chunk: key_of(seed, unit.digest, unit.start, chunk[0]))[: unit.take])
    return [raw[start:end].decode() for start, end in chunks]
