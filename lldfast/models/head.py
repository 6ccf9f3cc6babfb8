"""The output matrix of a causal language model, apart from the layers below it, and what becomes of its products.

A model whose head is a matrix on hidden states, followed at most by a scale and a soft cap, can be scored without the logits of a
whole batch: `linear_logprob` takes hidden states and the matrix. What follows the matrix is measured, not read from names in a
configuration: in a run on a few tokens the output layer's products are replaced by test logits from 1e-6 to 1e4 of both signs,
and the logits that the model then returns show scale and cap. So a head of zeros, or a dtype of few digits, hides nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from lldfast.models.forward import MODEL_ERRORS, in_short, run, wrapped
from lldfast.models.hf_config import scalars
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


class Measured(NamedTuple):
    """What follows the output layer: `softcap(logit_scale * products)`, cut to valid_vocab ids."""

    logit_scale: float
    softcap: float | None
    valid_vocab: int | None

    def head(self, layer: nn.Linear) -> Head:
        """With the layer's parameters of now."""
        return Head(layer.weight, layer.bias, self.softcap, self.logit_scale, self.valid_vocab)


class NotApart(Exception):
    """Why a model's head cannot be told apart from the rest."""


def output_layer(module: Any) -> nn.Linear:
    """
    Raises:
        NotApart: the module has none, or it computes something else than a matrix product and a bias.
    """
    layer = getattr(module, "get_output_embeddings", lambda: None)()
    if layer is None:
        raise NotApart("the model names no output layer")
    weight: Any = getattr(layer, "weight", None)
    # A subclass, a replaced `forward` or a weight of a kind of its own (quantised, sharded) may compute anything.
    plain = type(layer) is nn.Linear and "forward" not in vars(layer) and type(weight) in (nn.Parameter, Tensor)
    if not plain or not weight.is_floating_point():
        raise NotApart(f"no plain output matrix: the output layer is a {type(layer).__module__}.{type(layer).__qualname__}")
    return layer


def measure(module: Any, ids: Tensor) -> Measured:
    """Find out what the module does to the products of its output layer, from a run on ids [1, T]; a few rows of logits are made.

    Raises:
        NotApart: saying why.
    """
    layer, given = output_layer(module), []

    def replace(_: nn.Module, __: Any, products: Tensor) -> Tensor:
        given.append(_test_logits(products))
        return given[-1].clone()  # the model may work in place

    # Before all other hooks, so that what these do belongs to what is measured.
    handle = layer.register_forward_hook(replace, prepend=True)
    try:
        with torch.enable_grad():
            logits = getattr(run(module, ids), "logits", None)
    except MODEL_ERRORS as error:  # a model that cannot go on with these logits does more to them than is measured here
        raise NotApart(f"it does not run with other logits: {in_short(error)}") from None
    finally:
        handle.remove()
    if len(given) != 1:
        raise NotApart(f"its output layer is used {len(given)} times")
    z = given[0]
    if not isinstance(logits, Tensor) or logits.shape[:-1] != z.shape[:-1] or logits.shape[-1] > z.shape[-1]:
        raise NotApart("its logits are not the products of its output layer, row by row")
    if logits.requires_grad:
        raise NotApart("trainable parameters stand behind its output layer")
    vocab = logits.shape[-1]
    known = _numbers(value for source in (getattr(module, "config", None), *wrapped(module)) for _, value in scalars(source))
    test, returned = (x.detach().flatten().cpu().double() for x in (z[..., :vocab], logits))
    found = fit(test, returned, logits.dtype, known)
    if found is None:
        raise NotApart("its logits are not a scale and a soft cap of the output layer's products")
    return Measured(*found, valid_vocab=None if vocab == z.shape[-1] else vocab)


def _test_logits(products: Tensor) -> Tensor:
    """Numbers of both signs from 1e-6 to 3e4, as many small as large ones, in at least fp32."""
    generator, n = torch.Generator().manual_seed(0), products.numel()
    powers = torch.linspace(-20, 15, n, dtype=torch.float64)[torch.randperm(n, generator=generator)]
    signs = torch.randint(0, 2, (n,), generator=generator) * 2 - 1
    dtype = torch.promote_types(products.dtype, torch.float32)
    return (signs * torch.exp2(powers)).view(products.shape).to(products.device, dtype)


def _numbers(values: Iterable[Any]) -> list[float]:
    """Scales that a configuration may have meant: its numbers, and 1 by each of them."""
    found = {float(v) for v in values if isinstance(v, (int, float)) and not isinstance(v, bool) and 0 < abs(v) < 1e6}
    return [1.0, *sorted(found), *sorted(1 / v for v in found)]


def fit(z: Tensor, y: Tensor, dtype: torch.dtype, known: list[float]) -> tuple[float, float | None] | None:
    """(scale, cap or None) with y = cap tanh(scale z / cap), or y = scale z, for all of z, y fp64 [n]; None when there are none.

    Args:
        dtype: that y was computed in. Every value must agree to a few of its roundings, relative to the value itself.
        known: numbers that scale and cap are taken for where they agree; of 16 bits no other can be read to the digits it needs.
    """
    eps = torch.finfo(dtype).eps
    size = z.abs()
    small = size <= 2.0**-18  # no cap shows there
    scale = _exact(float((y[small] / z[small]).median()), known, 4 * eps, dtype)
    if scale is None or not bool(y.isfinite().all()):
        return None

    def fits(want: Tensor) -> bool:
        return bool(((y - want).abs() <= 8 * eps * want.abs()).all())

    if fits(scale * z):
        return scale, None
    cap = _exact(float(y.abs().max()), known, 4 * eps, dtype)
    if cap is None or not fits(transform_(z.clone(), None, cap, scale)):
        return None
    return scale, cap


def _exact(value: float, known: list[float], tolerance: float, dtype: torch.dtype) -> float | None:
    if value == 0 or value != value:
        return None
    nearest = min(known, key=lambda number: abs(number - value))
    if abs(nearest - value) <= tolerance * abs(value):
        return nearest
    return value if dtype.itemsize >= 4 else None
