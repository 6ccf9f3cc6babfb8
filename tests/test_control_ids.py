"""No text gives the id of a control token, whatever it spells, under any kind of vocabulary; `verify` says where one did."""

from __future__ import annotations

import itertools
import json
import random

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

import lldfast
from lldfast.data.making.prepare import verify
from lldfast.data.shards import ShardWriter, TokenShards, write_manifest
from lldfast.data.tokenizer import HFTokenizer, TextError, load_tokenizer, tokenizer_from_manifest, train_bpe
from lldfast.errors import CorruptError, InputError
from lldfast.models.gpt import GPT, GPTConfig
from lldfast.models.language_model import LanguageModel

LETTERS = "abcdefghijklmnopqrstuvwxyzS</>[]|_ ▁"
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
WHOLE = [*SPECIAL[1:], "</S>", "＜/s＞", "＜ｓ＞", "a", "b ", " ", "\n"]
PARTS = [piece for token in WHOLE for piece in (token, token[: len(token) // 2], token[len(token) // 2 :])]


def texts(n: int = 300) -> list[str]:
    """Control strings whole, halved, doubled, nested and as a normalizer would write them, between letters."""
    draw = random.Random(0)
    nested = ["</</s>s>", "</s></s>", "<s></s>", "a</s>b", "</s>", "</s", "/s>", "x </s> y", "<</s>>"]
    return nested + ["".join(draw.choices(PARTS, k=draw.randrange(1, 9))) for _ in range(n)]


def unigram(byte_fallback: bool = False, letters: str = LETTERS) -> tokenizers.Tokenizer:
    pieces = [(token, 0.0) for token in SPECIAL] + [(c, -3.0) for c in letters] + [("</", -3.5), ("s>", -3.5)]
    if byte_fallback:
        pieces += [(f"<0x{i:02X}>", -20.0) for i in range(256)]
    backend = tokenizers.Tokenizer(models.Unigram(pieces, 0, byte_fallback))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="never"), decoders.Fuse()])
    backend.add_special_tokens(SPECIAL)
    return backend


def undeclared() -> tokenizers.Tokenizer:
    """Unigram without any added token: only its name says that </s> ends a document."""
    content = json.loads(unigram().to_str())
    return tokenizers.Tokenizer.from_str(json.dumps({**content, "added_tokens": []}))


def vocabulary(*more: str) -> dict[str, int]:
    return {token: i for i, token in enumerate([*SPECIAL, *LETTERS, *more])}


def word_level() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary("hello"), unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(SPECIAL)
    return backend


