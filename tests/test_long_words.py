"""Very long words and runs of white space: the ids of uncut texts, in linear time; training cuts words at a stated length."""

from __future__ import annotations

import itertools
import random
import time

import numpy as np
import pytest
import tiktoken
import tokenizers
from tokenizers import models, pre_tokenizers

from lldfast.data.tokenizer import TiktokenTokenizer, load_tokenizer, train_bpe
from lldfast.data.tokenizers import tiktokens, training
from lldfast.errors import InputError

GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
CL100K = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
WORD = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K = WORD + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


# Runs of blanks, line breaks, and a blank before a letter: what a wrong cut would break.
MERGED = ("  ", "\n\n", "    ", " x", "        ", "\n\n\n\n", "\t\t", "!\n", " !", "\nx", "\tx", "xx")


def encoding(pattern: str, merged: tuple[str, ...] = ()) -> tiktoken.Encoding:
    ranks = {bytes([i]): i for i in range(256)}
    ranks |= {token.encode(): 256 + i for i, token in enumerate(merged)}
    return tiktoken.Encoding("small", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": len(ranks)})


def tokenizer(pattern: str, monkeypatch: pytest.MonkeyPatch, merged: tuple[str, ...] = ()) -> TiktokenTokenizer:
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding(pattern, merged))
    return TiktokenTokenizer("small")


@pytest.mark.parametrize("pattern", [GPT2, CL100K, O200K], ids=["gpt2", "cl100k", "o200k"])
def test_runs_of_white_space_keep_their_ids(pattern, monkeypatch):
    monkeypatch.setattr(tiktokens, "LONG_RUN", 3)
    ours, theirs = tokenizer(pattern, monkeypatch, MERGED), encoding(pattern, MERGED)
    draw = random.Random(1)
    parts = [
        " ",
        "  ",
        "     ",
        "\n",
        "\n\n\n",
        "\r\n",
        "\t\t",
        "\u3000",
        "\x1c",
        "x",
        "xx",
        "!",
        "!\n",
        "/",
        "1",
        "'s",
        "é",
        "漢",
    ]
    ends = ["", "x", " x", "!", "1"]
    texts = ["".join(pair) for pair in itertools.product(parts, repeat=2)]
    texts += ["".join(draw.choices(parts, k=draw.randrange(3, 12))) + draw.choice(ends) for _ in range(4000)]
    for text in texts:
        assert ours.encode(text) == theirs.encode_ordinary(text), repr(text)
    assert sum(any(end - begin >= 3 for begin, end in words(ours, text)) for text in texts) > 1000  # and many were taken out


def words(ours: TiktokenTokenizer, text: str) -> list[tuple[int, int]]:
    return [ours._word_in(text, *run.span()) for run in ours._long_runs.finditer(text)]


@pytest.mark.parametrize("pattern", [GPT2, CL100K, O200K], ids=["gpt2", "cl100k", "o200k"])
def test_more_white_space_than_tiktoken_takes(pattern, monkeypatch):
    ours, n = tokenizer(pattern, monkeypatch), 1_000_100
    with pytest.raises(ValueError, match="Max stack size exceeded"):
        encoding(pattern).encode_to_numpy("x" + " " * n + "x")
    for text in ("x" + " " * n + "x", " " * n, "x" + "\n" * n + "x", "!" + "\t" * n + "\n" + " " * n + "1"):
        assert bytes(ours.encode_batch([text])[0].astype(np.uint8)) == text.encode()


def test_what_tiktoken_still_refuses_is_an_error_of_the_text(monkeypatch):
    ours = tokenizer(GPT2, monkeypatch)

    class Failing:
        def __getattr__(self, name):
            raise type("PanicException", (BaseException,), {})("index out of range")

    monkeypatch.setattr(ours, "encoding", Failing())
    with pytest.raises(InputError, match=r"tokenizer small fails on a text \(panic: index out of range\)"):
        ours.encode("a")
    with pytest.raises(InputError, match="panic") as caught:
        ours.encode_batch(["a", "b"])
    assert caught.value.index == 0


def test_interrupts_pass(monkeypatch):
    ours = load_tokenizer("bytes")
    monkeypatch.setattr(ours, "_encode", lambda text: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        ours.encode("a")


def test_a_long_word_is_one_word_for_hugging_face():
    """A SentencePiece-like BPE takes a document for one word; a cut anywhere would change ids."""
    backend = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, "abab": 3}, [("a", "b"), ("ab", "ab")]))
    ours = load_tokenizer(backend)
    n = 300_000
    assert ours.encode("b" + "ab" * n) == [1] + [3] * (n // 2)


def test_training_takes_time_in_proportion_to_a_word():
    draw = random.Random(0)
    word = "".join(draw.choices("abcdefghijklmnop", [2.0**-i for i in range(16)], k=100_000))

    def seconds(size: int) -> float:
        start = time.process_time()
        train_bpe([word[:size]], 900)
        return time.process_time() - start

    seconds(1000)  # what is loaded once
    assert seconds(100_000) < 7 * seconds(25_000)  # uncut words take more than ten times as long


def test_training_cuts_only_longer_words():
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    n = training.LONGEST_WORD

    def cut(text):
        pieces = list(training._short_words(text, splitter))
        assert "".join(pieces) == text
        return [len(piece) for piece in pieces]

    assert cut("x" * n) == [n] and cut("x" * (n + 1)) == [n, 1]
    assert cut("ab1." * n) == [4 * n]  # no white space, but short words
    assert cut("漢字。" * n) == [3 * n]
    assert cut("see " + "x" * (2 * n + 5) + " there " + "1" * n) == [4 + n, n, 5 + 7 + n]
    assert cut("a" + " " * (n + 2) + "b")[0] == 1 + n
    assert [len(word) for text in cut_words("y" * (3 * n + 1), splitter) for word in text] == [n, n, n, 1]


def cut_words(text, splitter):
    return [[word for word, _ in splitter.pre_tokenize_str(piece)] for piece in training._short_words(text, splitter)]


def test_training_on_short_words_is_what_it_was():
    texts = ["the quick brown fox " * 5, "jumps over", "漢字かな交じり文。" * 40]
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    assert train_bpe(texts, 300).backend.get_vocab() == backend.get_vocab()
