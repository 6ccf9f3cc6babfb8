"""Gradients of groups of texts out of plain autograd, parameter by parameter, into an Accumulator.

    collector = Collector(model, accumulator)
    with collector.group("Github", 0, tokens=n):
        log_likelihood_sum(texts).backward()       # one or more backward passes; gradients add up

Whatever autograd leaves in `.grad` is taken, so any module works: tied and frozen parameters, experts that no token chose, layers
that a hook on modules would not know, activation checkpointing. The gradients that the parameters held before come back at the
end.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn as nn
import xxhash
from torch import Tensor

from lldfast.errors import InputError, TrainingError


@dataclass(frozen=True)
class Layout:
    """The flat parameter space: trainable parameters in the order of named_parameters, a tied one once, each row-major.

    Attributes:
        names, shapes, offsets: of each parameter. size: P.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    offsets: tuple[int, ...]
    size: int

    @classmethod
    def of(cls, module: nn.Module) -> Layout:
        """
        Raises:
            InputError: no parameter requires a gradient.
        """
        names, shapes, offsets, size = [], [], [], 0
        for name, p in module.named_parameters():
            if p.requires_grad:
                names.append(name)
                shapes.append(tuple(p.shape))
                offsets.append(size)
                size += p.numel()
        if not size:
            raise InputError(f"{type(module).__name__}: no parameter requires a gradient")
        return cls(tuple(names), tuple(shapes), tuple(offsets), size)

    @property
    def hash(self) -> str:
        """XXH3-64 (hex) of names and shapes in their order: sketches of equal hashes and seeds are comparable."""
        described = json.dumps([[name, list(shape)] for name, shape in zip(self.names, self.shapes, strict=True)])
        return xxhash.xxh3_64(described.encode()).hexdigest()


class Sink(Protocol):
    """What a collector gives gradients to: an Accumulator, rows (rows.py) or second moments (precondition.py)."""

    def add(
        self, domain: str, group: int, offset: int, tensor: Tensor, scale: Tensor | None = None, dot: Tensor | None = None
    ) -> float: ...


