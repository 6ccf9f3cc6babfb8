"""What of a folder is read, and as what: content decides, and nothing is left out or taken for text without being named."""

import gzip
import json
import lzma
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from lldfast.data.making.prepare import prepare
from lldfast.data.making.sources import Source
from lldfast.errors import InputError


def lines(*texts: str, **more: str) -> bytes:
    return b"".join(json.dumps({"id": i, "text": t, **more}).encode() + b"\n" for i, t in enumerate(texts))


def write(root: Path, **files: bytes) -> str:
    """Files by name, where __ stands for the / of a path and _dot_ for a dot."""
    for name, raw in files.items():
        path = root / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(raw)
    return str(root)


def read(source: Source) -> list[tuple[str, str]]:
    return [(d.text, d.domain) for d in source.documents()]


def test_a_folder_per_domain_of_compressed_json(tmp_path):
    """As Dolma, C4 and RedPajama come."""
    root = write(
        tmp_path / "dolma",
        books__part_0_dot_json_dot_gz=gzip.compress(lines("b0", "b1")),
        books__part_1_dot_json_dot_gz=gzip.compress(lines("b2")),  # a single record
        c4__en__part_0_dot_json_dot_gz=gzip.compress(lines("c0", source="not the label", domain="nor this")),
    )
    source = Source(root)
    assert read(source) == [("b0", "books"), ("b1", "books"), ("b2", "books"), ("c0", "c4")]
    assert source.survey.notes() == []


def test_every_suffix_of_a_folder_is_read(tmp_path):
    labelled = {"domain": "d"}
    files = {
        "a.jsonl": lines("a", **labelled),
        "b.json.gz": gzip.compress(lines("b", **labelled)),
        "c.JSONL.ZSTD": zstandard.ZstdCompressor().compress(lines("c", **labelled)),
        "d.ndjson.xz": lzma.compress(lines("d", **labelled)),
        "e.jl": lines("e", **labelled),
        "f": lines("f", **labelled),
        "sub/g.json": b"\xef\xbb\xbf" + lines("g", **labelled).replace(b"\n", b"\r\n"),
    }
    for name, raw in files.items():
        write(tmp_path / "c", **{name.replace("/", "__").replace(".", "_dot_"): raw})
    pq.write_table(pa.table({"text": ["h"], "domain": ["d"]}), tmp_path / "c" / "h.pq")
    source = Source(str(tmp_path / "c"))
    assert sorted(text for text, _ in read(source)) == list("abcdefgh")
    assert source.survey.notes() == []


def test_what_is_not_read_or_taken_as_text_is_named(tmp_path):
    root = write(
        tmp_path / "c",
        README_dot_md=b"about",
        code__a_dot_py=b"print(1)",
        code__package_dot_json=b'{"name": "x"}\n',
        code__settings_dot_json=b'{\n "a": {"text": "not at the first level"}\n}\n',
        code__empty_dot_txt=b" \n",
        code__SHA256SUMS=b"0123  a.py",
        code___dot_git__config=b"hidden",
        web__LICENSE=b"a licence",
        web__a_dot_jsonl=lines("w"),
        web__stats_dot_json=b'{"n": 1}\n{"n": 2}\n',
        web__b_dot_txt=lines("x", "y"),
        web__note_dot_txt=b"a note",
    )
    source = Source(root)
    names = {"code": 3, "web": 4}
    found = read(source)
    assert {domain: sum(d == domain for _, d in found) for domain in names} == names
    assert [text for text, domain in found if domain == "web"] == ["w", "x", "y", "a note"]
    assert source.empty == {"code": 1}
    record = source.survey.to_json()
    relative = lambda shown: [str(Path(name).relative_to(root)) for name in shown["names"]]  # noqa: E731
    assert relative(record["plain_text"]) == ["code/a.py", "code/package.json", "code/settings.json", "web/note.txt"]
    assert relative(record["empty"]) == ["code/empty.txt"]
    assert {why: relative(shown) for why, shown in record["not_read"].items()} == {
        "hidden": ["code/.git/config"],
        "in no domain's folder": ["README.md"],
        "checksums, indexes and marks": ["code/SHA256SUMS"],
        "beside records": ["web/LICENSE", "web/stats.json"],
    }
    assert {what: relative(shown) for what, shown in record["unexpected"].items()} == {"JSON lines, called .txt": ["web/b.txt"]}
    assert len(source.survey.notes()) == 7


