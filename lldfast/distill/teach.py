"""`lldfast teach`: a teacher's top-k next-token log-probabilities over token shards -> a cache on disk (distill/cache.py).

The layers run on batches of whole windows, the head on row chunks of a byte budget: no [T, V] tensor of a batch is alive, except
where a model makes its own logits. log p is the teacher's own, over its whole vocabulary, in fp32; the mass outside the k ids is
summed over those ids themselves, since log(1 - sum) would be rounding alone where a teacher is sure of itself.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lldfast.data.shards import TokenShards, bad_token_error
from lldfast.distill.cache import CACHE, PROGRESS, CacheSpec, CacheWriter, TeacherCache, as_json
from lldfast.errors import InputError, listed
from lldfast.files import folder_lock
from lldfast.models.batches import evaluating, layer_tokens
from lldfast.models.gpt import GPT
from lldfast.models.language_model import LanguageModel
from lldfast.models.loading import load_model
from lldfast.ops.chunks import NEG_INF, accumulate_dtype, row_chunks
from lldfast.ops.head import LEAST_ROWS, HeadProduct
from lldfast.terminal import progress_bar


def teach(
    model: Any,
    data: TokenShards | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    k: int = 64,
    block_size: int,
    batch_tokens: int = 16_384,
    domains: Iterable[str] | None = None,
    max_windows: int | None = None,
    device: str | torch.device | None = None,
    dtype: str = "float32",
    progress: bool = True,
) -> Path:
    """Make the teacher cache `out`, or return it at once when it is there already; an interrupted one is gone on with.

    Args:
        model: the teacher: a LanguageModel, or what `load_model` takes (a GPT in memory: `load_model(gpt, tokenizer=...)`).
        data: the token shards, or the folder of `lldfast prepare`.
        k: ids kept per position; up to the teacher's vocabulary.
        block_size: tokens per window, as in the training that will use the cache.
        batch_tokens: tokens the teacher gets at once, at least one window (a CPU takes fewer where that is faster); changes speed
            and memory, and results by rounding only.
        domains: cache only these; default all.
        max_windows: cache only the first so many windows of each domain.
        device: "auto" (cuda where there is one, else the CPU) or one by name, to which the teacher is moved first. Default: where
            it is; a path is loaded on auto.
        dtype: of the weights of a teacher that is loaded here.
        progress: a bar on stderr.

    Raises:
        InputError: an argument is wrong, the teacher has another tokenizer than the shards, a token outside its vocabulary, or
            logits that are not finite (domain and window named), or `out` holds something else.
        CorruptError: a shard, or the unfinished cache, is damaged.
        BusyError: another process is writing `out`.
        WriteError: the disk is full; the same call goes on when there is space.
    """
    if not str(out).strip():
        raise InputError("out is empty: name the folder to make")  # Path("") is the current folder
    for name, value in (("k", k), ("block_size", block_size), ("batch_tokens", batch_tokens), ("max_windows", max_windows)):
        if value is not None and (not isinstance(value, (int, np.integer)) or value < 1):
            raise InputError(f"{name} must be an integer of at least 1, not {value!r}")
    out = Path(out)
    _check_place(out)
    shards = data if isinstance(data, TokenShards) else TokenShards(data)
    windows = _windows(shards, int(block_size), domains, max_windows)
    teacher = _teacher(model, device, dtype)
    _check_teacher(teacher, shards, int(k), int(block_size))
    spec = CacheSpec(
        k=int(k),
        block_size=int(block_size),
        vocab_size=teacher.vocab_size,
        # The teacher's vocabulary may be padded beyond what the shards' dtype holds.
        dtype=shards.dtype.name if teacher.vocab_size - 1 <= np.iinfo(shards.dtype).max else "uint32",
        teacher=as_json(teacher.identity),
        tokenizer=as_json(shards.tokenizer),
        corpus_hash=shards.corpus_hash,
        windows=windows,
    )
    with folder_lock(out):
        if (out / CACHE).is_file():
            differs = TeacherCache(out).spec.difference(spec)
            if differs is not None:
                raise InputError(f"{out} holds a teacher cache whose {differs}: choose another folder, or remove it")
            (out / PROGRESS).unlink(missing_ok=True)  # of a run killed just after it had published
            return out
        with CacheWriter(out, spec) as writer:
            _write(teacher, shards, writer, int(batch_tokens), progress)
            writer.finish()
    return out


def _check_place(out: Path) -> None:
    """Refuse a folder of something else before anything is written there."""
    if out.is_dir() and any(item.name != ".lock" for item in out.iterdir()):
        if not any((out / name).is_file() for name in (CACHE, PROGRESS)):
            raise InputError(f"{out} exists and is not a folder that teach made: choose another, or remove it")
    elif out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file, where a folder is needed")


def _windows(shards: TokenShards, block_size: int, domains: Iterable[str] | None, max_windows: int | None) -> dict[str, int]:
    """How many windows of each domain to cache, in the shards' order."""
    wanted = set(shards.domains if domains is None else [domains] if isinstance(domains, str) else domains)
    unknown = sorted(wanted - set(shards.domains))
    if unknown:
        raise InputError(f"{shards.path} has no domain {unknown[0]!r}; it has: {listed(shards.domains)}")
    found = {}
    for domain in (name for name in shards.domains if name in wanted):
        n = shards.n_tokens[domain] // block_size
        found[domain] = n if max_windows is None else min(n, int(max_windows))
    if not any(found.values()):
        raise InputError(f"{shards.path}: no domain to cache has the {block_size} tokens of one window (block_size)")
    return found


