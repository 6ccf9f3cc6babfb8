"""Text from a causal language model, one token at a time: decoders that keep keys and values, and the draw of a token.

A decoder is a batch of sequences of one length. `step` appends tokens to each and gives the logits of the last position, which
are those of a forward pass over the whole sequences, up to rounding. `GPTDecoder` computes what `GPT.forward` computes, in
evaluation mode, with the keys and values of earlier positions read from buffers; `HFDecoder` leaves them to the model.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from lldfast.errors import InputError
from lldfast.models.gpt import GPT, Block
from lldfast.models.language_model import LanguageModel


class GPTDecoder:
    """Incremental evaluation of a GPT; its weights must not change meanwhile.

    Args:
        model: a GPT, on any device.
        batch: number of sequences.
        length: most tokens of one, at most the block_size; the buffers hold 2 n_layer batch length n_embd numbers.
        vocab: ids from here on get no logit; at most valid_vocab, which is the default.

    Raises:
        InputError: length is more than block_size.
    """

    def __init__(self, model: GPT, batch: int, length: int, vocab: int | None = None) -> None:
        c = model.config
        if length > c.block_size:
            raise InputError(f"{length} tokens do not fit a block_size of {c.block_size}")
        self.model, self.length, self.filled = model, length, 0
        self._head = model.head_weight[: min(vocab or c.valid_vocab, c.valid_vocab)]
        shape = (c.n_layer, 2, batch, c.n_head, length, c.n_embd // c.n_head)
        # Never read beyond what was written, so that it needs no values.
        self._cache = torch.empty(shape, dtype=self._head.dtype, device=model.device)

    @torch.no_grad()
    def step(self, ids: Tensor) -> Tensor:
        """Append ids [B, n] (n is free at every call) and return the fp32 logits of the last position, [B, vocab].

        Raises:
            InputError: more than `length` tokens in all.
        """
        start, end = self.filled, self.filled + ids.shape[1]
        if end > self.length:
            raise InputError(f"{end} tokens do not fit a decoder of {self.length}")
        x = self.model.wte(ids) + self.model.wpe.weight[start:end]
        # A query at position p sees the keys up to p. One token alone sees them all.
        mask = None if end - start == 1 else torch.ones(end - start, end, dtype=torch.bool, device=x.device).tril(start)
        for cache, block in zip(self._cache, self.model.blocks, strict=True):
            x = _block(cast(Block, block), x, cache, start, end, mask)
        self.filled = end
        return (self.model.ln_f(x[:, -1]) @ self._head.T).float()

    def keep(self, rows: Tensor) -> bool:
        """Go on with these sequences only, rows int64 [b] in their new order; whether that was done (here always)."""
        self._cache = self._cache[:, :, rows]
        return True


def _block(block: Block, x: Tensor, cache: Tensor, start: int, end: int, mask: Tensor | None) -> Tensor:
    """`Block.forward` in evaluation mode for positions start to end: x [B, n, d], cache [2, B, n_head, length, d / n_head]."""
    batch, time, d = x.shape
    q, k, v = block.qkv(block.ln_1(x)).view(batch, time, 3, block.n_head, d // block.n_head).permute(2, 0, 3, 1, 4)
    cache[0, :, :, start:end], cache[1, :, :, start:end] = k, v
    y = F.scaled_dot_product_attention(q, cache[0, :, :, :end], cache[1, :, :, :end], attn_mask=mask)
    x = x + block.proj(y.transpose(1, 2).reshape(batch, time, d))
    return x + block.down(F.gelu(block.up(block.ln_2(x)), approximate="tanh"))


class HFDecoder:
    """Incremental evaluation of a Hugging Face model by its own past_key_values, in the mode (training or not) it is in.

    A model that returns none (state-space models name theirs otherwise), or that puts a learnt prompt before what it is given, is
    run over the whole sequences at every step, with a warning: right, but slow.

    Args:
        model: a causal language model of transformers.
        vocab: ids from here on get no logit; default all.
        bounds: lengths above which the model sees all positions in another way (`Together.bounds`); keys and values of a sequence
            are made anew when it grows beyond one.
    """

    def __init__(self, model: Any, vocab: int | None = None, bounds: Sequence[int] = ()) -> None:
        self.model, self._vocab, self._bounds = model, vocab, bounds
        # Where the model can, it computes the logits of the last position only.
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        self._past: Any = None
        self._ids: Tensor | None = None  # all so far
        self._whole = False  # a model that is run over all of them at every step

    @torch.no_grad()
    def step(self, ids: Tensor) -> Tensor:
        """Append ids [B, n] (n is free at every call) and return the fp32 logits of the last position, [B, vocab]."""
        before = 0 if self._ids is None else self._ids.shape[1]
        self._ids = ids if self._ids is None else torch.cat((self._ids, ids), 1)
        if self._whole:
            out = self.model(input_ids=self._ids, use_cache=False, **self._options)
        elif self._past is not None and not any(before <= bound < self._ids.shape[1] for bound in self._bounds):
            out = self.model(input_ids=ids, past_key_values=self._past, use_cache=True, **self._options)
            self._past = out.past_key_values
        else:
            out = self.model(input_ids=self._ids, use_cache=True, **self._options)
            self._past = getattr(out, "past_key_values", None)
            # peft puts such a prompt before every piece of a text that it is given.
            prompted = getattr(getattr(self.model, "active_peft_config", None), "is_prompt_learning", False)
            if self._past is None or prompted:
                why = "puts a learnt prompt before a text" if prompted else "returns no past_key_values"
                self._whole, name = True, type(self.model).__name__
                warnings.warn(f"{name} {why}: every token costs a pass over the whole text", stacklevel=2)
        return out.logits[:, -1, : self._vocab].float()

    def keep(self, rows: Tensor) -> bool:
        """Go on with these sequences only, rows int64 [b] in their new order; False: all rows are there still."""
        if not self._whole:
            if not hasattr(self._past, "batch_select_indices"):
                return False
            self._past.batch_select_indices(rows)
        if self._ids is not None:
            self._ids = self._ids[rows]
        return True


def decoder_of(model: LanguageModel, batch: int, length: int, vocab: int | None = None) -> GPTDecoder | HFDecoder:
    """A decoder for a batch of sequences of at most `length` tokens, whose logits end before id `vocab`."""
    if isinstance(model.module, GPT):
        return GPTDecoder(model.module, batch, length, vocab)
    return HFDecoder(model.module, vocab, model.together.bounds)


def probabilities(logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0) -> Tensor:
    """What tokens are drawn from: logits [B, V] -> fp64 [B, V], not normalised, 0 for every token ruled out.

    Args:
        temperature: divides the logits; above 0.
        top_k: exactly the k likeliest tokens remain, whatever their ties.
        top_p: of these, the likeliest remain whose sum first reaches the share top_p; at least one does.
    """
    # The largest is subtracted first: a small temperature must not overflow.
    z = (logits.double() - logits.double().amax(-1, keepdim=True)) / temperature
    p = z.exp()
    if top_k is None and top_p >= 1:
        return p
    values, order = p.sort(dim=-1, descending=True, stable=True) if top_k is None else p.topk(min(top_k, p.shape[-1]))
    kept = values.cumsum(-1) - values < top_p * values.sum(-1, keepdim=True) if top_p < 1 else torch.ones_like(values).bool()
    # Back in the order of the ids: tokens that change ranks by rounding then keep their places in the draw.
    return torch.zeros_like(p).scatter_(-1, order, values * kept)


def draw_levels(vocab: int) -> int:
    """Random numbers that `draw` takes for a token: the depth of a binary tree over the ids."""
    return max(1, (vocab - 1).bit_length())


def draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """An id for each row in proportion to weights [B, V] >= 0, from uniform [B, draw_levels(V)] in [0, 1) -> int64 [B].

    The ids are the leaves of a binary tree. From its root on, a number for each level says which half comes next. Weights that
    are off by a share of e change the id with a probability of about e for every level, whatever V; one number and the
    distribution function of all ids would move the bounds of every id behind a likely one, which for most ids is further than
    they are wide.
    """
    levels = draw_levels(weights.shape[-1])
    sums = [F.pad(weights.double(), (0, 2**levels - weights.shape[-1]))]
    for _ in range(levels):
        sums.append(sums[-1].unflatten(-1, (-1, 2)).sum(-1))
    node = torch.zeros(len(weights), 1, dtype=torch.int64, device=weights.device)
    for level in range(levels):
        total, halves = sums[levels - level], sums[levels - level - 1]
        left, right = halves.gather(-1, 2 * node), halves.gather(-1, 2 * node + 1)
        # Never towards a half without weight, even where u * total is rounded up.
        goes_right = (uniform[:, level, None].double() * total.gather(-1, node) >= left) & (right > 0)
        node = 2 * node + goes_right
    return node[:, 0]


def choose_token(
    logits: Tensor, uniform: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0
) -> Tensor:
    """The next ids, int64 [B], for logits [B, V] and uniform [B, draw_levels(V)]; temperature 0: the first of the likeliest."""
    if temperature == 0:
        return logits.argmax(-1)
    return draw(probabilities(logits, temperature, top_k, top_p), uniform)
