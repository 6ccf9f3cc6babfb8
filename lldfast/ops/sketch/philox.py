"""Philox4x32-10, the counter-based generator of Random123 (Salmon et al., 2011): four 32-bit words for a counter and a key.

A word depends on nothing but its counter and the key, so that any part of a random table can be made anywhere, in any order: by a
thread of a GPU kernel, a vector lane of the C++ kernels, or the torch code below, with the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lldfast.errors import InputError

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
MASK = 0xFFFFFFFF


def check_seed(seed: int) -> int:
    """Refuse what is no 64-bit key.

    Raises:
        InputError: not an integer in [0, 2^64).
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise InputError(f"seed must be an integer in [0, 2^64), got {seed!r}")
    return seed


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words for every counter: int64 tensors that hold values in [0, 2^32), of any shapes that broadcast.

    Args:
        counter: four int64 tensors of 32-bit words, the lowest first.
        seed: the 64-bit key; its low half is the first key word.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = seed & MASK, seed >> 32
    for _ in range(ROUNDS):
        # int64 products wrap, but their bits are those of the unsigned ones
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32 & MASK) ^ c1 ^ k0, p1 & MASK, (p0 >> 32 & MASK) ^ c3 ^ k1, p0 & MASK
        k0, k1 = k0 + WEYL[0] & MASK, k1 + WEYL[1] & MASK
    shape = torch.broadcast_shapes(c0.shape, c1.shape, c2.shape, c3.shape)
    return c0.expand(shape), c1.expand(shape), c2.expand(shape), c3.expand(shape)
