import gzip
import json
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from lldfast.data.making import compression
from lldfast.data.making.sources import Source
from lldfast.errors import CorruptError, InputError, MissingDependencyError

ROWS = [
    {"text": "first text\nof two lines", "meta": {"pile_set_name": "Github"}},
    {"text": "zweiter Text: Größe, 漢字", "meta": {"pile_set_name": "Wikipedia (en)"}},
    {"text": "   \n", "meta": {"pile_set_name": "Github"}},
    {"text": "third", "meta": {"pile_set_name": "Github"}, "more": 1},
    {"text": "x" * 300_000, "meta": {"pile_set_name": "long"}},
]
EXPECTED = [(row["text"], row["meta"]["pile_set_name"]) for row in ROWS if row["text"].strip()]


def lines(rows=ROWS) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def zst(raw: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(raw)


def read(inputs, **options) -> list[tuple[str, str]]:
    return [(d.text, d.domain) for d in Source(inputs, **options).documents()]


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("d.jsonl", lambda raw: raw),
        ("d.json", lambda raw: b"\xef\xbb\xbf" + raw.replace(b"\n", b"\r\n")),
        ("d.ndjson", lambda raw: b"\n\n" + raw.rstrip()),
        ("d.jsonl.gz", gzip.compress),
        ("d.jsonl.gz", lambda raw: gzip.compress(raw[:100]) + gzip.compress(raw[100:])),
        ("d.jsonl.zst", zst),
        ("d.jsonl.zst", lambda raw: zst(raw[:70_000]) + zst(b"") + zst(raw[70_000:])),
    ],
)
def test_json_lines(tmp_path, name, write):
    (tmp_path / name).write_bytes(write(lines()))
    source = Source([str(tmp_path / name)])
    assert [(d.text, d.domain) for d in source.documents()] == EXPECTED
    assert source.empty == {"Github": 1}


def test_every_place_resumes(tmp_path):
    (tmp_path / "a.jsonl.zst").write_bytes(zst(lines()))
    table = pa.Table.from_pylist([{"text": f"row {i}", "meta": {"pile_set_name": "p"}} for i in range(600)])
    pq.write_table(table, tmp_path / "b.parquet")
    inputs = [str(tmp_path / "a.jsonl.zst"), str(tmp_path / "b.parquet")]
    every = list(Source(inputs, domains=["Github", "p"]).documents())
    assert [d.number for d in every] == list(range(602))
    for i in (0, 1, 2, 300, 600, 601):
        rest = list(Source(inputs, domains=["Github", "p"]).documents(every[i].place))
        assert rest == every[i + 1 :]


def test_domains_and_max_documents(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines())
    source = Source([str(tmp_path / "a.jsonl")], domains=["Github"], max_documents=2)
    assert [d.text for d in source.documents()] == [EXPECTED[0][0], "third"]
    first = next(source.documents())
    assert [d.text for d in source.documents(first.place)] == ["third"]
    assert "Wikipedia (en)" in source.met


def test_parquet_with_nested_and_dotted_columns(tmp_path):
    pq.write_table(pa.Table.from_pylist([dict(row, other=[1, 2]) for row in ROWS]), tmp_path / "nested.parquet")
    assert read([str(tmp_path / "nested.parquet")]) == EXPECTED
    assert read([str(tmp_path / "nested.parquet")], domain_field="meta.pile_set_name") == EXPECTED
    dotted = [{"text": row["text"], "meta.pile_set_name": row["meta"]["pile_set_name"]} for row in ROWS]
    pq.write_table(pa.Table.from_pylist(dotted), tmp_path / "dotted.parquet")
    assert read([str(tmp_path / "dotted.parquet")]) == EXPECTED
    assert read([str(tmp_path / "dotted.parquet")], domain_field="meta.pile_set_name") == EXPECTED