class Collector:
    """Folds gradients of groups of texts as autograd makes them.

    Attributes:
        layout: the flat parameter space. eager: whether `final` has an effect.
    """

    def __init__(
        self,
        module: nn.Module,
        *sinks: Sink,
        scale: Mapping[str, Tensor] | None = None,
        dot: Mapping[str, Tensor] | None = None,
    ) -> None:
        """
        Args:
            sinks: get every gradient, with squares from the first.
            scale, dot: per parameter name, as `Accumulator.add` takes them.

        Raises:
            InputError: nothing to train, a parameter that something else works on during backward (an optimiser step fused into
                it, another collector), or an accumulator of another order of parameters.
        """
        self.layout = Layout.of(module)
        parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        for name, p in parameters.items():
            if getattr(p, "_post_accumulate_grad_hooks", None):
                raise InputError(
                    f"parameter {name!r} has a post-accumulate-grad hook (another collector, or an optimiser step in the "
                    "backward pass?): take it off before collecting gradients"
                )
        for sink in sinks:
            size, layout = getattr(sink, "n_params", self.layout.size), getattr(sink, "layout", None)
            if size != self.layout.size or layout not in (None, self.layout.hash):
                raise InputError(
                    f"the accumulator is of {size:,} parameters in the order {layout}, the model has {self.layout.size:,} in the "
                    f"order {self.layout.hash}"
                )
        self.parameters, self.sinks = parameters, sinks
        self._module, self._busy = module, False
        self.scale, self.dot = scale or {}, dot or {}
        self.eager = True
        self._offset = dict(zip(self.layout.names, self.layout.offsets, strict=True))
        self._key: tuple[str, int] = ("", 0)
        self._last = False
        self._wide: dict[str, Tensor] = {}
        self._folded: set[str] = set()
        self._square = 0.0

    @contextlib.contextmanager
    def group(self, domain: str, index: int, tokens: float | None = None) -> Iterator[Collector]:
        """Gradients that backward passes inside leave are those of group `index` of `domain`.

        Args:
            tokens: of the group, recorded with sinks that count them (None: not recorded).

        Raises:
            InputError: a group is open, this one has a gradient already, or the model's trainable parameters have changed.
            TrainingError: the gradient is not finite; domain and group named. Whatever is raised, here or inside, the group is
                taken out of the accumulator.
        """
        if self._busy:
            raise InputError(f"group {self._key[1]} of domain {self._key[0]!r} is still open on this collector")
        if Layout.of(self._module) != self.layout:
            raise InputError("parameters were frozen, unfrozen or replaced since the collector was made: make another")
        for sink in self.sinks:
            if (domain, index) in getattr(sink, "sketches", ()):
                raise InputError(f"group {index} of domain {domain!r} has a gradient already: reset it, or take another number")
        kept = {name: p.grad for name, p in self.parameters.items()}
        self._key, self._last, self._square = (domain, index), False, 0.0
        self._wide, self._folded, self._busy = {}, set(), True
        with contextlib.ExitStack() as undo:
            undo.callback(self._close, kept)
            for name, p in self.parameters.items():
                p.grad = None
                undo.callback(p.register_post_accumulate_grad_hook(self._hook(name)).remove)
            try:
                yield self
                for name, p in self.parameters.items():
                    self._fold(name, p)
                if not math.isfinite(self._square):
                    raise TrainingError(f"the gradient of domain {domain!r}, group {index}, is not finite")
            except BaseException:  # half a group must not look like one, nor be there when it is tried again
                for sink in self.sinks:
                    if hasattr(sink, "reset"):
                        sink.reset(domain, index)
                raise
            if tokens is not None:
                for sink in self.sinks:
                    if hasattr(sink, "count"):
                        sink.count(domain, index, tokens)

    def _close(self, kept: Mapping[str, Tensor | None]) -> None:
        for name, p in self.parameters.items():
            p.grad = kept[name]
        self._wide, self._busy = {}, False

    def final(self) -> None:
        """The next backward pass is the group's last: each gradient is folded and freed as soon as autograd has it whole.

        A model whose backward pass runs in pieces (re-entrant checkpointing) can give a gradient in several parts; folding such
        parts one by one would lose |g|^2, so the collector notices and waits for the end of the pass from then on.
        """
        self._last = self.eager

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        def hook(p: Tensor) -> None:
            if self._last:
                if name in self._folded:
                    self.eager = False
                self._fold(name, p)
            elif p.dtype in (torch.bfloat16, torch.float16) and p.grad is not None:
                # summed in fp32: in 16 bits, every further micro-batch would be rounded to what is there
                wide = self._wide.get(name)
                self._wide[name] = p.grad.float() if wide is None else wide.add_(p.grad)
                p.grad = None

        return hook

    def _fold(self, name: str, p: Tensor) -> None:
        gradient, wide = p.grad, self._wide.pop(name, None)
        p.grad = None
        if gradient is None:
            gradient = wide
        elif wide is not None:
            gradient = wide.add_(gradient)
        if gradient is None:  # no text of the group touched it
            return
        self._folded.add(name)
        scale, dot = self.scale.get(name), self.dot.get(name)
        for offset, piece, at in local_pieces(gradient):
            extras = tuple(x if x is None or at is None else x.reshape(-1)[at] for x in (scale, dot))
            for i, sink in enumerate(self.sinks):
                square = sink.add(*self._key, self._offset[name] + offset, piece, *extras)
                self._square += square if i == 0 else 0.0


def local_pieces(gradient: Tensor) -> Iterator[tuple[int, Tensor, slice | None]]:
    """Contiguous parts of a gradient that this process holds: (offset in the whole, part, its place in the whole or None for
    all).

    A DTensor sharded over its first dimension is one part; one that is replicated comes from the first process of its mesh only.

    Raises:
        InputError: another placement, which has no contiguous part (use `Accumulator.add` row by row).
    """
    if gradient.is_sparse:
        gradient = gradient.to_dense()
    placements: Any = getattr(gradient, "placements", None)
    if placements is None:
        yield 0, gradient, None
        return
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    whole: Any = gradient
    if any(not (place.is_replicate() or (place.is_shard() and place.dim == 0)) for place in placements):
        raise InputError(
            f"a gradient placed as {placements} has no contiguous part here: shard dimension 0, or add rows yourself"
        )
    rank = whole.device_mesh.get_coordinate()
    if any(place.is_replicate() and at for place, at in zip(placements, rank, strict=True)):
        return
    _, start = compute_local_shape_and_global_offset(whole.shape, whole.device_mesh, placements)
    local = whole.to_local()
    if local.numel():
        offset = start[0] * math.prod(whole.shape[1:])
        yield offset, local, slice(offset, offset + local.numel())
