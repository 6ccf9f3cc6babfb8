"""Eq. (1) and (3): log-likelihoods of evaluation texts, the vectors they make, and target-minus-base differences by domain.

`score` gives `l_i = (log p_i(x_1), ..., log p_i(x_N))`: natural log, summed over the tokens of each text, not normalised. The
batch that a text was in changes its value by fp32 rounding at most: tokens are scored in fp32, summed in fp64 in a fixed order.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch import Tensor

from lldfast.backends import versions
from lldfast.data.evalset import PARTS, EvalSet
from lldfast.errors import CorruptError, InputError
from lldfast.files import atomic_path
from lldfast.models.gpt import GPT
from lldfast.models.scorer import Scorer, load_scorer
from lldfast.models.scoring import IGNORE, Batch, batches, evaluating, layer_tokens, segment_sums
from lldfast.ops.chunks import row_chunks
from lldfast.terminal import progress_bar

FORMAT = "lldfast-loglik"
NORMALIZE = ("base_tokens", "bytes", "texts")
COLUMNS = ("logprob", "domain", "part", "n_tokens", "n_bytes", "text_hash")

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass
class LoglikVector:
    """Log-likelihoods of N texts under one model, in the order of their evaluation set.

    logprob: nats per text, fp64 [N]. domain, part: object arrays [N]. n_tokens: scored tokens of this model's tokenizer.
    n_bytes: UTF-8 bytes. text_hash: XXH3-64 of each text, by which vectors are matched. meta: model identity, tokenizer_hash,
    evalset_hash, bos, versions.
    """

    logprob: Floats
    domain: npt.NDArray[np.object_]
    n_tokens: Ints
    n_bytes: Ints
    part: npt.NDArray[np.object_]
    text_hash: npt.NDArray[np.uint64]
    meta: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.logprob)

    @property
    def domains(self) -> list[str]:
        """Domain names in order of first appearance."""
        return list(dict.fromkeys(self.domain.tolist()))

    def select(self, part: str | None = None) -> LoglikVector:
        """The texts of one part ("estimate" or "measure"); all for None.

        Raises:
            InputError: an unknown part.
        """
        if part is None:
            return self
        if part not in PARTS:
            raise InputError(f"unknown part {part!r}: expected one of {', '.join(PARTS)}")
        keep = self.part == part
        columns: dict[str, Any] = {name: getattr(self, name)[keep] for name in COLUMNS}
        return LoglikVector(**columns, meta={**self.meta, "selected": part})

    def by_domain(
        self, normalize: str = "base_tokens", base_tokens: LoglikVector | Sequence[int] | Ints | None = None
    ) -> dict[str, float]:
        """Eq. (3): sum of log-likelihoods by domain in nats per token, byte or text.

        Args:
            normalize: "base_tokens", "bytes" or "texts": what the sum is divided by.
            base_tokens: the base model's vector, or its [N] token counts, for "base_tokens"; default: this model's own tokens.

        Raises:
            InputError: unknown normalisation, other texts, or a domain without a single token.
        """
        return _ratios(self.logprob, _denominators(self, normalize, base_tokens), self.domain)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write Parquet, atomically; meta goes to the schema metadata as JSON."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = {name: pa.array(getattr(self, name)) for name in COLUMNS}
        metadata = {"format": FORMAT, "version": "1", "lldfast": json.dumps(self.meta, ensure_ascii=False)}
        with atomic_path(path) as temporary:
            pq.write_table(pa.table(columns, metadata=metadata), temporary, compression="zstd")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LoglikVector:
        """Read what `save` wrote.

        Raises:
            InputError: no such file, or Parquet of something else.
            CorruptError: not Parquet, or a column is missing or not finite.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        if not Path(path).is_file():
            raise InputError(f"{path}: no such log-likelihood vector")
        try:
            table = pq.read_table(path)
        except (pa.ArrowException, OSError) as error:
            raise CorruptError(f"{path} is not a readable Parquet file ({error})") from None
        metadata = table.schema.metadata or {}
        if metadata.get(b"format") != FORMAT.encode():
            raise InputError(f"{path} is Parquet, but not a log-likelihood vector of lldfast")
        missing = [name for name in COLUMNS if name not in table.column_names]
        if missing:
            raise CorruptError(f"{path}: no column {', '.join(missing)}")
        empty = [name for name in COLUMNS if table[name].null_count]
        if empty:
            raise CorruptError(f"{path}: column {empty[0]} has empty entries")
        try:
            vector = cls(
                np.asarray(table["logprob"].to_numpy(), np.float64),
                _objects(table["domain"].to_pylist()),
                np.asarray(table["n_tokens"].to_numpy(), np.int64),
                np.asarray(table["n_bytes"].to_numpy(), np.int64),
                _objects(table["part"].to_pylist()),
                np.asarray(table["text_hash"].to_numpy(), np.uint64),
                json.loads(metadata[b"lldfast"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptError(f"{path}: a column or the metadata is not what `lldfast score` writes ({error!r})") from None
        for i in np.flatnonzero(~np.isfinite(vector.logprob))[:1]:
            raise CorruptError(f"{path}: text {i} has no finite log-likelihood")
        return vector


def delta(
    target: LoglikVector, base: LoglikVector, normalize: str = "base_tokens", bootstrap: int = 0, seed: int = 0
) -> tuple[dict[str, float], dict[str, float]]:
    """Delta of eq. (4): target minus base by domain, both divided by the same counts (the base's tokens by default).

    Args:
        bootstrap: number of resamplings of the texts of each domain; 0: the second result is empty.

    Returns:
        {domain: nats per token, byte or text} and {domain: bootstrap standard error} (nan for a domain of one text).

    Raises:
        InputError: the vectors are of different texts; a domain without tokens.
    """
    _check_same_texts(target, base)
    if bootstrap < 0:
        raise InputError(f"bootstrap must be 0 or more, got {bootstrap}")
    difference = target.logprob - base.logprob
    counts = _denominators(base, normalize, None)
    errors = {}
    rng = np.random.default_rng(seed)
    for name in base.domains if bootstrap else []:
        rows = np.flatnonzero(base.domain == name)
        picks = rows[rng.integers(len(rows), size=(bootstrap, len(rows)))]  # [bootstrap, texts]
        with np.errstate(invalid="ignore", divide="ignore"):  # a draw of empty texts only
            draws = difference[picks].sum(1) / counts[picks].sum(1)
        draws = draws[np.isfinite(draws)]
        errors[name] = float(draws.std(ddof=1)) if len(rows) > 1 and len(draws) > 1 else float("nan")
    return _ratios(difference, counts, base.domain), errors


def score(
    model: Scorer | str | os.PathLike[str],
    evalset: EvalSet | str | os.PathLike[str],
    *,
    batch_tokens: int = 16_384,
    bos: str = "auto",
    backend: str = "auto",
    device: str | torch.device | None = None,
    amp_dtype: str | None = None,
    precision: str | None = None,
    overlap: int = 0,
    progress: bool = False,
) -> LoglikVector:
    """Log-likelihood of every text of `evalset` under `model`, in the order of `evalset`.

    Args:
        model: a Scorer, or what `load_scorer` takes (a GPT in memory: `Scorer.from_gpt(gpt, tokenizer)`).
        evalset: an EvalSet or the path of its Parquet file.
        batch_tokens: most tokens of a batch, padding included (a CPU takes fewer where that is faster); changes speed and
            memory, not results.
        bos: "auto", "native" or "none" (see models/scorer.py); for a Scorer, "auto" keeps its own rule.
        device: "auto" (cuda where there is one, else the CPU) or one by name, to which the model is moved first. Default: where
            it is; a path is loaded on auto.
        amp_dtype: "bfloat16" or "float16": run the layers (not the log-softmax) under autocast.
        precision: of the head's product, as in `linear_logprob`; "bf16x3" is several times faster than fp32 on a CPU with AMX.
        overlap: context tokens that the windows of a long text repeat.
        progress: a bar on stderr.

    Raises:
        InputError: an argument is wrong, or a text has no finite log-likelihood (text, domain and model named).
    """
    scorer = _as_scorer(model, bos, device)
    evalset = evalset if isinstance(evalset, EvalSet) else EvalSet.load(evalset)
    if len(evalset) == 0:
        raise InputError("there are no evaluation texts to score")
    segments = scorer.tokenize(evalset, overlap)
    bar = progress_bar(scorer.name, sum(map(len, segments)), unit=" tokens", show=progress)
    with bar, evaluating(scorer), torch.inference_mode():
        sums = segment_sums(scorer, segments, batch_tokens, backend, amp_dtype, precision, lambda done: bar.update(done - bar.n))
    texts = sums.group([s.text for s in segments], len(evalset))  # in order of the segments, whatever the batches were
    bad = np.flatnonzero(~np.isfinite(texts.logprob))
    if len(bad):
        i = int(bad[0])
        raise InputError(
            f"{scorer.name} gives text {i} (domain {evalset.domain[i]}) the log-likelihood {texts.logprob[i]}"
            + (f", and {len(bad) - 1} more texts are not finite" if len(bad) > 1 else "")
        )
    meta = {
        "model": scorer.identity,
        "tokenizer_hash": scorer.tokenizer.hash,
        "evalset_hash": evalset.hash,
        "bos": {"mode": scorer.bos, "id": scorer.bos_id},
        "overlap": overlap,
        "amp_dtype": amp_dtype,
        "precision": precision,
        "versions": versions(),
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    domain, n_bytes, part = evalset.domain.copy(), evalset.n_bytes.copy(), evalset.part.copy()
    return LoglikVector(texts.logprob, domain, texts.n_tokens, n_bytes, part, _text_hashes(evalset), meta)


def token_kl(
    target: Scorer | str, base: Scorer | str, evalset: EvalSet | str | os.PathLike[str], *, batch_tokens: int = 16_384
) -> tuple[Floats, EvalSet]:
    """True KL(target || base) over next tokens, summed over each text's positions: (nats [N], the evaluation set).

    Both models see the same windows, of the shorter context. Ids that only one head has (padding) are left out and the
    distributions renormalised; that must leave the whole tokenizer's vocabulary.

    Raises:
        InputError: the tokenizers or first-token rules differ, or a head is smaller than the vocabulary.
    """
    a, b = _as_scorer(target, "auto", None), _as_scorer(base, "auto", None)
    evalset = evalset if isinstance(evalset, EvalSet) else EvalSet.load(evalset)
    if a.tokenizer.hash != b.tokenizer.hash:
        raise InputError(f"true KL needs one tokenizer, but {a.name} has {a.tokenizer.name} and {b.name} has {b.tokenizer.name}")
    if (a.bos, a.bos_id) != (b.bos, b.bos_id):
        raise InputError(f"true KL needs one first-token rule, but {a.name} has bos={a.bos!r} and {b.name} has bos={b.bos!r}")
    vocab = min(a.vocab_size, b.vocab_size)
    if vocab < a.tokenizer.vocab_size:
        raise InputError(f"a head of {vocab} ids does not cover the {a.tokenizer.vocab_size} ids of tokenizer {a.tokenizer.name}")
    segments = (a if a.context_length <= b.context_length else b).tokenize(evalset)
    sums = np.zeros(len(segments))
    with evaluating(a), evaluating(b), torch.inference_mode():
        for batch in batches(segments, min(layer_tokens(a, batch_tokens), layer_tokens(b, batch_tokens))):
            sums[batch.segment] = _batch_kl(a, b, batch, vocab).sum(1).numpy()
    nats = np.zeros(len(evalset))
    np.add.at(nats, np.array([s.text for s in segments], np.int64), sums)
    return nats, evalset


def _batch_kl(a: Scorer, b: Scorer, batch: Batch, vocab: int) -> Tensor:
    """KL(a || b) in nats per position, fp64 [B, T] on the CPU, 0 where ignored; in row chunks, so no [T, V] tensor."""
    states = [s.hidden(batch.ids.to(s.device)) if s.separate_head else s.logits(batch.ids.to(s.device)) for s in (a, b)]
    rows = (batch.labels.flatten() != IGNORE).nonzero()[:, 0]
    out = torch.zeros(batch.labels.numel(), dtype=torch.float64)
    for chunk in row_chunks(len(rows), vocab, torch.float32, a.device, least=64):
        logs = []
        for scorer, state in zip((a, b), states, strict=True):
            part = state.flatten(0, 1)[rows[chunk].to(scorer.device)].float()
            z = scorer.head().logits(part) if scorer.separate_head else part
            logs.append(torch.log_softmax(z[:, :vocab], -1).to(a.device))
        log_p, log_q = logs
        p = log_p.exp()
        # 0 log 0 = 0, also where the other model gives such an id probability 0.
        terms = torch.where(p > 0, p * (log_p - log_q), 0.0)
        out[rows[chunk]] = terms.sum(-1, dtype=torch.float64).cpu()
    return out.view(batch.labels.shape)


def _as_scorer(model: Any, bos: str, device: str | torch.device | None) -> Scorer:
    if isinstance(model, GPT):
        raise InputError("a GPT in memory has no tokenizer: pass Scorer.from_gpt(gpt, tokenizer)")
    if not isinstance(model, Scorer):
        return load_scorer(model, bos=bos, device=device)
    if device is not None:
        model.to(device)
    return model if bos in ("auto", model.bos) else model.with_bos(bos)


def _denominators(vector: LoglikVector, normalize: str, base_tokens: Any) -> Floats:
    if normalize not in NORMALIZE:
        raise InputError(f"normalize={normalize!r} is not one of {', '.join(NORMALIZE)}")
    if normalize == "bytes":
        return vector.n_bytes.astype(np.float64)
    if normalize == "texts":
        return np.ones(len(vector))
    if base_tokens is None:
        return vector.n_tokens.astype(np.float64)
    if isinstance(base_tokens, LoglikVector):
        _check_same_texts(vector, base_tokens)
        base_tokens = base_tokens.n_tokens
    counts = np.asarray(base_tokens, np.float64)
    if counts.shape != (len(vector),):
        raise InputError(f"base_tokens has shape {counts.shape}, the vector has {len(vector)} texts")
    return counts


def _ratios(values: Floats, counts: Floats, domain: npt.NDArray[np.object_]) -> dict[str, float]:
    out = {}
    for name in dict.fromkeys(domain.tolist()):
        rows = domain == name
        if counts[rows].sum() <= 0:
            raise InputError(f"domain {name} has no scored tokens: its texts are too short for this tokenizer")
        out[name] = float(values[rows].sum() / counts[rows].sum())
    return out


def _check_same_texts(a: LoglikVector, b: LoglikVector) -> None:
    if len(a) != len(b):
        raise InputError(f"the vectors are of different texts: {len(a)} and {len(b)} of them")
    for i in np.flatnonzero((a.text_hash != b.text_hash) | (a.domain != b.domain))[:1]:
        raise InputError(f"the vectors are of different texts: they differ at text {i} (domains {a.domain[i]} and {b.domain[i]})")


def _text_hashes(evalset: EvalSet) -> npt.NDArray[np.uint64]:
    return np.array([xxhash.xxh3_64_intdigest(text.encode()) for text in evalset.texts], np.uint64)


def _objects(values: list[Any]) -> npt.NDArray[np.object_]:
    out = np.empty(len(values), dtype=object)
    out[:] = values
    return out
