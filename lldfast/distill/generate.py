"""`lldfast generate`: text that a model writes, as token shards to train on (sequence-level distillation, Kim & Rush 2016).

    OUT/shards/, eval.parquet, tokenizer.json, prepare.json    a data folder like any other (data/making)
    OUT/generate.json                                          which model wrote it, how it was drawn, counts

Every document is a prompt, its continuation and the end-of-text token. The documents of a domain are cut into pieces of `length`
tokens, and the first `prompt_tokens` tokens of a piece are a prompt; pieces come in a random order, each once until all were.
As in scoring, the model's first token (BOS, or end-of-text) goes before a prompt. A continuation ends where the model ends it,
or after `length` tokens; then the end-of-text token is not the model's, and generate.json counts it under "cut".
Evaluation texts are no part of the shards, so no prompt comes from one; a document that repeats one token by token is dropped.

Which piece is the prompt of document i, and the random numbers it is drawn with, are a function of (seed, domain name, i)
alone. So the text does not depend on the batch size or on what else is generated, as far as the model's logits do not: they round
differently in a batch of another size, which changes a token about once in a million (and then what follows it).

Work happens in the hidden folder .OUT.generate beside OUT. After a kill the same command goes on with the first unfinished
domain. OUT appears by a single rename at the end.
"""

from __future__ import annotations

import math
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from lldfast.backends import versions
from lldfast.data.evalset import EvalSet
from lldfast.data.making.encode import token_hash
from lldfast.data.making.prepare import made_together, verify
from lldfast.data.mixture import permute, stream_key
from lldfast.data.shards import ShardWriter, TokenShards, bad_token_error, write_manifest
from lldfast.data.tokenizer import Tokenizer
from lldfast.errors import CorruptError, InputError, listed, renamed_arguments
from lldfast.files import explain_write_errors, file_stems, folder_lock, fsync_folder, read_json, write_json
from lldfast.models.batches import evaluating
from lldfast.models.decode import choose_token, decoder_of, draw_levels
from lldfast.models.hf_config import UNLIMITED
from lldfast.models.language_model import LanguageModel
from lldfast.models.loading import load_model
from lldfast.ops.sketch.philox import check_seed
from lldfast.terminal import progress_bar

FORMAT = "lldfast-generate"


class Sampling(NamedTuple):
    """How continuations are drawn; lengths in tokens."""

    prompt_tokens: int
    length: int
    temperature: float
    top_k: int | None
    top_p: float
    seed: int
    first: int | None  # goes before every prompt
    vocab: int  # no id from here on is drawn


