"""Per-text gradients out of one backward pass: hooks on a model's modules, and the folds of what they bring (texts.py)."""

from __future__ import annotations

import contextlib
import functools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from lldfast.errors import InputError
from lldfast.models.batches import IGNORE, SegmentBatch, token_logprobs
from lldfast.models.gpt import GPT
from lldfast.models.head import Head
from lldfast.models.language_model import LanguageModel
from lldfast.ops.chunks import transform_
from lldfast.ops.linear_logprob import linear_logprob
from lldfast.ops.sketch.fold import fold
from lldfast.ops.sketch.outer import fold_outer, fold_rows

LOGIT_ENTRIES = 1 << 22  # gradients of logits alive at a time


@dataclass(eq=False)
class Slot:
    """A parameter and its place in the flat space."""

    name: str
    parameter: nn.Parameter
    offset: int
    scale: Tensor | None


@dataclass(eq=False)
class Uses:
    """What is known of a parameter's gradient in a batch of n texts."""

    expected: int = 0  # products that the backward pass still has to bring
    folded: bool = False  # some of them are in the sketch already
    embedded: bool = False  # rows will come
    outer: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # (columns' side [n, T, I], rows' side [n, T, O])
    ids: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # (rows of the parameter [n, T], their gradients [n, T, d])
    vector: Tensor | None = None  # [n, m], of its first m entries

    def add_vector(self, x: Tensor) -> None:
        self.vector = x if self.vector is None else self.vector + x


class NotSeparable(Exception):
    """Texts of this batch cannot be told apart in some parameter's gradient."""


class Setting:
    """What all batches share: a model, its trainable parameters, and the sketch."""

    def __init__(self, model: LanguageModel, slots: dict[int, Slot], k: int, seed: int, backend: str) -> None:
        self.model, self.slots, self.k, self.seed, self.backend = model, slots, k, seed, backend
        gpt = model.module if isinstance(model.module, GPT) else None
        # GPT adds its positions to what the token embedding gives, without calling their module
        self.carrier = None if gpt is None else gpt.wte
        self.positions = None if gpt is None else slots.get(id(gpt.wpe.weight))

    def own(self, module: nn.Module) -> dict[str, Slot]:
        """The trainable parameters that belong to the module itself."""
        return {name: self.slots[id(p)] for name, p in module._parameters.items() if p is not None and id(p) in self.slots}


def kind_of(module: nn.Module) -> str | None:
    """What a module computes, by its exact type: a subclass may do anything."""
    kind = type(module)
    if kind is nn.Linear:
        return "linear"
    if kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers."):
        return "conv1d"
    if isinstance(module, nn.Embedding) and kind is nn.Embedding:
        plain = not module.scale_grad_by_freq and not module.sparse and module.max_norm is None
        return "embedding" if plain else None
    if kind in (nn.LayerNorm, nn.RMSNorm):
        return "norm"
    parameters = [p for p in module._parameters.values() if p is not None]
    vectors = all(p.dim() == 1 for p in parameters) and not any(True for _ in module.children())
    if kind.__name__.endswith("Norm") and not kind.__module__.startswith("torch.") and parameters and vectors:
        return "copies"
    return None


@dataclass(eq=False)
class Call:
    """A call of a module that the hooks take over, with its input."""

    kind: str
    x: Tensor
    version: int
    shared: bool  # one row for the whole batch: positions
    switched_off: list[nn.Parameter] = field(default_factory=list)
    replaced: dict[str, nn.Parameter] = field(default_factory=dict)


