import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lldfast.data.evalset import EvalSet
from lldfast.errors import CorruptError, InputError, WriteError


def small() -> EvalSet:
    texts = ["def f(): pass", "Ein Satz über Öl.", "x = 1", "漢字の文章です", "y"]
    parts = ["estimate", "measure", "measure", "estimate", "estimate"]
    return EvalSet(texts, ["code", "prose", "code", "asia", "prose"], parts, range(5))


def test_attributes():
    e = small()
    assert len(e) == 5
    assert e.domains == ["code", "prose", "asia"]
    assert e.n_bytes.tolist() == [len(t.encode()) for t in e.texts] and e.n_bytes.dtype == np.int64
    assert e.document.tolist() == [0, 1, 2, 3, 4] and e.document.dtype == np.int64
    assert e.counts() == {"code": 2, "prose": 2, "asia": 1}


def test_select_keeps_order_and_combines():
    e = small()
    assert e.select("estimate").texts == [e.texts[0], e.texts[3], e.texts[4]]
    assert e.select(domains=["prose", "code"]).texts == [e.texts[i] for i in (0, 1, 2, 4)]
    one = e.select("estimate", "prose")
    assert (one.texts, one.domains, one.document.tolist(), one.part.tolist()) == (["y"], ["prose"], [4], ["estimate"])
    assert len(e.select("measure", "asia")) == 0


def test_select_names_what_is_unknown():
    with pytest.raises(InputError, match=r"'test'.*estimate, measure"):
        small().select("test")
    with pytest.raises(InputError, match=r"'cod'.*code, prose, asia"):
        small().select(domains=["code", "cod"])


def test_hash_depends_on_texts_domains_parts_and_order_only():
    e = small()
    same = EvalSet(e.texts, e.domain, e.part, [9, 9, 9, 9, 9])
    assert same.hash == e.hash
    others = [
        EvalSet([*e.texts[:-1], "z"], e.domain, e.part),
        EvalSet(e.texts, [*e.domain[:-1], "code"], e.part),
        EvalSet(e.texts, e.domain, [*e.part[:-1], "measure"]),
        EvalSet(e.texts[::-1], e.domain[::-1], e.part[::-1]),
        EvalSet(["ab", "c"], ["d", "d"], ["measure"] * 2),
        EvalSet(["a", "bc"], ["d", "d"], ["measure"] * 2),
    ]
    assert len({e.hash, *(other.hash for other in others)}) == 7


def test_round_trip(tmp_path):
    e = small()
    e.save(tmp_path / "deep" / "eval.parquet")
    back = EvalSet.load(tmp_path / "deep" / "eval.parquet")
    assert (back.hash, back.texts, back.domains) == (e.hash, e.texts, e.domains)
    for name in ("domain", "part", "n_bytes", "document"):
        assert getattr(back, name).tolist() == getattr(e, name).tolist()
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["eval.parquet"]  # no temporary file stays
    table = pq.read_table(tmp_path / "deep" / "eval.parquet")
    assert table.column_names == ["text", "domain", "part", "n_bytes", "document"]


def test_from_texts():
    assert EvalSet.from_texts(["a", "b"], ["x", "y"]).part.tolist() == ["measure", "measure"]
    assert EvalSet.from_texts(["a", "b"], ["x", "y"], "estimate").part.tolist() == ["estimate", "estimate"]
    assert EvalSet.from_texts(["a", "b"], ["x", "y"], ["estimate", "measure"]).part.tolist() == ["estimate", "measure"]


@pytest.mark.parametrize(
    ("texts", "domain", "part", "message"),
    [
        (["a", ""], ["x", "x"], ["measure"] * 2, "text 1 is not a non-empty string"),
        (["a", None], ["x", "x"], ["measure"] * 2, "text 1 .*None"),
        (["a", "\ud800"], ["x", "x"], ["measure"] * 2, "text 1 is not valid Unicode"),
        (["a", "b"], ["x", " "], ["measure"] * 2, "text 1 has no domain"),
        (["a", "b"], ["x", "y"], ["measure", "test"], r"text 1 \(domain y\).*'test'"),
        (["a", "b"], ["x"], ["measure"] * 2, "2 texts but 1 values of domain"),
        (["a", "b"], ["x", "y"], ["measure"], "2 texts but 1 values of part"),
    ],
)
def test_bad_content(texts, domain, part, message):
    with pytest.raises(InputError, match=message):
        EvalSet(texts, domain, part)


def test_bad_files(tmp_path):
    with pytest.raises(InputError, match=r"none\.parquet"):
        EvalSet.load(tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("not Parquet at all")
    with pytest.raises(CorruptError, match=r"text\.parquet"):
        EvalSet.load(tmp_path / "text.parquet")
    pq.write_table(pa.table({"text": ["a"], "domain": ["x"]}), tmp_path / "columns.parquet")
    with pytest.raises(CorruptError, match=r"columns\.parquet.*no column part"):
        EvalSet.load(tmp_path / "columns.parquet")
    small().save(tmp_path / "good.parquet")
    raw = (tmp_path / "good.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(CorruptError, match=r"cut\.parquet"):
        EvalSet.load(tmp_path / "cut.parquet")


def test_altered_text_is_noticed(tmp_path):
    small().save(tmp_path / "e.parquet")
    table = pq.read_table(tmp_path / "e.parquet")
    texts = table["text"].to_pylist()
    texts[0] = "def g(): pass"
    altered = table.set_column(0, "text", pa.array(texts)).replace_schema_metadata(table.schema.metadata)
    pq.write_table(altered, tmp_path / "e.parquet")
    with pytest.raises(CorruptError, match="altered"):
        EvalSet.load(tmp_path / "e.parquet")


def test_unwritable_place(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match=r"eval\.parquet"):
        small().save(tmp_path / "file" / "eval.parquet")


def test_surrogates_and_numbers_that_are_none(tmp_path):
    with pytest.raises(InputError, match="the domain name of text 1 is not valid Unicode"):
        EvalSet.from_texts(["a", "b"], ["x", "x\ud800"])
    with pytest.raises(InputError, match="document numbers must be integers"):
        EvalSet(["a"], ["x"], ["measure"], ["one"])
    small().save(tmp_path / "e.parquet")
    table = pq.read_table(tmp_path / "e.parquet")
    column = table.column_names.index("document")
    pq.write_table(table.set_column(column, "document", pa.array(["one"] * 5)), tmp_path / "e.parquet")
    with pytest.raises(CorruptError, match=r"e\.parquet: document numbers must be integers"):
        EvalSet.load(tmp_path / "e.parquet")


@pytest.mark.parametrize("old", [b"some text", b"prose"])
def test_bytes_that_are_no_longer_utf8_are_told(tmp_path, old):
    """Parquet's pages have no checksum: only the text says that it was altered."""
    import pyarrow.parquet as pq

    path = tmp_path / "eval.parquet"
    EvalSet.from_texts(["some text"], ["prose"]).save(path)
    pq.write_table(pq.read_table(path), path, compression="none")
    raw = path.read_bytes()
    path.write_bytes(raw.replace(old, b"\xff" + old[1:]))
    with pytest.raises(CorruptError, match=r"eval\.parquet"):
        EvalSet.load(path)