@renamed_arguments(model_or_scorer="model")
def generate(
    model: Any,
    data: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    tokens: int | Mapping[str, int],
    prompt_tokens: int = 16,
    length: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    batch_size: int = 32,
    domains: Iterable[str] | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: str = "float32",
    progress: bool = True,
) -> Path:
    """Make the data folder `out` of text that the model writes, or return it at once when it is there, made the same way.

    Args:
        model: a LanguageModel, used where and as it is, or what `load_model` takes, loaded with `device` (auto by default) and
            `dtype`.
        data: a prepared folder; its shards give the prompts, its evaluation corpus is copied.
        tokens: least tokens of each domain, or {domain: tokens}; prompts and end-of-text tokens count.
        prompt_tokens: tokens of a document that are taken from the shards.
        length: most tokens of a document, its end-of-text token not counted. Default: the model's context.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k, top_p: draw from the k likeliest tokens, and of these from the likeliest that hold the share top_p.
        batch_size: documents generated together.
        domains: default all, or those that `tokens` names.

    Raises:
        InputError: wrong arguments, another tokenizer than the shards', logits that are not finite (domain named), a domain
            without a document of prompt_tokens tokens, or an `out` that holds something else or is half done in another way.
        CorruptError: `data` is damaged.
        BusyError: another process is generating the same `out`.
        WriteError: the disk is full; finished domains are kept.
    """
    if not str(out).strip():
        raise InputError("out is empty: name the folder to make")  # Path("") is the current folder
    out = Path(out).absolute()
    shards = TokenShards(data)
    wanted = _tokens_by_domain(tokens, domains, shards)
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise InputError(f"batch_size must be an integer of at least 1, got {batch_size!r}")
    _check_arguments(prompt_tokens, temperature, top_k, top_p, seed)
    source, evalset = made_together(shards)
    evalset = evalset.select(domains=list(wanted))
    if not isinstance(model, LanguageModel):
        model = load_model(model, device=device, dtype=dtype)
    shards.check_tokenizer(model.tokenizer.describe(), f"model {model.name}")
    length = _length(length, prompt_tokens, model)
    first, vocab = _first_token(model), min(model.vocab_size, shards.vocab_size)
    sampling = Sampling(prompt_tokens, length, float(temperature), top_k, float(top_p), seed, first, vocab)
    if model.vocab_size < shards.vocab_size:
        raise InputError(f"model {model.name} has {model.vocab_size} ids, the tokenizer of {shards.path} {shards.vocab_size}")
    identity = model.identity
    config = {
        "model": {key: identity[key] for key in ("hash", "dtype")},
        "source": {"corpus_hash": shards.corpus_hash, "evalset_hash": evalset.hash},
        "tokens": wanted,
        **sampling._asdict(),
    }
    if _is_done(out, config):
        return out
    work = out.parent / f".{out.name}.generate"
    with folder_lock(work):
        try:
            if not _is_done(out, config):
                found = _generated(model, shards, work, config, sampling, batch_size, set(source["held_out"]), progress)
                about = {"model": identity, "licence": identity["licence"]}
                about |= {"batch_size": batch_size, "device": str(model.device)}
                _finish(work / "data", shards, evalset, source, found, config, about)
                _publish(work / "data", out)
            shutil.rmtree(work)
        finally:
            if work.exists() and not (work / "progress.json").exists():  # nothing that could be resumed
                shutil.rmtree(work)
    return out


def _tokens_by_domain(tokens: Any, domains: Iterable[str] | None, shards: TokenShards) -> dict[str, int]:
    """{domain: tokens} in the order of the shards."""
    names = [domains] if isinstance(domains, str) else None if domains is None else list(domains)
    if names is None:
        names = list(tokens) if isinstance(tokens, Mapping) else shards.domains
    unknown = [name for name in names if name not in shards.domains]
    if unknown:
        raise InputError(f"{shards.path} has no domain {unknown[0]!r}; it has: {listed(shards.domains)}")
    if not names:
        raise InputError("domains is an empty list: name at least one, or leave it out for all")
    if isinstance(tokens, Mapping) and set(tokens) != set(names):
        raise InputError(f"tokens is given for {listed(sorted(tokens))}; the domains are {listed(sorted(names))}")
    wanted = {name: tokens[name] if isinstance(tokens, Mapping) else tokens for name in shards.domains if name in names}
    for name, n in wanted.items():
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise InputError(f"tokens must be an integer of at least 1, got {n!r} for domain {name!r}")
    return wanted


def _check_arguments(prompt_tokens: Any, temperature: Any, top_k: Any, top_p: Any, seed: Any) -> None:
    for name, n in (("prompt_tokens", prompt_tokens), ("top_k", 1 if top_k is None else top_k)):
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise InputError(f"{name} must be an integer of at least 1, got {n!r}")
    if not 0 <= temperature < math.inf:
        raise InputError(f"temperature must be 0 or more, and finite, got {temperature}")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p must lie in (0, 1], got {top_p}")
    check_seed(seed)


