"""The second reading of `prepare`: documents -> token ids, on threads, into part files that survive a kill.

Encoding releases the GIL, so threads scale; reading, which does not, runs in the main thread while they encode. A part
file holds the tokens of about 16 MiB of text, the evaluation texts met in it, and the place where reading goes on. It is
written atomically: the part files that are there are all that a resumed run needs.
"""

from __future__ import annotations

import itertools
import json
import zipfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from lldfast.data.making.evalplan import EvalPlan, Unit, boundary, digest_of, texts_of
from lldfast.data.making.sources import Document, Place, Source
from lldfast.data.tokenizer import Ids, TextError, Tokenizer
from lldfast.errors import CorruptError, InputError
from lldfast.files import atomic_path

PART_BYTES = 16 << 20  # text per part file: the most that a kill can cost, and that is held in memory
GROUP_BYTES = 256 << 10  # text handed to a thread at a time


class Piece(NamedTuple):
    """A stretch of a document: training text (`unit` None) or held out."""

    text: str
    n_bytes: int
    unit: Unit | None


class Row(NamedTuple):
    document: Document
    n_bytes: int
    pieces: list[Piece]  # empty: a copy of a held-out document, or of a domain that is dropped


EncodedRow = tuple[Row, list[Ids]]


@dataclass
class State:
    """How far the encoding has come after a part."""

    place: Place = (0, 0, 0)
    n_bytes: int = 0
    complete: bool = False


@dataclass
class Part:
    """Tokens of some training documents, and what else was met while they were encoded."""

    state: State
    tokens: npt.NDArray[Any]
    lengths: npt.NDArray[np.int64]  # of each document, in tokens
    n_bytes: npt.NDArray[np.int64]  # of each document's text
    domain: npt.NDArray[np.int32]  # position of its domain in the plan
    texts: list[tuple[str, str, str, int]] = field(default_factory=list)  # evaluation: text, domain, part, document
    held_out: list[str] = field(default_factory=list)  # token hashes of held-out stretches
    copies: dict[str, int] = field(default_factory=dict)  # dropped copies of held-out documents, by domain

    def save(self, path: Path) -> None:
        rest = {"state": vars(self.state), "texts": self.texts, "held_out": self.held_out, "copies": self.copies}
        raw = np.frombuffer(json.dumps(rest).encode(), np.uint8)
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, tokens=self.tokens, lengths=self.lengths, n_bytes=self.n_bytes, domain=self.domain, rest=raw)

    @classmethod
    def load(cls, path: Path) -> Part:
        try:
            with np.load(path) as arrays:
                rest = json.loads(arrays["rest"].tobytes())
                state = State(tuple(rest["state"]["place"]), rest["state"]["n_bytes"], rest["state"]["complete"])
                tokens, lengths, n_bytes, domain = (arrays[name] for name in ("tokens", "lengths", "n_bytes", "domain"))
                texts = [tuple(text) for text in rest["texts"]]
                return cls(state, tokens, lengths, n_bytes, domain, texts, rest["held_out"], rest["copies"])
        except (zipfile.BadZipFile, KeyError, ValueError, EOFError) as error:
            raise CorruptError(f"{path}, left by an interrupted run, is damaged ({error}); run again with resume off") from None


def token_dtype(tokenizer: Tokenizer) -> np.dtype[Any]:
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)


def token_hash(ids: npt.NDArray[Any]) -> str:
    """XXH3-64 of a document's tokens (as uint32, end-of-text included)."""
    return xxhash.xxh3_64_hexdigest(np.ascontiguousarray(ids, np.uint32).tobytes())


def encode(
    source: Source,
    plan: EvalPlan,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    seed: int,
    workers: int,
    on_progress: Callable[[int, int], object] = lambda n_bytes, n_tokens: None,
) -> list[Path]:
    """Write the part files that `folder` does not have yet; returns all of them, in order.

    `on_progress` hears (bytes, tokens) of every document; on resume first (bytes done, 0).

    Raises:
        InputError: the source is not what was planned for, or the tokenizer refuses a text (file and line named).
    """
    parts: list[Path] = []
    state = State()
    while (path := folder / f"part-{len(parts):06}.npz").exists():
        state = Part.load(path).state
        parts.append(path)
    if state.complete:
        return parts
    on_progress(state.n_bytes, 0)
    with ThreadPoolExecutor(workers) as pool:
        rows = ((d, *pieces_of(d, plan)) for d in source.documents(state.place))
        stream = encoded((Row(*row) for row in rows), tokenizer, pool, source.where, ahead=2 * workers + 2)
        try:
            while not state.complete:
                part = _collect(stream, state, plan, seed, token_dtype(tokenizer), on_progress)
                state = part.state
                if state.complete and (state.place[2], state.n_bytes) != (plan.n_documents, plan.n_bytes):
                    raise InputError(
                        f"the inputs changed between the two readings: {plan.n_documents} documents ({plan.n_bytes} bytes) were"
                        f" counted, {state.place[2]} ({state.n_bytes} bytes) encoded; run again with resume off"
                    )
                path = folder / f"part-{len(parts):06}.npz"
                part.save(path)
                parts.append(path)
        finally:
            pool.shutdown(cancel_futures=True)
    return parts


