"""DomainMixture: domain weights -> training batches.

Which sequence comes next in a domain, and which domain comes next, are two separate questions:

- The j-th sequence of a domain is a function of (seed, domain name, j) alone. A domain's tokens are a ring (it begins and ends at
  a document boundary), cut into W = tokens // block_size windows at a random offset and visited in a random order, both new
  in every epoch. So runs with one seed see the same texts in the same order whatever their weights, and a change of weights
  loses and repeats nothing within an epoch. `aligned` leaves the offset at 0, for what was computed for fixed windows.
- The domain of each row comes from uniforms keyed by (seed, step), which are the same whatever the weights: methods are
  compared under common random numbers.

All state is the step and one cursor per domain, so resuming is exact. Every rank keeps the cursors of the whole step and
reads its own rows only; the whole step does not depend on the number of ranks.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from lldfast.backends import extension, resolve
from lldfast.data.shards import TokenShards, bad_token_error
from lldfast.errors import InputError, listed

DRAWS = ("sequence", "micro_batch", "step")
_ROUNDS = 12  # with fewer the orders of a domain of a few windows are visibly uneven


class Batch(NamedTuple):
    """One optimiser step of one rank: tokens x [B, T], next tokens y [B, T] (int64); of each row the index into `domains` [B],
    and the position of its first token in that domain's shard [B] (int64).
    """

    x: torch.Tensor
    y: torch.Tensor
    domain: np.ndarray
    start: np.ndarray


class DomainMixture:
    """Endless batches whose rows come from the domains in proportion to weights that may change at any step.

    Args:
        shards: the domains' tokens.
        weights: {domain: weight} with exactly the shards' domains, or an array in the order of `domains`; finite, not negative,
            summing to 1 within 1e-3 (then normalised).
        block_size: T, tokens per row.
        batch_size: rows of one optimiser step over all ranks.
        micro_batch_size: rows of one micro-batch (default: a rank's whole share); matters to draw="micro_batch" only.
        draw: "sequence": systematic sampling over the step, so that a domain's rows differ from batch_size * weight by less
            than one; "micro_batch": one categorical draw for each micro-batch; "step": one for each step (Algorithm 1).
        seed: decides texts and draws.
        rank, world_size: this process's contiguous slice of every step.
        backend: "auto", "cpp" or "numpy" for reading the tokens; all give the same bits.
        aligned: windows begin at multiples of block_size in every epoch; their order is still new in each.
        windows: {domain: n}, with `aligned` only: visit the first n windows of each domain (a domain not named has none), as a
            teacher cache has them; default all.

    Attributes: domains (list of names, the shards' order), weights (float64 [K] in that order, normalised), step, consumed
    ({domain: sequences drawn, over all ranks}).

    Raises:
        InputError: weights, sizes or windows are wrong, or a domain with weight > 0 has fewer than block_size + 1 tokens or no
            window to visit.
    """

    def __init__(
        self,
        shards: TokenShards,
        weights: Mapping[str, float] | Sequence[float] | np.ndarray,
        *,
        block_size: int,
        batch_size: int,
        micro_batch_size: int | None = None,
        draw: str = "sequence",
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        backend: str = "auto",
        aligned: bool = False,
        windows: Mapping[str, int] | None = None,
    ) -> None:
        for name, value in (("block_size", block_size), ("batch_size", batch_size), ("world_size", world_size)):
            if not isinstance(value, (int, np.integer)) or value < 1:
                raise InputError(f"{name} must be an integer of at least 1, not {value!r}")
        if not 0 <= rank < world_size:
            raise InputError(f"rank {rank} is not one of {world_size} ranks")
        if batch_size % world_size:
            raise InputError(f"batch_size {batch_size} is not a multiple of world_size {world_size}")
        share = batch_size // world_size
        micro_batch_size = share if micro_batch_size is None else micro_batch_size
        if micro_batch_size < 1 or share % micro_batch_size:
            raise InputError(f"micro_batch_size {micro_batch_size} does not divide a rank's {share} rows")
        if draw not in DRAWS:
            raise InputError(f"draw {draw!r} is unknown; choose {', '.join(DRAWS)}")
        self.shards, self.domains = shards, list(shards.domains)
        self.block_size, self.batch_size, self.micro_batch_size = block_size, batch_size, micro_batch_size
        self.draw, self.seed, self.rank, self.world_size = draw, seed, rank, world_size
        self.step = 0
        self._backend = resolve("gather", backend)
        self._rows = slice(rank * share, (rank + 1) * share)
        self._cursors = np.zeros(len(self.domains), dtype=np.int64)
        self._tokens = [shards.tokens(domain) for domain in self.domains]
        self._addresses = np.array([tokens.ctypes.data for tokens in self._tokens], dtype=np.int64)
        self._sizes = np.array([len(tokens) for tokens in self._tokens], dtype=np.int64)
        self._windows = self._sizes // block_size
        self.aligned = aligned
        if windows is not None:
            self._windows = self._limited(windows)
        # Draws go over the names in sorted order, so they do not depend on the order of the manifest.
        self._sorted = np.argsort(np.array(self.domains, dtype=object), kind="stable")
        self._epochs: dict[tuple[int, int], tuple[int, int]] = {}
        self.set_weights(weights)

    @property
    def consumed(self) -> dict[str, int]:
        """Sequences drawn so far over all ranks, by domain."""
        return {domain: int(n) for domain, n in zip(self.domains, self._cursors)}

    @property
    def epochs(self) -> dict[str, float]:
        """How often each domain has been gone through; above 1 its texts repeat."""
        return {domain: n / max(1, int(self._windows[k])) for k, (domain, n) in enumerate(self.consumed.items())}

    def set_weights(self, weights: Mapping[str, float] | Sequence[float] | np.ndarray) -> None:
        """Use other weights from the next batch on; cursors stay where they are.

        Raises:
            InputError: as for the constructor; the old weights then stay.
        """
        values = self._by_name(weights) if isinstance(weights, Mapping) else _numbers(weights)
        if values.shape != (len(self.domains),):
            raise InputError(f"weights have shape {values.shape}; there are {len(self.domains)} domains")
        for domain, value in zip(self.domains, values):
            if not math.isfinite(value) or value < 0:
                raise InputError(f"weight of domain {domain!r} is {value}; it must be finite and not negative")
        total = math.fsum(values)
        if abs(total - 1) > 1e-3:
            raise InputError(f"the weights sum to {total:g}, not to 1")
        for domain, value, size in zip(self.domains, values, self._sizes):
            if value > 0 and size < self.block_size + 1:
                raise InputError(
                    f"domain {domain!r} has weight {value:g} but only {size} tokens; block_size {self.block_size} needs more"
                )
        for domain, value, n in zip(self.domains, values, self._windows):
            if value > 0 and n < 1:
                raise InputError(f"domain {domain!r} has weight {value:g}, but windows= leaves it none to visit")
        self.weights = values / total

    def _limited(self, windows: Mapping[str, int]) -> np.ndarray:
        """Windows to visit in each domain, int64 [K]."""
        if not self.aligned:
            raise InputError("windows= counts windows from the beginning of a domain: it needs aligned=True")
        for domain, n in windows.items():
            if domain not in self.domains:
                raise InputError(f"windows name the unknown domain {domain!r}; {self.shards.path} has: {listed(self.domains)}")
            most = int(self._windows[self.domains.index(domain)])
            if not isinstance(n, (int, np.integer)) or not 0 <= n <= most:
                raise InputError(f"windows of domain {domain!r} must be an integer in [0, {most}], not {n!r}")
        return np.array([windows.get(domain, 0) for domain in self.domains], dtype=np.int64)

    def _by_name(self, weights: Mapping[str, float]) -> np.ndarray:
        unknown = sorted(set(weights) - set(self.domains))
        missing = sorted(set(self.domains) - set(weights))
        if unknown:
            raise InputError(f"weights name the unknown domain {unknown[0]!r}; {self.shards.path} has: {listed(self.domains)}")
        if missing:
            raise InputError(f"weights lack the domain {missing[0]!r} of {self.shards.path}")
        return _numbers([weights[domain] for domain in self.domains])

    def next_batch(self) -> Batch:
        """The rows of one optimiser step, all its micro-batches in order; this rank's slice.

        Raises:
            CorruptError: a shard holds a token id at or above the vocabulary; file, position and id are named.
        """
        domain = self._draw_domains()  # [batch_size]
        counts = np.bincount(domain, minlength=len(self.domains))
        # Rows of one domain take its next sequences in row order: a row's index is the cursor plus its rank among them.
        order = np.argsort(domain, kind="stable")
        index = np.empty(self.batch_size, dtype=np.int64)
        index[order] = np.arange(self.batch_size) + np.repeat(self._cursors - (np.cumsum(counts) - counts), counts)
        mine = domain[self._rows]
        start = self._starts(mine, index[self._rows])
        x, y = self._gather(mine, start)
        self._cursors += counts
        self.step += 1
        return Batch(x, y, mine, start)

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield self.next_batch()

    def _draw_domains(self) -> np.ndarray:
        """The domain of each row of the whole step, int64 [batch_size]."""
        n = {"sequence": self.batch_size, "micro_batch": self.batch_size // self.micro_batch_size, "step": 1}[self.draw]
        key = np.array(stream_key(self.seed, "draw", self.step), dtype=np.uint64)
        raw = np.random.Philox(key=key).random_raw(n + 1)
        uniforms = (raw >> np.uint64(11)) * 2.0**-53
        points = (uniforms[0] + np.arange(n)) / n if self.draw == "sequence" else uniforms[1:]
        cumulative = np.cumsum(self.weights[self._sorted])
        # The sum may round to just below 1, or a point to 1: neither may pick a domain without weight.
        last = int(np.flatnonzero(self.weights[self._sorted])[-1])
        picked = np.minimum(np.searchsorted(cumulative, points, side="right"), last)
        domain = self._sorted[picked].astype(np.int64)
        if self.draw == "sequence":
            return domain[np.argsort(raw[1:], kind="stable")]  # shuffled, so that every micro-batch is mixed
        return np.repeat(domain, self.batch_size // n)

    def _starts(self, domain: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Where the index-th sequence of each row's domain begins in its ring of tokens, int64 [rows]."""
        windows = self._windows[domain]
        epoch, position = np.divmod(index, windows)
        keys = np.empty((2, len(domain)), dtype=np.uint64)
        for row, pair in enumerate(zip(domain.tolist(), epoch.tolist())):
            keys[:, row] = self._epoch_keys(*pair)
        if self.aligned:
            return permute(position, windows, keys[1]) * self.block_size
        offset = (keys[0] % self._sizes[domain].astype(np.uint64)).astype(np.int64)
        return (offset + permute(position, windows, keys[1]) * self.block_size) % self._sizes[domain]

    def _epoch_keys(self, domain: int, epoch: int) -> tuple[int, int]:
        pair = (domain, epoch)
        if pair not in self._epochs:
            if len(self._epochs) > 16 * len(self.domains):
                self._epochs.clear()
            self._epochs[pair] = stream_key(self.seed, "order", self.domains[domain], epoch)
        return self._epochs[pair]

    def _gather(self, domain: np.ndarray, start: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (len(domain), self.block_size)
        x, y = torch.empty(shape, dtype=torch.int64), torch.empty(shape, dtype=torch.int64)
        vocab_size, sizes = self.shards.vocab_size, self._sizes
        module = extension()
        if self._backend == "cpp" and module is not None:
            itemsize = self._tokens[0].dtype.itemsize
            bad = module.gather(
                self._addresses, sizes, itemsize, vocab_size, domain, start, self.block_size, x.data_ptr(), y.data_ptr()
            )
        else:
            bad = gather_numpy(self._tokens, vocab_size, domain, start, x, y)
        if bad is not None:
            row, position, token = bad
            name = self.domains[int(domain[row])]
            raise bad_token_error(self.shards.shard_file(name), name, position, token, vocab_size)
        return x, y

    def state_dict(self) -> dict[str, Any]:
        """All that resuming needs, ready for JSON: step, cursors and weights by name, and what must not change meanwhile."""
        return {
            "step": self.step,
            "cursors": self.consumed,
            "weights": {domain: float(weight) for domain, weight in zip(self.domains, self.weights)},
            "seed": self.seed,
            "block_size": self.block_size,
            "corpus_hash": self.shards.corpus_hash,
            "aligned": self.aligned,
            "windows": self._visited(),
        }

    def _visited(self) -> dict[str, int] | None:
        """Windows of each domain where they are fewer than all, else None."""
        if np.array_equal(self._windows, self._sizes // self.block_size):
            return None
        return {domain: int(n) for domain, n in zip(self.domains, self._windows)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken; batch size, draw and number of ranks may have changed.

        Raises:
            InputError: another corpus, seed, block size, alignment, windows or set of domains, under which the cursors would
                mean other texts; or not a state of `state_dict`.
        """
        lacking = [key for key in ("corpus_hash", "seed", "block_size", "cursors", "weights", "step") if key not in state]
        if lacking:
            raise InputError(f"cannot resume: the state has no {lacking[0]!r}")
        for key, own in (("corpus_hash", self.shards.corpus_hash), ("seed", self.seed), ("block_size", self.block_size)):
            if state[key] != own:
                raise InputError(f"cannot resume: {key} was {state[key]} and is now {own}")
        # States from before there were aligned windows lack both keys.
        aligned, windows = state.get("aligned", False), state.get("windows")
        if aligned != self.aligned:
            raise InputError(f"cannot resume: aligned was {aligned} and is now {self.aligned}")
        if windows != self._visited():
            raise InputError(f"cannot resume: windows were {windows or 'all'} and are now {self._visited() or 'all'}")
        cursors, weights = state["cursors"], self._by_name(state["weights"])
        if set(cursors) != set(self.domains):
            raise InputError(f"cannot resume: the cursors are of {sorted(cursors)}, the domains are {sorted(self.domains)}")
        for what, n in [("step", state["step"]), *((f"cursor of domain {domain!r}", n) for domain, n in cursors.items())]:
            if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 0:
                raise InputError(f"cannot resume: the {what} is {n!r}")
        self.set_weights(weights)  # the last check: nothing has changed before it
        self.weights = weights  # they were normalised when saved; a second division could change a bit
        self._cursors = np.array([cursors[domain] for domain in self.domains], dtype=np.int64)
        self.step = int(state["step"])


def _numbers(weights: Any) -> np.ndarray:
    try:
        return np.asarray(weights, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"weights must be numbers, by domain name or one per domain, not {weights!r:.100} ({error})") from None


def permute(position: np.ndarray, size: np.ndarray, key: np.ndarray) -> np.ndarray:
    """A keyed bijection of range(size), one per row and without a table: position, size int64 [n], key uint64 [n] -> int64 [n].

    A Feistel network on pairs (left, right) from range(a) x range(b), a b just above size; a value that lands outside
    range(size) goes through again until it is inside (cycle walking), which keeps it a bijection.
    """
    a = np.ceil(np.sqrt(size)).astype(np.uint64)
    b = -(-size // a.astype(np.int64))
    value, b = position.astype(np.uint64), b.astype(np.uint64)
    outside = np.ones(len(value), dtype=bool)
    while outside.any():
        right, left = np.divmod(value[outside], a[outside])
        for turn in range(_ROUNDS):
            salted = key[outside] + np.uint64((turn + 1) * 0x9E3779B97F4A7C15 % 2**64)
            if turn % 2:
                right = (right + _mix(left ^ salted) % b[outside]) % b[outside]
            else:
                left = (left + _mix(right ^ salted) % a[outside]) % a[outside]
        value[outside] = left + right * a[outside]
        outside = value >= size.astype(np.uint64)
    return value.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    # The finaliser of SplitMix64: every input bit moves every output bit.
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def stream_key(*parts: object) -> tuple[int, int]:
    """Key of a stream of random numbers: two 64-bit integers that depend on `parts` alone, on every machine and version."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def gather_numpy(
    tokens: Sequence[np.ndarray], vocab_size: int, domain: np.ndarray, start: np.ndarray, x: torch.Tensor, y: torch.Tensor
) -> tuple[int, int, int] | None:
    """Fill x, y [rows, T] from rings of tokens: x[r, t] = ring[start[r] + t], y one further; the reference of _C.gather.

    Returns None, or (row, position, token) of the first token id at or above vocab_size.
    """
    length = x.shape[1]
    for row, (k, first) in enumerate(zip(domain.tolist(), start.tolist())):
        window = np.take(tokens[k], np.arange(first, first + length + 1), mode="wrap").astype(np.int64)
        bad = np.flatnonzero(window >= vocab_size)
        if bad.size:
            return row, (first + int(bad[0])) % len(tokens[k]), int(window[bad[0]])
        x[row], y[row] = torch.from_numpy(window[:-1]), torch.from_numpy(window[1:])
    return None
