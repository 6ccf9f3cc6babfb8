"""Sketches of domain gradients, group by group, from gradients that somebody else computes.

    acc = Accumulator(n_params, ["Github", "Wikipedia"], k=2**16, seed=0)
    acc.add("Github", 0, offset, p.grad)        # the part of group 0's gradient that lies at `offset` of the flat parameter space
    acc.count("Github", 0, tokens=5120)         # optional: makes gradients per token of sums over tokens
    acc.merge(other)                            # of another process: more groups, other parameters, or more texts
    G = acc.gram()                              # [K, K]

A group is some texts of one domain. Groups are what noise is told from signal by, so each should hold texts of its own.

A sketch of P numbers or more would hold no less than the gradient: with k = P, where P is no power of two, the gradient itself is
kept.
"""

from __future__ import annotations

import itertools
import json
import os
import tokenize
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lldfast.errors import CorruptError, InputError, listed
from lldfast.files import atomic_path
from lldfast.gram.debias import domain_gram
from lldfast.ops.sketch.fold import check_k, fold
from lldfast.ops.sketch.philox import check_seed

FORMAT = "lldfast-gram-sketch"
# What numpy lets through of a damaged archive.
UNREADABLE = (
    OSError, ValueError, EOFError, KeyError, TypeError, AttributeError, NotImplementedError, SyntaxError, RuntimeError,
    zipfile.BadZipFile, zlib.error, tokenize.TokenError,
)  # fmt: skip
UNITS = "nats per token, over parameters"
# Numbers of every sketch that `products` multiplies at a time: at most so many, and of all sketches at most so many.
PART, TOGETHER = 1 << 13, 1 << 24
Key = tuple[str, int]


