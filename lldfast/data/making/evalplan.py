"""Which texts become the evaluation corpus, decided by keyed hashes of the documents' contents.

A document's place in the draw is a hash of (seed, its text): the choice does not depend on the order or number of inputs
read, every copy of a document shares its place, and one pass in constant memory finds it (only the smallest keys of each
domain are kept).

Held out are whole documents, as long as they hold little of the domain: more than one text is cut from a document only
where otherwise over a tenth of the domain would be lost to training. A domain of few, huge documents is held out by
RANGES: a range of a document's bytes goes to evaluation and the rest of it to training, never both. The parts "estimate"
and "measure" never share a document (or, in such a domain, a range).
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import xxhash

from lldfast.data.making.sources import Source, did_you_mean
from lldfast.errors import InputError

CHUNK_BYTES = 1024
MIN_BYTES = 256  # a chunk is kept if it is longer
RANGE_BYTES = (8192, 4096, 2048, 1024)
DEFAULT_TEXTS = 10_000  # the paper's
MOST_HELD_OUT = 0.5  # never more than this share of a domain's bytes


class Candidate(NamedTuple):
    key: int
    digest: str  # XXH3-128 of the text
    document: int
    n_bytes: int
    n_chunks: int


class Unit(NamedTuple):
    """Bytes [start, end) of a document, held out; `take` texts of it are used, in `part`."""

    document: int
    digest: str
    start: int
    end: int
    take: int
    part: str


Piece = tuple[Candidate, int, int, int]  # document, start, end, texts it can give


class Chosen(NamedTuple):
    held_out_by: str  # "documents" or "ranges"
    units: list[Unit]
    warning: str


@dataclass
class EvalPlan:
    """What the first reading of the corpus settles.

    Attributes:
        domains: by name, sorted: documents_read, bytes_read, empty_skipped, held_out_by, held_out_bytes.
        units: document number -> what of it is held out, in the order of the text.
        n_documents, n_bytes: of the whole corpus.
        warnings: domains that give fewer texts than were asked for.
    """

    domains: dict[str, dict[str, Any]]
    units: dict[int, list[Unit]]
    n_documents: int
    n_bytes: int
    warnings: list[str]

    @functools.cached_property
    def held(self) -> frozenset[str]:
        """Digests of the documents of which something is held out; other copies of them are dropped."""
        return frozenset(unit.digest for units in self.units.values() for unit in units)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"units": {str(i): [list(unit) for unit in units] for i, units in self.units.items()}}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> EvalPlan:
        units = {int(i): [Unit(*unit) for unit in units] for i, units in content["units"].items()}
        return cls(content["domains"], units, content["n_documents"], content["n_bytes"], content["warnings"])


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
    """[start, end) of the chunks of at most 1,024 bytes on character boundaries; those of 256 bytes or fewer fall out."""
    chunks, start = [], 0
    while start < len(raw):
        end = boundary(raw, start + CHUNK_BYTES)
        if end - start > MIN_BYTES and not raw[start:end].isspace():
            chunks.append((start, end))
        start = end
    return chunks


class Candidates:
    """The documents of one domain with the smallest keys, at most `limit`, and the domain's totals."""

    def __init__(self, limit: int) -> None:
        self.limit, self.documents, self.n_bytes = limit, 0, 0
        self._heap: list[tuple[int, Candidate]] = []  # largest key first
        self._held: set[str] = set()

    def add(self, seed: int, document: int, raw: bytes) -> None:
        self.documents += 1
        self.n_bytes += len(raw)
        digest = digest_of(raw)
        key = key_of(seed, digest)
        if digest in self._held or (len(self._heap) == self.limit and -self._heap[0][0] <= key):
            return
        n_chunks = len(cut(raw))
        if n_chunks:
            heapq.heappush(self._heap, (-key, Candidate(key, digest, document, len(raw), n_chunks)))
            self._held.add(digest)
            if len(self._heap) > self.limit:
                self._held.discard(heapq.heappop(self._heap)[1].digest)

    def sorted(self) -> list[Candidate]:
        return sorted(candidate for _, candidate in self._heap)


def make_plan(
    source: Source,
    *,
    eval_texts: int | None,
    eval_per_domain: int | None,
    estimate_share: float,
    seed: int,
    on_bytes: Callable[[int], object] = int,
) -> EvalPlan:
    """Read the whole source once and choose the evaluation texts; `on_bytes` hears the size of every document.

    Raises:
        InputError: no documents, a domain that was asked for but is not there or has only empty texts, or a domain that
            is too small for evaluation texts.
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
    _check_found(source, found)
    n_bytes = {name: found[name].n_bytes for name in sorted(found)}
    counts = quotas(n_bytes, eval_texts, eval_per_domain)
    entries: dict[str, dict[str, Any]] = {}
    units: dict[int, list[Unit]] = {}
    warnings: list[str] = []
    taken: set[str] = set()
    for name in n_bytes:
        chosen = plan_domain(name, found[name], counts[name], estimate_share, seed, taken)
        for unit in sorted(chosen.units):
            units.setdefault(unit.document, []).append(unit)
            taken.add(unit.digest)
        entries[name] = {
            "documents_read": found[name].documents,
            "bytes_read": found[name].n_bytes,
            "empty_skipped": source.empty[name],
            "held_out_by": chosen.held_out_by,
            "held_out_bytes": sum(unit.end - unit.start for unit in chosen.units),
        }
        warnings += [chosen.warning] if chosen.warning else []
    return EvalPlan(entries, units, n_documents, sum(n_bytes.values()), warnings)


def _check_found(source: Source, found: Mapping[str, Candidates]) -> None:
    for name in sorted(source.domains or ()):
        if name not in source.met:
            known = ", ".join(sorted(source.met)) or "none"
            raise InputError(f"no document has the domain {name!r}; there are: {known}.{did_you_mean(name, source.met)}")
    for name, count in sorted(source.empty.items()):
        if name not in found:
            raise InputError(f"domain {name!r} has no text: its documents ({count}) are empty")
    if not found:
        raise InputError(f"no documents in {', '.join(item.name for item in source.inputs[:5])}")


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
        InputError: the domain is too small for one text in each part.
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
            return Chosen("documents", units, "")
        take *= 2
    best: list[Unit] = []
    for size in RANGE_BYTES:
        pieces: list[Piece] = []
        for c in documents:
            if c.n_bytes <= size:
                pieces.append((c, 0, c.n_bytes, c.n_chunks))
            else:  # the last, shorter range of a document stays in training
                pieces += [(c, at, at + size, size // CHUNK_BYTES) for at in range(0, c.n_bytes - size + 1, size)]
        pieces.sort(key=lambda piece: (key_of(seed, piece[0].digest, piece[1]), piece[0].digest, piece[1]))
        units = _fill(pieces, targets, most)
        if _texts(units) > _texts(best):
            best = units
        if _texts(best) == quota:
            break
    if {unit.part for unit in best} != set(targets) or _bytes(best) >= found.n_bytes:
        raise InputError(
            f"domain {domain!r} is too small for evaluation texts: its documents ({found.documents}, {found.n_bytes} bytes) have"
            f" {sum(c.n_chunks for c in documents)} chunks of over {MIN_BYTES} bytes, where each part needs one and training the"
            " rest; add text or leave the domain out"
        )
    got = _texts(best)
    warning = f"domain {domain!r} gives {got} evaluation texts, not {quota}: more would take half of it from training"
    return Chosen("ranges", best, "" if got == quota else warning)


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
