"""Token log-likelihoods summed by segment (a text, a window, a domain), with the counts that any normalisation divides by.

Sums are in fp64 and run in the order of tokens, so they do not depend on batch shapes, threads or devices. States of disjoint
batches or of ranks add up: a sum and a count are all that an all_reduce has to carry.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lldfast.errors import InputError


@dataclass
class SegmentSums:
    """logprob: nats, fp64 [N]. n_tokens: scored tokens, int64 [N]. A segment nothing was added to has 0 of both."""

    logprob: npt.NDArray[np.float64]
    n_tokens: npt.NDArray[np.int64]

    @classmethod
    def zeros(cls, n: int) -> SegmentSums:
        return cls(np.zeros(n), np.zeros(n, np.int64))

    def add(self, logprob: Tensor, segment: npt.ArrayLike | Tensor, scored: Tensor | None = None) -> None:
        """Add tokens.

        Args:
            logprob: [...] in nats, any device.
            segment: number of each token's segment, of logprob's shape, or of its leading dimensions (one per row of a batch).
            scored: bool [...]: tokens to count; default: all. For padded batches: `labels != ignore_index`.

        Raises:
            InputError: shapes do not fit, or a number is outside [0, N).
        """
        values = logprob.detach().double().cpu().numpy()
        index = np.asarray(segment.cpu() if isinstance(segment, Tensor) else segment)
        if index.shape != values.shape[: index.ndim]:
            raise InputError(f"segment has shape {index.shape}, which is not the beginning of logprob's {values.shape}")
        index = np.broadcast_to(index.reshape(index.shape + (1,) * (values.ndim - index.ndim)), values.shape).ravel()
        values = values.ravel()
        if scored is not None:
            if tuple(scored.shape) != tuple(logprob.shape) or scored.dtype != torch.bool:
                raise InputError(f"scored must be bool {tuple(logprob.shape)}, not {scored.dtype} {tuple(scored.shape)}")
            keep = scored.cpu().numpy().ravel()
            index, values = index[keep], values[keep]
        if len(index) and not 0 <= index.min() <= index.max() < len(self.logprob):
            raise InputError(
                f"segment numbers run from {index.min()} to {index.max()}, but there are {len(self.logprob)} segments"
            )
        # bincount adds one after the other, which sum() and add.reduceat() do not promise.
        self.logprob += np.bincount(index, values, minlength=len(self.logprob))
        self.n_tokens += np.bincount(index, minlength=len(self.logprob))

    def merge(self, other: SegmentSums) -> None:
        """Add the state of another batch or rank.

        Raises:
            InputError: it has another number of segments.
        """
        if len(other.logprob) != len(self.logprob):
            raise InputError(f"cannot merge {len(other.logprob)} segments into {len(self.logprob)}")
        self.logprob += other.logprob
        self.n_tokens += other.n_tokens

    def group(self, index: npt.ArrayLike, n: int) -> SegmentSums:
        """The sums of groups of segments: texts into domains, windows into texts. index: [N] group numbers below n."""
        groups = np.asarray(index)
        if groups.shape != self.logprob.shape or (len(groups) and not 0 <= groups.min() <= groups.max() < n):
            raise InputError(f"index must be {len(self.logprob)} group numbers below {n}")
        out = SegmentSums.zeros(n)
        np.add.at(out.logprob, groups, self.logprob)
        np.add.at(out.n_tokens, groups, self.n_tokens)
        return out
