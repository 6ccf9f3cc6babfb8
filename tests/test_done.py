"""A finished or interrupted folder is taken for what the arguments give only if all that decides the result is as it was."""

import json
import os
from pathlib import Path

import pytest

from lldfast.data.evalset import EvalSet
from lldfast.data.making import builtin
from lldfast.data.making.prepare import prepare, verify
from lldfast.data.shards import TokenShards
from lldfast.errors import CorruptError, InputError, MissingDependencyError

OPTIONS = {"tokenizer": "bytes", "eval_per_domain": 2, "progress": False}


def corpus(path: Path, swap: bool = False) -> str:
    """Records of two domains; `swap` exchanges two labels of equal length, in place and without a trace in size or times."""
    rows = [{"text": f"{i} word " * 60, "domain": ("code", "text")[(i + (swap and i in (6, 7))) % 2]} for i in range(20)]
    raw = "".join(json.dumps(row) + "\n" for row in rows).encode()
    times = path.stat() if path.exists() else None
    if times is None:
        path.write_bytes(raw)
    else:
        with open(path, "r+b") as file:
            assert len(file.read()) == len(raw)
            file.seek(0)
            file.write(raw)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    return str(path)


def test_a_change_in_place_is_seen(tmp_path):
    inputs = corpus(tmp_path / "c.jsonl")
    out = prepare(inputs, tmp_path / "d", **OPTIONS)
    before = TokenShards(out).corpus_hash
    corpus(tmp_path / "c.jsonl", swap=True)
    with pytest.raises(InputError, match=r"d was made when .*c\.jsonl had another content: use overwrite \(--overwrite\), or"):
        prepare(inputs, out, **OPTIONS)
    prepare(inputs, out, overwrite=True, **OPTIONS)
    assert TokenShards(out).corpus_hash != before
    verify(out)


def test_the_same_content_with_other_times_is_the_same(tmp_path, monkeypatch):
    inputs = corpus(tmp_path / "c.jsonl")
    out = prepare(inputs, tmp_path / "d", **OPTIONS)
    os.utime(inputs, ns=(0, 0))
    monkeypatch.setattr("lldfast.data.making.prepare.make_plan", None)
    assert prepare(inputs, out, overwrite=True, **OPTIONS) == out


@pytest.mark.parametrize("kind", ["parquet", "text", "disk", pytest.param("hf", marks=pytest.mark.slow)])
def test_a_change_in_place_of_other_inputs(tmp_path, kind):
    texts = [f"{i} word " * 60 for i in range(20)]
    changed = [*texts[:7], texts[7].replace("word", "wort"), *texts[8:]]

    def write(texts: list[str]) -> str:
        if kind == "parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            pq.write_table(pa.table({"text": texts, "domain": ["d"] * 20}), tmp_path / "c.parquet", compression=None)
            return str(tmp_path / "c.parquet")
        folder = tmp_path / "c" / ("d" if kind == "text" else "")
        folder.mkdir(parents=True, exist_ok=True)
        if kind == "text":
            for i, text in enumerate(texts):
                (folder / f"{i}.txt").write_text(text)
            return str(tmp_path / "c")
        datasets = pytest.importorskip("datasets")
        data = datasets.Dataset.from_dict({"text": texts, "domain": ["d"] * 20})
        if kind == "disk":
            data.save_to_disk(str(folder))
            return str(folder)
        data.to_json(str(folder / "train.jsonl"))
        return f"hf:{folder}"

    inputs = write(texts)
    out = prepare(inputs, tmp_path / "d", **OPTIONS)
    assert prepare(inputs, out, **OPTIONS) == out
    write(changed)
    with pytest.raises(InputError, match="had another content"):
        prepare(inputs, out, **OPTIONS)


def test_only_what_was_read_decides(tmp_path):
    """With max_documents the inputs that were not reached may hold anything."""
    first, second = corpus(tmp_path / "a.jsonl"), corpus(tmp_path / "b.jsonl")
    out = prepare([first, second], tmp_path / "d", max_documents=15, **OPTIONS)
    corpus(tmp_path / "b.jsonl", swap=True)
    assert prepare([first, second], out, max_documents=15, **OPTIONS) == out
    corpus(tmp_path / "a.jsonl", swap=True)
    with pytest.raises(InputError, match=r"a\.jsonl had another content"):
        prepare([first, second], out, max_documents=15, **OPTIONS)


def test_a_file_more_is_other_files(tmp_path):
    (tmp_path / "c").mkdir()
    corpus(tmp_path / "c" / "a.jsonl")
    out = prepare(tmp_path / "c", tmp_path / "d", **OPTIONS)
    corpus(tmp_path / "c" / "b.jsonl")
    with pytest.raises(InputError, match="d was made of other files: use overwrite"):
        prepare(tmp_path / "c", out, **OPTIONS)