class BatchRun:
    """One batch on its way: n texts, each in `windows` rows of the batch."""

    def __init__(self, setting: Setting, batch: SegmentBatch, n: int, projections: int) -> None:
        self.setting, self.batch, self.n = setting, batch, n
        self.rows, self.time = batch.ids.shape
        self.windows = self.rows // n
        device = batch.ids.device
        self.out = torch.zeros(n, setting.k, dtype=torch.float64, device=device)
        self.squares = torch.zeros(n, dtype=torch.float64, device=device)
        self.uses: dict[Slot, Uses] = defaultdict(Uses)
        self.calls: dict[nn.Module, Call] = {}
        self.head: HeadUse | None = None
        signs = torch.randint(0, 2, (projections, setting.k), generator=torch.Generator().manual_seed(0))
        self.probe = (2.0 * signs - 1).double().to(device)
        self.noted: dict[Slot, tuple[Tensor, Tensor]] = {}  # square and projections of the last text, if any are wanted

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        """Hooks on the modules inside; afterwards modules and parameters are as they were."""
        handles: list[Any] = []
        positions = self.setting.positions
        try:
            if positions is not None:
                positions.parameter.requires_grad_(False)
            for module in self.setting.model.module.modules():
                kind = kind_of(module)
                if kind is not None and (self.setting.own(module) or module is self.setting.carrier):
                    before = functools.partial(self.before, kind)
                    handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
                    handles.append(module.register_forward_hook(self.after, always_call=True))
            yield
        finally:
            for handle in handles:
                handle.remove()
            for module, call in self.calls.items():
                self.undo(module, call)
            if positions is not None:
                positions.parameter.requires_grad_(True)

    def forward_backward(self) -> None:
        model = self.setting.model
        with torch.enable_grad(), model.settled(), self.hooked():
            if model.separate_head:
                hidden = model.hidden(self.batch.ids)
            else:
                total = token_logprobs(model, self.batch).sum()
        if not model.separate_head:
            total.backward()
            return
        with torch.no_grad():
            self.head = HeadUse(self, model.head(), hidden.detach())
            gradient = self.head.fold()
        if hidden.requires_grad:
            hidden.backward(gradient.view_as(hidden))

    @torch.no_grad()
    def finish(self) -> None:
        """
        Raises:
            NotSeparable: some parameter needs its texts one by one.
        """
        for slot in self.setting.slots.values():
            self.finish_slot(slot)

    def clear(self) -> None:
        """Let go of all tensors but the results: head and run know each other, and would wait for the garbage collector."""
        self.head = None
        self.uses.clear()

    def before(self, kind: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook."""
        x = args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(x, Tensor) or module in self.calls:
            return
        own = self.setting.own(module)
        shared = kind == "embedding" and x.dim() == 2 and len(x) == 1 < self.rows
        apart = self.n == 1 or shared or (x.dim() >= (2 if kind == "embedding" else 3) and len(x) == self.rows)
        call = Call(kind, x.detach(), x._version, shared)
        if kind == "copies":
            fits = x.dim() >= 3 and len(x) == self.rows and all(slot.parameter.shape == x.shape[-1:] for slot in own.values())
            if not fits:
                return
            for name, slot in own.items():
                call.replaced[name] = slot.parameter
                copies = slot.parameter.detach().expand(self.rows, *[1] * (x.dim() - 2), -1).clone().requires_grad_()
                copies.register_hook(lambda g, slot=slot: self.uses[slot].add_vector(self.by_text(g).to(_wide(g)).sum(1)))
                module._parameters[name] = copies  # type: ignore[assignment]
        elif not apart:
            return
        else:
            call.switched_off = [slot.parameter for slot in own.values()]
            for p in call.switched_off:
                p.requires_grad_(False)
        self.calls[module] = call

    def after(self, module: nn.Module, _: Any, output: Any) -> Any:
        """Forward hook, called too where the forward raised."""
        call = self.calls.pop(module, None)
        if call is None:
            return None
        self.undo(module, call)
        if call.kind == "copies" or not isinstance(output, Tensor):
            return None
        own = self.setting.own(module)
        weight = own.get("weight")
        if weight is not None and call.kind in ("linear", "conv1d"):
            self.uses[weight].expected += 1
        if weight is not None and call.kind == "embedding":
            self.uses[weight].embedded = True
        if not output.requires_grad:
            output = output.requires_grad_().clone()  # a copy may be changed in place
        if call.shared:
            output = output.expand(self.rows, -1, -1)
        output.register_hook(lambda b: self.arrived(module, call, own, b))
        return output

    def undo(self, module: nn.Module, call: Call) -> None:
        for p in call.switched_off:
            p.requires_grad_(True)
        for name, p in call.replaced.items():
            module._parameters[name] = p

    def by_text(self, x: Tensor) -> Tensor:
        """[rows, ..., d] -> [n, all between, d]."""
        return x.reshape(self.n, -1, x.shape[-1])

    @torch.no_grad()
    def arrived(self, module: nn.Module, call: Call, own: dict[str, Slot], b: Tensor) -> None:
        """The gradient of a call's output is there."""
        x, weight, bias = call.x, own.get("weight"), own.get("bias")
        if x._version != call.version:
            raise InputError(f"per_text: the input of a {type(module).__name__} was changed in place; use the collector")
        call.x = x.new_empty(0)  # memory goes back as the backward pass proceeds
        if call.kind == "embedding":
            if module is self.setting.carrier and self.setting.positions is not None:
                each = b.to(_wide(b)).view(self.n, self.windows, self.time, -1).sum(1)
                self.uses[self.setting.positions].add_vector(each.flatten(1))
            if weight is not None:
                ids = x.expand(b.shape[:-1]).reshape(self.n, -1)
                b, padding = self.by_text(b), getattr(module, "padding_idx", None)
                self.uses[weight].ids.append((ids, b if padding is None else b.masked_fill((ids == padding)[..., None], 0.0)))
            return
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            shape, eps = list(module.normalized_shape), module.eps
            eps = torch.finfo(x.dtype).eps if eps is None else eps
            b, x = b.to(_wide(b)).reshape(self.n, -1, *shape), x.to(_wide(x))
            if weight is not None:
                layer = isinstance(module, nn.LayerNorm)
                plain = F.layer_norm(x, shape, eps=eps) if layer else F.rms_norm(x, shape, eps=eps)
                self.uses[weight].add_vector((b * plain.view_as(b)).sum(1).flatten(1))
            if bias is not None:
                self.uses[bias].add_vector(b.sum(1).flatten(1))
            return
        b = self.by_text(b)
        if bias is not None:
            self.uses[bias].add_vector(b.sum(1, dtype=torch.promote_types(b.dtype, torch.float32)))
        if weight is not None:
            a, uses = self.by_text(x), self.uses[weight]
            uses.outer.append((a, b) if call.kind == "linear" else (b, a))
            uses.expected -= 1
            # at once, unless the square is that of a sum of several kinds
            whole = self.n == 1 or uses.embedded or (self.head is not None and self.head.weight is weight)
            if uses.expected == 0 and not whole:
                self.fold_products(weight)
                uses.outer, uses.folded = [], True

    @contextlib.contextmanager
    def noting(self, slot: Slot) -> Iterator[None]:
        """What is folded inside belongs to the slot; noted for the check."""
        square, probe = self.squares[-1].clone(), self.probe @ self.out[-1]
        yield
        if len(probe):
            old = self.noted.get(slot, (0.0, 0.0))
            self.noted[slot] = (old[0] + self.squares[-1] - square, old[1] + self.probe @ self.out[-1] - probe)

    def fold_products(self, slot: Slot) -> None:
        uses, e = self.uses[slot], self.setting
        a, b = (x[0] if len(x) == 1 else torch.cat(x, 1) for x in zip(*uses.outer, strict=True))
        with self.noting(slot):
            self.squares += fold_outer(self.out, a, b, offset=slot.offset, seed=e.seed, scale=slot.scale, backend=e.backend)

    def finish_slot(self, slot: Slot) -> None:
        """Fold what has not been folded yet of a parameter."""
        uses, left = self.uses[slot], slot.parameter.grad
        head = self.head if self.head is not None and self.head.weight is slot else None
        products, vectors = bool(uses.outer) or uses.folded, uses.vector is not None
        # Text by text each kind is settled alone; rows of an embedding also beside products, whose columns at these rows suffice.
        if left is not None or products + vectors + (head is not None) > 1 or (vectors and bool(uses.ids)):
            if self.n > 1:
                raise NotSeparable
            self.fold_whole(slot, left, head)
            return
        if uses.outer:
            self.fold_products(slot)
        if uses.vector is not None:
            self.fold_vectors(slot, uses.vector)
        if uses.ids:
            self.fold_ids(slot, head)

    def fold_whole(self, slot: Slot, left: Tensor | None, head: HeadUse | None) -> None:
        """All of a parameter's gradient but the head's part, for the only text."""
        uses, e, p = self.uses[slot], self.setting, slot.parameter
        total = torch.zeros_like(p, dtype=_wide(p)) if left is None else left.to(_wide(p), copy=True)
        for a, b in uses.outer:
            total += b[0].to(total.dtype).T @ a[0].to(total.dtype)
        for ids, b in uses.ids:
            total.index_put_((ids[0],), b[0].to(total.dtype), accumulate=True)
        if uses.vector is not None:
            total.view(-1)[: uses.vector.shape[1]] += uses.vector[0]
        with self.noting(slot):
            self.squares += fold(self.out[0], total, offset=slot.offset, seed=e.seed, scale=slot.scale, backend=e.backend)[0]
            if head is not None:
                factor = total if slot.scale is None else total * slot.scale.view_as(total).square()
                self.squares += 2 * head.product(0, factor)

    def fold_vectors(self, slot: Slot, x: Tensor) -> None:
        e, n = self.setting, torch.arange(self.n, device=x.device)
        x = x if slot.scale is None else x * slot.scale[: x.shape[1]]
        with self.noting(slot):
            fold_rows(self.out, x, n, torch.full_like(n, slot.offset), seed=e.seed, backend=e.backend)
            self.squares += x.double().square().sum(1)

    def fold_ids(self, slot: Slot, head: HeadUse | None) -> None:
        """Rows of an embedding, those of equal ids added up; and |products + rows|^2 needs twice their inner product."""
        uses, e = self.uses[slot], self.setting
        count, width = slot.parameter.shape
        ids, b = (torch.cat(x, 1) for x in zip(*uses.ids, strict=True))
        number = torch.arange(self.n, device=ids.device)
        key, inverse = (ids + number[:, None] * count).flatten().unique(return_inverse=True)
        rows = torch.zeros(len(key), width, dtype=_wide(b), device=b.device)
        rows.index_put_((inverse,), b.flatten(0, 1).to(rows.dtype), accumulate=True)  # in a fixed order on a GPU too
        sample, ids = key // count, key % count
        scale = None if slot.scale is None else slot.scale.view(count, width)[ids]
        rows = rows if scale is None else rows * scale
        with self.noting(slot):
            fold_rows(self.out, rows, sample, slot.offset + ids * width, seed=e.seed, backend=e.backend)
            self.squares.index_put_((sample,), rows.double().square().sum(1), accumulate=True)
            if not uses.outer and head is None:
                return
            rows = rows if scale is None else rows * scale
            begin = torch.searchsorted(sample, torch.arange(self.n + 1, device=sample.device)).tolist()
            for i in range(self.n):
                part = slice(begin[i], begin[i + 1])
                for x, y in uses.outer:
                    self.squares[i] += 2 * _inner(y[i][:, ids[part]], x[i], rows[part])
                if head is not None:
                    self.squares[i] += 2 * head.product(i, rows[part], ids[part])


class HeadUse:
    """The head of a model that keeps it apart, on the hidden states of a batch: logits = softcap(s (H W^T + bias))."""

    def __init__(self, run: BatchRun, head: Head, hidden: Tensor) -> None:
        self.run, self.head = run, head
        self.weight, self.bias = run.setting.slots.get(id(head.weight)), run.setting.slots.get(id(head.bias))
        self.hidden = run.by_text(hidden)  # [n, T, d]
        self.labels = run.batch.labels.view(run.n, -1)
        self.vocab = min(head.valid_vocab or len(head.weight), len(head.weight))
        lse = linear_logprob(self.hidden, head.weight, self.labels, return_lse=True, **head.options()).lse
        assert lse is not None
        self.lse = lse

    def gradient(self, which: slice, columns: slice | Tensor) -> Tensor:
        """Of the total log-likelihood in H W^T, for some texts and rows of W: [texts, T, columns]."""
        h, y = self.hidden[which], self.labels[which]
        dtype, head = _wide(h), self.head
        bias = None if head.bias is None else head.bias[columns].to(dtype)
        z = transform_(h.to(dtype) @ head.weight[columns].to(dtype).T, bias, head.softcap, head.logit_scale)
        g = (z - self.lse[which][..., None]).exp_().neg_()
        if isinstance(columns, slice):
            here = ((y >= columns.start) & (y < columns.start + g.shape[-1])).nonzero(as_tuple=True)
            at = (*here, y[here] - columns.start)
            g[at] += 1.0
        else:
            g += y[..., None] == columns
            g.masked_fill_(columns >= self.vocab, 0.0)
        if head.softcap is not None:
            g *= 1 - (z / head.softcap).square()
        return g.mul_(head.logit_scale).masked_fill_((y == IGNORE)[..., None], 0.0)

    def fold(self) -> Tensor:
        """Fold the gradients of weight and bias; gives that of the hidden states, [n, T, d]."""
        run, e, width = self.run, self.run.setting, self.hidden.shape[-1]
        total = torch.zeros_like(self.hidden, dtype=_wide(self.hidden))
        step = max(LOGIT_ENTRIES // self.labels.numel(), 64)
        biases = []
        for first in range(0, self.vocab, step):
            columns = slice(first, min(first + step, self.vocab))
            g = self.gradient(slice(None), columns)
            total += g @ self.head.weight[columns].to(total.dtype)
            if self.weight is not None:
                scale = self.weight.scale
                scale = None if scale is None else scale[first * width : columns.stop * width]
                offset = self.weight.offset + first * width
                with run.noting(self.weight):
                    run.squares += fold_outer(run.out, self.hidden, g, offset=offset, seed=e.seed, scale=scale, backend=e.backend)
            biases.append(g.sum(1))
        if self.bias is not None:
            run.uses[self.bias].add_vector(torch.cat(biases, 1))
        return total.to(self.hidden.dtype)

    def product(self, n: int, rows: Tensor, ids: Tensor | None = None) -> Tensor:
        """<gradient of W of text n, rows>, which stand at `ids`, or are all of them."""
        if ids is not None:
            return _inner(self.gradient(slice(n, n + 1), ids)[0], self.hidden[n], rows)
        total = torch.zeros((), dtype=torch.float64, device=rows.device)
        step = max(LOGIT_ENTRIES // self.labels.numel(), 64)
        for first in range(0, self.vocab, step):
            columns = slice(first, min(first + step, self.vocab))
            total += _inner(self.gradient(slice(n, n + 1), columns)[0], self.hidden[n], rows[columns])
        return total


def _inner(b: Tensor, a: Tensor, rows: Tensor) -> Tensor:
    """<b^T a, rows> of b [T, U], a [T, d], rows [U, d]."""
    return ((a.to(rows.dtype) @ rows.T) * b).sum(dtype=torch.float64)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