def pieces_of(document: Document, plan: EvalPlan) -> tuple[int, list[Piece]]:
    """(bytes of the document, its pieces): training text in between what the plan holds out; none of a held-out copy
    or of a domain that is dropped."""
    raw = document.text.encode()
    if document.domain in plan.dropped:
        return len(raw), []
    units = plan.units.get(document.number)
    if units is None:
        return len(raw), [] if digest_of(raw) in plan.held else [Piece(document.text, len(raw), None)]
    cuts = [0]
    for unit in units:
        cuts += [boundary(raw, unit.start), boundary(raw, unit.end)]
    cuts.append(len(raw))
    pieces = []
    for i, (start, end) in enumerate(itertools.pairwise(cuts)):
        unit_here = units[i // 2] if i % 2 else None
        text = raw[start:end].decode()
        if unit_here is not None or text.strip():
            pieces.append(Piece(text, end - start, unit_here))
    return len(raw), pieces


def encoded(
    rows: Iterable[Row], tokenizer: Tokenizer, pool: ThreadPoolExecutor, where: Callable[[Place], str], ahead: int
) -> Iterator[EncodedRow]:
    """Each row with the ids of its pieces, in order, while `pool` works on the next `ahead` groups.

    Raises:
        InputError: a text that the tokenizer refuses; `where` names its place.
    """
    pending: deque[tuple[list[Row], Future[list[Ids]]]] = deque()

    def oldest() -> Iterator[EncodedRow]:
        group, future = pending.popleft()
        try:
            ids = iter(future.result())
        except TextError as error:
            row = [row for row in group for _ in row.pieces][error.index]
            raise InputError(f"{where(row.document.place)} (domain {row.document.domain!r}): {error}") from error
        for row in group:
            yield row, [next(ids) for _ in row.pieces]

    for group in _groups(rows):
        pending.append((group, pool.submit(_encode_group, tokenizer, [piece.text for row in group for piece in row.pieces])))
        if len(pending) > ahead:
            yield from oldest()
    while pending:
        yield from oldest()


def _groups(rows: Iterable[Row]) -> Iterator[list[Row]]:
    group: list[Row] = []
    size = 0
    for row in rows:
        group.append(row)
        size += row.n_bytes
        if size >= GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _encode_group(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Ids]:
    eot = np.array([tokenizer.eot], np.uint32)
    return [np.concatenate((ids, eot)) for ids in tokenizer.encode_batch(texts, threads=1)]


def _collect(
    stream: Iterator[EncodedRow],
    before: State,
    plan: EvalPlan,
    seed: int,
    dtype: np.dtype[Any],
    on_progress: Callable[[int, int], object],
) -> Part:
    """Take rows off the stream until they make a part."""
    rank = {name: i for i, name in enumerate(plan.domains)}
    tokens: list[npt.NDArray[Any]] = []
    n_bytes: list[int] = []
    domains: list[int] = []
    texts: list[tuple[str, str, str, int]] = []
    held_out: list[str] = []
    copies: Counter[str] = Counter()
    state, size = State(before.place, before.n_bytes, complete=True), 0
    for row, ids in stream:
        domain = row.document.domain
        if domain not in rank and domain not in plan.dropped:
            raise InputError(f"the inputs changed between the two readings: domain {domain!r} is new; run again with resume off")
        if not row.pieces and domain in rank:
            copies[domain] += 1
        for piece, piece_ids in zip(row.pieces, ids):
            if piece.unit is None:
                tokens.append(piece_ids.astype(dtype))
                n_bytes.append(piece.n_bytes)
                domains.append(rank[domain])
            else:
                unit = piece.unit
                texts += [(text, domain, unit.part, unit.document) for text in texts_of(piece.text.encode(), unit, seed)]
                held_out.append(token_hash(piece_ids))
        size += row.n_bytes
        state.place, state.n_bytes = row.document.place, state.n_bytes + row.n_bytes
        on_progress(row.n_bytes, sum(map(len, ids)))
        if size >= PART_BYTES:
            state.complete = False
            break
    lengths = np.array([len(ids) for ids in tokens], np.int64)
    flat = np.concatenate(tokens) if tokens else np.empty(0, dtype)
    return Part(state, flat, lengths, np.array(n_bytes, np.int64), np.array(domains, np.int32), texts, held_out, dict(copies))
