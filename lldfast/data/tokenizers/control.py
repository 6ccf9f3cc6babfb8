"""Control tokens: which they are, and a Hugging Face tokenizer that cannot give them.

`encode_special_tokens` keeps a library from cutting special tokens out of a text; whether the model then spells "</s>" with
other tokens is the model's affair. Where "</s>" is an entry of a Unigram, WordPiece or WordLevel vocabulary, or of a BPE with
`ignore_merges`, the model itself answers with its id; a normalizer may write it, too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from lldfast.backends import require
from lldfast.errors import InputError

# Settings of tokenizer_config.json and special_tokens_map.json that name control tokens. The unknown token is none of them.
NAMING = ("eos_token", "bos_token", "pad_token", "sep_token", "cls_token", "mask_token")
NAMING_MORE = ("additional_special_tokens", "extra_special_tokens")
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def named_tokens(settings: Mapping[str, Any]) -> list[str]:
    """The control tokens that a tokenizer's settings name."""
    found = [settings.get(key) for key in NAMING]
    for key in NAMING_MORE:
        more = settings.get(key) or []
        found += list(more.values()) if isinstance(more, Mapping) else list(more) if isinstance(more, (list, tuple)) else []
    decoder = settings.get("added_tokens_decoder")
    if isinstance(decoder, Mapping):
        found += [token for token in decoder.values() if isinstance(token, Mapping) and token.get("special")]
    contents = [token.get("content") if isinstance(token, Mapping) else token for token in found]
    return [str(content) for content in contents if content]


def control_ids(backend: Any, eot: int | None, bos: int | None, named: Iterable[str] = ()) -> set[int]:
    """Ids of a `tokenizers.Tokenizer` that no text may give: special added tokens, what is named, `eot` and `bos`.

    The model's unknown token and the bytes of a byte fallback stand for text and are none, unless the unknown token is `eot`.
    """
    ids = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
    ids |= {i for token in named if (i := backend.token_to_id(token)) is not None}
    if bos is not None:
        ids.add(bos)
    text = {_unknown(backend)} | {i for i in ids if _BYTE.fullmatch(backend.id_to_token(i) or "")}
    return (ids - text) | ({eot} if eot is not None else set())


def _unknown(backend: Any) -> int | None:
    """The id that the model gives to what it does not know, or None."""
    if hasattr(backend.model, "unk_token"):
        token = backend.model.unk_token
        return None if token is None else backend.token_to_id(token)
    model = json.loads(backend.to_str())["model"]  # Unigram shows its unknown token nowhere else
    return None if model.get("unk_id") is None else int(model["unk_id"])


def without_control(backend: Any, control: Iterable[int]) -> Any:
    """A copy of a `tokenizers.Tokenizer` whose model and added tokens lack the ids of `control`; all other ids stay.

    Raises:
        InputError: the library gives an added token another id in the copy.
    """
    tokenizers = require("tokenizers", purpose="this tokenizer needs")
    control = set(control)
    content = json.loads(backend.to_str())
    added, content["added_tokens"] = content["added_tokens"], []
    content["post_processor"] = content["decoder"] = None
    _cut(content["model"], control)
    copy = tokenizers.Tokenizer.from_str(json.dumps(content))
    copy.encode_special_tokens = True
    fillers = 0
    for entry in sorted(added, key=lambda entry: entry["id"]):
        if entry["id"] in control:
            continue
        # The library numbers added tokens in order. Special ones that no text is searched for fill the gaps.
        while copy.token_to_id(entry["content"]) is None and _next_id(copy) < entry["id"]:
            copy.add_special_tokens([f"\U0010ffff{fillers}"])
            fillers += 1
        token = tokenizers.AddedToken(**{key: value for key, value in entry.items() if key not in ("id", "special")})
        (copy.add_special_tokens if entry["special"] else copy.add_tokens)([token])
        if copy.token_to_id(entry["content"]) != entry["id"]:
            raise InputError(f"the vocabulary without control tokens cannot keep the id {entry['id']} of {entry['content']!r}")
    return copy


def _cut(model: dict[str, Any], control: set[int]) -> None:
    """Take the ids of `control` out of the model part of a tokenizer.json, in place."""
    vocab = model["vocab"]
    if isinstance(vocab, list):  # Unigram: the place is the id, so the piece becomes one that no text has; its score stays
        model["vocab"] = [["" if i in control else piece, score] for i, (piece, score) in enumerate(vocab)]
        if model.get("unk_id") in control:
            model["unk_id"] = None
        return
    gone = {token for token, i in vocab.items() if i in control}
    model["vocab"] = {token: i for token, i in vocab.items() if token not in gone}
    if "merges" in model:
        prefix = model.get("continuing_subword_prefix") or ""
        pairs = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"]]
        model["merges"] = [[a, b] for a, b in pairs if gone.isdisjoint((a, b, a + b.removeprefix(prefix)))]
        if model.get("unk_token") in gone:
            model["unk_token"] = None


def _next_id(backend: Any) -> int:
    """The id that the library would give to a new added token."""
    size = backend.get_vocab_size(with_added_tokens=False)
    return max([size, *(i + 1 for i in backend.get_added_tokens_decoder())])
