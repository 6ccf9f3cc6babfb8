"""Records that cannot be used: they stop the run with file and line, or are skipped, counted and listed."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lldfast.data.making import encode
from lldfast.data.making.prepare import prepare, verify
from lldfast.data.making.sources import Source
from lldfast.data.shards import TokenShards
from lldfast.errors import InputError
from lldfast.train import parse_config

BAD = [  # (line, reason, what stop says)
    (b'{"text": null, "domain": "a"}', "text is null", "field 'text' must be text, got null"),
    (b'{"text": ["x"], "domain": "a"}', "text is not a string", "field 'text' must be text, got a list"),
    (b'{"text": "x", "domain": null}', "label is null", "field 'domain' must be a domain name, got null"),
    (b'{"text": "x", "domain": 1.5}', "label is not a string", "must be a domain name, got a number"),
    (b'{"text": "x", "domain": " "}', "label is empty", "the domain name is empty"),
    (b'{"text": "x", "domain": "a\\u0000"}', "label has a control character", "has a control character"),
    (b'{"text": "x"}', "no domain field", "no domain field 'domain'"),
    (b'{"domain": "a"}', "no text field", "no text field 'text'"),
    (b'{"text": "x \\ud800 y", "domain": "a"}', "lone surrogate", "the text is not valid Unicode"),
    (b'{"text": "x", "domain": "\\udc00"}', "lone surrogate", "the domain name is not valid Unicode"),
    (b'{"text": "x", "domain": "a", "n": ' + b"7" * 5000 + b"}", "integer too long", "an integer of more digits than Python"),
    (b'{"text": "x", "domain": "a"', "invalid JSON", "not valid JSON"),
    (b'{"text": "x\xff", "domain": "a"}', "invalid UTF-8", "invalid UTF-8"),
    (b'"x"', "not a JSON object", "expected a JSON object, got a string"),
    (b'{"text": ' + b"[" * 200_000, "JSON nested too deeply", "JSON nested too deeply"),
]


def good(n: int, size: int = 60) -> list[bytes]:
    """Lines of two domains, each a text of its own."""
    return [json.dumps({"text": f"{i} word " * size, "domain": "ab"[i % 2]}).encode() for i in range(n)]


@pytest.mark.parametrize(("line", "reason", "message"), BAD, ids=[row[1] for row in BAD])
def test_stop_names_the_line_and_skip_counts_it(tmp_path, line, reason, message):
    path = tmp_path / "c.jsonl"
    path.write_bytes(b"\n".join([*good(3), b"", line, *good(2)]))
    with pytest.raises(InputError, match=rf"c\.jsonl, line 5(, byte \d+)?: .*{message}"):
        list(Source(str(path)).documents())
    source = Source(str(path), on_error="skip")
    assert len(list(source.documents())) == 5
    assert source.rejects.to_json() == {
        "records": 6, "skipped": 1, "reasons": {reason: 1}, "listed": [[str(path), "line 5", reason]],
    }  # fmt: skip
    list(source.documents())
    assert source.rejects.n_records == 6  # of the last reading, not of both


def test_rows_of_parquet(tmp_path):
    invalid = pa.py_buffer(b"onea\xfftwo")
    text = pa.Array.from_buffers(pa.string(), 3, [None, pa.array([0, 3, 5, 8], pa.int32()).buffers()[1], invalid])
    pq.write_table(pa.table({"text": text, "domain": ["d", "d", None]}), tmp_path / "c.parquet")
    with pytest.raises(InputError, match=r"c\.parquet, row 2: invalid UTF-8"):
        list(Source(str(tmp_path / "c.parquet")).documents())
    source = Source(str(tmp_path / "c.parquet"), on_error="skip")
    assert [(d.text, d.place) for d in source.documents()] == [("one", (0, 1, 1))]
    assert [row[1:] for row in source.rejects.listed] == [["row 2", "invalid UTF-8"], ["row 3", "label is null"]]


def test_a_text_file_that_is_not_utf8(tmp_path):
    (tmp_path / "c" / "d").mkdir(parents=True)
    (tmp_path / "c" / "d" / "a.txt").write_bytes(b"one\ntwo \xff")
    (tmp_path / "c" / "d" / "b.txt").write_bytes(b"good")
    source = Source(str(tmp_path / "c"), on_error="skip")
    assert [d.text for d in source.documents()] == ["good"]
    assert source.rejects.listed == [[f"{tmp_path}/c/d/a.txt", "line 2", "invalid UTF-8"]]


OPTIONS = {"tokenizer": "bytes", "eval_per_domain": 2, "progress": False}


@pytest.fixture
def broken(tmp_path):
    """A corpus with every kind of bad record among 200, and the same without them."""
    lines = good(200)
    (tmp_path / "clean.jsonl").write_bytes(b"\n".join(lines))
    for i, (line, _, _) in enumerate(BAD):
        lines.insert(13 * i + 1, line)
    (tmp_path / "broken.jsonl").write_bytes(b"\n".join(lines))
    return tmp_path / "broken.jsonl"


def test_prepare_skips_counts_and_lists(broken, tmp_path, capfd):
    clean = prepare(tmp_path / "clean.jsonl", tmp_path / "clean", **OPTIONS)
    out = prepare(broken, tmp_path / "d", **{**OPTIONS, "progress": True}, on_error="skip")
    verify(out)
    assert TokenShards(out).corpus_hash == TokenShards(clean).corpus_hash
    skipped = json.loads((out / "prepare.json").read_text())["skipped"]
    assert (skipped["records"], skipped["skipped"], skipped["reasons"]["lone surrogate"]) == (200 + len(BAD), len(BAD), 2)
    assert [row[2] for row in skipped["listed"]] == [reason for _, reason, _ in BAD]
    assert skipped["listed"][2] == [str(broken), "line 28", "label is null"]
    assert f"skipped {len(BAD)} of 215 records: lone surrogate (2), " in capfd.readouterr().err


def test_too_many_are_refused(broken, tmp_path):
    with pytest.raises(
        InputError, match=rf"{len(BAD)} of 215 records are bad.*0\.05.*\(2\).*broken\.jsonl, line 2: field 'text' must"
    ):
        prepare(broken, tmp_path / "d", on_error="skip", most_skipped=0.05, **OPTIONS)
    with pytest.raises(InputError, match="most_skipped must be"):
        prepare(broken, tmp_path / "d", most_skipped=1.0, **OPTIONS)
    with pytest.raises(InputError, match="on_error must be 'stop' or 'skip', got 'ignore'"):
        prepare(broken, tmp_path / "d", on_error="ignore", **OPTIONS)
    assert not (tmp_path / "d").exists()


def test_going_on_keeps_the_counts(broken, tmp_path, monkeypatch):
    whole = prepare(broken, tmp_path / "whole", on_error="skip", **OPTIONS)
    monkeypatch.setattr(encode, "PART_BYTES", 10_000)
    save, saved = encode.Part.save, []

    def third_fails(part, path):
        saved.append(path)
        if len(saved) == 3:
            raise KeyboardInterrupt
        save(part, path)

    monkeypatch.setattr(encode.Part, "save", third_fails)
    with pytest.raises(KeyboardInterrupt):
        prepare(broken, tmp_path / "d", on_error="skip", **OPTIONS)
    monkeypatch.setattr(encode.Part, "save", save)
    monkeypatch.setattr("lldfast.data.making.prepare.make_plan", None)  # the first reading is not done again
    again = prepare(broken, tmp_path / "d", on_error="skip", **OPTIONS)
    assert (again / "prepare.json").read_bytes() == (whole / "prepare.json").read_bytes()
    assert TokenShards(again).corpus_hash == TokenShards(whole).corpus_hash


def test_the_label_field_is_that_of_the_first_record_after_going_on_too(tmp_path, monkeypatch):
    rows = [json.loads(line) for line in good(40)]
    for row in rows[5:]:
        row["meta"] = {"pile_set_name": "other"}  # would be taken by a reader that begins here
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(encode, "PART_BYTES", 5_000)
    monkeypatch.setattr("lldfast.data.making.prepare.ShardWriter", None)
    with pytest.raises(TypeError):
        prepare(tmp_path / "c.jsonl", tmp_path / "d", **OPTIONS)
    monkeypatch.undo()
    sorted((tmp_path / ".d.prepare").glob("part-*"))[-1].unlink()
    assert TokenShards(prepare(tmp_path / "c.jsonl", tmp_path / "d", **OPTIONS)).domains == ["a", "b"]


def test_a_run_s_configuration_has_them():
    config = parse_config(["--data.on_error", "skip", "--data.most_skipped", "0.2", "--data.drop_small_domains", "true"])
    given = config.data.corpus_options()
    assert (given["on_error"], given["most_skipped"], given["drop_small_domains"]) == ("skip", 0.2, True)


def test_stopping_says_how_not_to(tmp_path):
    (tmp_path / "c.jsonl").write_bytes(b"\n".join([*good(3), BAD[0][0]]))
    with pytest.raises(InputError, match=r"got null \(on_error skip, --on-error skip, leaves such records out\)$"):
        list(Source(str(tmp_path / "c.jsonl")).documents())
    with pytest.raises(
        InputError, match=r"no text field 'body'; the fields are text, domain\.$"
    ):  # of all records, not of a bad one
        list(Source(str(tmp_path / "c.jsonl"), text_field="body").documents())