class Accumulator:
    """Signed XOR-folds of the gradients of groups of texts, and their exact squared norms.

    Attributes:
        n_params: P, size of the flat parameter space. domains: K names. k: size of a sketch, a power of two, or P: the gradients
            are then kept as they are. seed: its key.
        layout: hash of the order of parameters (`Layout.hash`), or None; sketches of different layouts are not comparable.
        sketches: fp64 [k] by (domain, group). squares: |g|^2 by (domain, group). dots: inner products asked for in `add`.
    """

    def __init__(
        self,
        n_params: int,
        domains: Sequence[str],
        k: int,
        seed: int = 0,
        *,
        layout: str | None = None,
        device: str | torch.device = "cpu",
        backend: str = "auto",
    ) -> None:
        """
        Raises:
            InputError: no parameters, no or repeated domains, k neither a power of two nor n_params, seed out of range.
        """
        if isinstance(n_params, bool) or not isinstance(n_params, (int, np.integer)) or n_params < 1:
            raise InputError(f"n_params must be a positive integer, got {n_params!r}")
        if isinstance(domains, str) or not len(domains) or len(set(domains)) != len(domains):
            raise InputError(f"domains must be different names, at least one, got {domains!r}")
        self.n_params, self.domains, self.seed = int(n_params), list(domains), check_seed(seed)
        self.k = self.n_params if k == self.n_params and not isinstance(k, bool) else check_k(k)
        self.layout, self.backend = layout, backend
        self.device = torch.empty(0, device=device).device  # "cuda" is the current one, with its number
        self.sketches: dict[Key, Tensor] = {}
        self.squares: dict[Key, float] = {}
        self.dots: dict[Key, float] = {}
        self.tokens: dict[Key, float] = {}
        self._ranges: dict[Key, list[tuple[int, int]]] = {}

    def __repr__(self) -> str:
        return f"Accumulator({self.n_params} parameters, {len(self.domains)} domains, {len(self.sketches)} groups, k={self.k})"

    def add(
        self, domain: str, group: int, offset: int, tensor: Tensor, scale: Tensor | None = None, dot: Tensor | None = None
    ) -> float:
        """Add a part of the gradient of (domain, group).

        Args:
            offset: place of tensor's first entry in the flat parameter space; its entries follow in row-major order.
            tensor: fp32, bf16, fp16 or fp64, any shape.
            scale: fp32, as many entries: tensor * scale is added (for a preconditioned G, M^(-1/2)).
            dot: as many entries: <tensor, dot>, without scale, is added to `dots`.

        Returns:
            |tensor * scale|^2.

        Raises:
            InputError: unknown domain, a group < 0, entries outside [0, n_params), a dtype or shape that is wrong.
        """
        key = self._key(domain, group)
        size = tensor.numel()
        if isinstance(offset, bool) or not isinstance(offset, int) or offset < 0 or offset + size > self.n_params:
            raise InputError(f"entries {offset} .. {offset}+{size} are not within the {self.n_params} parameters")
        if tensor.device != self.device:
            raise InputError(f"the tensor is on {tensor.device}, the accumulator on {self.device}")
        out = self.sketches.get(key)
        out = torch.zeros(self.k, dtype=torch.float64, device=self.device) if out is None else out
        others = [] if dot is None else [dot]
        if self.k & (self.k - 1):  # no power of two: the gradient itself
            sums = _place(out, tensor, offset, scale, others)
        else:
            sums = fold(out, tensor, offset=offset, seed=self.seed, scale=scale, dots=others, backend=self.backend).tolist()
        self._open(key, out)
        self.squares[key] += sums[0]
        if dot is not None:
            self.dots[key] += sums[1]
        if size:
            self._ranges[key].append((offset, offset + size))
        return sums[0]

    def _open(self, key: Key, sketch: Tensor) -> None:
        if key not in self.sketches:
            self.sketches[key], self.squares[key], self.dots[key], self._ranges[key] = sketch, 0.0, 0.0, []

    def count(self, domain: str, group: int, tokens: float) -> None:
        """Record that the gradient of (domain, group) is a sum over so many tokens (more are added to those before).

        A group that is counted and gets nothing has a gradient of 0.

        Raises:
            InputError: unknown domain, a group < 0, or tokens that are not > 0 and finite.
        """
        key = self._key(domain, group)
        if not (isinstance(tokens, (int, float, np.number)) and 0 < tokens < float("inf")):
            raise InputError(f"tokens must be a finite number > 0, got {tokens!r}")
        self._open(key, torch.zeros(self.k, dtype=torch.float64, device=self.device))
        self.tokens[key] = self.tokens.get(key, 0.0) + float(tokens)

    def reset(self, domain: str, group: int) -> None:
        """Forget everything of (domain, group)."""
        key = self._key(domain, group)
        for table in (self.sketches, self.squares, self.dots, self.tokens, self._ranges):
            table.pop(key, None)

    def merge(self, other: Accumulator) -> Accumulator:
        """Add another accumulator's groups to this one, and return this one. Of a group in both, the gradients are summed.

        Where the two hold other entries of a group, they are shards of one gradient, of the same tokens; where they hold the same
        entries, its texts were split, and the tokens add up.

        Raises:
            InputError: other parameters, domains, k or seed; a group counted in one and not in the other, or counted differently
                by shards. What differs is named, and nothing was added.
        """
        for name in ("n_params", "domains", "k", "seed", "layout"):
            if getattr(self, name) != getattr(other, name):
                raise InputError(
                    f"sketches do not belong together: {name} is {getattr(self, name)!r} here, {getattr(other, name)!r} there"
                )
        tokens = {key: self._merged_tokens(key, other) for key in other.sketches}
        for key, sketch in other.sketches.items():
            if key in self.sketches:
                self.sketches[key] += sketch.to(self.device)
                self.squares[key] += other.squares[key]
                self.dots[key] += other.dots[key]
                self._ranges[key] += other._ranges[key]
            else:
                self.sketches[key] = sketch.to(self.device, copy=True)
                self.squares[key], self.dots[key] = other.squares[key], other.dots[key]
                self._ranges[key] = list(other._ranges[key])
        self.tokens |= {key: n for key, n in tokens.items() if n is not None}
        return self

    def _merged_tokens(self, key: Key, other: Accumulator) -> float | None:
        """Tokens of a group after a merge; None where nobody counted it."""
        mine, theirs = self.tokens.get(key), other.tokens.get(key)
        if key not in self.sketches:
            return theirs
        if _disjoint(_union(self._ranges[key]) + _union(other._ranges[key])):
            if mine is not None and theirs is not None and mine != theirs:
                raise InputError(f"shards of group {key[1]} of domain {key[0]!r} count {mine:g} and {theirs:g} tokens")
            return theirs if mine is None else mine
        if (mine is None) != (theirs is None):
            raise InputError(f"group {key[1]} of domain {key[0]!r} is counted on one side only: call count on both")
        return None if mine is None or theirs is None else mine + theirs

    def _exact(self, key: Key) -> bool:
        """Whether squares[key] is |g|^2: every entry was added once, so that the squares of parts are those of the whole."""
        return _disjoint(self._ranges[key])

    def groups(self) -> list[Key]:
        """(domain, group) in the order of domains and groups: rows of `products`."""
        index = {name: i for i, name in enumerate(self.domains)}
        return sorted(self.sketches, key=lambda key: (index[key[0]], key[1]))

    def products(self) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float64]]:
        """Inner products of the groups' gradients [M, M] with exact squares on the diagonal, their domains [M], their tokens [M].

        A group whose entries were added in several summands (micro-batches added one by one) has its diagonal from the sketch.
        Groups without a count have 1 "token".

        Raises:
            InputError: a domain without a gradient, or some groups counted and some not.
        """
        keys = self.groups()
        missing = [name for name in self.domains if name not in {domain for domain, _ in keys}]
        if missing:
            raise InputError(f"domain {missing[0]!r} has no gradient")
        uncounted = [key for key in keys if key not in self.tokens]
        if uncounted and self.tokens:
            raise InputError(f"group {uncounted[0][1]} of domain {uncounted[0][0]!r} has no token count, others have")
        total = torch.zeros(len(keys), len(keys), dtype=torch.float64, device=self.device)
        size = min(PART, max(TOGETHER // max(len(keys), 1), 1))
        for begin in range(0, self.k, size):  # no second copy of all sketches
            part = torch.stack([self.sketches[key][begin : begin + size] for key in keys])
            total += part @ part.T
        table = total.cpu().numpy()
        for i, key in enumerate(keys):
            if self._exact(key):
                table[i, i] = self.squares[key]
        domain = np.array([self.domains.index(name) for name, _ in keys], dtype=np.int64)
        tokens = np.array([self.tokens.get(key, 1.0) for key in keys])
        return table, domain, tokens

    def gram(self, *, debias: bool = False) -> NDArray[np.float64]:
        """G [K, K] in the order of `domains`: J_k is the sum of domain k's gradients, divided by its tokens where they were
        counted.

        Args:
            debias: take the noise of finitely many texts out of the diagonal (`domain_gram`); needs counts.

        Raises:
            InputError: a domain without a gradient, or debias without counts.
        """
        table, domain, tokens = self.products()
        if not self.tokens:
            if debias:
                raise InputError("debias=True needs the tokens of every group: call count(domain, group, tokens)")
            member = np.equal.outer(np.arange(len(self.domains)), domain).astype(np.float64)
            return member @ table @ member.T
        return domain_gram(table, domain, tokens, debias=debias)[0]

    def save(self, path: str | os.PathLike[str], meta: Mapping[str, Any] | None = None) -> None:
        """Write .npz, atomically: `header` (JSON: format, n_params, domains, k, seed, layout, units, meta), the sketches and
        counts.

        Raises:
            WriteError: the file cannot be written.
        """
        keys = self.groups()
        header = {
            "format": FORMAT,
            "version": 1,
            "n_params": self.n_params,
            "domains": self.domains,
            "k": self.k,
            "seed": self.seed,
            "layout": self.layout,
            "units": UNITS if self.tokens else "as added",
            "meta": dict(meta or {}),
        }
        ranges = [(i, *r) for i, key in enumerate(keys) for r in self._ranges[key]]
        arrays: dict[str, Any] = {
            "header": np.array(json.dumps(header, ensure_ascii=False)),
            "domain": np.array([self.domains.index(name) for name, _ in keys], dtype=np.int64),
            "group": np.array([group for _, group in keys], dtype=np.int64),
            "sketches": np.stack([self.sketches[key].cpu().numpy() for key in keys]) if keys else np.zeros((0, self.k)),
            "squares": np.array([self.squares[key] for key in keys]),
            "dots": np.array([self.dots[key] for key in keys]),
            "tokens": np.array([self.tokens.get(key, np.nan) for key in keys]),
            "ranges": np.array(ranges, dtype=np.int64).reshape(-1, 3),
        }
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> Accumulator:
        """Read what `save` wrote.

        Raises:
            InputError: no such file, or one of something else.
            CorruptError: truncated or altered.
        """
        header, arrays = read_npz(path, FORMAT)
        try:
            made = cls(header["n_params"], header["domains"], header["k"], header["seed"], layout=header["layout"], device=device)
            sketches = torch.from_numpy(arrays["sketches"])
            if sketches.shape != (len(arrays["domain"]), made.k) or sketches.dtype != torch.float64:
                raise CorruptError(f"{path}: its sketches are {tuple(sketches.shape)}, expected rows of {made.k}")
            for i, (d, group) in enumerate(zip(arrays["domain"].tolist(), arrays["group"].tolist(), strict=True)):
                key = (made.domains[d], group)
                made.sketches[key] = sketches[i].to(device, copy=True)
                made.squares[key], made.dots[key] = float(arrays["squares"][i]), float(arrays["dots"][i])
                if not np.isnan(arrays["tokens"][i]):
                    made.tokens[key] = float(arrays["tokens"][i])
                rows = arrays["ranges"][arrays["ranges"][:, 0] == i]
                made._ranges[key] = [(int(a), int(b)) for _, a, b in rows]
        except (KeyError, IndexError, ValueError, TypeError) as error:
            if isinstance(error, CorruptError):
                raise
            raise CorruptError(f"{path} is not a whole file of sketches ({error})") from None
        return made

    def _key(self, domain: str, group: int) -> Key:
        if domain not in self.domains:
            raise InputError(f"unknown domain {domain!r}; the domains are [{listed(map(repr, self.domains))}]")
        if isinstance(group, bool) or not isinstance(group, (int, np.integer)) or group < 0:
            raise InputError(f"group must be an integer >= 0, got {group!r}")
        return domain, int(group)


def _place(out: Tensor, g: Tensor, offset: int, scale: Tensor | None, dots: Sequence[Tensor]) -> list[float]:
    """`fold` without folding: add g * scale (rounded to fp32) to its own entries of `out`; the same sums come back."""
    flat = g.detach().reshape(-1)
    if not flat.is_floating_point() or any(other.numel() != len(flat) for other in (scale, *dots) if other is not None):
        raise InputError(f"{tuple(g.shape)} of {g.dtype}: expected floating point numbers, with as many in scale and dot")
    values = flat.double() if scale is None else (flat * scale.reshape(-1)).double()
    out[offset : offset + len(flat)] += values
    sums = [values.square().sum(), *((flat.double() * other.reshape(-1).double()).sum() for other in dots)]
    return torch.stack(sums).tolist()


def _disjoint(ranges: list[tuple[int, int]]) -> bool:
    return all(end <= start for (_, end), (start, _) in itertools.pairwise(sorted(ranges)))


def _union(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same entries in ranges that do not overlap."""
    joined: list[tuple[int, int]] = []
    for begin, end in sorted(ranges):
        if joined and begin <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((begin, end))
    return joined


def read_npz(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Header and arrays of an .npz file of format `kind`.

    Raises:
        InputError: no such file, or one of something else.
        CorruptError: truncated or altered.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except UNREADABLE as error:
        raise CorruptError(f"{path} is not a readable .npz file ({error})") from None
    try:
        header = json.loads(str(arrays.pop("header")))
    except (KeyError, ValueError):
        raise InputError(f"{path} is not a file of {kind}: it has no header") from None
    if not isinstance(header, dict) or header.get("format") != kind or header.get("version") != 1:
        found = header.get("format") if isinstance(header, dict) else header
        raise InputError(f"{path} is not a version 1 file of {kind}, but of {found!r}")
    return header, arrays
