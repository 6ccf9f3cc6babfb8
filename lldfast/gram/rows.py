"""The K rows of J kept whole: in fp32, over the processes of a group, or in 16, 8 or 4 bits by stochastic rounding.

Stochastic rounding takes the upper of two neighbours with the probability that makes the mean right, independently in every row,
so inner products of different rows stay unbiased; the diagonal comes from the exact norms.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lldfast.errors import InputError, listed

# bytes per number, scales included
BYTES = {"exact": 4.0, "bf16": 2.0, "int8": 1.0 + 4 / 128, "int4": 0.5 + 4 / 128}
SCALED = 128  # neighbouring numbers that share a scale
CHUNK = 1 << 18
TOGETHER = 1 << 24  # numbers of all rows that `gram` has in fp64 at a time


def row_bytes(mode: str, size: int) -> int:
    """Memory of a finished row of `size` numbers; rows that are rounded have whole blocks of a scale."""
    return int(BYTES[mode] * (size if mode == "exact" else _whole_blocks(size)))


def _whole_blocks(size: int) -> int:
    return -(-size // SCALED) * SCALED


class GradientRows:
    """Sums of gradients by domain, one row of `window` each.

    Attributes:
        mode: "exact", "bf16", "int8" or "int4". window: the part of the flat parameter space that this process keeps.
    """

    def __init__(self, domains: list[str], window: tuple[int, int], mode: str, seed: int, device: torch.device) -> None:
        if mode not in BYTES:
            raise InputError(f"rows are kept as one of {', '.join(BYTES)}, not {mode!r}")
        self.domains, self.window, self.mode, self.device = list(domains), window, mode, device
        size = window[1] - window[0]
        self._size = _whole_blocks(size)  # the rest stays 0
        self._generator = torch.Generator(device).manual_seed(seed % 2**63)
        self._rows = torch.zeros(len(domains), size, device=device) if mode == "exact" else None
        self._buffer: Tensor | None = None
        self._packed: list[tuple[Tensor, Tensor | None]] = []
        self.squares: list[float] = []

    def add(
        self, domain: str, group: int, offset: int, tensor: Tensor, scale: Tensor | None = None, dot: Tensor | None = None
    ) -> float:
        """Add a part of a gradient to its domain's row. Domains come one after another, in their order."""
        row = self._row(domain)
        begin, end = max(offset, self.window[0]), min(offset + tensor.numel(), self.window[1])
        if begin < end:
            part = slice(begin - offset, end - offset)
            values = tensor.reshape(-1)[part].float()
            to = row[begin - self.window[0] : end - self.window[0]]
            if scale is None:
                to += values
            else:
                to.addcmul_(values, scale.reshape(-1)[part])
        return 0.0

    def _row(self, domain: str) -> Tensor:
        if self._rows is not None:
            return self._rows[self.domains.index(domain)]
        if self.domains.index(domain) != len(self._packed):
            raise InputError(f"rows of {self.mode} are made domain by domain, in the order [{listed(map(repr, self.domains))}]")
        if self._buffer is None:
            self._buffer = torch.zeros(self._size, device=self.device)
        return self._buffer

    def finish(self, domain: str, tokens: float) -> None:
        """The domain's gradient is complete: make it per token, and pack it."""
        row = self._row(domain)
        row /= tokens
        self.squares.append(sum(float(part.double().square().sum()) for part in row.split(CHUNK)))
        if self._rows is None:
            self._packed.append(self._pack(row))
            row.zero_()
            if len(self._packed) == len(self.domains):
                self._buffer = None

    def _pack(self, row: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.mode == "bf16":
            packed = torch.empty(len(row), dtype=torch.bfloat16, device=row.device)
            for to, part in zip(packed.split(CHUNK), row.split(CHUNK), strict=True):
                noise = torch.randint(1 << 16, part.shape, generator=self._generator, device=row.device, dtype=torch.int32)
                to.copy_(((part.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32))
            return packed, None
        top = 127 if self.mode == "int8" else 7
        blocks = row.view(-1, SCALED)
        scales = blocks.abs().amax(1) / top
        levels = torch.empty(blocks.shape, dtype=torch.int8, device=row.device)
        for to, part, unit in zip(*(x.split(CHUNK // SCALED) for x in (levels, blocks, scales)), strict=True):
            steps = part / unit.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
            noise = torch.rand(steps.shape, generator=self._generator, device=row.device)
            to.copy_((steps + noise).floor_().clamp_(-top, top))
        if self.mode == "int4":
            pairs = (levels.view(-1, 2) + 8).to(torch.uint8)
            return pairs[:, 0] | pairs[:, 1] << 4, scales
        return levels.view(-1), scales

    def _part(self, row: int, begin: int, end: int) -> Tensor:
        """Numbers begin .. end of a row in fp64; both are multiples of SCALED where rows are packed."""
        if self._rows is not None:
            return self._rows[row, begin:end].double()
        packed, scales = self._packed[row]
        if scales is None:
            return packed[begin:end].double()
        if self.mode == "int4":
            pairs = packed[begin // 2 : end // 2]
            levels = torch.stack((pairs & 15, pairs >> 4), 1).flatten().to(torch.int8) - 8
        else:
            levels = packed[begin:end]
        unit = scales[begin // SCALED : end // SCALED].double()
        return (levels.view(-1, SCALED).double() * unit[:, None]).flatten()

    def _noise(self, row: int, begin: int, end: int, values: Tensor) -> Tensor:
        """Variance of the rounding of numbers begin .. end: a sixth of the squared distance between neighbours, on average."""
        scales = self._packed[row][1]
        if scales is None:
            _, exponent = torch.frexp(values)
            return torch.where(values == 0, 0.0, torch.ldexp(torch.ones_like(values), exponent - 8).square() / 6)
        return (scales[begin // SCALED : end // SCALED].double().square() / 6).repeat_interleave(SCALED)

    def gram(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Inner products of the finished rows, and the variances that rounding gave them (0 on the diagonal), both fp64 [K, K].

        With n the rounding noise of a row, independent of every other, `Var <x, y> = sum n_x^2 y^2 + x^2 n_y^2 + n_x^2 n_y^2`.
        """
        k = len(self.domains)
        total, variance = torch.zeros(2, k, k, dtype=torch.float64, device=self.device)
        size = self._rows.shape[1] if self._rows is not None else self._size
        chunk = min(CHUNK, max(TOGETHER // k // SCALED, 1) * SCALED)
        for begin in range(0, size, chunk):
            end = min(begin + chunk, size)
            part = torch.stack([self._part(row, begin, end) for row in range(k)])
            total += part @ part.T
            if self._rows is None:
                noise = torch.stack([self._noise(row, begin, end, part[row]) for row in range(k)])
                crossed = noise @ part.square().T
                variance += crossed + crossed.T + noise @ noise.T
        table, errors = total.cpu().numpy(), variance.cpu().numpy()
        np.fill_diagonal(table, self.squares)
        np.fill_diagonal(errors, 0.0)
        return table, errors