def test_folder_per_domain(tmp_path):
    root = tmp_path / "corpus"
    (root / "code" / "deep").mkdir(parents=True)
    (root / "prose").mkdir()
    (root / "README.md").write_text("not a document: it lies in no domain")
    (root / "code" / "deep" / "b.py").write_text("print('é')")
    (root / "code" / "a.json").write_text('{"a": [1,\n 2]}')
    (root / "code" / ".hidden").write_text("skipped")
    (root / "prose" / "x.jsonl.gz").write_bytes(gzip.compress(b'{"body": "one"}\n{"body": "two"}\n'))
    (root / "prose" / "y.txt.zst").write_bytes(zst(b"kept whole\nas one"))
    found = read([str(root)], text_field="body")
    assert found == [
        ('{"a": [1,\n 2]}', "code"),
        ("print('é')", "code"),
        ("one", "prose"),
        ("two", "prose"),
        ("kept whole\nas one", "prose"),
    ]


def test_folder_of_labelled_files(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.jsonl").write_bytes(lines(ROWS[:1]))
    (tmp_path / "a.jsonl").write_bytes(lines(ROWS[1:2]))
    assert read([str(tmp_path)]) == [EXPECTED[1], EXPECTED[0]]
    (tmp_path / "a.jsonl").unlink()
    assert read([str(tmp_path)], domain_field="meta.pile_set_name") == [EXPECTED[0]]


def test_label_fields(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines([{"text": "t", "domain": "d", "kind": 7, "meta": {"pile_set_name": "p"}}]))
    path = [str(tmp_path / "a.jsonl")]
    assert read(path) == [("t", "p")]
    assert read(path, domain_field="domain") == [("t", "d")]
    assert read(path, domain_field="kind") == [("t", "7")]


def test_hugging_face_datasets(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "train.jsonl").write_bytes(lines([ROWS[0], ROWS[1], ROWS[2]]))
    source = Source([f"hf:{tmp_path / 'hub'}"])
    every = list(source.documents())
    assert [(d.text, d.domain) for d in every] == EXPECTED[:2]
    assert list(Source([f"hf:{tmp_path / 'hub'}"]).documents(every[0].place)) == every[1:]
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "train.jsonl.zst").write_bytes(zst(lines())[:-9])
    with pytest.raises(CorruptError, match=r"train\.jsonl\.zst is truncated"):  # datasets takes it for shorter data
        read([f"hf:{tmp_path / 'cut'}"], on_error="skip")
    labels = datasets.ClassLabel(names=["ham", "spam"])
    features = datasets.Features(text=datasets.Value("string"), kind=labels)
    data = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "kind": [1, 0, None]}, features)
    datasets.DatasetDict(test=data).save_to_disk(str(tmp_path / "disk"))
    options = {"split": "test", "domain_field": "kind"}
    assert read([str(tmp_path / "disk")], on_error="skip", **options) == [("a", "spam"), ("b", "ham")]
    with pytest.raises(InputError, match="disk, row 3: field 'kind' must be a domain name, got null"):
        read([str(tmp_path / "disk")], **options)
    with pytest.raises(InputError, match="no split 'train'; it has test"):
        read([str(tmp_path / "disk")], domain_field="kind")
    with pytest.raises(InputError, match="config None, split nosplit"):
        read([f"hf:{tmp_path / 'hub'}"], split="nosplit")


def test_a_stream_that_breaks_is_never_skipped(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")

    def rows():
        yield from ({"text": f"row {i}", "domain": "d"} for i in range(2))
        raise OSError("connection lost")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.IterableDataset.from_generator(rows))
    with pytest.raises(InputError, match=r"failed after row 2: .*connection lost"):
        read([f"hf:{tmp_path}"], on_error="skip")


