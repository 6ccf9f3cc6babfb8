"""What the sketch and Gram benchmarks compare with: other sketches in torch, and packages. Not run by itself.

Sketches are objects with `rows(J [K, P]) -> [K, k]` whose products estimate J J^T. `CountSketch` and `dense_jl` are the strongest
forms found for a CPU: the sign is folded into the bucket, which saves a table and a product; random bits become signs by a table
look-up. `Kronecker` is the family of LoGra and of bergson's default: per linear layer, random projections of its input and of its
output's gradient; parameters that are not a linear layer's weight are left out.

Packages are imported when they are asked for: traker 0.3.2, dattri 0.3.0 and bergson 2.5.1 ran on a CPU beside this project's
pins (`pip install -c constraints.txt -e '.[bench]'`).
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from lldfast.models.batches import SegmentBatch, token_logprobs
from lldfast.models.language_model import LanguageModel

BLOCK = 1 << 16  # parameters at a time on a CPU, so that temporaries stay in cache

Pass = Sequence[tuple[int, SegmentBatch]]  # (domain, batch) in the order of the passes


class CountSketch:
    """Every parameter goes to one of k buckets with a sign. int32 [P] of tables: 2 * bucket + (1 for minus)."""

    def __init__(self, n: int, k: int, seed: int, device: str = "cpu") -> None:
        made = torch.Generator(device).manual_seed(seed)
        self.k, self.n = k, n
        self.table = torch.randint(2 * k, (n,), generator=made, dtype=torch.int32, device=device)

    def index_add(self, g: Tensor) -> Tensor:
        both = torch.zeros(2 * self.k, device=g.device)
        step = BLOCK if g.device.type == "cpu" else self.n
        for part, index in zip(g.split(step), self.table.split(step), strict=True):
            both.index_add_(0, index, part.float())
        return both[0::2] - both[1::2]

    def bincount(self, g: Tensor) -> Tensor:
        both = np.zeros(2 * self.k)
        step = max(BLOCK, 2 * self.k)  # every call makes its 2 k buckets anew
        for part, index in zip(g.split(step), self.table.split(step), strict=True):
            both += np.bincount(index.numpy(), weights=part.float().numpy(), minlength=2 * self.k)
        return torch.from_numpy(both[0::2] - both[1::2])

    def rows(self, jacobian: Tensor) -> Tensor:
        return torch.stack([self.bincount(row) for row in jacobian])


class PlainCountSketch:
    """The same, as it is usually written: int64 buckets, fp32 signs and one product of the whole vector. 12 P bytes of tables."""

    def __init__(self, n: int, k: int, seed: int, device: str = "cpu") -> None:
        table = CountSketch(n, k, seed, device).table
        self.k, self.bucket = k, (table >> 1).long()
        self.sign = 1.0 - 2.0 * (table & 1)

    def __call__(self, g: Tensor) -> Tensor:
        return torch.zeros(self.k, device=g.device).index_add_(0, self.bucket, g * self.sign)


class ReadySigns:
    """CountSketch without masks: chunks of k added up with ready signs, int8 [P]. What one writes in plain torch."""

    def __init__(self, n: int, k: int, seed: int, device: str = "cpu") -> None:
        made = torch.Generator(device).manual_seed(seed)
        self.k = k
        self.signs = torch.randint(2, (n,), generator=made, dtype=torch.int8, device=device).mul_(2).sub_(1)

    def __call__(self, g: Tensor) -> Tensor:
        out = torch.zeros(self.k, device=g.device)
        step = max((BLOCK if g.device.type == "cpu" else len(g)) // self.k, 1) * self.k
        for part, signs in zip(g.split(step), self.signs.split(step), strict=True):
            whole = len(part) // self.k * self.k
            out += (part[:whole].view(-1, self.k) * signs[:whole].view(-1, self.k)).float().sum(0)
            if whole < len(part):
                out[: len(part) - whole] += part[whole:] * signs[whole:]
        return out


def signs_of_bytes(device: str) -> Tensor:
    """[256, 8]: the signs that the bits of a byte stand for."""
    values = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device) & 1
    return (1 - 2 * values).float()


def dense_jl(rows: Tensor, k: int, seed: int) -> Tensor:
    """Dense Johnson-Lindenstrauss with random signs, made on the fly: rows [K, P] -> [K, k]; k a multiple of 8."""
    device = rows.device.type
    made, table = torch.Generator(rows.device).manual_seed(seed), signs_of_bytes(device)
    out = torch.zeros(len(rows), k, device=rows.device)
    block = 1 << (12 if device == "cpu" else 18)
    for part in rows.split(block, dim=1):
        bits = torch.randint(256, (part.shape[1] * k // 8,), generator=made, dtype=torch.int32, device=rows.device)
        out += part.float() @ F.embedding(bits, table).view(part.shape[1], k)
    return out / k**0.5


def coordinates(rows: Tensor, k: int, seed: int) -> Tensor:
    """k parameters drawn without replacement."""
    drawn = np.random.default_rng(seed).choice(rows.shape[1], size=k, replace=False, shuffle=False)
    return rows[:, torch.from_numpy(np.sort(drawn))] * (rows.shape[1] / k) ** 0.5


def last(rows: Tensor, k: int, seed: int) -> Tensor:
    """The last k parameters: a fixed subset."""
    return rows[:, -k:] * (rows.shape[1] / k) ** 0.5


class Kronecker:
    """`B (sum_t b_t a_t^T) A^T` of every linear layer, A [p, I] and B [p, O] with normal entries of variance 1 / p."""

    def __init__(self, model: LanguageModel, k: int, seed: int) -> None:
        self.model, module = model, model.module
        head = module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None
        self.layers = {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear) and m is not head}
        self.p = max(round((k / len(self.layers)) ** 0.5), 1)
        made = torch.Generator().manual_seed(seed)
        self.a, self.b = {}, {}
        for name, m in self.layers.items():
            self.a[name] = torch.randn(m.in_features, self.p, generator=made) / self.p**0.5
            self.b[name] = torch.randn(m.out_features, self.p, generator=made) / self.p**0.5
        self.places, offset = {}, 0
        for name, p in module.named_parameters():
            self.places[name] = (offset, p.shape)
            offset += p.numel()

    @property
    def k(self) -> int:
        return self.p**2 * len(self.layers)

    def own_columns(self, rows: Tensor) -> list[Tensor]:
        """The columns of J [K, P] that belong to these layers."""
        found = []
        for name in self.layers:
            offset, shape = self.places[name + ".weight"]
            found.append(rows[:, offset : offset + shape.numel()].view(len(rows), *shape))
        return found

    def rows(self, jacobian: Tensor) -> Tensor:
        """The same numbers as `collect`, from ready rows: the projection is linear."""
        parts = zip(self.layers, self.own_columns(jacobian), strict=True)
        return torch.cat([(self.b[n].T @ part.float() @ self.a[n]).flatten(1) for n, part in parts], 1)

    def collect(self, passes: Pass, domains: int) -> Tensor:
        """[K, k] with hooks: no gradient of a weight is ever made."""
        out = {name: torch.zeros(domains, self.p, self.p) for name in self.layers}
        inputs: dict[str, Tensor] = {}
        row = 0

        def keep(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, given: tuple[Tensor, ...], __: Tensor) -> None:
                inputs[name] = given[0].detach().flatten(0, -2) @ self.a[name]

            return hook

        def project(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, __: Any, gradients: tuple[Tensor, ...]) -> None:
                out[name][row] += (gradients[0].flatten(0, -2) @ self.b[name]).T @ inputs.pop(name)

            return hook

        with frozen(self.model):
            handles = [m.register_forward_hook(keep(n)) for n, m in self.layers.items()]
            handles += [m.register_full_backward_hook(project(n)) for n, m in self.layers.items()]
            try:
                for domain, batch in passes:
                    row = domain
                    token_logprobs(self.model, batch).sum().backward()
            finally:
                for handle in handles:
                    handle.remove()
        return torch.cat([part.flatten(1) for part in out.values()], 1)


@contextlib.contextmanager
def frozen(model: LanguageModel) -> Iterator[None]:
    """No weight wants a gradient, only what follows the embedding: as these tools run, and it saves a third of the work."""
    module = model.module
    wanted = [p for p in module.parameters() if p.requires_grad]
    embedding = module.get_input_embeddings() if hasattr(module, "get_input_embeddings") else module.wte
    handle = embedding.register_forward_hook(lambda _, __, out: out.requires_grad_())
    for p in wanted:
        p.requires_grad_(False)
    try:
        yield
    finally:
        handle.remove()
        for p in wanted:
            p.requires_grad_(True)


def package(module: str, distribution: str) -> tuple[Any, str]:
    """A module and its version, or None and why not."""
    try:
        return importlib.import_module(module), importlib.metadata.version(distribution)
    except Exception as error:  # noqa: BLE001 - a peer that does not load here gets a line that says so
        return None, f"{distribution}: {type(error).__name__}: {str(error)[:100]}"


def trak(rows: Tensor, k: int, seed: int) -> Tensor:
    """traker's projector for machines without CUDA. Its matrix block is [P, block_size] fp32: 100 by default, 8 here."""
    module, why = package("trak.projectors", "traker")
    if module is None:
        raise ImportError(why)
    kind = module.ProjectionType.rademacher
    projector = module.BasicProjector(rows.shape[1], k, seed, kind, torch.device("cpu"), block_size=8)
    return projector.project(rows, model_id=0) / k**0.5


