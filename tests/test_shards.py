from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import xxhash

from lldfast.data import shards as shards_module
from lldfast.data.making.prepare import prepare, verify
from lldfast.data.shards import ShardWriter, TokenShards, write_manifest, xxh3_file
from lldfast.errors import CorruptError, InputError, WriteError


@pytest.fixture
def folder(shards, tmp_path):
    """A copy that a test may damage."""
    shutil.copytree(shards.path, tmp_path / "shards")
    return tmp_path


def edit_manifest(folder: Path, change) -> None:
    path = folder / "shards" / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def test_round_trip(shards, sample_texts):
    assert shards.domains == list(sample_texts)
    assert shards.eot == 256 and shards.vocab_size == 257 and shards.dtype == np.uint16
    for domain, texts in sample_texts.items():
        tokens, offsets = shards.tokens(domain), shards.offsets(domain)
        assert shards.n_documents[domain] == len(texts) == len(offsets) - 1
        assert shards.n_tokens[domain] == len(tokens) == sum(len(text.encode()) + 1 for text in texts)
        assert shards.manifest["domains"][domain]["bytes"] == sum(len(text.encode()) for text in texts)
        for i, text in enumerate(texts):
            document = tokens[offsets[i] : offsets[i + 1]]
            assert bytes(document[:-1].astype(np.uint8)).decode() == text and document[-1] == 256
    shards.verify()
    assert sum(shards.proportions().values()) == pytest.approx(1, abs=1e-12)
    assert shards.proportions()["Prose"] == shards.n_tokens["Prose"] / sum(shards.n_tokens.values())


def test_opens_the_data_folder_and_the_shard_folder(shards):
    assert TokenShards(shards.path).corpus_hash == TokenShards(shards.path.parent).corpus_hash


def test_nanogpt_reads_the_file(shards, sample_texts):
    # As nanoGPT's train.py does, without knowing anything of the manifest.
    data = np.memmap(shards.path / "Code (Python).bin", dtype=np.uint16, mode="r")
    text = sample_texts["Code (Python)"][0].encode()
    assert bytes(data[: len(text)].astype(np.uint8)) == text


def test_two_domains_in_one_file(tmp_path, make_shards):
    make_shards(tmp_path, {"a": [[1, 2]], "b": [[3, 4]]})
    edit_manifest(tmp_path, lambda manifest: manifest["domains"]["b"].update(file="a.bin"))
    with pytest.raises(CorruptError, match=r"two domains name the file 'a\.bin'"):
        TokenShards(tmp_path)


def test_same_texts_same_hash_in_any_order(tmp_path, make_shards):
    documents = {"a": [[1, 2, 3]], "b": [[4, 5]]}
    one = make_shards(tmp_path / "one", documents)
    two = make_shards(tmp_path / "two", dict(reversed(documents.items())))
    other = make_shards(tmp_path / "other", {"a": [[4, 5]], "b": [[1, 2, 3]]})
    assert one.corpus_hash == two.corpus_hash != other.corpus_hash


def test_uint32(tmp_path, make_shards):
    shards = make_shards(tmp_path, {"a": [[70_000, 1], [99_999]]}, vocab_size=100_001, eot=100_000, dtype="uint32")
    assert shards.tokens("a").tolist() == [70_000, 1, 100_000, 99_999, 100_000]
    shards.verify()


def test_a_domain_without_documents(tmp_path, make_shards):
    shards = make_shards(tmp_path, {"empty": [], "a": [[1, 2]]})
    assert len(shards.tokens("empty")) == 0 and shards.offsets("empty").tolist() == [0]
    with pytest.raises(CorruptError, match="has no document"):
        shards.verify()


def test_unfinished_folder(tmp_path):
    with ShardWriter(tmp_path / "shards", "a", "uint16") as writer:
        writer.add(np.array([1, 2, 256]))
        writer.close()
    with pytest.raises(InputError, match=r"no manifest\.json"):
        TokenShards(tmp_path)


def test_truncated(folder):
    path = folder / "shards" / "Prose.bin"
    with open(path, "r+b") as handle:
        handle.truncate(path.stat().st_size - 2)
    with pytest.raises(CorruptError, match=r"Prose\.bin.*'Prose'.*truncated or swapped"):
        TokenShards(folder)


def test_truncated_index(folder):
    path = folder / "shards" / "Prose.idx"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CorruptError, match=r"Prose\.idx.*truncated"):
        TokenShards(folder)


