"""A byte-level BPE trained on texts of your own."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from lldfast.backends import require
from lldfast.data.gpt2bpe import EOT
from lldfast.data.tokenizers.huggingface import HFTokenizer
from lldfast.errors import InputError

# The trainer visits a whole word for every merge in it: time grows with the square of the longest word.
LONGEST_WORD = 4096  # characters
# Only such a stretch can have a longer word: GPT-2's words have white space all through or before the first character.
_LONG = re.compile(rf"\S{{{LONGEST_WORD + 1},}}|\s{{{LONGEST_WORD + 1},}}")


def train_bpe(texts: Iterable[str], vocab_size: int) -> HFTokenizer:
    """Train a byte-level BPE with GPT-2's splitting and `<|endoftext|>` (id 0).

    The vocabulary is smaller than `vocab_size` only when the texts do not have enough pairs to merge. A word, as GPT-2 splits
    them, of more than `LONGEST_WORD` characters is cut into pieces of that length before pairs are counted: no token grows
    across a cut. Encoding cuts nothing.

    Raises:
        InputError: `vocab_size` is under 257 (256 bytes and EOT), or there is no text.
    """
    if vocab_size < 257:
        raise InputError(f"vocab_size must be at least 257 (256 bytes and {EOT}), got {vocab_size}")
    tokenizers = require("tokenizers", purpose="this tokenizer needs")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    splitter = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)  # its own: training locks that of `backend`
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOT],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    seen = 0

    def counted() -> Iterator[str]:
        nonlocal seen
        for text in texts:
            seen += 1
            yield from _short_words(text, splitter)

    backend.train_from_iterator(counted(), trainer)
    if not seen:
        raise InputError("there is no text to train a tokenizer on")
    return HFTokenizer(backend, f"bpe-{vocab_size}", backend.token_to_id(EOT), None)


def _short_words(text: str, splitter: Any) -> Iterator[str]:
    """The text in pieces, so that none has a word of more than `LONGEST_WORD` characters; nearly every text is one piece."""
    start = 0
    for stretch in _LONG.finditer(text) if len(text) > LONGEST_WORD else ():
        for _, (first, end) in splitter.pre_tokenize_str(stretch[0]):
            for cut in range(stretch.start() + first + LONGEST_WORD, stretch.start() + end, LONGEST_WORD):
                yield text[start:cut]
                start = cut
    yield text[start:]
