"""How well G predicts a step of an optimiser: the step is taken, then the model and the optimiser are put back as they were."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lldfast.data.evalset import EvalSet
from lldfast.errors import InputError
from lldfast.gram.result import GramEstimate
from lldfast.measure.score import score
from lldfast.models.batches import batches, evaluating, gradient_tokens, token_logprobs
from lldfast.models.language_model import LanguageModel
from lldfast.weights.simplex import Values, simplex

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Fidelity:
    """Predicted against measured changes of l by one optimiser step, for S mixtures.

    Attributes:
        cosine: between measured change and G w (+ drift) [S]; 1 is a perfect prediction of the direction.
        cosine_centred: the same of the parts that differ between domains [S], which alone move the weights; NaN for one domain.
        scale: measured change per predicted one, by least squares [S]: the step size that the optimiser had in effect.
        weights, predicted, measured: [S, K]; measured in nats per token. domains: K names.
    """

    domains: list[str]
    weights: Array
    predicted: Array
    measured: Array
    cosine: Array
    cosine_centred: Array
    scale: Array

    def __str__(self) -> str:
        return (
            f"cosine {self.cosine.mean():.4f} (least {self.cosine.min():.4f}), centred {np.nanmean(self.cosine_centred):.4f}, "
            f"effective step size {self.scale.mean():.3g} over {len(self.cosine)} mixtures"
        )


def fidelity(
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    gram: GramEstimate,
    evalset: EvalSet | None = None,
    *,
    weights: Sequence[Values] | None = None,
    lr: float | None = None,
    batch_tokens: int = 4096,
) -> Fidelity:
    """Take one step of `optimizer` along the gradient of each mixture, and compare the change of l with `gram`'s prediction.

    The mixture's gradient is that of `sum_k w_k l_k` on the texts of `evalset`, so eq. (4) predicts a change of eta (G w +
    drift). Parameters, gradients, buffers and the optimiser's state are put back after each step; hooks on the optimiser's steps
    do run. Costs a forward and backward pass and a scoring pass over the texts for each mixture, and a copy of the parameters and
    of the optimiser's state.

    Args:
        gram: of this model and these texts (`debias=False` gives the matrix of these very texts), with or without `precondition`.
        evalset: by default the texts that `gram` was estimated on.
        weights: S mixtures, mappings or arrays in the order of gram's domains. By default the uniform one and each domain alone,
            at most eight.
        lr: learning rate of every parameter group for these steps; None: the optimiser's own. Small ones measure eq. (4), large
            ones also the curvature.

    Raises:
        InputError: other domains than gram's, a parameter that the optimiser lacks, all learning rates 0, or an unknown weight.
    """
    evalset = gram.evalset if evalset is None else evalset
    if evalset is None:
        raise InputError("a Gram matrix from a file does not hold its texts: pass evalset=")
    if set(evalset.domains) != set(gram.domains):
        raise InputError(f"the texts have the domains {evalset.domains}, the Gram matrix {gram.domains}")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InputError(f"fidelity measures a torch optimiser, got {optimizer!r:.100}")
    if lr is not None and not (isinstance(lr, (int, float)) and lr > 0):
        raise InputError(f"lr must be > 0, got {lr!r}")
    if weights is not None and not len(weights):
        raise InputError("weights is empty: give mixtures to measure, or None")
    if lr is None and not any(float(group["lr"]) > 0 for group in optimizer.param_groups):
        raise InputError("every learning rate of the optimiser is 0 (a warm-up?): pass lr=")
    k = len(gram.domains)
    parameters = [p for p in model.module.parameters() if p.requires_grad]
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if any(id(p) not in own for p in parameters):
        raise InputError("the optimiser does not have every trainable parameter of the model")
    chosen: Sequence[Any] = [np.full(k, 1 / k), *np.eye(k)[:7]] if weights is None else weights
    mixtures = np.stack([simplex(w, gram.domains, f"weights {i}") for i, w in enumerate(chosen)])
    drift = np.zeros(k) if gram.drift is None else gram.drift
    predicted = mixtures @ gram.gram + drift

    values = {name: value.detach().clone() for name, value in model.module.state_dict().items()}
    gradients = [p.grad for p in parameters]
    saved = _State(optimizer)
    before = _by_domain(model, evalset, gram.domains)
    measured = np.zeros_like(predicted)
    try:
        for i, w in enumerate(mixtures):
            _loss_gradient(model, evalset, dict(zip(gram.domains, w.tolist(), strict=True)), parameters, batch_tokens)
            for group in optimizer.param_groups:
                if group.get("maximize"):  # which is given the gradient of what it shall raise
                    for p in group["params"]:
                        p.grad = None if p.grad is None else -p.grad
                if lr is not None:
                    group["lr"] = lr
            optimizer.step()
            measured[i] = _by_domain(model, evalset, gram.domains) - before
            model.module.load_state_dict(values)
            saved.restore()
    finally:
        model.module.load_state_dict(values)
        saved.restore()
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient
    centred = [x - x.mean(1, keepdims=True) for x in (measured, predicted)]
    return Fidelity(
        domains=list(gram.domains),
        weights=mixtures,
        predicted=predicted,
        measured=measured,
        cosine=_cosine(measured, predicted),
        cosine_centred=_cosine(*centred) if k > 1 else np.full(len(mixtures), np.nan),
        scale=(measured * predicted).sum(1) / (predicted**2).sum(1),
    )


class _State:
    """An optimiser's state and settings, tensor by tensor: load_state_dict would cast moments to the parameters' dtype."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.state = {p: _copied(entry) for p, entry in optimizer.state.items()}
        self.groups = [_copied({k: v for k, v in group.items() if k != "params"}) for group in optimizer.param_groups]

    def restore(self) -> None:
        self.optimizer.state.clear()
        self.optimizer.state.update({p: _copied(entry) for p, entry in self.state.items()})
        for group, settings in zip(self.optimizer.param_groups, self.groups, strict=True):
            group.update(_copied(settings))


def _copied(entry: dict[str, Any]) -> dict[str, Any]:
    return {k: v.clone() if isinstance(v, torch.Tensor) else copy.copy(v) for k, v in entry.items()}


def _cosine(a: Array, b: Array) -> Array:
    with np.errstate(invalid="ignore", divide="ignore"):
        return (a * b).sum(1) / np.sqrt((a**2).sum(1) * (b**2).sum(1))


def _by_domain(model: LanguageModel, evalset: EvalSet, domains: list[str]) -> Array:
    found = score(model, evalset).by_domain()
    return np.array([found[name] for name in domains])


def _loss_gradient(
    model: LanguageModel, evalset: EvalSet, weights: Mapping[str, float], parameters: list[torch.nn.Parameter], batch_tokens: int
) -> None:
    """Leave the gradient of `-sum_k w_k l_k` in .grad."""
    for p in parameters:
        p.grad = None
    segments = model.tokenize(evalset)
    tokens = dict.fromkeys(weights, 0)
    for segment in segments:
        tokens[evalset.domain[segment.text]] += len(segment) - segment.first
    factor = np.array([weights[evalset.domain[s.text]] / tokens[evalset.domain[s.text]] for s in segments])
    most = gradient_tokens(model, batch_tokens)
    with evaluating(model), torch.enable_grad():
        for batch in batches(segments, most, np.flatnonzero(factor), together=model.together):
            each = torch.from_numpy(factor[batch.segment]).to(model.device)
            values = token_logprobs(model, batch.to(model.device)).sum(1)
            (-(values * each.to(values.dtype)).sum()).backward()
