"""Eq. (1): a model on every evaluation text, and two models side by side for the true KL.

`score` gives `l_i = (log p_i(x_1), ..., log p_i(x_N))`: natural log, summed over the tokens of each text, not normalised. The
batch that a text was in changes its value by fp32 rounding at most: tokens are scored in fp32, summed in fp64 in a fixed order.
"""

from __future__ import annotations

import datetime
import os
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lldfast.backends import versions
from lldfast.data.evalset import EvalSet
from lldfast.errors import ComparisonWarning, InputError
from lldfast.measure.comparable import MEASURED_ON, compare_conditions
from lldfast.measure.loglik import Floats, LoglikVector
from lldfast.models.batches import IGNORE, SegmentBatch, batches, evaluating, layer_tokens, segment_sums
from lldfast.models.gpt import GPT
from lldfast.models.language_model import LanguageModel
from lldfast.models.loading import load_model
from lldfast.ops.chunks import row_chunks
from lldfast.terminal import progress_bar


def score(
    model: LanguageModel | str | os.PathLike[str],
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
        model: a LanguageModel, or what `load_model` takes (a GPT in memory: `LanguageModel.from_gpt(gpt, tokenizer)`).
        evalset: an EvalSet or the path of its Parquet file.
        batch_tokens: most tokens of a batch, padding included (a CPU takes fewer where that is faster); changes speed and
            memory, not results.
        bos: "auto", "native" or "none" (see models/language_model.py); for a LanguageModel, "auto" keeps its own rule.
        device: "auto" (cuda where there is one, else the CPU) or one by name, to which the model is moved first. Default: where
            it is; a path is loaded on auto.
        amp_dtype: "bfloat16" or "float16": run the layers (not the log-softmax) under autocast.
        precision: of the head's product, as in `linear_logprob`; "bf16x3" is several times faster than fp32 on a CPU with AMX.
        overlap: context tokens that the windows of a long text repeat.
        progress: a bar on stderr.

    Raises:
        InputError: an argument is wrong, or a text has no finite log-likelihood (text, domain and model named).
    """
    lm = _as_model(model, bos, device)
    evalset = evalset if isinstance(evalset, EvalSet) else EvalSet.load(evalset)
    if len(evalset) == 0:
        raise InputError("there are no evaluation texts to score")
    segments = lm.tokenize(evalset, overlap)
    bar = progress_bar(lm.name, sum(map(len, segments)), unit=" tokens", show=progress)
    with bar, evaluating(lm), torch.inference_mode():
        sums = segment_sums(lm, segments, batch_tokens, backend, amp_dtype, precision, lambda done: bar.update(done - bar.n))
    texts = sums.group([s.text for s in segments], len(evalset))  # in order of the segments, whatever the batches were
    bad = np.flatnonzero(~np.isfinite(texts.logprob))
    if len(bad):
        i = int(bad[0])
        raise InputError(
            f"{lm.name} gives text {i} (domain {evalset.domain[i]}) the log-likelihood {texts.logprob[i]}"
            + (f", and {len(bad) - 1} more texts are not finite" if len(bad) > 1 else "")
        )
    meta = {
        "model": lm.identity,
        "tokenizer_hash": lm.tokenizer.hash,
        "evalset_hash": evalset.hash,
        "bos": {"mode": lm.bos, "id": lm.bos_id},
        "overlap": overlap,
        "amp_dtype": amp_dtype,
        "precision": precision,
        "batch_tokens": batch_tokens,
        "versions": versions(),
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    domain, n_bytes, part = evalset.domain.copy(), evalset.n_bytes.copy(), evalset.part.copy()
    return LoglikVector(texts.logprob, domain, texts.n_tokens, n_bytes, part, evalset.text_hash.copy(), meta)


def token_kl(
    target: LanguageModel | str,
    base: LanguageModel | str,
    evalset: EvalSet | str | os.PathLike[str],
    *,
    batch_tokens: int = 16_384,
    allow_differences: bool = False,
) -> tuple[Floats, EvalSet]:
    """True KL(target || base) over next tokens, summed over each text's positions: (nats [N], the evaluation set).

    Both models see the same windows, of the shorter context. Ids that only one head has (padding) are left out and the
    distributions renormalised; that must leave the whole tokenizer's vocabulary.

    Args:
        allow_differences: do not warn of models that compute in different dtypes.

    Raises:
        InputError: the tokenizers or first-token rules differ, or a head is smaller than the vocabulary.
    """
    a, b = _as_model(target, "auto", None), _as_model(base, "auto", None)
    evalset = evalset if isinstance(evalset, EvalSet) else EvalSet.load(evalset)
    if a.tokenizer.hash != b.tokenizer.hash:
        raise InputError(f"true KL needs one tokenizer, but {a.name} has {a.tokenizer.name} and {b.name} has {b.tokenizer.name}")
    if (a.bos, a.bos_id) != (b.bos, b.bos_id):
        raise InputError(f"true KL needs one first-token rule, but {a.name} has bos={a.bos!r} and {b.name} has bos={b.bos!r}")
    if not allow_differences:
        of_a, of_b = ({"model": {"dtype": str(next(lm.module.parameters()).dtype)}} for lm in (a, b))
        for difference in compare_conditions(of_a, of_b):
            floor = f"; for that alone eq. (2) is {difference.floor:g} nats per text ({MEASURED_ON})" if difference.floor else ""
            warnings.warn(f"{a.name} and {b.name}: {difference.sentence}{floor}", ComparisonWarning, stacklevel=3)
    vocab = min(a.vocab_size, b.vocab_size)
    if vocab < a.tokenizer.vocab_size:
        raise InputError(f"a head of {vocab} ids does not cover the {a.tokenizer.vocab_size} ids of tokenizer {a.tokenizer.name}")
    segments = (a if a.context_length <= b.context_length else b).tokenize(evalset)
    sums = np.zeros(len(segments))
    with evaluating(a), evaluating(b), torch.inference_mode():
        most = min(layer_tokens(a, batch_tokens), layer_tokens(b, batch_tokens))
        for batch in batches(segments, most, together=a.together.and_also(b.together)):
            sums[batch.segment] = _batch_kl(a, b, batch, vocab).sum(1).numpy()
    nats = np.zeros(len(evalset))
    np.add.at(nats, np.array([s.text for s in segments], np.int64), sums)
    return nats, evalset


def _batch_kl(a: LanguageModel, b: LanguageModel, batch: SegmentBatch, vocab: int) -> Tensor:
    """KL(a || b) in nats per position, fp64 [B, T] on the CPU, 0 where ignored; in row chunks, so no [T, V] tensor."""
    states = [s.hidden(batch.ids.to(s.device)) if s.separate_head else s.logits(batch.ids.to(s.device)) for s in (a, b)]
    rows = (batch.labels.flatten() != IGNORE).nonzero()[:, 0]
    out = torch.zeros(batch.labels.numel(), dtype=torch.float64)
    for chunk in row_chunks(len(rows), vocab, torch.float32, a.device, least=64):
        logs = []
        for lm, state in zip((a, b), states, strict=True):
            part = state.flatten(0, 1)[rows[chunk].to(lm.device)].float()
            z = lm.head().logits(part) if lm.separate_head else part
            logs.append(torch.log_softmax(z[:, :vocab], -1).to(a.device))
        log_p, log_q = logs
        p = log_p.exp()
        # 0 log 0 = 0, also where the other model gives such an id probability 0.
        terms = torch.where(p > 0, p * (log_p - log_q), 0.0)
        out[rows[chunk]] = terms.sum(-1, dtype=torch.float64).cpu()
    return out.view(batch.labels.shape)


def _as_model(model: Any, bos: str, device: str | torch.device | None) -> LanguageModel:
    if isinstance(model, GPT):
        raise InputError("a GPT in memory has no tokenizer: pass LanguageModel.from_gpt(gpt, tokenizer)")
    if not isinstance(model, LanguageModel):
        return load_model(model, bos=bos, device=device)
    if device is not None:
        model.to(device)
    return model if bos in ("auto", model.bos) else model.with_bos(bos)