def word_piece() -> tokenizers.Tokenizer:
    pieces = vocabulary(*(f"##{c}" for c in LETTERS))
    backend = tokenizers.Tokenizer(models.WordPiece(pieces, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.WordPiece(cleanup=False)
    backend.add_special_tokens(SPECIAL)
    return backend


def merged_bpe(**options: bool) -> tokenizers.Tokenizer:
    """A BPE whose merges lead to </s>, and over it to `</s>a`."""
    merges = [("<", "/"), ("s", ">"), ("</", "s>"), ("</s>", "a"), ("a", "b")]
    pieces = vocabulary("</", "s>", "</s>a", "ab")
    backend = tokenizers.Tokenizer(models.BPE(pieces, merges, unk_token="<unk>", **options))
    backend.normalizer = normalizers.NFKC()
    backend.add_special_tokens(SPECIAL)
    return backend


def plain_eos(content: AddedToken) -> tokenizers.Tokenizer:
    """A byte-level BPE whose EOS was added without `special`, beside a run of blanks that a user added."""
    backend = tokenizers.Tokenizer.from_str(train_bpe(["some text to merge, some more text"] * 3, 280).backend.to_str())
    content_of = json.loads(backend.to_str())
    content_of["added_tokens"] = []
    content_of["model"]["vocab"] = {t if i else "Ġsome!": i for t, i in content_of["model"]["vocab"].items()}
    backend = tokenizers.Tokenizer.from_str(json.dumps(content_of))
    backend.add_tokens([AddedToken("    "), content, AddedToken("\t\t")])
    return backend


KINDS = {
    "unigram": unigram,
    "unigram bytes": lambda: unigram(True, "ab ▁"),
    "undeclared": undeclared,
    "word level": word_level,
    "word piece": word_piece,
    "bpe": merged_bpe,
    "bpe ignore_merges": lambda: merged_bpe(ignore_merges=True),
    "added": lambda: plain_eos(AddedToken("</s>")),
    "added normalized": lambda: plain_eos(AddedToken("</s>", normalized=True, lstrip=True)),
}


def load(kind: str) -> HFTokenizer:
    return load_tokenizer(KINDS[kind]())


@pytest.mark.parametrize("kind", KINDS)
def test_no_text_gives_a_control_id(kind):
    tokenizer, backend = load(kind), KINDS[kind]()
    backend.encode_special_tokens = True
    forged = 0
    batch = tokenizer.encode_batch(texts())
    for text, ids in zip(texts(), batch):
        own = backend.encode(text, add_special_tokens=False).ids
        assert not set(ids.tolist()) & set(tokenizer.control), text
        assert ids.tolist() == tokenizer.encode(text)
        if set(own) & set(tokenizer.control):
            forged += 1
        else:
            assert ids.tolist() == own, text  # the tokenizer's own ids, where they are no forgery
        whole = backend.normalizer.normalize_str(text) if backend.normalizer else text
        if kind.startswith("word") or ("\n" in whole and kind in ("unigram", "undeclared", "bpe", "bpe ignore_merges")):
            continue  # with unknown tokens or blanks of its own
        back = tokenizer.decode(ids)
        if kind.startswith("bpe"):  # without a decoder the library puts blanks between tokens
            back, whole = back.replace(" ", ""), whole.replace(" ", "")
        assert back == whole, text
    assert forged > 40  # the library itself is forged by these texts
    assert tokenizer.eot == tokenizer.backend.token_to_id("</s>") and tokenizer.eot in tokenizer.control


def test_spelled_with_what_is_left():
    pieces = load("unigram")
    assert [pieces.backend.id_to_token(i) for i in pieces.encode("a</s>b")] == ["a", "</", "s>", "b"]
    words = load("word level")
    assert words.encode("hello </S> hello") == [words.backend.token_to_id(t) for t in ("hello", "<unk>", "hello")]
    bpe = load("bpe")
    assert [bpe.backend.id_to_token(i) for i in bpe.encode("</s>")] == ["</", "s>"]
    assert [bpe.backend.id_to_token(i) for i in bpe.encode("</s>ab")] == ["</s>a", "b"]  # its own ids: no control token
    added = load("added")
    assert added.decode(added.encode("x    </s>\t\ty")) == "x    </s>\t\ty"
    assert {added.backend.token_to_id("    "), added.backend.token_to_id("\t\t")} <= set(added.encode("x    </s>\t\ty"))


def test_added_tokens_of_users_are_no_control_tokens():
    tokenizer = load("added")
    assert tokenizer.control == (tokenizer.eot,)
    assert tokenizer.encode("    ") == [tokenizer.backend.token_to_id("    ")]


@pytest.mark.parametrize(
    "model",
    [
        models.WordLevel({"</s>": 0, "a": 1}, unk_token="<unk>"),
        models.BPE({"</s>": 0, "a": 1, "<": 2}, [], ignore_merges=True),
        models.Unigram([("</s>", 0.0), ("a", -1.0)], 0, False),  # its unknown token ends a document
        models.WordPiece({"</s>": 0, "a": 1}, unk_token="</s>"),
    ],
    ids=["word level", "bpe", "unigram unknown", "word piece unknown"],
)
def test_no_other_way_to_write_it(model, tmp_path):
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = load_tokenizer(backend)
    assert tokenizer.encode("a a") == [1, 1]
    message = r"control token '</s>' \(id 0\), and the vocabulary has no other way to write it"
    with pytest.raises(InputError, match=message):
        tokenizer.encode("a </s>")
    with pytest.raises(TextError, match=message) as caught:
        tokenizer.encode_batch(["a", "a </s>"])
    assert caught.value.index == 1


def prepared(folder, rows, tokenizer, **options):
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return lldfast.prepare(folder / "rows.jsonl", folder / "out", tokenizer=str(tokenizer), progress=False, **options)


def rows(forging: str) -> list[dict[str, str]]:
    """Documents of two domains, every fourth with a piece that forges."""
    return [
        {"text": " ".join(["ab ba"] * (60 + i) + [forging] * (i % 4 == 2) + ["ab"] * 5), "domain": "xy"[i % 2]} for i in range(24)
    ]


def test_prepare_names_the_line_that_cannot_be_written(tmp_path):
    backend = tokenizers.Tokenizer(models.WordLevel({"</s>": 0, "ab": 1, "ba": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match=r"rows\.jsonl, line \d+ \(domain 'x'\): tokenizer .*control token '</s>'"):
        prepared(tmp_path, rows("</s>"), tmp_path / "tokenizer.json", workers=1)


def test_score_names_the_text_that_cannot_be_written():
    backend = tokenizers.Tokenizer(models.WordLevel({"</s>": 0, "ab": 1, "ba": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model = tiny_model(load_tokenizer(backend))
    with pytest.raises(InputError, match=r"text 1 \(domain second\): tokenizer .*control token '</s>'"):
        lldfast.score(model, lldfast.EvalSet.from_texts(["ab ba", "ab </s>"], ["first", "second"]))


def tiny_model(tokenizer):
    size = tokenizer.vocab_size
    config = GPTConfig(vocab_size=size, valid_vocab=size, block_size=16, n_layer=1, n_head=1, n_embd=8)
    return LanguageModel.from_gpt(GPT(config), tokenizer)


def test_native_ids_keep_their_template():
    backend = unigram()
    template = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    backend.post_processor = template
    tokenizer = load_tokenizer(backend)
    for text in ("ab", "", "a</s>b", "</s>", "</s></s>"):
        assert [ids.tolist() for ids in tokenizer.encode_batch_native([text])] == [[1, *tokenizer.encode(text), 2]]


def test_shards_of_forging_texts(tmp_path):
    """Under a vocabulary of which </s> is an entry, documents end once, and `verify` finds what forged them before."""
    backend = unigram(True, "ab ▁")
    backend.save(str(tmp_path / "tokenizer.json"))
    folder = prepared(tmp_path, rows("x</s>y <s>"), tmp_path / "tokenizer.json")
    verify(folder)
    shards = TokenShards(folder)
    assert shards.control == shards.load_tokenizer().control == (1, 2, 3)
    written = []
    for name in shards.domains:
        tokens, offsets = shards.tokens(name), shards.offsets(name)
        assert int((tokens == 2).sum()) == shards.n_documents[name] and not np.isin(tokens, [1, 3]).any()
        written += [shards.load_tokenizer().decode(tokens[a : b - 1]) for a, b in itertools.pairwise(offsets)]
    assert sum("x</s>y <s>" in text for text in written) > 2


def rewritten(folder, change, *, listed: bool) -> None:
    """Change one token of domain x of a data folder, checksums and all."""
    shards = TokenShards(folder)
    entries = {}
    for name in shards.domains:
        documents = [shards.tokens(name)[a:b].copy() for a, b in itertools.pairwise(shards.offsets(name))]
        if name == "x":
            documents[1][3] = change
        with ShardWriter(folder / "shards", name, "uint16") as writer:
            for document in documents:
                writer.add(document)
            entries[name] = writer.close()
    about = {key: value for key, value in shards.tokenizer.items() if listed or key != "control"}
    corpus_hash = write_manifest(folder / "shards", about, shards.vocab_size, entries)
    record = json.loads((folder / "prepare.json").read_text())
    (folder / "prepare.json").write_text(json.dumps({**record, "corpus_hash": corpus_hash}))


@pytest.mark.parametrize("listed", [True, False])  # False: as folders were made before manifests listed control tokens
@pytest.mark.parametrize("control", [1, 2, 3])
def test_verify_finds_control_tokens(control, listed, tmp_path):
    unigram(True, "ab ▁").save(str(tmp_path / "tokenizer.json"))
    folder = prepared(tmp_path, rows("ab"), tmp_path / "tokenizer.json")
    rewritten(folder, 5, listed=listed)
    verify(folder)
    rewritten(folder, control, listed=listed)
    first = int(TokenShards(folder).offsets("x")[1])
    message = rf"x\.bin: document 1 of domain 'x', token 3 \(position {first + 3} of the file\): the control token {control}"
    with pytest.raises(CorruptError, match=message):
        verify(folder)


def test_documents_of_a_model_may_have_other_control_tokens(tmp_path):
    about = {"name": "t", "hash": "h", "eot": 2, "control": [1, 2]}
    for documents, sampled, fault in (([[5, 1, 2]], True, None), ([[5, 1, 2]], False, 1), ([[5, 2, 2]], True, 2)):
        with ShardWriter(tmp_path, "a", "uint16") as writer:
            for document in documents:
                writer.add(np.array(document))
            entries = {"a": writer.close()}
        write_manifest(tmp_path, about, 10, entries, sampled=sampled)
        if fault is None:
            TokenShards(tmp_path).verify()
        else:
            with pytest.raises(CorruptError, match=rf"document 0 of domain 'a', token 1 .*control token {fault}"):
                TokenShards(tmp_path).verify()


def test_which_tokens_are_control(tmp_path):
    content = json.loads(unigram(True).to_str())
    for entry in content["added_tokens"]:
        entry["special"] = entry["content"] == "<unk>"
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    settings = {
        "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>", "mask_token": {"content": "a"}, "cls_token": "absent",
        "extra_special_tokens": {"image": "<pad>"}, "additional_special_tokens": ["b", {"content": "c"}],
        "added_tokens_decoder": {"9": {"content": "d", "special": True}, "10": {"content": "e", "special": False}},
    }  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(tmp_path)
    names = {tokenizer.backend.id_to_token(i) for i in tokenizer.control}
    assert names == {"</s>", "a", "<pad>", "b", "c", "d"}  # not <unk>, which is also the padding, nor <s>, which nothing names
    back = tokenizer_from_manifest({**tokenizer.describe()}, tmp_path)
    assert back.control == tokenizer.control
    with pytest.raises(CorruptError, match=r"control tokens of tokenizer .* must be a list of ids"):
        tokenizer_from_manifest({**tokenizer.describe(), "control": ["a"]}, tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()  # a manifest travels without it
    assert tokenizer_from_manifest(tokenizer.describe(), tmp_path).control == tokenizer.control


def slow_words():
    transformers = pytest.importorskip("transformers")

    class WordsTokenizer(transformers.PreTrainedTokenizer):
        def __init__(self, **kwargs):
            self.ids = vocabulary("hello")
            super().__init__(**kwargs)

        @property
        def vocab_size(self):
            return len(self.ids)

        def get_vocab(self):
            return dict(self.ids)

        def _tokenize(self, text, **kwargs):
            return text.split()

        def _convert_token_to_id(self, token):
            return self.ids.get(token, self.ids.get(self.unk_token))

        def _convert_id_to_token(self, index):
            return list(self.ids)[index]

    return WordsTokenizer


@pytest.mark.parametrize("unknown", ["<unk>", None])
def test_tokenizers_in_pure_python(unknown):
    tokenizer = load_tokenizer(slow_words()(eos_token="</s>", bos_token="<s>", pad_token="<pad>", unk_token=unknown))
    ids = tokenizer.encode("hello </s> hello")
    assert tokenizer.decode(ids).replace(" ", "") == "hello</s>hello" and not set(ids) & set(tokenizer.control)
    assert tokenizer.encode("hello a") == [vocabulary("hello")["hello"], vocabulary()["a"]]


def test_a_character_that_is_itself_a_control_token():
    words = slow_words()
    words._tokenize = lambda self, text: list(text)
    tokenizer = load_tokenizer(words(eos_token="_", unk_token=None))
    assert tokenizer.encode("ab") == [vocabulary()["a"], vocabulary()["b"]]
    with pytest.raises(InputError, match=r"control token '_' \(id \d+\), and the vocabulary has no other way"):
        tokenizer.encode("a_b")