def test_missing_file(folder):
    (folder / "shards" / "DM%2FMaths.bin").unlink()
    with pytest.raises(CorruptError, match="file of domain 'DM/Maths' is missing"):
        TokenShards(folder)


def test_swapped_with_another_size(folder):
    a, b = folder / "shards" / "Prose.bin", folder / "shards" / "DM%2FMaths.bin"
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)
    with pytest.raises(CorruptError, match=r"Prose\.bin.*swapped"):
        TokenShards(folder)


def test_swapped_with_the_same_size(tmp_path, make_shards):
    make_shards(tmp_path, {"a": [[1, 2, 3]], "b": [[4, 5, 6]]})
    a, b = tmp_path / "shards" / "a.bin", tmp_path / "shards" / "b.bin"
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)
    with pytest.raises(CorruptError, match=r"a\.bin: checksum .*'a'"):
        TokenShards(tmp_path).verify()


def test_one_flipped_bit(folder):
    path = folder / "shards" / "Prose.bin"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    shards = TokenShards(folder)  # sizes are right
    with pytest.raises(CorruptError, match=r"Prose\.bin: checksum"):
        shards.verify()


def test_token_over_the_vocabulary(tmp_path, make_shards):
    shards = make_shards(tmp_path, {"a": [[1, 2], [3, 300, 4]]})
    with pytest.raises(CorruptError, match=r"a\.bin: token id 300 at position 4 of domain 'a' .* vocabulary of 257"):
        shards.verify()


def test_a_document_without_end(tmp_path):
    with ShardWriter(tmp_path, "a", "uint16") as writer:
        writer.add(np.array([1, 9]))
        writer.add(np.array([1, 2]))
        entry = writer.close()
    write_manifest(tmp_path, {"name": "t", "hash": "h", "eot": 9}, 10, {"a": entry})
    with pytest.raises(CorruptError, match=r"document 1 of domain 'a' does not end"):
        TokenShards(tmp_path).verify()


@pytest.mark.parametrize("offsets", [[0, 5, 5, 8], [1, 3, 5, 8], [0, 3, 5, 9], [0, 6, 5, 8]])
def test_wrong_offsets(tmp_path, make_shards, offsets):
    make_shards(tmp_path, {"a": [[1, 2], [3], [4, 5]]})
    (tmp_path / "shards" / "a.idx").write_bytes(np.array(offsets, dtype="<i8").tobytes())
    with pytest.raises(CorruptError, match=r"a\.idx: the document offsets"):
        TokenShards(tmp_path).verify()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format="other"), "is not a lldfast-shards manifest"),
        (lambda m: m.update(version=2), "format version 2"),
        (lambda m: m.update(dtype="int7"), "int7"),
        (lambda m: m.pop("tokenizer"), "tokenizer"),
        (lambda m: m["tokenizer"].update(eot=None), "field is missing or wrong"),
        (lambda m: m["domains"]["Prose"].pop("xxh3"), "xxh3"),
        (lambda m: m["domains"]["Prose"].update(xxh3="0" * 16), "was altered"),
        (lambda m: m["domains"].pop("Prose"), "was altered"),
        (lambda m: m["domains"]["Prose"].update(file="../../secret.bin"), "not the name of a file in this folder"),
        (lambda m: m.update(domains=[]), "field is missing or wrong"),
    ],
)
def test_corrupted_manifest(folder, change, message):
    edit_manifest(folder, change)
    with pytest.raises(CorruptError, match=message) as caught:
        TokenShards(folder)
    assert "manifest.json" in str(caught.value)


def test_manifest_that_is_not_json(folder):
    (folder / "shards" / "manifest.json").write_text('{"format": "lldfa')
    with pytest.raises(CorruptError, match="not valid JSON"):
        TokenShards(folder)


def test_unknown_domain(shards):
    for method in (shards.tokens, shards.offsets, shards.shard_file):
        with pytest.raises(InputError, match="no domain 'prose'; it has: Prose, Code"):
            method("prose")


def test_tokenizer_mismatch(shards):
    shards.check_tokenizer(shards.tokenizer, "base model")
    shards.check_tokenizer(shards.tokenizer["hash"], "base model")
    with pytest.raises(InputError, match=r"base model uses the tokenizer 'gpt2' \(hash beef\).*made with 'bytes'"):
        shards.check_tokenizer({"name": "gpt2", "hash": "beef"}, "base model")
    with pytest.raises(InputError, match="hash beef"):
        shards.check_tokenizer("beef", "base model")