def test_interrupted_work_on_other_content_begins_anew(tmp_path, monkeypatch):
    inputs = corpus(tmp_path / "c.jsonl")
    monkeypatch.setattr("lldfast.data.making.prepare._assemble", None)
    with pytest.raises(TypeError):
        prepare(inputs, tmp_path / "d", **OPTIONS)
    monkeypatch.undo()
    assert (tmp_path / ".d.prepare" / "plan.json").exists()
    corpus(tmp_path / "c.jsonl", swap=True)
    out = prepare(inputs, tmp_path / "d", **OPTIONS)
    whole = prepare(inputs, tmp_path / "whole", **OPTIONS)
    assert TokenShards(out).corpus_hash == TokenShards(whole).corpus_hash


def test_a_change_between_the_readings_is_seen(tmp_path, monkeypatch):
    from lldfast.data.making import prepare as module

    inputs = corpus(tmp_path / "c.jsonl")
    encoded = module._encoded

    def change_first(*arguments):
        corpus(tmp_path / "c.jsonl", swap=True)
        return encoded(*arguments)

    monkeypatch.setattr(module, "_encoded", change_first)
    with pytest.raises(InputError, match=r"c\.jsonl was changed while it was read"):
        prepare(inputs, tmp_path / "d", **OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["c.jsonl"]


def test_another_tokenizer_of_the_same_name(tmp_path):
    inputs = corpus(tmp_path / "c.jsonl")
    bpe = prepare(inputs, tmp_path / "bpe", **{**OPTIONS, "tokenizer": "bpe"}, vocab_size=280)
    options = {**OPTIONS, "tokenizer": str(tmp_path / "t.json")}
    (tmp_path / "t.json").write_bytes((bpe / "tokenizer.json").read_bytes())
    out = prepare(inputs, tmp_path / "d", **options)
    assert prepare(inputs, out, **options) == out
    other = prepare(inputs, tmp_path / "other", **{**OPTIONS, "tokenizer": "bpe"}, vocab_size=270)
    (tmp_path / "t.json").write_bytes((other / "tokenizer.json").read_bytes())
    with pytest.raises(InputError, match=r"when the tokenizer .*t\.json was another"):
        prepare(inputs, out, **options)


def test_versions_decide_where_they_do(tmp_path, monkeypatch):
    inputs = corpus(tmp_path / "c.jsonl")
    options = {**OPTIONS, "tokenizer": "bpe", "vocab_size": 270}
    out = prepare(inputs, tmp_path / "d", **options)
    record = json.loads((out / "prepare.json").read_text())
    record["versions"]["tokenizers"], record["versions"]["numpy"] = "0.1", "0.1"
    (out / "prepare.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"when its tokenizer was trained with tokenizers 0\.1, now"):
        prepare(inputs, out, **options)

    texts = [(f"{i} word " * 60, "d") for i in range(20)]
    monkeypatch.setattr(builtin, "documents", lambda: iter(texts))
    monkeypatch.setattr(builtin, "versions", lambda: {"numpy": "1"})
    out = prepare("builtin", tmp_path / "b", **OPTIONS)
    monkeypatch.setattr(builtin, "versions", lambda: {"numpy": "2"})
    assert prepare("builtin", out, **OPTIONS) == out  # another version with the same texts
    texts[3] = ("8" + texts[3][0][1:], "d")
    with pytest.raises(InputError, match="when builtin had another content"):
        prepare("builtin", out, **OPTIONS)


def test_a_folder_of_version_1_is_taken_with_a_note(tmp_path, capfd):
    inputs = corpus(tmp_path / "c.jsonl")
    out = prepare(inputs, tmp_path / "d", **OPTIONS)
    record = json.loads((out / "prepare.json").read_text())
    for name in ("on_error", "most_skipped", "drop_small_domains"):
        del record["arguments"][name]
    for name in ("skipped", "files", "dropped_domains"):
        del record[name]
    record["version"], record["inputs"] = 1, [entry[:3] for entry in record["inputs"]]
    (out / "prepare.json").write_text(json.dumps(record))
    verify(out)
    assert prepare(inputs, out, **OPTIONS) == out
    assert "only the sizes of its inputs are compared" in capfd.readouterr().err
    with pytest.raises(InputError, match=r"other arguments \(seed = 0, now 1\)"):
        prepare(inputs, out, seed=1, **OPTIONS)


class Builder:
    """What datasets says of a dataset on the hub; the revision is that of every instance."""

    revision = "abc"

    def __init__(self, name: str, config: str | None) -> None:
        files = type("Files", (list,), {"origin_metadata": [("owner/name", Builder.revision)]})()
        self.config, self.hash = type("Config", (), {"data_files": {"train": files}}), "h"


def test_a_dataset_of_the_hub_is_known_by_its_revision(tmp_path, monkeypatch, capfd):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": [f"{i} word " * 60 for i in range(20)], "domain": ["d"] * 20})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows.to_iterable_dataset())
    monkeypatch.setattr(datasets, "load_dataset_builder", Builder)
    out = prepare("owner/name", tmp_path / "d", **OPTIONS)
    assert prepare("owner/name", out, **OPTIONS) == out
    monkeypatch.setattr(Builder, "revision", "abd")
    with pytest.raises(InputError, match="when owner/name had another content"):
        prepare("owner/name", out, **OPTIONS)

    def unreachable(name: str, config: str | None) -> None:
        raise OSError("no network")

    monkeypatch.setattr(datasets, "load_dataset_builder", unreachable)
    assert prepare("owner/name", out, **OPTIONS) == out
    assert "owner/name (config None) cannot be opened: no network" in capfd.readouterr().err


def test_a_tokenizer_that_cannot_be_looked_at(tmp_path, monkeypatch, capfd):
    inputs = corpus(tmp_path / "c.jsonl")
    out = prepare(inputs, tmp_path / "d", **OPTIONS)

    def unreachable(spec: str) -> None:
        raise MissingDependencyError("no network")

    monkeypatch.setattr("lldfast.data.making.done.load_tokenizer", unreachable)
    assert prepare(inputs, out, **OPTIONS) == out
    assert f"whether {out} was made with the tokenizer bytes of now cannot be told" in capfd.readouterr().err


def a_tokenizer(folder: Path, **config: object) -> Path:
    """A model folder's tokenizer with a token [X] that the configuration may call a control token."""
    import tokenizers

    if not folder.exists():
        folder.mkdir()
        vocab = {"<unk>": 0, "</s>": 1, "[X]": 2, **{chr(c): c - 30 for c in range(33, 127)}}
        model = tokenizers.models.BPE(vocab, [], unk_token="<unk>", ignore_merges=True)
        tokenizer = tokenizers.Tokenizer(model)
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        tokenizer.add_special_tokens(["</s>"])
        tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", **config}))
    return folder


def test_other_control_tokens_make_another_tokenizer(tmp_path):
    """They decide how a text is written; the tokenizer's file is the same."""
    inputs = corpus(tmp_path / "c.jsonl")
    options = {**OPTIONS, "tokenizer": str(a_tokenizer(tmp_path / "t"))}
    out = prepare(inputs, tmp_path / "d", **options)
    assert prepare(inputs, out, **options) == out
    a_tokenizer(tmp_path / "t", additional_special_tokens=["[X]"])
    with pytest.raises(InputError, match=r"when the tokenizer .* was another \(control ids 1, now 1, 2\)"):
        prepare(inputs, out, **options)
    a_tokenizer(tmp_path / "t", bos_token="[X]")
    with pytest.raises(InputError, match=r"was another \(beginning id none, now 2; control ids 1, now 1, 2\)"):
        prepare(inputs, out, **options)
    a_tokenizer(tmp_path / "t")
    record = json.loads((out / "prepare.json").read_text())
    del record["tokenizer"]["control"]  # as folders are that were made before these were listed
    (out / "prepare.json").write_text(json.dumps(record))
    assert prepare(inputs, out, **options) == out


@pytest.mark.parametrize("name", ["eval.parquet", "tokenizer.json", "shards/manifest.json"])
def test_a_folder_that_lost_a_file_is_not_done(tmp_path, name):
    inputs = corpus(tmp_path / "c.jsonl")
    options = {**OPTIONS, "tokenizer": "bpe", "vocab_size": 260}
    out = prepare(inputs, tmp_path / "d", **options)
    before = (out / name).read_bytes()
    (out / name).unlink()
    with pytest.raises(CorruptError, match=rf"{Path(name).name}|no finished"):
        prepare(inputs, out, **options)
    prepare(inputs, out, overwrite=True, **options)
    assert (out / name).read_bytes() == before


def test_other_evaluation_texts_are_seen(tmp_path):
    inputs = corpus(tmp_path / "c.jsonl")
    out = prepare(inputs, tmp_path / "d", **OPTIONS)
    EvalSet.from_texts(["other"], ["code"]).save(out / "eval.parquet")
    with pytest.raises(CorruptError, match=r"d/eval\.parquet was altered"):
        prepare(inputs, out, **OPTIONS)


def test_what_to_do_with_bad_records_decides_only_where_there_are_any(tmp_path):
    inputs = corpus(tmp_path / "c.jsonl")
    out = prepare(inputs, tmp_path / "d", **OPTIONS)
    assert prepare(inputs, out, on_error="skip", most_skipped=0.5, drop_small_domains=True, **OPTIONS) == out
    with open(inputs, "a", encoding="utf-8") as file:
        file.write('{"text": null, "domain": "code"}\n{"text": "small", "domain": "tiny"}\n')
    skipping = {**OPTIONS, "on_error": "skip", "drop_small_domains": True}
    out = prepare(inputs, tmp_path / "e", **skipping)
    for other in ({"on_error": "stop"}, {"most_skipped": 0.01}, {"drop_small_domains": False}):
        with pytest.raises(InputError, match=f"with other arguments .{next(iter(other))} = "):
            prepare(inputs, out, **{**skipping, **other})