def test_labelled_records_beside_other_files(tmp_path):
    root = write(
        tmp_path / "c",
        a_dot_jsonl=lines("a", domain="d"),
        stats_dot_json=b'{"n": 1}\n{"n": 2}\n',
        notes_dot_md=b"# about",
        sub__doc_dot_txt=b"in a folder, but the labels are in the records",
        sub__b_dot_json_dot_gz=gzip.compress(lines("b", domain="e")),
        _SUCCESS=b"",
    )
    source = Source(root)
    assert read(source) == [("a", "d"), ("b", "e")]
    assert {why: shown["count"] for why, shown in source.survey.to_json()["not_read"].items()} == {
        "JSON without the field 'text'": 1, "plain text": 2, "checksums, indexes and marks": 1,
    }  # fmt: skip
    shutil.rmtree(tmp_path / "c" / "sub")
    (tmp_path / "c" / "a.jsonl").unlink()
    with pytest.raises(InputError, match=r"stats\.json, line 1: no text field 'text'; the fields are n"):
        read(Source(root))


def test_a_description_beside_the_domains_does_not_make_a_labelled_folder(tmp_path):
    root = write(tmp_path / "c", index_dot_json=b'{"a": 1}\n{"b": 2}\n', d__a_dot_json=lines("a"), e__b_dot_txt=b"b")
    assert read(Source(root)) == [("a", "d"), ("b", "e")]


def test_records_with_another_text_field_are_told(tmp_path):
    root = write(tmp_path / "c", d__a_dot_json_dot_gz=gzip.compress(lines("a", "b").replace(b'"text"', b'"content"')))
    with pytest.raises(InputError, match=r"a\.json\.gz, line 1: no text field 'text'; the fields are id, content"):
        read(Source(root))
    assert read(Source(root, text_field="content")) == [("a", "d"), ("b", "d")]


def test_a_bad_first_record_does_not_make_a_file_text(tmp_path):
    root = write(tmp_path / "c", d__a_dot_json=b'{"text": \n' + lines("a", "b"))
    with pytest.raises(InputError, match=r"a\.json, line 1: not valid JSON"):
        read(Source(root))
    assert read(Source(root, on_error="skip")) == [("a", "d"), ("b", "d")]


ROWS = [{"text": "one", "n": 1}, {"text": "two", "n": 2}]


@pytest.mark.parametrize(
    ("name", "raw", "what"),
    [
        ("a.json", json.dumps(ROWS).encode(), "one JSON array"),
        ("a.json.gz", gzip.compress(b"[\n" + b",\n".join(json.dumps(row).encode() for row in ROWS) + b"\n]\n"), "one JSON array"),
        ("a.json", json.dumps([{"text": "long " * 20_000}]).encode(), "one JSON array"),
        ("a.jsonl", json.dumps(ROWS, indent=1).encode(), "one JSON array"),
        ("a.json", "\n".join(json.dumps(row, indent=2) for row in ROWS).encode(), "JSON objects over several lines"),
        ("a.csv", b"id,text\n1,one\n", "CSV with a column 'text'"),
        ("a.TSV", b"id\ttext\n1\tone\n", "TSV with a column 'text'"),
        ("a.json", '{"text": "one"}\n'.encode("utf-16"), "text in UTF-16"),
        ("a.feather", b"ARROW1\0\0" + bytes(64), "an Arrow or Feather file"),
        ("a.avro", b"Obj\x01\x04", "an Avro file"),
    ],
)
@pytest.mark.parametrize("folder", ["", "c/domain/", "c/"])
def test_records_that_are_not_read_are_refused(tmp_path, name, raw, what, folder):
    path = tmp_path / folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(raw)
    with pytest.raises(InputError, match=rf"{name} is {what}.*: write it|{name} is {what}.*: write one record a line"):
        Source(str(tmp_path / "c" if folder else path))


@pytest.mark.parametrize("head", ["BZh9 is bzip2's", "PK is a team", "ORCHID", "PAR1 text", "Rar! zip", "[1, 2]", "{ok}", "{\n}"])
def test_texts_that_begin_alike_are_texts(tmp_path, head):
    root = write(tmp_path / "c", d__a_dot_txt=head.encode() + b" and more text\n" * 30)
    assert read(Source(root))[0][0].startswith(head)


def test_a_single_text_is_no_input(tmp_path):
    for name, raw, what in [("a.txt", b"plain", "holds plain text"), ("a", b"", "is empty"), ("a.py", b"{\n}", "holds plain")]:
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(InputError, match=rf"expected \.jsonl \(JSON lines.*; it {what}"):
            Source(str(tmp_path / name))


