"""G of a model on an evaluation corpus: which texts make a group, what keeps the rows, the errors of the result."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import xxhash
from numpy.typing import ArrayLike, NDArray

from lldfast.data.evalset import EvalSet
from lldfast.errors import InputError, TrainingError
from lldfast.gram.accumulator import Accumulator
from lldfast.gram.collector import Collector, Layout
from lldfast.gram.debias import debiased_diagonal, domain_gram, psd_clip
from lldfast.gram.jackknife import gram_standard_errors
from lldfast.gram.options import Mode, check_values
from lldfast.gram.precondition import SecondMoments, check_optimizer, of_optimizer
from lldfast.gram.result import GramEstimate
from lldfast.gram.ridge import auto_ridge
from lldfast.gram.rows import BYTES, GradientRows, row_bytes
from lldfast.gram.sketch_error import effective_size, relative_error, rounding_error, size_for
from lldfast.models.batches import batches, evaluating, gradient_tokens, token_logprobs
from lldfast.models.gpt import GPT
from lldfast.models.language_model import LanguageModel, Segment
from lldfast.models.loading import load_model
from lldfast.ops.sketch.philox import check_seed
from lldfast.weights.equations import check_tau
from lldfast.weights.simplex import align

DEFAULT_BUDGET = 2 << 30  # bytes for the rows, or for their sketches
# With rows kept whole, the groups are sketched too, for error bars: to this size, whose own error widens them little.
ERROR_K = 1 << 14
LEAST_ERROR_K = 1 << 10
LEAST_K, LARGEST_K = 1 << 6, 1 << 20

Ints = NDArray[np.int64]


class Storage(NamedTuple):
    """What is kept of the rows of J.

    mode: any but "auto"; k: of the groups' sketches; bytes: of rows or sketches on this process.
    """

    mode: str
    k: int
    bytes: int


@torch.inference_mode(False)  # whatever mode the caller is in: tensors made in that one cannot take part in a backward pass
def estimate(
    model: LanguageModel | str | os.PathLike[str],
    evalset: EvalSet | str | os.PathLike[str],
    *,
    mode: Mode = "auto",
    k: int | Literal["auto"] = "auto",
    groups: int = 8,
    debias: bool = True,
    precondition: torch.optim.Optimizer | None = None,
    budget_bytes: float | None = None,
    batch_tokens: int = 4096,
    seed: int = 0,
    delta: Mapping[str, float] | ArrayLike | None = None,
    tau: float = 1.0,
    target_kl: float = 1e-4,
    ridge: float | Literal["auto"] | None = "auto",
) -> GramEstimate:
    """Estimate G = J J^T, eq. (4), on the texts of `evalset`: one forward and backward pass over them.

    Args:
        model: a LanguageModel over the model whose parameters are differentiated, or what `load_model` takes. Frozen parameters
            are left out; a tied parameter counts once; one that a domain does not touch counts as zero.
        evalset: an EvalSet or the path of its Parquet file.
        mode: what is kept of the rows of J. "exact": K P numbers in fp32; "sharded": each process of torch.distributed keeps
            its part of them (every process runs the same texts); "bf16", "int8", "int4": rounded stochastically, exact norms;
            "fold": sketches of k numbers for every group, never K P numbers. "auto": the first of these that fits `budget_bytes`.
        k: size of the sketches of "fold", a power of two. "auto": for an expected KL of the weights of `target_kl` (planned by
            `size_for`, at a spread of the logits of std(delta) / tau, or of 1 without delta), as far as the budget allows, and no
            more than there are parameters; where rows in fp32 take no more than such sketches, they are kept ("exact").
        groups: groups of texts per domain. Debiasing and error bars come from their differences; texts of one document stay in
            one group, and the order of the texts does not matter. As many as there are texts: gradients text by text.
        debias: take the noise of finitely many texts out of the diagonal (`debiased_diagonal`). Domains with a single group
            keep the naive diagonal and say so in `debiased`.
        precondition: an Adam or AdamW optimiser of this model: G is then J M^-1 J^T, and `drift` is estimated (precondition.py).
            It makes one more pass over the texts, and holds three more numbers per parameter.
        budget_bytes: for the rows or sketches (2 GiB by default). Beside them there are one gradient, and 8 bytes for every pair
            of groups.
        batch_tokens: tokens of a batch; their activations are what the backward pass holds.
        seed: of the sketch and of stochastic rounding; `matrix` of equal seeds and parameters are comparable to the bit.
        delta: Delta in nats per token, {domain: value} or [K]; sharpens `k="auto"` and the ridge. tau: see `k`.
        ridge: "auto" chooses by split halves (`auto_ridge`); a number >= 0 in G's unit is kept as it is; None: none.

    Raises:
        InputError: an argument that makes no sense, no texts, nothing to train, or more is asked for than `budget_bytes`.
        TrainingError: a gradient is not finite; domain and text named.
    """
    model = model if isinstance(model, LanguageModel) else _load(model)
    evalset = evalset if isinstance(evalset, EvalSet) else EvalSet.load(evalset)
    _check(mode, k, groups, batch_tokens, tau, target_kl, ridge, budget_bytes)
    check_seed(seed)
    if len(evalset) == 0:
        raise InputError("gram.estimate: there are no evaluation texts")
    began = time.perf_counter()
    domains = list(evalset.domains)
    shift = None if delta is None else align(delta, domains, "delta")
    if shift is not None and not np.isfinite(shift).all():
        raise InputError(f"delta: the value of domain {domains[int(np.argmin(np.isfinite(shift)))]!r} is not finite")
    if precondition is not None:
        check_optimizer(model.module, precondition)
    layout = _layout(model)
    split = {name: split_groups(evalset, name, groups) for name in domains}
    n_groups = sum(len(parts) for parts in split.values())
    spread = 1.0 if shift is None else float(shift.std()) / tau
    kept = choose_storage(mode, k, len(domains), n_groups, layout.size, budget_bytes, target_kl, spread)

    segments = model.tokenize(evalset)
    tokens = _token_counts(segments, len(evalset))
    for name in domains:
        if not sum(int(tokens[part].sum()) for part in split[name]):
            raise InputError(f"gram.estimate: the texts of domain {name!r} have no scored token")
    work = _Work(model, evalset, segments, split, tokens, gradient_tokens(model, batch_tokens))
    device = model.device
    made = None
    if precondition is not None:
        moments = SecondMoments(layout.size, device)
        work.run(Collector(model.module, moments), moments)
        made = of_optimizer(model.module, precondition, moments.mean())
        del moments
    sketches = Accumulator(layout.size, domains, kept.k, seed, layout=layout.hash, device=device)
    rows = None
    if kept.mode != "fold":
        rows = GradientRows(domains, _window(kept.mode, layout.size), _storage(kept.mode), seed, device)
    scale, dot = (None, None) if made is None else (made.scale, made.dot)
    sinks = [sketches] if rows is None else [sketches, rows]
    work.run(Collector(model.module, *sinks, scale=scale, dot=dot), rows)

    products, group_domain, group_tokens = sketches.products()
    exact, variance = (None, None) if rows is None else (_reduced(x, kept.mode, device) for x in rows.gram())
    gram, naive, debiased = _gram(exact, products, group_domain, group_tokens, debias)
    clipped = psd_clip(gram)
    size = effective_size(kept.k, layout.size)
    amount = ridge
    if ridge == "auto":
        amount = auto_ridge(products, group_domain, group_tokens, shift, debias=debias)
    errors = None
    if any(len(parts) > 1 for parts in split.values()):
        found = gram_standard_errors(products, group_domain, group_tokens, size if rows is None else None, debias=debias)
        errors = found.total
    drift = None
    if made is not None:
        sums = np.zeros(len(domains))
        np.add.at(sums, group_domain, [sketches.dots[key] for key in sketches.groups()])
        drift = sums / np.bincount(group_domain, weights=group_tokens)
    extra: dict[str, Any] = {
        "n_params": layout.size,
        "layout": layout.hash,
        "seed": seed,
        "groups": groups,
        "debias": debias,
        "bytes": kept.bytes,
        "clipped": float(np.abs(clipped - gram).max()),
        "evalset": evalset.hash,
    }
    if made is not None:
        extra |= {"eta": made.eta, "preconditioner": made.source}
    counts = evalset.counts()
    return GramEstimate(
        domains=domains,
        gram=clipped,
        naive_diagonal=naive,
        n_texts=[counts[name] for name in domains],
        debiased=debiased,
        mode=kept.mode,
        k=kept.k if rows is None else None,
        ridge=None if amount is None else float(amount),
        gram_se=errors,
        expected_error=relative_error(len(domains), size) if variance is None else rounding_error(clipped, variance),
        drift=drift,
        products=products,
        group_domain=group_domain,
        group_tokens=group_tokens,
        seconds=time.perf_counter() - began,
        extra=extra,
        evalset=evalset,
    )


def choose_storage(
    mode: str,
    k: int | Literal["auto"],
    n_domains: int,
    n_groups: int,
    size: int,
    budget_bytes: float | None,
    target_kl: float,
    spread: float = 1.0,
) -> Storage:
    """What is kept: rows of `size` numbers for each domain, or sketches of k numbers for each group.

    "auto" takes the most accurate that fits: exact, sharded over the processes, bf16, int8, int4, fold. The sketches from which
    error bars come beside rows are counted too: of ERROR_K numbers, of fewer where they would take more than the rows and the
    budget needs it. No sketch that is planned here has more numbers than the parameters: with as many it is the gradient itself.
    "fold" of a planned size gives way to "exact" where that takes no more.

    Raises:
        InputError: nothing fits, or not what was asked for; sizes given.
    """
    budget = DEFAULT_BUDGET if budget_bytes is None and mode == "auto" else budget_bytes
    processes = _processes()[1]
    if mode == "sharded" and processes == 1:
        raise InputError("mode='sharded' needs torch.distributed with several processes; with one, 'exact' is the same")
    rows = {name: n_domains * row_bytes(name, size) for name in BYTES}
    rows["sharded"] = n_domains * row_bytes("exact", -(-size // processes))

    def beside(of_rows: int) -> int:
        """Numbers per sketch beside rows of so many bytes."""
        numbers = min(ERROR_K, size)
        while budget is not None and of_rows + 8 * numbers * n_groups > budget and 8 * numbers * n_groups > of_rows:
            if numbers <= LEAST_ERROR_K:
                break
            numbers = smaller_size(numbers)
        return numbers

    wanted = k
    if wanted == "auto":
        largest = min(LARGEST_K, size)
        while budget is not None and largest > LEAST_K and 8 * largest * n_groups > budget:
            largest = smaller_size(largest)
        wanted = min(size_for(n_domains, target_kl, spread), largest)
    numbers = {name: beside(of_rows) for name, of_rows in rows.items()} | {"fold": int(wanted)}
    needs = {name: rows.get(name, 0) + 8 * numbers[name] * n_groups for name in numbers}
    order: tuple[str, ...] = ("exact", *(("sharded",) if processes > 1 else ()), "bf16", "int8", "int4", "fold")
    if mode != "auto":
        planned = mode == "fold" and k == "auto"
        order = ("exact",) if planned and needs["exact"] <= needs["fold"] else (mode,)
    for name in order:
        if budget is None or needs[name] <= budget:
            return Storage(name, numbers[name], needs[name])
    least = min(needs[name] for name in order)
    what = f"sketches of {n_groups} groups" if mode in ("auto", "fold") else f"{mode} rows of {n_domains} domains"
    raise InputError(f"{what} x {size:,} parameters need {least:,} bytes, the budget is {int(budget or 0):,}")


def smaller_size(k: int) -> int:
    """The next smaller power of two; k > 1."""
    return 1 << ((k - 1).bit_length() - 1)


def split_groups(evalset: EvalSet, domain: str, groups: int) -> list[Ints]:
    """Texts of a domain in at most `groups` groups, by a hash, so that the order of the texts does not matter.

    Texts of one document, and equal texts, are not independent: they stay together, and a domain of one document is one group.
    """
    units: dict[str, list[int]] = {}
    for i in np.flatnonzero(evalset.domain == domain).tolist():
        number = int(evalset.document[i])
        name = f"document {number}" if number >= 0 else evalset.texts[i]
        units.setdefault(xxhash.xxh3_128_hexdigest(name.encode()), []).append(i)
    ordered = [units[name] for name in sorted(units)]
    parts = np.array_split(np.arange(len(ordered)), min(groups, len(ordered)))
    return [np.array(sorted(i for at in part for i in ordered[at]), dtype=np.int64) for part in parts]


class _Work:
    """The texts of every group through the model."""

    def __init__(
        self,
        model: LanguageModel,
        evalset: EvalSet,
        segments: list[Segment],
        split: dict[str, list[Ints]],
        tokens: Ints,
        batch: int,
    ) -> None:
        self.model, self.evalset, self.segments = model, evalset, segments
        self.split, self.tokens, self.batch = split, tokens, batch
        self.of_text: dict[int, list[int]] = {}
        for i, segment in enumerate(segments):
            self.of_text.setdefault(segment.text, []).append(i)

    def run(self, collector: Collector, rows: GradientRows | SecondMoments | None = None) -> None:
        with evaluating(self.model):  # dropout would add noise that no text has
            for domain, parts in self.split.items():
                for index, texts in enumerate(parts):
                    n = int(self.tokens[texts].sum())
                    if n == 0:
                        continue
                    try:
                        with collector.group(domain, index, n):
                            self.backward(texts, collector)
                    except TrainingError:
                        raise TrainingError(self.culprit(domain, texts)) from None
                if rows is not None:
                    rows.finish(domain, float(sum(self.tokens[texts].sum() for texts in parts)))

    def backward(self, texts: Ints, collector: Collector | None = None) -> None:
        which = [i for text in texts.tolist() for i in self.of_text.get(text, [])]
        with torch.enable_grad():
            parts = list(batches(self.segments, self.batch, which, together=self.model.together))
            for i, batch in enumerate(parts):
                total = token_logprobs(self.model, batch.to(self.model.device)).sum()
                if collector is not None and i + 1 == len(parts):
                    collector.final()
                if total.requires_grad:  # else these texts touch no trainable parameter: their gradient is 0
                    total.backward()

    def culprit(self, domain: str, texts: Ints) -> str:
        """Which text gave a gradient that is not finite."""
        parameters = [p for p in self.model.module.parameters() if p.requires_grad]
        kept = [p.grad for p in parameters]
        try:
            for text in texts.tolist():
                for p in parameters:
                    p.grad = None
                self.backward(np.array([text]))
                if any(p.grad is not None and not bool(p.grad.isfinite().all()) for p in parameters):
                    start = self.evalset.texts[text][:40]
                    return f"gram.estimate: the gradient of text {text} of domain {domain!r} ({start!r}...) is not finite"
        finally:
            for p, gradient in zip(parameters, kept, strict=True):
                p.grad = gradient
        return f"gram.estimate: a gradient of domain {domain!r} is not finite (of the sum of texts {texts[0]} to {texts[-1]})"


def _gram(
    exact: NDArray[np.float64] | None, products: NDArray[np.float64], domain: Ints, tokens: NDArray[np.float64], debias: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64], list[bool]]:
    """G, its naive diagonal and which entries were debiased; from whole rows where there are any."""
    if exact is None:
        gram, naive, flags = domain_gram(products, domain, tokens, debias=debias)
        return gram, naive, flags.tolist()
    gram, naive = exact.copy(), exact.diagonal().copy()
    total = np.bincount(domain, weights=tokens)
    own = np.bincount(domain, weights=products.diagonal()) / total**2
    share = np.bincount(domain, weights=tokens**2) / total**2
    diagonal, flags = debiased_diagonal(naive, own, share)
    if debias:
        np.fill_diagonal(gram, diagonal)
    return gram, naive, (flags & debias).tolist()


def _check(
    mode: str, k: int | str, groups: int, batch_tokens: int, tau: float, target_kl: float, ridge: float | str | None,
    budget: float | None,
) -> None:  # fmt: skip
    check_values(mode=mode, k=k, groups=groups, batch_tokens=batch_tokens, target_kl=target_kl)
    if budget is not None and (isinstance(budget, bool) or not isinstance(budget, (int, float)) or not 0 < budget < math.inf):
        raise InputError(f"budget_bytes must be a number > 0, got {budget!r}")
    check_tau(tau)
    number = isinstance(ridge, (int, float, np.number)) and not isinstance(ridge, bool)
    if ridge not in ("auto", None) and not (number and 0 <= float(ridge) < math.inf):
        raise InputError(f"ridge must be a number >= 0, 'auto' or None, got {ridge!r}")


def _load(model: Any) -> LanguageModel:
    if isinstance(model, GPT):
        raise InputError("gram.estimate was given a bare model: wrap it once, by load_model(model, tokenizer=...)")
    return load_model(model)


def _layout(model: LanguageModel) -> Layout:
    try:
        return Layout.of(model.module)
    except InputError as error:
        raise InputError(f"{model.name}: {error}") from None


def _token_counts(segments: list[Segment], n_texts: int) -> Ints:
    """Scored tokens of each text [N]."""
    counts = np.zeros(n_texts, dtype=np.int64)
    for segment in segments:
        counts[segment.text] += len(segment) - segment.first
    return counts


def _processes() -> tuple[int, int]:
    """Rank and number of the processes of torch.distributed; one without it."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def _storage(mode: str) -> str:
    return "exact" if mode == "sharded" else mode


def _window(mode: str, size: int) -> tuple[int, int]:
    rank, processes = _processes() if mode == "sharded" else (0, 1)
    return rank * size // processes, (rank + 1) * size // processes


def _reduced(gram: NDArray[np.float64], mode: str, device: torch.device) -> NDArray[np.float64]:
    """Summed over the processes of "sharded": K^2 numbers."""
    if mode != "sharded":
        return gram
    table = torch.from_numpy(gram).to(device)
    torch.distributed.all_reduce(table)
    return table.cpu().numpy()