BAD_LINES = [
    (b'{"text": "a"', r"line 4: not valid JSON"),
    (b"[1, 2]", r"line 4: expected a JSON object, got a list"),
    (b'{"text": "a\xff", "meta": {"pile_set_name": "x"}}', r"line 4, byte 12: invalid UTF-8"),
    (b'{"txet": "a", "meta": {"pile_set_name": "x"}}', r"line 4: no text field 'text'; the fields are txet.*Did you mean 'txet'"),
    (b'{"text": "a", "meta": {"pile_setname": "x"}}', r"line 4: no domain field .*Did you mean 'meta.pile_setname'"),
    (b'{"text": 3, "meta": {"pile_set_name": "x"}}', r"line 4: field 'text' must be text, got a number"),
    (b'{"text": null, "meta": {"pile_set_name": "x"}}', r"line 4: field 'text' must be text, got null"),
    (b'{"text": "a", "meta": {"pile_set_name": ""}}', r"line 4: the domain name is empty"),
    (b'{"text": "a", "meta": {"pile_set_name": ["x"]}}', r"line 4: field 'meta.pile_set_name' must be a domain name, got a list"),
    (b'{"text": "a \\ud800", "meta": {"pile_set_name": "x"}}', r"line 4: the text is not valid Unicode"),
    (b"[" * 100_000, r"line 4: (JSON nested too deeply|not valid JSON)"),
]


@pytest.mark.parametrize(("bad", "message"), BAD_LINES)
def test_bad_lines_are_named(tmp_path, bad, message):
    (tmp_path / "some.jsonl").write_bytes(lines(ROWS[:2]) + b"\n" + bad + b"\n" + lines(ROWS[3:]))
    source = Source([str(tmp_path / "some.jsonl")])
    documents = source.documents()
    assert [next(documents).text for _ in range(2)] == [ROWS[0]["text"], ROWS[1]["text"]]
    with pytest.raises(InputError, match=r"some\.jsonl, " + message):
        next(documents)