def test_a_link_to_nothing_is_named(tmp_path):
    root = write(tmp_path / "c", d__a_dot_jsonl=lines("a"))
    (tmp_path / "c" / "d" / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    source = Source(root)
    assert source.survey.notes() == [f"1 file is not read (a link to nothing): {root}/d/gone.jsonl"]


def test_names_that_are_no_text(tmp_path):
    """File names are bytes; what is recorded is UTF-8."""
    root = write(tmp_path / "c", a_dot_jsonl=lines("a", domain="d"))
    other = Path(os.fsdecode(os.fsencode(root) + b"/\xe9.md"))
    other.write_bytes(b"beside")
    source = Source(root)
    assert read(source) == [("a", "d")]
    assert json.dumps(source.survey.to_json(), ensure_ascii=False).encode().count(rb"\\udce9.md") == 1
    other.rename(other.with_suffix(".jsonl"))
    other.with_suffix(".jsonl").write_bytes(lines("b", domain="d"))
    with pytest.raises(InputError, match=r"\\udce9\.jsonl: the name is not UTF-8"):
        Source(root)


def test_prepare_names_and_records_them(tmp_path, capfd):
    text = "some words of a document that is long enough for a text " * 6
    root = write(
        tmp_path / "c",
        **{f"prose__{i}_dot_txt": f"{i} {text}".encode() for i in range(9)},
        web__a_dot_json_dot_gz=gzip.compress(lines(*(f"{i} {text}" for i in range(9)))),
        notes_dot_md=b"about",
    )
    out = prepare(root, tmp_path / "d", tokenizer="bytes", eval_per_domain=2)
    err = capfd.readouterr().err
    assert f"note: 1 file is not read (in no domain's folder): {root}/notes.md" in err
    assert f"note: 9 files are taken as plain text, a document each: {root}/prose/0.txt, " in err and ", and 4 more" in err
    record = json.loads((out / "prepare.json").read_text())
    assert record["files"]["plain_text"]["count"] == len(record["files"]["plain_text"]["names"]) == 9
    assert {name: entry["documents_read"] for name, entry in record["domains"].items()} == {"prose": 9, "web": 9}
    prepare(root, tmp_path / "quiet", tokenizer="bytes", eval_per_domain=2, progress=False)
    assert "note:" not in capfd.readouterr().err


BINARY = {
    "pdf": b"%PDF-1.4\n1 0 obj << /Title (text) >> endobj\n",
    "png": b"\x89PNG\r\n\x1a\n" + b"pixels" * 9,
    "npy": b"\x93NUMPY\x01",
    "pickle": b"\x80\x04K\x01.",
    "elf": b"\x7fELF\x02",
    "sqlite": b"SQLite format 3\x00",
    "other": b"text and then\0 a NUL byte",
}


def test_binary_files_are_no_text(tmp_path):
    files = {**BINARY, "z.gz": gzip.compress(BINARY["pdf"]), "a.txt": b"%PDF is a name"}
    root = write(tmp_path / "c", **{f"d__{name.replace('.', '_dot_')}": raw for name, raw in files.items()})
    source = Source(root)
    assert read(source) == [("%PDF is a name", "d")]
    assert source.survey.to_json()["not_read"] == {
        "binary": {"count": 8, "names": [f"{root}/d/{name}" for name in sorted(files) if name != "a.txt"]}
    }
    (tmp_path / "c" / "d" / "a.txt").unlink()
    with pytest.raises(InputError, match=r"the folder of domain 'd' has no file that is read: 8 files are not read \(binary\)"):
        Source(root)
    (tmp_path / "c" / "d" / "a.jsonl").write_bytes(lines("a"))
    assert read(Source(root)) == [("a", "d")]


@pytest.mark.parametrize("name", [*BINARY, "a.json"])
def test_a_binary_file_is_no_input(tmp_path, name):
    (tmp_path / name).write_bytes(BINARY.get(name, BINARY["npy"]))
    with pytest.raises(InputError, match=rf"{name} is binary, which is not read: give its text"):
        Source(str(tmp_path / name))


def test_a_domain_of_checksums_is_told(tmp_path):
    root = write(tmp_path / "c", A__x_dot_md5=b"0", A__x_dot_idx=b"1", A___dot_x=b"2", B__a_dot_txt=b"b")
    said = r"domain 'A' has no file that is read: 2 files are not read \(checksums.*A/x\.idx, .*; 1 file is not read \(hidden"
    with pytest.raises(InputError, match=said):
        Source(root)


@pytest.mark.parametrize("labelled", [False, True])
def test_linked_folders_are_read_once(tmp_path, labelled):
    write(tmp_path / "z", y__b_dot_jsonl_dot_gz=gzip.compress(lines("b", domain="A")))
    root = write(tmp_path / "c", A__a_dot_jsonl=lines("a", domain="A"))
    links = {"more": tmp_path / "z", "up": tmp_path / "c", "self": tmp_path / "c" / "A", "again": tmp_path / "z" / "y"}
    for name, target in links.items():
        (tmp_path / "c" / "A" / name).symlink_to(target)
    (tmp_path / "z" / "around").symlink_to(tmp_path / "z")
    source = Source(root, domain_field="domain" if labelled else None)
    assert read(source) == [("a", "A"), ("b", "A")]
    (left,) = source.survey.to_json()["not_read"].items()
    assert left[0] == "a link to a folder that is read at its own place"
    assert left[1]["names"] == [f"{root}/A/{name}" for name in ("more/around", "more/y", "self", "up")]


def test_a_domain_may_be_a_link_to_another(tmp_path):
    root = write(tmp_path / "c", A__a_dot_txt=b"a", A___dot_x=b"x")
    (tmp_path / "c" / "B").symlink_to(tmp_path / "c" / "A")
    source = Source(root)
    assert read(source) == [("a", "A"), ("a", "B")]
    assert source.survey.to_json()["not_read"] == {"hidden": {"count": 2, "names": [f"{root}/A/.x", f"{root}/B/.x"]}}


@pytest.mark.parametrize("name", ["df.parquet.gz", "df.parquet.gzip", "df.pq.zst", "df.gz"])
@pytest.mark.parametrize("parent", ["", "c/d/"])
def test_parquet_is_known_by_its_bytes(tmp_path, name, parent):
    """pandas' to_parquet("df.parquet.gzip", compression="gzip") compresses inside."""
    path = tmp_path / parent / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": ["a"], "domain": ["d"]}), path, compression="gzip")
    assert read(Source(str(tmp_path / "c" if parent else path))) == [("a", "d")]
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(InputError, match="Parquet, compressed as a whole: decompress it"):
        Source(str(path))


@pytest.mark.parametrize("head", [b"ORC\n", b"ORC\t", b"ORC\r\n"])
def test_orc_is_known_by_both_ends(tmp_path, head):
    root = write(tmp_path / "c", d__a_dot_txt=head + b"an orc is a monster\n")
    assert read(Source(root))[0][0].startswith("ORC")
    import pyarrow.orc

    pyarrow.orc.write_table(pa.table({"text": ["a"]}), tmp_path / "c" / "d" / "a.txt")
    with pytest.raises(InputError, match="is an ORC file"):
        Source(root)


UNREAD = {
    "strings.json": json.dumps({"text": "hi", "n": 1}, indent=1).encode(),
    "rows.json": json.dumps([{"text": "hi"}]).encode(),
    "t.csv": b"text,n\none,1\n",
}


@pytest.mark.parametrize(("name", "raw"), UNREAD.items())
def test_records_among_code_are_documents(tmp_path, name, raw):
    root = write(tmp_path / "c", code__a_dot_py=b"a", code__b_dot_py=b"b")
    (tmp_path / "c" / "code" / name).write_bytes(raw)
    source = Source(root)
    assert sorted(text for text, _ in read(source)) == sorted(["a", "b", raw.decode()])
    (named,) = source.survey.unexpected.items()
    assert named[0].endswith(", taken as a document") and str(named[1]) == f"{root}/code/{name}"
    (tmp_path / "c" / "code" / "a.py").rename(tmp_path / "c" / "code" / "README.md")
    with pytest.raises(InputError, match=rf"{name} is "):  # one of two, the description not counted
        Source(root)


def test_code_that_begins_like_records_is_text(tmp_path):
    menu = b'[\n{"text": "a"},\n{"text": "b"}\n]'
    for tail in (b".forEach(add)\n", b".forEach(add)\n" + b"// more\n" * 10_000):
        root = write(tmp_path / "c", d__menu_dot_js=menu + tail)
        assert read(Source(root)) == [((menu + tail).decode(), "d")]
    with pytest.raises(InputError, match=r"menu\.js is one JSON array"):
        Source(write(tmp_path / "c", d__menu_dot_js=menu))


def test_a_stray_file_that_makes_a_labelled_folder_is_named(tmp_path):
    root = write(tmp_path / "c", Github__a_dot_jsonl=lines("a"), stray_dot_jsonl=lines("s"))
    why = (
        rf"{root} is not taken as a folder per domain because of {root}/stray\.jsonl: put it into a domain's folder, or elsewhere"
    )
    with pytest.raises(InputError, match=rf"Github/a\.jsonl, line 1: no field .*{why}"):
        read(Source(root))
    write(tmp_path / "c", A__a_dot_jsonl=lines("b", domain="A"))
    with pytest.raises(InputError, match=rf"Github/a\.jsonl, line 1: no domain field 'domain'.*{why}"):
        read(Source(root))
    (tmp_path / "c" / "stray.jsonl").unlink()
    assert read(Source(root)) == [("b", "A"), ("a", "Github")]
