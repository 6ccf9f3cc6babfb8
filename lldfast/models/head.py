"""The output matrix of a causal language model, apart from the layers below it, found by name and then checked.

A model whose head is a matrix on the last hidden state, followed at most by a scale and a soft cap, can be scored without the
logits of a whole batch: `linear_logprob` takes hidden states and the matrix. Whether that is so is asked of the model itself, by
a probe: the head applied to the hidden states must give the model's own logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from lldfast.models.hf_config import config_int, text_config
from lldfast.ops.chunks import transform_


@dataclass(frozen=True)
class Head:
    """`logits = softcap(logit_scale * (hidden @ weight.T + bias))`, of which ids below valid_vocab are real."""

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0
    valid_vocab: int | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., valid_vocab] in the dtype of hidden; for probes and for chunks of a few rows."""
        weight = self.weight[: self.valid_vocab].to(hidden.dtype)
        bias = None if self.bias is None else self.bias[: self.valid_vocab].to(hidden.dtype)
        return transform_(hidden @ weight.T, bias, self.softcap, self.logit_scale)

    def options(self) -> dict[str, Any]:
        """Keyword arguments of `linear_logprob`."""
        return {"bias": self.bias, "softcap": self.softcap, "logit_scale": self.logit_scale, "valid_vocab": self.valid_vocab}


def take_apart(model: Any) -> tuple[Any, Head | None, int, str]:
    """(trunk, head, vocabulary size, "weight" or why the head could not be taken apart), checked on a probe."""
    config = text_config(model)
    probe = torch.arange(1, 9)[None] % config_int(config, ("vocab_size",), 9)
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            expected = model(input_ids=probe.to(device), use_cache=False).logits
            vocab = expected.shape[-1]
            head, note = _find_head(model, config)
            if head is None:
                return None, None, vocab, f"logits ({note})"
            trunk = model.base_model
            hidden = trunk(input_ids=probe.to(device), use_cache=False).last_hidden_state
            if hidden.shape[-1] != head.weight.shape[1] or head.weight.shape[0] != vocab:
                return None, None, vocab, "logits (the head is not a matrix on the last hidden state)"
            # The same products, perhaps summed in another order: some roundings of the dtype apart at most.
            tolerance = 64 * torch.finfo(expected.dtype).eps * (1 + expected.float().abs().max())
            gap = (head.logits(hidden).float() - expected.float()).abs().max()
    finally:
        model.train(training)
    if not bool(gap <= tolerance):
        return None, None, vocab, f"logits (head times hidden state differs from the model's logits by {float(gap):.3g})"
    return trunk, head, vocab, "weight"


def _find_head(model: Any, config: Any) -> tuple[Head | None, str]:
    embeddings = getattr(model, "get_output_embeddings", lambda: None)()
    trunk = getattr(model, "base_model", model)
    if not isinstance(embeddings, nn.Linear) or not embeddings.weight.is_floating_point():
        return None, "no plain output matrix"
    if trunk is model:
        return None, "the model has no trunk of its own"
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    return Head(embeddings.weight, embeddings.bias, None if cap is None else float(cap), scale), ""
