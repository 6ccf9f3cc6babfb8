"""`lldfast prepare`: texts with a domain label -> token shards and an evaluation corpus.

    DIR/shards/manifest.json, <domain>.bin, <domain>.idx    training tokens (shards.py)
    DIR/eval.parquet                                        evaluation corpus (evalset.py), chosen as evalplan.py says
    DIR/tokenizer.json                                      when the tokenizer is a Hugging Face one or trained here
    DIR/prepare.json                                        arguments, inputs, versions, counts, hashes

The inputs are read twice, as streams: once to count, to hash and to choose the evaluation texts (evalplan.py), once to encode
(encode.py). Evaluation documents, and exact copies of them, are left out of the shards. Memory does not grow with the
corpus.

Work happens in the hidden folder .DIR.prepare beside DIR: plan.json after the first reading, then one file for every
16 MiB of text. A run that was killed at any moment goes on from there, and its result is the same to the byte. DIR
appears by a single rename at the end.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lldfast.backends import versions
from lldfast.data.evalset import PARTS, EvalSet
from lldfast.data.making import builtin, evalplan
from lldfast.data.making.done import changed_inputs, is_done
from lldfast.data.making.encode import Part, encode, token_dtype, token_hash
from lldfast.data.making.evalplan import EvalPlan, make_plan
from lldfast.data.making.options import PrepareOptions
from lldfast.data.making.rejects import counted
from lldfast.data.making.sources import Source
from lldfast.data.shards import ShardWriter, TokenShards, write_manifest
from lldfast.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_from_manifest, train_bpe
from lldfast.errors import CorruptError, InputError
from lldfast.files import explain_write_errors, file_stems, folder_lock, fsync_folder, read_json, write_json
from lldfast.terminal import note, progress_bar

VERSIONS = (1, 2)  # of prepare.json that are read; the last is written
BPE_BYTES, MOST_BPE_BYTES = 8 << 10, 64 << 20  # text a BPE is trained on: per token of its vocabulary, and at most


def prepare(
    inputs: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    domain_field: str | None = None,
    text_field: str = "text",
    tokenizer: str = "gpt2",
    vocab_size: int | None = None,
    domains: Iterable[str] | None = None,
    eval_texts: int | None = None,
    eval_per_domain: int | None = None,
    estimate_share: float = 0.5,
    seed: int = 0,
    workers: int | None = None,
    progress: bool = True,
    split: str | None = None,
    config: str | None = None,
    max_documents: int | None = None,
    on_error: Literal["stop", "skip"] = "stop",
    most_skipped: float = 0.1,
    drop_small_domains: bool = False,
    resume: bool = True,
    overwrite: bool = False,
) -> Path:
    """Make the data folder `out`, or return it when it is there already, made of the same inputs with the same arguments.

    That is decided on everything that decides the result: arguments, the content of the inputs (which are hashed again: one read,
    nothing is decoded), the tokenizer, and the versions of packages where these matter. Sizes and times are not trusted.

    Args:
        inputs: "builtin", or files, folders and dataset ids (see sources.py).
        domain_field, text_field, tokenizer, vocab_size, domains, eval_texts, eval_per_domain, estimate_share, seed, split,
            config, max_documents, on_error, most_skipped, drop_small_domains: what is made of them; `PrepareOptions`
            (options.py) says what each means.
        workers: encoding threads; default one per core. They change no byte.
        progress: bars and warnings on stderr.
        resume: go on from what an interrupted run with the same arguments and inputs left; False starts over.
        overwrite: replace an `out` that was made with other arguments.

    Raises:
        InputError: wrong arguments or records (file and line named), domains without evaluation texts (all named), a tokenizer
            without an end-of-text token, or an `out` that holds something else or was made of other content.
        CorruptError: a truncated or damaged input.
        BusyError: another process is preparing the same `out`.
        WriteError: the disk is full; nothing is published, and the same command goes on when there is space.
    """
    if not str(out).strip():
        raise InputError("out is empty: name the folder to make")  # Path("") is the current folder
    out = Path(out).absolute()
    places = [str(inputs)] if isinstance(inputs, (str, os.PathLike)) else [str(item) for item in inputs]
    options = PrepareOptions(
        domain_field=domain_field,
        text_field=text_field,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        domains=None if domains is None else [domains] if isinstance(domains, str) else list(domains),
        eval_texts=eval_texts,
        eval_per_domain=eval_per_domain,
        estimate_share=estimate_share,
        seed=seed,
        split=split,
        config=config,
        max_documents=max_documents,
        on_error=on_error,
        most_skipped=most_skipped,
        drop_small_domains=drop_small_domains,
    )
    options.check()
    if workers is not None and workers < 1:
        raise InputError(f"workers must be at least 1, got {workers}")
    source = Source(
        places,
        text_field=text_field,
        domain_field=domain_field,
        split=split,
        config=config,
        domains=options.domains,
        max_documents=max_documents,
        on_error=on_error,
    )
    record: dict[str, Any] = {
        "arguments": {"inputs": places, **options.record()},
        "inputs": [item.stamp() for item in source.inputs],
    }
    for line in source.survey.notes() if progress else ():
        note(f"note: {line}")
    if is_done(out, record, source, overwrite):
        for line in _warnings(out, read_json(out / "prepare.json")) if progress else ():
            note(f"warning: {line}")
        return out
    ready = None if tokenizer == "bpe" else load_tokenizer(tokenizer)
    if ready is not None:
        _check_eot(ready)
    record["versions"] = _versions(places)
    stamps = {**record, "tokenizer": ready and ready.describe()}
    work = out.parent / f".{out.name}.prepare"
    with folder_lock(work):
        try:
            if not is_done(out, record, source, overwrite):
                plan, contents = _plan(source, work, json.loads(json.dumps(stamps)), options, resume, progress)
                record["inputs"] = [stamp + content for stamp, content in zip(record["inputs"], contents, strict=True)]
                ready = ready or _trained(source, plan, work, options, progress)
                parts = _encoded(source, plan, ready, work, seed, workers, progress)
                _check_unchanged(source, contents, work)
                _publish(_assemble(plan, ready, parts, work, record, source), out)
                for line in _warnings(out, {"skipped": plan.skipped}) if progress else ():  # the others were said before
                    note(f"warning: {line}")
            shutil.rmtree(work)
        finally:
            if work.exists() and not (work / "plan.json").exists():  # nothing that could be resumed
                shutil.rmtree(work)
    return out


def made_together(shards: TokenShards) -> tuple[dict[str, Any], EvalSet]:
    """prepare.json and the evaluation corpus of the folder of these shards; of another run the shards might hold its texts.

    Raises:
        InputError: a file is missing.
        CorruptError: prepare.json is damaged, or files of two runs are mixed.
    """
    folder = shards.path.parent
    record = read_json(folder / "prepare.json")
    if not isinstance(record, dict) or record.get("format") != "lldfast-prepare" or record.get("version") not in VERSIONS:
        raise CorruptError(f"{folder / 'prepare.json'} is not an lldfast-prepare file of version {VERSIONS[0]} to {VERSIONS[-1]}")
    if not isinstance(record.get("held_out"), list) or set(record.get("domains") or ()) != set(shards.domains):
        raise CorruptError(f"{folder / 'prepare.json'}: held_out is missing, or the domains are not {shards.domains}")
    evalset = EvalSet.load(folder / "eval.parquet")
    for what, found in (("corpus_hash", shards.corpus_hash), ("evalset_hash", evalset.hash)):
        if record.get(what) != found:
            there = f"{found}, but prepare.json says {record.get(what)}"
            raise CorruptError(f"{folder}: {what} is {there}: files of two runs are mixed")
    return record, evalset


def verify(path: str | os.PathLike[str]) -> None:
    """Check a data folder from end to end; every byte is read.

    Shards: sizes, checksums, offsets, ids, one end-of-text token a document, at its end, and no other control token, save
    where a model wrote the documents. Evaluation corpus: its hash, sizes, both parts of every
    domain, parts that share no document, and no held-out document among the training tokens.

    Raises:
        InputError: `path` is not a finished data folder.
        CorruptError: the first thing found wrong, with its file.
    """
    shards = TokenShards(path)
    folder = shards.path.parent  # `path` may be the shards inside
    shards.verify()
    record, evalset = made_together(shards)
    file = folder / "eval.parquet"
    tokenizer = tokenizer_from_manifest(shards.tokenizer, folder)
    if shards.control is None and not record.get("arguments", {}).get("generated"):
        shards.check_documents(tokenizer.control)
    if evalset.domains != shards.domains:
        raise CorruptError(f"{file} has the domains {evalset.domains}, the shards {shards.domains}")
    if evalset.n_bytes.max() > evalplan.CHUNK_BYTES:
        raise CorruptError(f"{file}: text {int(evalset.n_bytes.argmax())} is longer than {evalplan.CHUNK_BYTES} bytes")
    held_out = set(record["held_out"])
    for name in shards.domains:
        estimate, measure = (set(evalset.select(part, name).document.tolist()) for part in PARTS)
        if not estimate or not measure:
            raise CorruptError(f"{file}: domain {name!r} has no texts of one part")
        if record["domains"][name]["held_out_by"] == "documents" and estimate & measure:
            raise CorruptError(f"{file}: document {min(estimate & measure)} of domain {name!r} is in both parts")
        tokens, offsets = shards.tokens(name), shards.offsets(name)
        for i in range(shards.n_documents[name]):
            if token_hash(tokens[offsets[i] : offsets[i + 1]]) in held_out:
                raise CorruptError(f"{shards.shard_file(name)}: document {i} is held out for evaluation, yet it is in the shard")


def _warnings(out: Path, record: Mapping[str, Any]) -> list[str]:
    """What a record says that its reader should know: warnings about domains, and how many records were skipped."""
    lines = list(record.get("warnings") or ())
    skipped = record.get("skipped") or {}  # version 1 has none
    if skipped.get("skipped"):
        count = f"{skipped['skipped']:,} of {skipped['records']:,} records"
        lines.append(f"skipped {count}: {counted(skipped['reasons'])}; {out / 'prepare.json'} lists them")
    return lines


def _check_eot(tokenizer: Tokenizer) -> None:
    if tokenizer.eot is None:
        raise InputError(f"tokenizer {tokenizer.name} has no end-of-text token, with which documents must be separated")


def _plan(
    source: Source, work: Path, stamps: Any, options: PrepareOptions, resume: bool, progress: bool
) -> tuple[EvalPlan, list[list[Any]]]:
    """The plan an interrupted run with the same stamps and contents left, or a new one; and the contents it is made of."""
    path = work / "plan.json"
    if path.exists():
        stored = read_json(path)
        contents = stored.get("contents") or []
        if resume and stored["stamps"] == stamps and not any(changed_inputs(source, contents)):
            plan = EvalPlan.from_json(stored["plan"])
            source.domain_field = plan.domain_field
            return plan, contents
        path.unlink()  # first: without it the other files mean nothing
    for item in work.iterdir():
        if item.name != ".lock":
            shutil.rmtree(item) if item.is_dir() else item.unlink()
    with progress_bar("reading", unit="B", show=progress) as bar:
        plan = make_plan(
            source,
            eval_texts=options.eval_texts,
            eval_per_domain=options.eval_per_domain,
            estimate_share=options.estimate_share,
            seed=options.seed,
            most_skipped=options.most_skipped,
            drop_small=options.drop_small_domains,
            on_bytes=bar.update,
        )
    for warning in plan.warnings if progress else ():
        note(f"warning: {warning}")
    contents = [source.contents[i].to_json() if i in source.contents else [] for i in range(len(source.inputs))]
    write_json(path, {"stamps": stamps, "contents": contents, "plan": plan.to_json()})
    return plan, contents


def _check_unchanged(source: Source, contents: Sequence[Sequence[Any]], work: Path) -> None:
    """What the second reading read must be what the first one did.

    Raises:
        InputError: an input was changed in between.
    """
    for i, content in source.contents.items():
        if content.to_json() != list(contents[i]):
            (work / "plan.json").unlink()  # what was encoded is of no use
            raise InputError(f"{source.inputs[i].name} was changed while it was read: run again")


def _trained(source: Source, plan: EvalPlan, work: Path, options: PrepareOptions, progress: bool) -> Tokenizer:
    """The BPE of this corpus, trained on a sample of the training documents drawn by hash."""
    path = work / "tokenizer.json"
    if not path.exists():
        assert options.vocab_size is not None  # options.check asked
        share = min(BPE_BYTES * options.vocab_size, MOST_BPE_BYTES) / len(plan.domains)  # the same for every domain
        bound = {name: min(1.0, share / entry["bytes_read"]) * 2**64 for name, entry in plan.domains.items()}

        def sample() -> Iterator[str]:
            with progress_bar("training a BPE", plan.n_documents, unit=" documents", scale=False, show=progress) as bar:
                for document in source.documents():
                    digest = evalplan.digest_of(document.text.encode())
                    drawn = evalplan.key_of(options.seed, "bpe", digest) < bound.get(document.domain, 0)  # 0: it is dropped
                    if drawn and digest not in plan.held:
                        yield document.text
                    bar.update()

        train_bpe(sample(), options.vocab_size).save(path)
    tokenizer = load_tokenizer(path)
    tokenizer.name = f"bpe-{tokenizer.vocab_size}"
    return tokenizer


def _encoded(
    source: Source, plan: EvalPlan, tokenizer: Tokenizer, work: Path, seed: int, workers: int | None, progress: bool
) -> list[Path]:
    with progress_bar("encoding", plan.n_bytes, unit="B", show=progress) as bar:
        done = 0

        def on_progress(n_bytes: int, n_tokens: int) -> None:
            nonlocal done
            if n_tokens == 0:  # what an earlier run did is no part of this run's speed
                bar.initial = n_bytes
            done += n_tokens
            bar.update(n_bytes)
            if progress:
                bar.set_postfix_str(f"{done / max(1e-3, bar.format_dict['elapsed']):,.0f} tokens/s", refresh=False)

        workers = workers or os.cpu_count() or 1
        return encode(source, plan, tokenizer, work, seed=seed, workers=workers, on_progress=on_progress)


def _assemble(
    plan: EvalPlan, tokenizer: Tokenizer, parts: Sequence[Path], work: Path, record: Mapping[str, Any], source: Source
) -> Path:
    """Write the data folder out of the part files, inside the work folder; returns it."""
    data = work / "data"
    shutil.rmtree(data, ignore_errors=True)
    dtype, stems = token_dtype(tokenizer).name, file_stems(plan.domains)
    texts: list[tuple[str, str, str, int]] = []
    held_out: list[str] = []
    copies: Counter[str] = Counter()
    with ExitStack() as stack:
        writers = [stack.enter_context(ShardWriter(data / "shards", name, dtype, stems[name])) for name in plan.domains]
        for path in parts:
            part = Part.load(path)
            ends = np.cumsum(part.lengths)
            for domain, start, end, n_bytes in zip(part.domain, ends - part.lengths, ends, part.n_bytes):
                writers[domain].add(part.tokens[start:end], int(n_bytes))
            texts += part.texts
            held_out += part.held_out
            copies.update(part.copies)
        entries = {writer.domain: writer.close() for writer in writers}
    texts.sort(key=lambda row: (row[1], row[3]))  # by domain, then document; within a document they are in order
    evalset = EvalSet([t[0] for t in texts], [t[1] for t in texts], [t[2] for t in texts], [t[3] for t in texts])
    domains = {}
    for name, entry in entries.items():
        numbers = {part: int(((evalset.domain == name) & (evalset.part == part)).sum()) for part in PARTS}
        shown = {f"training_{key}": entry[key] for key in ("documents", "bytes", "tokens")}
        domains[name] = {**plan.domains[name], "held_out_copies_dropped": copies[name], **shown, "eval_texts": numbers}
    with explain_write_errors(data):
        evalset.save(data / "eval.parquet")
        tokenizer.save(data)
        corpus_hash = write_manifest(data / "shards", tokenizer.describe(), tokenizer.vocab_size, entries)
    content = {
        "format": "lldfast-prepare",
        "version": VERSIONS[-1],
        **record,
        "tokenizer": tokenizer.describe(),
        "domains": domains,
        "dropped_domains": plan.dropped,
        "skipped": plan.skipped,
        "files": source.survey.to_json(),
        "corpus_hash": corpus_hash,
        "evalset_hash": evalset.hash,
        "warnings": plan.warnings,
        "held_out": sorted(held_out),  # XXH3-64 of the tokens of what is held out: `verify` looks for them in the shards
    }
    write_json(data / "prepare.json", content)
    return data


def _publish(data: Path, out: Path) -> None:
    """Give the finished folder its name; an older one (overwrite) is moved aside first and removed last."""
    old = out.with_name(f".{out.name}.old")
    with explain_write_errors(out):
        shutil.rmtree(old, ignore_errors=True)
        if out.exists():
            os.rename(out, old)
        os.rename(data, out)
        fsync_folder(out.parent)
        shutil.rmtree(old, ignore_errors=True)


def _versions(inputs: Sequence[str]) -> dict[str, str]:
    """Versions of what can change the result."""
    here = versions()
    used = {name: here[name] for name in ("lldfast", "python", "numpy", "pyarrow", "tiktoken", "tokenizers") if name in here}
    return used | (builtin.versions() if "builtin" in inputs else {})