def dattri(rows: Tensor, k: int, seed: int) -> Tensor:
    """dattri's random_project makes this projector on a CPU, with blocks of 100 columns; 8 here."""
    module, why = package("dattri.func.projection", "dattri")
    if module is None:
        raise ImportError(why)
    kind = module.ProjectionType.rademacher
    projector = module.BasicProjector(rows.shape[1], k, seed, kind, torch.device("cpu"), block_size=8)
    return projector.project(rows, ensemble_id=0)


def dattri_mask(rows: Tensor, k: int, seed: int) -> Tensor:
    """dattri's random_mask: coordinates."""
    module, why = package("dattri.func.projection", "dattri")
    if module is None:
        raise ImportError(why)
    call = module.random_project(rows, len(rows), k, 8, seed, "random_mask", device="cpu")
    return call(rows) * (rows.shape[1] / k) ** 0.5


class Bergson:
    """bergson's in-memory collector with its default per-module projection, on our batches and our loss."""

    def __init__(self, model: LanguageModel, k: int, seed: int) -> None:
        bergson, why = package("bergson", "bergson")
        if bergson is None:
            raise ImportError(why)
        self.bergson, self.model, self.seed = bergson, model, seed
        self.layers = Kronecker(model, k, seed).layers
        self.p = max(round((k / len(self.layers)) ** 0.5), 1)
        self.k = self.p**2 * len(self.layers)

    def collect(self, passes: Pass, domains: int) -> Tensor:
        """[K, k]: it keeps a row per text, which are summed by domain here."""
        from datasets import Dataset

        texts = sum(len(batch.ids) for _, batch in passes)
        data = Dataset.from_dict({"input_ids": [[0]] * texts})
        settings = {"projection_dim": self.p, "projection_type": "normal", "projection_seed": self.seed}
        collector = self.bergson.InMemoryCollector(
            model=self.model.module,
            data=data,
            cfg=self.bergson.IndexConfig(run_path="unused", **settings),
            processor=self.bergson.GradientProcessor(**settings),
            target_modules=set(self.layers),
        )
        domain_of, done = [], 0
        # the collector asks the parameters for the dtype of gradients before they are frozen
        with frozen(self.model):
            for domain, batch in passes:
                with collector.with_batch(batch.labels != -100):
                    total = token_logprobs(self.model, batch).sum(1)
                    total.sum().backward()
                index = list(range(done, done + len(batch.ids)))
                collector.process_batch(index, losses=total)
                domain_of += [domain] * len(batch.ids)
                done += len(batch.ids)
        collector.teardown()
        every = torch.cat([part.flatten(1).float() for part in collector.gradients.values()], 1)
        return torch.zeros(domains, every.shape[1]).index_add_(0, torch.tensor(domain_of), every)


DENSE_PEERS = {"traker, BasicProjector": trak, "dattri, BasicProjector": dattri}