def _length(length: Any, prompt_tokens: int, model: LanguageModel) -> int:
    """Most tokens of a document. With a first token before it its last token is no input, so that it fits the context."""
    if length is None:
        if model.context_length >= UNLIMITED:
            raise InputError(f"model {model.name} has no context length: give length")
        length = model.context_length
    if isinstance(length, bool) or not isinstance(length, int):
        raise InputError(f"length must be an integer, got {length!r}")
    if length > model.context_length:
        raise InputError(f"length={length} is more than the context of model {model.name}, {model.context_length}")
    if prompt_tokens >= length:
        raise InputError(f"prompt_tokens={prompt_tokens} must be less than length={length}: nothing would be generated")
    return length


def _first_token(model: LanguageModel) -> int | None:
    if model.bos == "native":
        return model.tokenizer.bos if model.tokenizer.adds_bos else None
    return model.bos_id


def _is_done(out: Path, config: Mapping[str, Any]) -> bool:
    """Whether `out` is what this configuration would give; raises when it is something else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / "generate.json").is_file():
        raise InputError(f"{out} exists and is not a folder that generate made: choose another, or remove it")
    _check_same(out, read_json(out / "generate.json"), config)
    TokenShards(out)  # sizes: a file may be missing or cut off
    return True


def _check_same(folder: Path, record: Any, config: Mapping[str, Any]) -> None:
    there = record.get("config") if isinstance(record, dict) else None
    if not isinstance(there, dict):
        raise CorruptError(f"{folder}: the record of what it was made with is missing or damaged")
    changed = [f"{key} = {there.get(key)!r}, now {value!r}" for key, value in config.items() if there.get(key) != value]
    if changed:
        raise InputError(f"{folder} was made with another configuration ({', '.join(changed)}): choose another out, or remove it")


def _generated(
    model: LanguageModel,
    shards: TokenShards,
    work: Path,
    config: Mapping[str, Any],
    sampling: Sampling,
    batch_size: int,
    held_out: set[str],
    progress: bool,
) -> dict[str, dict[str, Any]]:
    """{domain: {"entry": for the manifest, "counts": for generate.json}}; what an earlier run finished is kept."""
    path, wanted = work / "progress.json", config["tokens"]
    state = read_json(path) if path.exists() else {"config": dict(config), "domains": {}}
    _check_same(work, state, config)
    prompts = {name: Prompts(shards, name, sampling) for name in wanted if name not in state["domains"]}  # all errors now
    tokenizer, stems = shards.load_tokenizer(), file_stems(wanted)
    if model.together.alone:
        batch_size = 1
    with evaluating(model), progress_bar("generating", sum(wanted.values()), unit=" tokens", scale=False, show=progress) as bar:
        bar.update(sum(wanted[name] for name in state["domains"]))
        bar.initial = bar.n  # what an earlier run did is no part of this run's speed
        for name, of_domain in prompts.items():
            bar.set_postfix_str(name, refresh=False)
            with ShardWriter(work / "data" / "shards", name, shards.dtype.name, stems[name]) as writer:
                counts = _write_domain(model, of_domain, writer, tokenizer, wanted[name], batch_size, held_out, bar)
                state["domains"][name] = {"entry": writer.close(), "counts": counts}
            write_json(path, state)
    return {name: state["domains"][name] for name in wanted}


def _write_domain(
    model: LanguageModel,
    prompts: Prompts,
    writer: ShardWriter,
    tokenizer: Tokenizer,
    wanted: int,
    batch_size: int,
    held_out: set[str],
    bar: Any,
) -> dict[str, Any]:
    """Generate documents 0, 1, ... of a domain until it has `wanted` tokens; returns its counts."""
    domain, sampling = prompts.domain, prompts.sampling
    counts = {"documents": 0, "tokens": 0, "prompt_tokens": 0, "ended": 0, "cut": 0, "held_out_dropped": 0}
    index = 0
    while counts["tokens"] < wanted:
        if index >= prompts.n and not counts["documents"]:
            raise InputError(f"domain {domain!r}: the model repeats a held-out document from each of {prompts.n} prompts")
        mean = counts["tokens"] / counts["documents"] if counts["documents"] else sampling.length + 1
        # No more than are likely to be used; the rest of a batch is thrown away.
        size = min(batch_size, math.ceil((wanted - counts["tokens"]) / mean))
        for document, ended in _documents(model, prompts, range(index, index + size), domain):
            if counts["tokens"] >= wanted:
                break
            index += 1
            if token_hash(document) in held_out:
                counts["held_out_dropped"] += 1
                continue
            writer.add(document, len(tokenizer.decode(document[:-1]).encode()))
            counts["documents"] += 1
            counts["tokens"] += len(document)
            counts["prompt_tokens"] += sampling.prompt_tokens
            counts["ended" if ended else "cut"] += 1
            bar.update(min(len(document), max(0, wanted - counts["tokens"] + len(document))))
    repeated = max(0, index - prompts.n)
    if repeated:
        greedy = sampling.temperature == 0 or sampling.top_k == 1
        same = "; without chance in the draw the same documents come again" if greedy else ""
        warnings.warn(f"domain {domain!r} has {prompts.n} prompts for {index} documents: they repeat{same}", stacklevel=2)
    return {**counts, "prompts": prompts.n, "prompts_repeated": repeated}


def _documents(model: LanguageModel, prompts: Prompts, indices: range, domain: str) -> Iterator[tuple[np.ndarray, bool]]:
    """The documents of these indices, in order: tokens with end-of-text, and whether the model wrote that itself."""
    s, eot, device = prompts.sampling, prompts.eot, model.device
    text = np.full((len(indices), s.length), eot, np.int64)
    text[:, : s.prompt_tokens] = [prompts.tokens(i) for i in indices]
    shape = (s.length - s.prompt_tokens, draw_levels(s.vocab))
    uniforms = torch.from_numpy(np.stack([uniform(s.seed, domain, i, shape) for i in indices]))
    first = np.full((len(indices), 0 if s.first is None else 1), s.first or 0, np.int64)
    ids = torch.from_numpy(np.concatenate((first, text[:, : s.prompt_tokens]), 1)).to(device)
    decoder = decoder_of(model, len(indices), first.shape[1] + s.length - 1, s.vocab)
    rows = np.arange(len(indices))  # which document each row of the decoder is
    ends = np.full(len(indices), s.length)  # where its end-of-text token goes
    for at in range(s.prompt_tokens, s.length):
        logits = decoder.step(ids)
        if not bool(torch.isfinite(logits).all()):
            row = int((~torch.isfinite(logits)).any(-1).byte().argmax())
            where = f"domain {domain!r}, document {indices[rows[row]]}, token {at}"
            raise InputError(f"model {model.name}: logits that are not finite ({where})")
        chosen = choose_token(logits, uniforms[rows, at - s.prompt_tokens].to(device), s.temperature, s.top_k, s.top_p)
        text[rows, at] = np.where(ends[rows] < at, eot, chosen.cpu().numpy())
        ends[rows[(text[rows, at] == eot) & (ends[rows] == s.length)]] = at
        open_rows = np.flatnonzero(ends[rows] == s.length)
        if not len(open_rows):
            break
        # Copying keys and values pays when it halves the batch.
        if 2 * len(open_rows) <= len(rows) and decoder.keep(torch.from_numpy(open_rows).to(device)):
            rows, chosen = rows[open_rows], chosen[torch.from_numpy(open_rows).to(device)]
        ids = chosen[:, None]
    for tokens, end in zip(text, ends.tolist(), strict=True):
        yield np.append(tokens[:end], eot), end < s.length


class Prompts:
    """The prompts of a domain: pieces of its documents, in a keyed order.

    Attributes: domain, sampling, n (how many different ones there are), eot.

    Raises:
        InputError: no document of the domain has prompt_tokens tokens.
        CorruptError: the shard is damaged.
    """

    def __init__(self, shards: TokenShards, domain: str, sampling: Sampling) -> None:
        self.domain, self.sampling, self.eot = domain, sampling, shards.eot
        self._tokens, self._offsets = shards.tokens(domain), np.asarray(shards.offsets(domain))
        self._file, self._vocab = shards.shard_file(domain), shards.vocab_size
        room = np.diff(self._offsets) - 1 - sampling.prompt_tokens  # end-of-text is no part of a prompt
        self._pieces = np.cumsum(np.where(room >= 0, room // sampling.length + 1, 0))
        self.n = int(self._pieces[-1]) if len(self._pieces) else 0
        if self.n == 0:
            n = sampling.prompt_tokens
            raise InputError(f"{self._file}: no document of domain {domain!r} has the {n} tokens of a prompt")

    def tokens(self, index: int) -> np.ndarray:
        """The prompt of document `index`, int64 [prompt_tokens]."""
        epoch, position = divmod(index, self.n)
        key = np.array([stream_key(self.sampling.seed, "prompt", self.domain, epoch)[0]], np.uint64)
        piece = int(permute(np.array([position]), np.array([self.n]), key)[0])
        document = int(np.searchsorted(self._pieces, piece, side="right"))
        before = int(self._pieces[document - 1]) if document else 0
        start = int(self._offsets[document]) + (piece - before) * self.sampling.length
        found = self._tokens[start : start + self.sampling.prompt_tokens].astype(np.int64)
        if found.max() >= self._vocab:
            at = start + int(found.argmax())
            raise bad_token_error(self._file, self.domain, at, int(found.max()), self._vocab)
        return found


def uniform(seed: int, domain: str, document: int, shape: tuple[int, ...]) -> np.ndarray:
    """The numbers in [0, 1) that a document's tokens are drawn with, fp64 of a shape: a Philox stream of its own."""
    generator = np.random.Philox(key=np.array(stream_key(seed, "sample", domain, document), np.uint64))
    words = generator.random_raw(math.prod(shape))  # not Generator.random: its stream may change with numpy
    return ((words >> np.uint64(11)) * 2.0**-53).reshape(shape)