@pytest.mark.parametrize(("name", "compress"), [("cut.jsonl.zst", zst), ("cut.jsonl.gz", gzip.compress)])
def test_truncated_and_damaged_files(tmp_path, name, compress):
    rows = [{"text": f"{i} {i * i} {i**3}", "domain": "d"} for i in range(30_000)]
    raw = compress(lines(rows))
    (tmp_path / name).write_bytes(raw[: len(raw) // 2])
    documents, count = Source([str(tmp_path / name)]).documents(), 0
    with pytest.raises(CorruptError, match=rf"{name} is truncated.*after \d+ complete lines") as caught:
        for _ in documents:
            count += 1
    assert count > 1000 and f"after {count} complete lines" in str(caught.value)
    (tmp_path / name).write_bytes(raw[:-1])
    with pytest.raises(CorruptError, match=f"{name} is truncated"):
        read([str(tmp_path / name)])
    middle = len(raw) // 2
    (tmp_path / name).write_bytes(raw[:middle] + bytes(b ^ 0x5A for b in raw[middle : middle + 64]) + raw[middle + 64 :])
    with pytest.raises((CorruptError, InputError), match=name):
        read([str(tmp_path / name)])
    (tmp_path / name).write_bytes(b"not compressed")
    with pytest.raises(CorruptError, match=f"{name} is damaged after 0"):
        read([str(tmp_path / name)])


def test_bad_parquet(tmp_path):
    pq.write_table(pa.Table.from_pylist([{"txt": "a", "meta": {"pile_set_name": "x"}}]), tmp_path / "p.parquet")
    with pytest.raises(InputError, match=r"p\.parquet, row 1: no text field 'text'; .*Did you mean 'txt'"):
        read([str(tmp_path / "p.parquet")])
    with pytest.raises(InputError, match=r"no domain field 'meta.pile'; the fields are meta, meta.pile_set_name, txt"):
        read([str(tmp_path / "p.parquet")], text_field="txt", domain_field="meta.pile")
    raw = (tmp_path / "p.parquet").read_bytes()
    (tmp_path / "p.parquet").write_bytes(raw[:-20])
    with pytest.raises(CorruptError, match=r"p\.parquet cannot be read as Parquet after 0 rows"):
        read([str(tmp_path / "p.parquet")])
    invalid = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff")])
    pq.write_table(pa.table({"text": invalid, "domain": ["d"]}), tmp_path / "u.parquet")
    with pytest.raises(InputError, match=r"u\.parquet, row 1: invalid UTF-8"):
        read([str(tmp_path / "u.parquet")])


def test_bad_text_files(tmp_path):
    (tmp_path / "c" / "code").mkdir(parents=True)
    (tmp_path / "c" / "code" / "x.txt").write_bytes(b"one\ntwo \xe9 three")
    with pytest.raises(InputError, match=r"x\.txt, line 2, byte 9 of the file: invalid UTF-8"):
        read([str(tmp_path / "c")])
    (tmp_path / "c" / "code" / "x.txt").unlink()
    with pytest.raises(InputError, match="domain 'code' has no files"):
        Source([str(tmp_path / "c")])
    (tmp_path / "c" / "code" / "x.txt.gz").write_bytes(gzip.compress(b"text")[:-4])
    with pytest.raises(CorruptError, match=r"x\.txt\.gz is truncated"):
        read([str(tmp_path / "c")])


def test_bad_inputs(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.bin").write_bytes(b"")
    for inputs, message in [
        ([str(tmp_path / "none.jsonl")], r"none\.jsonl: no such file"),
        (["./none"], r"\./none: no such file"),
        ([str(tmp_path / "a.bin")], r"a\.bin: expected \.jsonl"),
        ([str(tmp_path / "empty")], "empty: neither data files nor a folder per domain"),
        ([], "no input given"),
    ]:
        with pytest.raises(InputError, match=message):
            Source(inputs)
    with pytest.raises(InputError, match="no JSONL or Parquet file"):
        Source([str(tmp_path / "empty")], domain_field="domain")
    (tmp_path / "a.jsonl").write_text('{"text": "a", "label": "b", "x": {"y": 1}}\n')
    with pytest.raises(InputError, match=r"no field meta\.pile_set_name or domain .*text, label, x, x\.y"):
        read([str(tmp_path / "a.jsonl")])
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingDependencyError, match="pip install datasets"):
        read(["some/dataset"])


def test_stamp_changes_with_the_file(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines())
    before = [item.stamp() for item in Source([str(tmp_path / "a.jsonl")]).inputs]
    (tmp_path / "a.jsonl").write_bytes(lines(ROWS[:2]))
    assert [item.stamp() for item in Source([str(tmp_path / "a.jsonl")]).inputs] != before


def test_long_lines_cost_linear_time(tmp_path, monkeypatch):
    monkeypatch.setattr(compression, "BLOCK", 64)  # ten thousand blocks in one line
    (tmp_path / "a.jsonl").write_bytes(lines([{"text": "y" * 640_000, "domain": "d"}] * 2))
    assert [len(text) for text, _ in read([str(tmp_path / "a.jsonl")])] == [640_000, 640_000]


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31mred", "a\0"])
def test_control_characters_in_a_domain_name(tmp_path, name):
    (tmp_path / "a.jsonl").write_bytes(lines([{"text": "t", "domain": name}]))
    with pytest.raises(InputError, match=r"a\.jsonl, line 1: the domain name .* has a control character") as caught:
        read([str(tmp_path / "a.jsonl")])
    assert str(caught.value).isprintable()


def test_hostile_but_legal_domain_names(tmp_path):
    names = ["../x", ".", "a/b", " a ", "Ελληνικά", "a\u00a0b", "100%"]
    (tmp_path / "a.jsonl").write_bytes(lines([{"text": "t", "domain": name} for name in names]))
    assert [domain for _, domain in read([str(tmp_path / "a.jsonl")])] == names


def test_empty_inputs_and_prepared_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_bytes(lines())
    for empty in ("", " "):
        with pytest.raises(InputError, match="an input is empty"):  # not the current folder
            Source([empty])
    (tmp_path / "data" / "shards").mkdir(parents=True)
    (tmp_path / "data" / "prepare.json").write_text("{}")
    with pytest.raises(InputError, match="data is a folder that prepare made"):
        Source(["data"])
    for name in ("empty.jsonl", "empty.jsonl.gz", "empty.jsonl.zst"):
        (tmp_path / name).write_bytes(b"")
        assert read([name]) == []
    (tmp_path / "empty.parquet").write_bytes(b"")
    with pytest.raises(CorruptError, match=r"empty\.parquet cannot be read as Parquet"):
        read(["empty.parquet"])