def _teacher(model: Any, device: str | torch.device | None, dtype: str) -> LanguageModel:
    if isinstance(model, GPT):
        raise InputError("a GPT in memory has no tokenizer: pass LanguageModel.from_gpt(gpt, tokenizer)")
    if not isinstance(model, LanguageModel):
        return load_model(model, device=device, dtype=dtype)
    return model if device is None else model.to(device)


def _check_teacher(teacher: LanguageModel, shards: TokenShards, k: int, block_size: int) -> None:
    shards.check_tokenizer({"name": teacher.tokenizer.name, "hash": teacher.tokenizer.hash}, f"teacher {teacher.name}")
    if block_size > teacher.context_length:
        raise InputError(
            f"block_size {block_size} is more than the {teacher.context_length} tokens that teacher {teacher.name} sees"
        )
    if k > teacher.vocab_size:
        raise InputError(f"k {k} is more than the {teacher.vocab_size} ids of teacher {teacher.name}")


def _write(teacher: LanguageModel, shards: TokenShards, writer: CacheWriter, batch_tokens: int, progress: bool) -> None:
    """Fill the writer from where it stands."""
    spec, length = writer.spec, writer.spec.block_size
    at_once = max(1, batch_tokens // length)
    run = _Teacher(teacher, spec.k, max(1, layer_tokens(teacher, batch_tokens) // length))
    total, done = (sum(counts.values()) * length for counts in (spec.windows, writer.done))
    bar = progress_bar("teaching", total, unit=" tokens", done=done, show=progress)
    with bar, evaluating(teacher), torch.no_grad():
        for domain, n in spec.windows.items():
            tokens = shards.tokens(domain)
            # A writer stops between batches, so a resumed run makes the batches, and the bits, of one that was never stopped.
            for first in range(writer.done[domain], n, at_once):
                last = min(first + at_once, n)
                ids = tokens[first * length : last * length].astype(np.int64)
                _check_ids(ids, first * length, domain, shards, teacher)
                found = run(torch.from_numpy(ids).view(-1, length))
                _check_finite(found[1], first, domain, teacher, spec.k)
                writer.append(domain, *found)
                bar.update(len(ids))


class _Teacher:
    """Windows of tokens -> top-k ids, log p and the log mass of the rest; keeps the head and its buffer between the calls."""

    def __init__(self, teacher: LanguageModel, k: int, layer_windows: int) -> None:
        self.teacher, self.k, self.layer_windows = teacher, k, layer_windows
        self._head: HeadProduct | None = None

    def __call__(self, windows: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """windows [n, T] -> ids [n, T, k], logprob [n, T, k], rest [n, T]."""
        parts = [part.to(self.teacher.device) for part in windows.split(self.layer_windows)]
        if self.teacher.separate_head:
            # The layers and the head want different batches (models/batches.py).
            rows = self._of_hidden(torch.cat([self.teacher.hidden(part) for part in parts]).flatten(0, 1))
        else:
            rows = [row for part in parts for row in self._of_logits(self.teacher.logits(part).flatten(0, 1))]
        ids, logprob, rest = (torch.cat(values).cpu().numpy() for values in zip(*rows, strict=True))
        n, length = windows.shape
        return ids.reshape(n, length, self.k), logprob.reshape(n, length, self.k), rest.reshape(n, length)

    def _of_hidden(self, hidden: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        options = self.teacher.head().options()
        if self._head is None:
            self._head = HeadProduct(hidden, self.teacher.head().weight, options["bias"], self.teacher.vocab_size, None)
        head, found = self._head, []
        for chunk in row_chunks(len(hidden), self.teacher.vocab_size, head.dtype, hidden.device, LEAST_ROWS):
            z = head.logits(head.rows(hidden, chunk), options["softcap"], options["logit_scale"])
            found.append(top_k_(z, self.k))
        return found

    def _of_logits(self, logits: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        dtype = accumulate_dtype(logits)
        chunks = row_chunks(len(logits), logits.shape[1], dtype, logits.device, LEAST_ROWS)
        return [top_k_(logits[chunk, : self.teacher.vocab_size].to(dtype), self.k) for chunk in chunks]


def top_k_(z: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits z [R, V], overwritten -> ids [R, k] int32, log p [R, k] fp32 descending, log of the rest's mass [R] fp32.

    A logit that is NaN or inf makes its whole row NaN.
    """
    values, ids = torch.topk(z, k)
    top = values[:, :1].clone()
    # Off the largest first: log p is a small difference, of which log-sum-exps of large logits would keep few digits.
    z.sub_(top)
    log_sum = torch.logsumexp(z, -1, keepdim=True)
    rest = torch.logsumexp(z.scatter_(-1, ids, NEG_INF), -1, keepdim=True) - log_sum
    return ids.int(), (values - top - log_sum).float(), rest[:, 0].float()


def _check_ids(ids: np.ndarray, start: int, domain: str, shards: TokenShards, teacher: LanguageModel) -> None:
    worst = int(ids.argmax())
    if ids[worst] >= shards.vocab_size:
        raise bad_token_error(shards.shard_file(domain), domain, start + worst, int(ids[worst]), shards.vocab_size)
    if ids[worst] >= teacher.vocab_size:
        raise InputError(
            f"domain {domain!r} has token {int(ids[worst])} at position {start + worst}, outside the vocabulary of "
            f"{teacher.vocab_size} of teacher {teacher.name}"
        )


def _check_finite(logprob: np.ndarray, first: int, domain: str, teacher: LanguageModel, k: int) -> None:
    """logprob [n, T, k] of the windows from `first` on; a cache holds finite numbers only."""
    bad = ~np.isfinite(logprob)
    if not bad.any():
        return
    window, position = np.argwhere(bad.any(-1))[0].tolist()
    where = f"domain {domain!r}, window {first + window}, token {position}"
    if np.isnan(logprob[window, position]).any():
        raise InputError(f"teacher {teacher.name} gives logits that are not finite: {where}")
    n = int(np.isfinite(logprob[window, position]).sum())
    raise InputError(f"teacher {teacher.name} gives only {n} ids a probability above 0, fewer than k={k}: {where}")