def test_writer_refuses(tmp_path):
    with pytest.raises(InputError, match="dtype 'int64' is unknown"):
        ShardWriter(tmp_path, "a", "int64")
    with pytest.raises(InputError, match="an empty name"):
        ShardWriter(tmp_path, "", "uint16")
    with pytest.raises(InputError, match="not valid Unicode"):
        ShardWriter(tmp_path, "a\ud800", "uint16")
    with ShardWriter(tmp_path, "a", "uint16") as writer:
        for tokens, message in [
            ([], "non-empty"),
            ([65536], "65536 does not fit"),
            ([-1], "-1 does not fit"),
            ([0.5], "token ids"),
        ]:
            with pytest.raises(InputError, match=message):
                writer.add(np.array(tokens))
        writer.add(np.array([65535]))
        assert writer.close()["tokens"] == 1


def test_manifest_refuses(tmp_path):
    with pytest.raises(InputError, match="there is no domain"):
        write_manifest(tmp_path, {"hash": "h"}, 10, {})
    entries = {}
    for domain, dtype in (("a", "uint16"), ("b", "uint32")):
        with ShardWriter(tmp_path, domain, dtype) as writer:
            writer.add(np.array([1]))
            entries[domain] = writer.close()
    with pytest.raises(InputError, match=r"one token dtype, not \['uint16', 'uint32'\]"):
        write_manifest(tmp_path, {"hash": "h"}, 10, entries)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, where every write meets a full disk")
def test_disk_full(tmp_path):
    (tmp_path / "a.bin").symlink_to("/dev/full")
    with pytest.raises(WriteError, match=r"cannot write .*a\.bin: No space left"), ShardWriter(tmp_path, "a", "uint16") as writer:
        writer.add(np.arange(100_000) % 1000)  # more than the buffer
    (tmp_path / "b.bin").symlink_to("/dev/full")
    with ShardWriter(tmp_path, "b", "uint16") as writer:
        writer.add(np.array([1, 2, 3]))  # still in the buffer
        with pytest.raises(WriteError, match=r"b\.bin: No space left"):
            writer.close()
    (tmp_path / "c.idx").symlink_to("/dev/full")
    with ShardWriter(tmp_path, "c", "uint16") as writer:
        writer.add(np.array([1, 2, 3]))
        with pytest.raises(WriteError, match=r"c\.idx: No space left"):
            writer.close()


def test_an_error_of_the_caller_is_not_hidden(tmp_path):
    with pytest.raises(RuntimeError, match="mine"), ShardWriter(tmp_path, "a", "uint16") as writer:
        writer.add(np.array([1]))
        raise RuntimeError("mine")


@pytest.mark.parametrize("size", [0, 1, 16, 17, 128, 129, 240, 241, 1024, 1025, 100_003])
def test_checksum_with_and_without_the_extension(tmp_path, monkeypatch, size):
    data = np.random.default_rng(size).bytes(size)
    (tmp_path / "file").write_bytes(data)
    expected = xxhash.xxh3_64_hexdigest(data)
    assert xxh3_file(tmp_path / "file") == expected
    monkeypatch.setattr(shards_module, "extension", lambda: None)
    assert xxh3_file(tmp_path / "file") == expected


def test_checksum_of_nothing(tmp_path):
    with pytest.raises(InputError, match="gone: no such file"):
        xxh3_file(tmp_path / "gone")


def test_infinite_vocabulary(tmp_path, shards):
    shutil.copytree(shards.path, tmp_path / "s")
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    (tmp_path / "s" / "manifest.json").write_text(json.dumps({**manifest, "vocab_size": float("inf")}))
    with pytest.raises(CorruptError, match=r"manifest\.json: a field is missing or wrong"):
        TokenShards(tmp_path / "s")


def test_names_of_domains_that_files_cannot_have(tmp_path):
    names = ["Pile-CC", "pile-cc", "NUL", "漢" * 60, "code" * 61, "a:b*?", "..", "x "]
    rows = [{"text": f"{name} document {i} " * 60, "domain": name} for i in range(8) for name in names]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    folder = prepare(tmp_path / "rows.jsonl", tmp_path / "data", tokenizer="bytes", progress=False)
    verify(folder)
    shards = TokenShards(folder)
    assert sorted(shards.domains) == sorted(names)
    files = [path.name for path in (folder / "shards").iterdir()]
    assert len({file.lower() for file in files}) == 2 * len(names) + 1 and all(len(file) < 255 for file in files)
    for name in names:
        assert bytes(shards.tokens(name)[:-1].astype(np.uint8)).startswith(f"{name} document".encode())
