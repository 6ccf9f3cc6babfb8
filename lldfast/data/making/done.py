"""Whether a folder is what `prepare` would make now: decided on everything that decides the result, and on nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lldfast.backends import versions
from lldfast.data.making import builtin
from lldfast.data.making.options import PrepareOptions
from lldfast.data.making.sources import Source
from lldfast.data.shards import TokenShards
from lldfast.data.tokenizer import load_tokenizer
from lldfast.errors import CorruptError, InputError, LLDError
from lldfast.files import read_json
from lldfast.terminal import note

# Options that a record of version 1 does not have; it was made as their defaults say.
SINCE_VERSION_2 = ("on_error", "most_skipped", "drop_small_domains")


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
            TokenShards(out)  # sizes: a file may be missing or cut off
            return True
        except CorruptError:
            if not overwrite:
                raise
    if overwrite:
        return False
    raise InputError(f"{out} was made {why}")


def _differences(out: Path, there: Mapping[str, Any], record: Mapping[str, Any], source: Source) -> Iterator[str]:
    """How the folder's inputs and arguments differ from these, the cheapest looks first."""
    again = "use overwrite, or remove it, to make it again"
    defaults = PrepareOptions()
    old = {name: getattr(defaults, name) for name in SINCE_VERSION_2} | dict(there.get("arguments") or {})
    new = record["arguments"]
    if changed := ", ".join(f"{key} = {old.get(key)!r}, now {new[key]!r}" for key in new if old.get(key) != new[key]):
        yield f"with other arguments ({changed}): choose another folder, or overwrite"
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
    if any(before.get(key) != tokenizer[key] for key in ("hash", "eot", "bos")):
        yield f"when the tokenizer {spec} was another (hash {before.get('hash')}, now {tokenizer['hash']})"


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
