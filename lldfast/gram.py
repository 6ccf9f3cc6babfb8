"""The Gram matrix G = J J^T of domain log-likelihood gradients, by exact rows: eqs. (4) and (6).

Row k of J is the gradient of l_k, the mean log-likelihood per token of domain k. Every text belongs to one domain, so all of
J costs one forward and backward pass over the evaluation corpus (about 6 P N FLOPs against 2 P N for scoring). Rows are kept
in fp32, K x P numbers; products are summed in fp64.

`E[l(theta_{t+1}) - l(theta_t)] ~ eta G w` for a gradient step of size eta on the mixture w.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from lldfast.data.evalset import EvalSet
from lldfast.errors import InputError, TrainingError
from lldfast.models.scorer import Scorer, load_scorer
from lldfast.models.scoring import IGNORE, batches, token_logprobs

MODES = ("auto", "exact")


@dataclass(frozen=True)
class GramEstimate:
    """G [K, K] in (nats per token)^2 per unit of parameter^2, in the order of `domains`, and how it was made.

    Attributes:
        naive_diagonal: |g_k|^2 before the noise of finitely many texts, tr(Sigma_k) / n_k, was taken out.
        n_texts: texts behind each row.
        debiased: per domain, whether the diagonal was debiased (a domain in one group cannot be).
    """

    domains: list[str]
    gram: NDArray[np.float64]
    naive_diagonal: NDArray[np.float64]
    n_texts: list[int]
    debiased: list[bool]
    mode: str
    seconds: float
    extra: dict[str, Any] = field(default_factory=dict)

    def matrix(self, domains: Sequence[str]) -> NDArray[np.float64]:
        """G with rows and columns in the order of `domains`.

        Raises:
            InputError: a domain that was not estimated.
        """
        unknown = [name for name in domains if name not in self.domains]
        if unknown:
            raise InputError(f"the Gram matrix has no domain {unknown[0]!r}; it has {self.domains}")
        index = [self.domains.index(name) for name in domains]
        return self.gram[np.ix_(index, index)]

    @property
    def condition(self) -> float:
        """Condition number (inf for a singular or indefinite matrix)."""
        values = np.linalg.eigvalsh(self.gram)
        return float(values[-1] / values[0]) if values[0] > 0 else float("inf")


def estimate(
    model: Scorer | str | os.PathLike[str],
    evalset: EvalSet | str | os.PathLike[str],
    *,
    mode: Literal["auto", "exact"] = "auto",
    k: Literal["auto"] = "auto",
    groups: int = 8,
    debias: bool = True,
    precondition: None = None,
    budget_bytes: int | None = None,
    batch_tokens: int = 4096,
    seed: int = 0,
) -> GramEstimate:
    """Estimate G on the texts of `evalset`.

    Args:
        model: a Scorer over the model whose parameters are differentiated, or what `load_scorer` takes. Frozen parameters
            are left out; a tied parameter counts once; one that a domain does not touch counts as zero.
        evalset: an EvalSet or the path of its Parquet file.
        mode: "exact" keeps the K rows; "auto" is "exact" here.
        k, precondition, seed: of sketched and preconditioned estimates, which this version does not make; exact rows draw
            nothing at random.
        groups: groups of texts per domain for the debiased diagonal (a U-statistic: the product of gradients of different
            texts has no noise term).
        debias: `G_kk = (|sum_b a_b g_b|^2 - sum_b a_b^2 |g_b|^2) / (1 - sum_b a_b^2)` over groups b with token shares a_b;
            domains with a single text keep the naive diagonal and say so in `debiased`.
        batch_tokens: tokens of a batch; their activations are what the backward pass holds.
        budget_bytes: refuse to allocate more than this for the rows.

    Raises:
        InputError: unknown mode, no texts, no trainable parameters, or the rows would exceed `budget_bytes`.
        TrainingError: a gradient is not finite; domain named.
    """
    if mode not in MODES:
        raise InputError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if k != "auto" or precondition is not None:
        raise InputError("gram.estimate makes exact rows of the plain Gram matrix here: leave k='auto' and precondition=None")
    model = model if isinstance(model, Scorer) else load_scorer(model)
    evalset = evalset if isinstance(evalset, EvalSet) else EvalSet.load(evalset)
    if groups < 1:
        raise InputError(f"groups must be >= 1, got {groups}")
    if len(evalset) == 0:
        raise InputError("gram.estimate: there are no evaluation texts")
    parameters = [p for p in model.module.parameters() if p.requires_grad]
    if not parameters:
        raise InputError(f"{model.name}: no parameter requires a gradient")
    began = time.perf_counter()
    domains, size = list(evalset.domains), sum(p.numel() for p in parameters)
    needed = 4 * size * len(domains)
    if budget_bytes is not None and needed > budget_bytes:
        raise InputError(
            f"exact rows of {len(domains)} domains x {size:,} parameters need {needed / 2**20:,.0f} MiB, the budget is "
            f"{budget_bytes / 2**20:,.0f} MiB"
        )
    rows = torch.zeros(len(domains), size, device=parameters[0].device)
    own_noise = np.zeros(len(domains))  # sum_b |sum of gradients of group b|^2, in total-log-likelihood units
    tokens, share, counts = np.zeros(len(domains)), np.zeros(len(domains)), evalset.counts()
    segments = model.tokenize(evalset)
    text_of = np.array([segment.text for segment in segments], dtype=np.int64)
    training = model.module.training
    model.module.eval()  # dropout would add noise that no text has
    try:
        for row, name in enumerate(domains):
            texts = np.flatnonzero(evalset.domain == name)
            for group in np.array_split(texts, min(groups, len(texts))):
                n = 0
                gradient = torch.zeros(size, device=rows.device)
                for batch in batches(segments, batch_tokens, np.flatnonzero(np.isin(text_of, group))):
                    batch = batch.to(model.device)
                    with torch.enable_grad():
                        total = token_logprobs(model, batch).sum()
                    found = torch.autograd.grad(total, parameters, allow_unused=True)
                    flat = [
                        torch.zeros_like(p).flatten() if g is None else g.flatten()
                        for g, p in zip(found, parameters, strict=True)
                    ]
                    gradient += torch.cat(flat).float()
                    n += int((batch.labels != IGNORE).sum())
                squares = gradient.double().square().sum()
                if not torch.isfinite(squares):
                    raise TrainingError(f"gram.estimate: a gradient of domain {name!r} is not finite")
                rows[row] += gradient
                own_noise[row] += float(squares)
                tokens[row] += n
                share[row] += n**2
            if tokens[row] == 0:
                raise InputError(f"gram.estimate: the texts of domain {name!r} have no scored token")
            rows[row] /= tokens[row]
    finally:
        model.module.train(training)
    gram = np.array([[_dot(rows[i], rows[j]) if j <= i else 0.0 for j in range(len(domains))] for i in range(len(domains))])
    gram = gram + np.tril(gram, -1).T
    naive = gram.diagonal().copy()
    share = share / tokens**2  # sum_b a_b^2
    corrected = debias & (share < 1 - 1e-12)
    noise_free = (naive - own_noise / tokens**2) / np.where(corrected, 1 - share, 1.0)
    # few noisy texts can push the unbiased value below zero, which no squared norm is: then nothing is known but the bound
    corrected &= noise_free > 0
    np.fill_diagonal(gram, np.where(corrected, noise_free, naive))
    return GramEstimate(
        domains, gram, naive, [counts[d] for d in domains], corrected.tolist(), "exact", time.perf_counter() - began
    )


def _dot(a: torch.Tensor, b: torch.Tensor, chunk: int = 1 << 22) -> float:
    """<a, b> with fp64 sums of fp32 rows, a chunk at a time so that no fp64 copy of a row is alive."""
    return sum(float(torch.dot(a[i : i + chunk].double(), b[i : i + chunk].double())) for i in range(0, len(a), chunk))
