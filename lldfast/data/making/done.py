"""Whether a folder is what `prepare` would make now: decided on everything that decides the result, and on nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lldfast.backends import versions
from lldfast.data.evalset import EvalSet
from lldfast.data.making import builtin
from lldfast.data.making.options import PrepareOptions
from lldfast.data.making.sources import Source
from lldfast.data.shards import TokenShards
from lldfast.data.tokenizer import load_tokenizer, tokenizer_from_manifest
from lldfast.errors import CorruptError, InputError, LLDError, listed
from lldfast.files import read_json
from lldfast.terminal import note

# Options that a record of version 1 does not have; it was made as their defaults say.
SINCE_VERSION_2 = ("on_error", "most_skipped", "drop_small_domains")
# What of a tokenizer decides the ids, as `Tokenizer.describe` and, for people, as a message calls it.
DECIDING = {"hash": "hash", "eot": "end-of-text id", "bos": "beginning id", "control": "control ids"}


def is_done(out: Path, record: Mapping[str, Any], source: Source, overwrite: bool) -> bool:
    """Whether `out` is what the arguments and inputs of `record` give; True costs one read of the inputs, for their hashes.

    What cannot be looked at now (a hub that does not answer, contents that version 1 did not record) is said on stderr.

    Raises:
        InputError: it is something else, which must not be replaced; never with `overwrite`, unless it is no prepared folder.
        CorruptError: a file of it is missing or damaged.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / "prepare.json").is_file():
        raise InputError(f"{out} exists and is not a folder that prepare made: choose another, or remove it")
    there = read_json(out / "prepare.json")
    if not isinstance(there, dict):
        raise CorruptError(f"{out / 'prepare.json'}: expected a JSON object, got {type(there).__name__}")
    why = next(_differences(out, there, json.loads(json.dumps(record)), source), None)
    if why is None:
        try:
            _check_files(out, there)
            return True
        except CorruptError:
            if not overwrite:
                raise
    if overwrite:
        return False
    raise InputError(f"{out} was made {why}")


def _check_files(out: Path, there: Mapping[str, Any]) -> None:
    """The shards' sizes, the tokenizer's file and the evaluation corpus are what was published together.

    Raises:
        CorruptError: a file of the folder is missing, cut off or altered; it is named.
    """
    try:
        shards = TokenShards(out)
        if shards.tokenizer.get("file"):
            tokenizer_from_manifest(shards.tokenizer, out)
        evalset = EvalSet.load(out / "eval.parquet")
    except InputError as error:  # a file that is not there, which is a fault of the folder and not of what was asked for
        raise CorruptError(f"{error}; {out} was a finished folder: use overwrite (--overwrite) to make it again") from None
    if evalset.hash != there.get("evalset_hash"):
        recorded = f"prepare.json recorded {there.get('evalset_hash')}"
        raise CorruptError(f"{out / 'eval.parquet'} was altered: its hash is {evalset.hash}, {recorded}")


def _differences(out: Path, there: Mapping[str, Any], record: Mapping[str, Any], source: Source) -> Iterator[str]:
    """How the folder's inputs and arguments differ from these, the cheapest looks first."""
    again = "use overwrite (--overwrite), or remove it, to make it again"
    defaults = PrepareOptions()
    old = {name: getattr(defaults, name) for name in SINCE_VERSION_2} | dict(there.get("arguments") or {})
    new = record["arguments"]
    idle = _without_effect(there)
    different = [key for key in new if old.get(key) != new[key] and key not in idle]
    if changed := ", ".join(f"{key} = {old.get(key)!r}, now {new[key]!r}" for key in different):
        yield f"with other arguments ({changed}): choose another folder, or use overwrite (--overwrite)"
    stamps, entries = record["inputs"], there.get("inputs")
    if not isinstance(entries, list) or not all(isinstance(entry, list) for entry in entries):
        raise CorruptError(f"{out / 'prepare.json'}: inputs is no list of lists")
    if [stamp[:2] for stamp in stamps] != [entry[:2] for entry in entries]:
        yield f"of other files: {again}"
    for stamp, entry in zip(stamps, entries):
        if entry[: len(stamp)] != stamp:
            yield f"when the inputs had other sizes ({stamp[1]}): {again}"
    yield from (f"{how}: {again}" for how in _other_tokenizer(out, there, new["tokenizer"]))
    contents = [entry[len(stamp) :] for stamp, entry in zip(stamps, entries)]
    if there.get("version") == 1:
        note(f"{out} was made when contents were not recorded: only the sizes of its inputs are compared")
    elif builtin_is_the_same(there):
        contents = [[] if item.kind == "builtin" else content for item, content in zip(source.inputs, contents)]
    try:
        yield from (f"when {name} had another content: {again}" for name in changed_inputs(source, contents))
    except InputError as error:
        note(f"{error}: {out} is taken as it is")


def _without_effect(there: Mapping[str, Any]) -> set[str]:
    """Options that do not change what a folder is made of, since no record of its inputs was bad, or no domain too small."""
    skipped, dropped = (there.get("skipped") or {}).get("skipped"), there.get("dropped_domains")
    return (set() if skipped else {"on_error", "most_skipped"}) | (set() if dropped else {"drop_small_domains"})


def _other_tokenizer(out: Path, there: Mapping[str, Any], spec: str) -> Iterator[str]:
    if spec == "bpe":
        before, now = (found.get("tokenizers") for found in (there.get("versions") or {}, versions()))
        if before != now:
            yield f"when its tokenizer was trained with tokenizers {before}, now {now}"
        return
    try:
        tokenizer = load_tokenizer(spec).describe()
    except LLDError as error:
        path = Path(spec)
        if path.exists() or path.suffix or path.is_absolute() or spec.startswith("."):
            raise
        note(f"whether {out} was made with the tokenizer {spec} of now cannot be told, so it is taken as it is: {error}")
        return
    before = there.get("tokenizer") or {}
    # Records from before control ids were listed have none to compare.
    changed = [key for key in DECIDING if before.get(key) != tokenizer[key] and (key != "control" or key in before)]
    if changed:
        shown = "; ".join(f"{DECIDING[key]} {_shown(before.get(key))}, now {_shown(tokenizer[key])}" for key in changed)
        yield f"when the tokenizer {spec} was another ({shown})"


def _shown(value: Any) -> str:
    """A field of a tokenizer's entry, for a message."""
    return "none" if value is None or value == [] else listed(value) if isinstance(value, list) else str(value)


def builtin_is_the_same(there: Mapping[str, Any]) -> bool:
    """Whether the packages that the builtin corpus is read from have the versions that they had: then its texts are the same."""
    before = there.get("versions") or {}
    return "builtin" in there["arguments"]["inputs"] and builtin.versions().items() <= before.items()


def changed_inputs(source: Source, contents: Sequence[Sequence[Any]]) -> Iterator[str]:
    """Names of inputs that no longer hold what they held ([bytes read, hash], or nothing where nothing was read).

    Raises:
        InputError: the hub does not answer.
    """
    for item, content in zip(source.inputs, contents):
        if content and item.content(source.config, content[0]).to_json() != list(content):
            yield item.name