def _finish(
    data: Path,
    shards: TokenShards,
    evalset: EvalSet,
    source: Mapping[str, Any],
    found: Mapping[str, Mapping[str, Any]],
    config: Mapping[str, Any],
    about: Mapping[str, Any],
) -> None:
    """Write what a data folder needs besides the shards, the manifest last, and check the whole of it."""
    entries = {name: item["entry"] for name, item in found.items()}
    inputs = source.get("arguments", {}).get("inputs", [])
    with explain_write_errors(data):
        evalset.save(data / "eval.parquet")
        shards.load_tokenizer().save(data)
    domains = {}
    for name, entry in entries.items():
        shown = {f"training_{key}": entry[key] for key in ("documents", "bytes", "tokens")}
        domains[name] = {**source["domains"][name], **shown}
    corpus_hash = write_manifest(data / "shards", shards.tokenizer, shards.vocab_size, entries, sampled=True)
    content = {
        "format": FORMAT,
        "version": 1,
        "config": dict(config),
        **about,
        "source": {"corpus_hash": shards.corpus_hash, "evalset_hash": evalset.hash, "inputs": inputs},
        "domains": {name: item["counts"] for name, item in found.items()},
        "corpus_hash": corpus_hash,
        "versions": versions(),
    }
    write_json(data / "generate.json", content)
    made = {
        **source,
        # Not the arguments of the source: `prepare` must not take this folder for what they give.
        "arguments": {"generated": True, "inputs": [f"generated by {about['model']['name']}", *inputs]},
        "domains": domains,
        "corpus_hash": corpus_hash,
        "evalset_hash": evalset.hash,
        "warnings": [],
    }
    write_json(data / "prepare.json", made)
    verify(data)


def _publish(data: Path, out: Path) -> None:
    with explain_write_errors(out):
        os.rename(data, out)  # over an empty folder too
        fsync_folder(out.parent)
