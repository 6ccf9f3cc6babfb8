import dataclasses
import errno
import inspect
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lldfast.data.evalset import EvalSet
from lldfast.data.making import encode
from lldfast.data.making.encode import token_hash
from lldfast.data.making.options import PrepareOptions
from lldfast.data.making.prepare import prepare, verify
from lldfast.data.shards import TokenShards
from lldfast.data.tokenizer import load_tokenizer, tokenizer_from_manifest
from lldfast.errors import BusyError, CorruptError, InputError, WriteError
from lldfast.files import folder_lock

WORDS = {
    "code": "def return if else for while import self None True ( ) : = + [ ] x y",
    "prose": "the of and a Größe naïve whale sea captain — morning “quoted” сегодня",
    "logs": "<user> joined left hello help kernel boot 12:30 12:31 ubuntu sudo",
}


def text(domain: str, seed: int, n_words: int) -> str:
    draw = random.Random(f"{domain}/{seed}")
    return " ".join(draw.choices(WORDS[domain].split(), k=n_words))


def rows(n: int = 120) -> list[tuple[str, str]]:
    """Documents of two domains with many, and one with two huge documents."""
    made = [(text(domain, i, 200 + 7 * (i % 90)), domain) for i in range(n) for domain in ("code", "prose")]
    return [*made[:50], (text("logs", 0, 30_000), "logs"), *made[50:], (text("logs", 1, 20_000), "logs")]


def write(path: Path, documents: list[tuple[str, str]]) -> list[str]:
    path.write_text("".join(json.dumps({"text": t, "meta": {"pile_set_name": d}}) + "\n" for t, d in documents), encoding="utf-8")
    return [str(path)]


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def training_texts(folder: Path, domain: str) -> list[str]:
    shards = TokenShards(folder)
    tokenizer = tokenizer_from_manifest(shards.tokenizer, folder)
    tokens, offsets = shards.tokens(domain), shards.offsets(domain)
    assert (np.asarray(tokens[offsets[1:] - 1]) == shards.eot).all()
    return [tokenizer.decode(tokens[a : b - 1]) for a, b in itertools.pairwise(offsets)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> list[str]:
    return write(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", rows())


@pytest.fixture(scope="module")
def made(corpus, tmp_path_factory) -> Path:
    return prepare(corpus, tmp_path_factory.mktemp("made") / "data", tokenizer="bytes", eval_per_domain=24, progress=False)


def test_nothing_is_lost_and_nothing_is_in_both(made):
    verify(made)
    evalset, record = EvalSet.load(made / "eval.parquet"), json.loads((made / "prepare.json").read_text())
    assert evalset.counts() == {"code": 24, "logs": 24, "prose": 24}
    assert evalset.select("estimate").counts() == {"code": 12, "logs": 12, "prose": 12}
    assert evalset.n_bytes.max() <= 1024 and evalset.n_bytes.min() > 256
    assert {name: entry["held_out_by"] for name, entry in record["domains"].items()} == {
        "code": "documents", "logs": "ranges", "prose": "documents",
    }  # fmt: skip
    originals = [t for t, _ in rows()]
    for name in ("code", "prose"):
        held = set(evalset.document[evalset.domain == name].tolist())
        assert training_texts(made, name) == [t for i, (t, d) in enumerate(rows()) if d == name and i not in held]
    joined = "\0".join(t for name in WORDS for t in training_texts(made, name))
    for t, document in zip(evalset.texts, evalset.document, strict=True):
        assert t in originals[document]
        assert t not in joined
    for name in ("code", "prose"):
        estimate, measure = (set(evalset.select(part, name).document.tolist()) for part in ("estimate", "measure"))
        assert not estimate & measure
    kept = sum(len(t.encode()) for t in training_texts(made, "logs")) + record["domains"]["logs"]["held_out_bytes"]
    assert kept == sum(len(t.encode()) for t, d in rows() if d == "logs")


def test_the_signature_is_the_dataclass():
    how = {"workers", "progress", "resume", "overwrite"}  # these change no byte of the result
    parameters = list(inspect.signature(prepare).parameters.values())[2:]
    options = {f.name: (f.default, f.type) for f in dataclasses.fields(PrepareOptions)}
    options["domains"] = (None, "Iterable[str] | None")  # a caller need not have a list
    assert {p.name: (p.default, p.annotation) for p in parameters if p.name not in how} == options
    assert how < {p.name for p in parameters}


def test_options_that_mean_the_same_are_the_same():
    same = PrepareOptions(domains=["b", "a", "b"], eval_texts=100, eval_per_domain=8)
    assert same == PrepareOptions(domains=["a", "b"], eval_per_domain=8)
    assert PrepareOptions(domains="a").domains == ["a"]


def test_record(made):
    record, shards = json.loads((made / "prepare.json").read_text()), TokenShards(made)
    assert shards.domains == ["code", "logs", "prose"] == EvalSet.load(made / "eval.parquet").domains
    assert (record["corpus_hash"], record["evalset_hash"]) == (shards.corpus_hash, EvalSet.load(made / "eval.parquet").hash)
    assert record["arguments"]["tokenizer"] == "bytes" and record["inputs"][0][0] == "jsonl"
    assert " ".join(record["arguments"]) == (  # the order is part of the file
        "inputs domain_field text_field tokenizer vocab_size domains eval_texts eval_per_domain estimate_share seed split config "
        "max_documents on_error most_skipped drop_small_domains"
    )
    for name, entry in record["domains"].items():
        assert entry["documents_read"] == sum(d == name for _, d in rows())
        assert entry["training_tokens"] == shards.n_tokens[name] == entry["training_bytes"] + entry["training_documents"]
    assert [p.name for p in made.parent.iterdir()] == ["data"]  # the work folder is gone
    assert sorted(p.name for p in made.iterdir()) == ["eval.parquet", "prepare.json", "shards"]


def test_workers_do_not_change_a_byte(corpus, made, tmp_path):
    again = prepare(corpus, tmp_path / "d", tokenizer="bytes", eval_per_domain=24, workers=5, progress=False)
    assert content(again) == content(made)


def test_order_of_documents_does_not_change_the_evaluation_texts(made, tmp_path):
    inputs = write(tmp_path / "c.jsonl", rows()[::-1])
    again = prepare(inputs, tmp_path / "d", tokenizer="bytes", eval_per_domain=24, progress=False)
    old, new = (EvalSet.load(folder / "eval.parquet") for folder in (made, again))
    assert sorted(zip(old.texts, old.part, strict=True)) == sorted(zip(new.texts, new.part, strict=True))


def test_seed_and_share(corpus, made, tmp_path):
    options = {"tokenizer": "bytes", "eval_per_domain": 24, "progress": False}
    other = prepare(corpus, tmp_path / "seed", seed=1, **options)
    assert len(set(EvalSet.load(other / "eval.parquet").texts) & set(EvalSet.load(made / "eval.parquet").texts)) < 40
    share = prepare(corpus, tmp_path / "share", estimate_share=0.75, **options)
    assert EvalSet.load(share / "eval.parquet").select("estimate").counts() == {"code": 18, "logs": 18, "prose": 18}


def test_proportional_evaluation_corpus(corpus, tmp_path):
    folder = prepare(corpus, tmp_path / "d", tokenizer="bytes", eval_texts=60, progress=False)
    counts, record = EvalSet.load(folder / "eval.parquet").counts(), json.loads((folder / "prepare.json").read_text())
    sizes = {name: entry["bytes_read"] for name, entry in record["domains"].items()}
    assert sum(counts.values()) == 60
    for name, count in counts.items():
        assert abs(count - 60 * sizes[name] / sum(sizes.values())) < 1


def test_copies_of_evaluation_documents_are_left_out(made, tmp_path):
    evalset = EvalSet.load(made / "eval.parquet")
    held = rows()[int(evalset.document[evalset.domain == "code"][0])]
    irc = next(row for row in rows() if row[1] == "logs")
    doubled = [*rows(), (held[0], "prose"), irc, held]
    folder = prepare(write(tmp_path / "c.jsonl", doubled), tmp_path / "d", tokenizer="bytes", eval_per_domain=24, progress=False)
    verify(folder)
    record, evalset = json.loads((folder / "prepare.json").read_text()), EvalSet.load(folder / "eval.parquet")
    assert sum(entry["held_out_copies_dropped"] for entry in record["domains"].values()) == 3
    assert held[0] not in training_texts(folder, "prose") + training_texts(folder, "code")
    assert len(set(evalset.texts)) == len(evalset)


def test_gpt2_and_trained_tokenizers(corpus, tmp_path):
    gpt2 = prepare(corpus, tmp_path / "gpt2", eval_per_domain=4, progress=False)
    assert TokenShards(gpt2).dtype == np.uint16 and TokenShards(gpt2).vocab_size == 50257
    bpe = prepare(corpus, tmp_path / "bpe", tokenizer="bpe", vocab_size=400, eval_per_domain=4, progress=False)
    assert (bpe / "tokenizer.json").exists() and 300 < TokenShards(bpe).vocab_size <= 400
    for folder in (gpt2, bpe):
        verify(folder)
    assert training_texts(gpt2, "prose") == training_texts(bpe, "prose")
    reused = prepare(corpus, tmp_path / "reused", tokenizer=str(bpe / "tokenizer.json"), eval_per_domain=4, progress=False)
    assert TokenShards(reused).corpus_hash == TokenShards(bpe).corpus_hash


def test_large_vocabulary_needs_uint32(corpus, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    vocab = {"<unk>": 0, **{f"w{i}": i for i in range(1, 70_000)}}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    backend.add_special_tokens(["<|endoftext|>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    folder = prepare(corpus, tmp_path / "d", tokenizer=str(tmp_path / "tokenizer.json"), eval_per_domain=2, progress=False)
    assert TokenShards(folder).dtype == np.uint32 and TokenShards(folder).eot == 70_000


def test_same_arguments_return_at_once_others_are_refused(corpus, made, monkeypatch):
    options = {"tokenizer": "bytes", "eval_per_domain": 24, "progress": False}
    before = content(made)
    monkeypatch.setattr("lldfast.data.making.prepare.make_plan", None)  # would raise if anything were read
    assert prepare(corpus, made, workers=1, **options) == made
    with pytest.raises(InputError, match=r"other arguments \(seed = 0, now 3\)"):
        prepare(corpus, made, seed=3, **options)
    assert content(made) == before


def test_overwrite(corpus, tmp_path):
    folder = prepare(corpus, tmp_path / "d", tokenizer="bytes", eval_per_domain=4, progress=False)
    prepare(corpus, folder, tokenizer="bytes", eval_per_domain=6, overwrite=True, progress=False)
    assert EvalSet.load(folder / "eval.parquet").counts() == {"code": 6, "logs": 6, "prose": 6}
    assert [p.name for p in tmp_path.iterdir()] == ["d"]
    (folder / "shards" / "code.bin").write_bytes(b"")
    with pytest.raises(CorruptError, match=r"code\.bin"):
        prepare(corpus, folder, tokenizer="bytes", eval_per_domain=6, progress=False)
    prepare(corpus, folder, tokenizer="bytes", eval_per_domain=6, overwrite=True, progress=False)
    verify(folder)


def test_a_folder_of_somebody_else_is_never_replaced(corpus, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="home exists and is not a folder that prepare made"):
        prepare(corpus, tmp_path / "home", tokenizer="bytes", overwrite=True, progress=False)
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years of work"


def test_changed_inputs_are_noticed(tmp_path):
    inputs = write(tmp_path / "c.jsonl", rows(20))
    folder = prepare(inputs, tmp_path / "d", tokenizer="bytes", eval_per_domain=2, progress=False)
    write(tmp_path / "c.jsonl", rows(21))
    with pytest.raises(InputError, match="inputs had other sizes"):
        prepare(inputs, folder, tokenizer="bytes", eval_per_domain=2, progress=False)


def test_second_writer_is_refused(corpus, tmp_path):
    with folder_lock(tmp_path / ".d.prepare"), pytest.raises(BusyError, match=f"pid {os.getpid()}"):
        prepare(corpus, tmp_path / "d", tokenizer="bytes", progress=False)
    assert not (tmp_path / "d").exists()


PROGRAM = """
import resource, sys
from lldfast.data.making import encode
encode.PART_BYTES = 100_000
from lldfast.data.making.prepare import prepare
limit = int(sys.argv[3])
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
prepare([sys.argv[1]], sys.argv[2], tokenizer="bpe", vocab_size=300, eval_per_domain=8, progress=False)
"""


def start(corpus: list[str], out: Path, limit: int = 0) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", PROGRAM, corpus[0], str(out), str(limit)], stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def uninterrupted(corpus, tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole") / "d"
    prepare(corpus, folder, tokenizer="bpe", vocab_size=300, eval_per_domain=8, progress=False)
    return content(folder)


@pytest.mark.parametrize(
    "moment",
    [
        "plan.json", "part-000003.npz",
        *(pytest.param(moment, marks=pytest.mark.slow) for moment in (".lock", "tokenizer.json", "part-000000.npz", "data")),
    ],
)  # fmt: skip
def test_killed_at_any_moment_a_rerun_gives_the_same_bytes(corpus, uninterrupted, tmp_path, moment):
    work = tmp_path / ".d.prepare"
    process = start(corpus, tmp_path / "d")
    deadline = time.monotonic() + 60
    while process.poll() is None and not (work / moment).exists() and time.monotonic() < deadline:
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    # The last step may be over before the signal arrives; then there is nothing left to resume.
    assert process.returncode == -signal.SIGKILL or moment == "data"
    if process.returncode:
        assert not (tmp_path / "d").exists()
    kept = {p: p.stat().st_mtime_ns for p in work.glob("part-*.npz")}
    rerun = start(corpus, tmp_path / "d")
    for path, written in kept.items() if rerun.poll() is None else ():
        assert path.stat().st_mtime_ns == written  # finished parts are not encoded again
    assert rerun.wait() == 0, rerun.communicate()[1]
    assert content(tmp_path / "d") == uninterrupted
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_full_disk_publishes_nothing_and_goes_on_later(corpus, uninterrupted, tmp_path):
    process = start(corpus, tmp_path / "d", limit=90_000)  # bytes a file may have: parts fit, the shards do not
    message = process.communicate()[1]
    assert process.returncode == 1 and "lldfast.errors.WriteError: [Errno 27] cannot write" in message, message
    assert not (tmp_path / "d").exists()
    assert (tmp_path / ".d.prepare" / "plan.json").exists()
    assert start(corpus, tmp_path / "d").wait() == 0
    assert content(tmp_path / "d") == uninterrupted


def test_disk_full_error_keeps_its_number(corpus, tmp_path, monkeypatch):
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(encode.np, "savez", full)
    with pytest.raises(WriteError, match=r"part-000000\.npz: No space left") as caught:
        prepare(corpus, tmp_path / "d", tokenizer="bytes", progress=False)
    assert caught.value.errno == errno.ENOSPC
    assert not (tmp_path / "d").exists()


def test_other_arguments_do_not_resume(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("lldfast.data.making.prepare._assemble", None)
    with pytest.raises(TypeError):
        prepare(corpus, tmp_path / "d", tokenizer="bytes", eval_per_domain=4, progress=False)
    monkeypatch.undo()
    assert list((tmp_path / ".d.prepare").glob("part-*"))
    folder = prepare(corpus, tmp_path / "d", tokenizer="bytes", eval_per_domain=6, progress=False)
    verify(folder)
    assert EvalSet.load(folder / "eval.parquet").counts()["code"] == 6


@pytest.mark.parametrize("share", [2, pytest.param(1, marks=[pytest.mark.slow, pytest.mark.alone])])
def test_memory_does_not_grow_with_the_corpus(tmp_path, share):
    program = (
        f"import re, sys, threading\nfrom lldfast.data.making import encode\nencode.PART_BYTES = {2_000_000 // share}\n"
        "from lldfast.data.making.prepare import prepare\npeak, done = 0, threading.Event()\n"
        "def watch():\n"
        "    global peak\n"
        "    while not done.wait(0.002):\n"
        "        peak = max(peak, int(re.search(r'RssAnon:\\s+(\\d+)', open('/proc/self/status').read())[1]))\n"
        "threading.Thread(target=watch).start()\n"
        "try:\n"
        "    prepare([sys.argv[1]], sys.argv[2], tokenizer='bytes', eval_per_domain=4, workers=2, progress=False)\n"
        "finally:\n"
        "    done.set()\n"
        "print(peak)"
    )  # anonymous memory: pages of mapped files come and go with the page cache
    peaks = []
    for name, copies in (("small", 4), ("large", 16)):  # both have more parts than are worked on at a time
        once = [(text(d, i, 2000), d) for i in range(132 // share) for d in ("code", "prose")]
        inputs = write(tmp_path / f"{name}.jsonl", [(f"{c} {t}", d) for c in range(copies) for t, d in once])
        command = [sys.executable, "-c", program, inputs[0], str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout) / 1024)
    assert (tmp_path / "large.jsonl").stat().st_size > 50e6 / share
    assert peaks[1] - peaks[0] < 12  # MiB, where the corpus grew by over 18


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_texts": 1}, "eval_texts must be at least 2"),
        ({"eval_per_domain": 1}, "eval_per_domain must be at least 2"),
        ({"max_documents": 0}, "max_documents must be at least 1"),
        ({"workers": 0}, "workers must be at least 1"),
        ({"estimate_share": 1.0}, "estimate_share must lie between 0 and 1"),
        ({"tokenizer": "bpe"}, "vocab_size is needed"),
        ({"vocab_size": 300}, "vocab_size is needed by, and only by"),
        ({"tokenizer": "bpe", "vocab_size": 200}, "vocab_size must be at least 257"),
        ({"domains": []}, "domains is an empty list"),
        ({"domains": ["code", "pros"]}, "no document has the domain 'pros'.*Did you mean 'prose'"),
    ],
)
def test_bad_arguments(corpus, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        prepare(corpus, tmp_path / "d", **{"tokenizer": "bytes", "progress": False, **options})
    assert list(tmp_path.iterdir()) == []  # nothing is left behind


def test_bad_corpora(tmp_path):
    for documents, message in [
        ([(text("code", i, 300), "code") for i in range(40)] + [("short", "tiny")], "domain 'tiny' is too small"),
        (
            [(text("code", i, 300), "code") for i in range(40)] + [(" ", "blank")],
            "domain 'blank' is too small .* it has no text, its documents",
        ),
        ([], r"no documents in .*c\.jsonl"),
    ]:
        with pytest.raises(InputError, match=message):
            prepare(write(tmp_path / "c.jsonl", documents), tmp_path / "d", tokenizer="bytes", progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["c.jsonl"]


def test_tokenizer_without_end_of_text(corpus, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0}, unk_token="<unk>")).save(str(tmp_path / "t.json"))
    with pytest.raises(InputError, match="no end-of-text token"):
        prepare(corpus, tmp_path / "d", tokenizer=str(tmp_path / "t.json"), progress=False)


def test_subset_and_max_documents(corpus, tmp_path):
    folder = prepare(
        corpus, tmp_path / "d", tokenizer="bytes", domains=["prose"], max_documents=30, eval_per_domain=4, progress=False
    )
    record = json.loads((folder / "prepare.json").read_text())
    assert list(record["domains"]) == TokenShards(folder).domains == ["prose"]
    assert record["domains"]["prose"]["documents_read"] == 30
    assert EvalSet.load(folder / "eval.parquet").document.max() < 30


def test_progress_goes_to_stderr(corpus, tmp_path, capfd):
    prepare(corpus, tmp_path / "d", eval_per_domain=200, domains=["code"])
    out, err = capfd.readouterr()
    assert out == ""
    assert "encoding" in err and "tokens/s" in err and "warning: fewer evaluation texts than asked for: 'code' (" in err


def test_verify_finds_damage(corpus, made, tmp_path):
    options = {"tokenizer": "bytes", "eval_per_domain": 24, "progress": False}

    def fresh(name: str, **changes: object) -> Path:
        return prepare(corpus, tmp_path / name, **{**options, **changes})

    folder = fresh("flipped")
    raw = bytearray((folder / "shards" / "prose.bin").read_bytes())
    raw[1000] ^= 1
    (folder / "shards" / "prose.bin").write_bytes(raw)
    with pytest.raises(CorruptError, match=r"prose\.bin"):
        verify(folder)

    folder, other = fresh("mixed"), fresh("other", seed=5)
    (folder / "eval.parquet").write_bytes((other / "eval.parquet").read_bytes())
    with pytest.raises(CorruptError, match=r"evalset_hash.*files of two runs"):
        verify(folder)

    folder = fresh("leak")
    shards, record = TokenShards(folder), json.loads((folder / "prepare.json").read_text())
    a, b = shards.offsets("code")[7:9]
    record["held_out"].append(token_hash(shards.tokens("code")[a:b]))
    (folder / "prepare.json").write_text(json.dumps(record))
    with pytest.raises(CorruptError, match=r"code\.bin: document 7 is held out"):
        verify(folder)

    folder = fresh("shared")
    e = EvalSet.load(folder / "eval.parquet")
    shared = EvalSet(e.texts, e.domain, e.part, [1] * len(e))
    shared.save(folder / "eval.parquet")
    with pytest.raises(CorruptError, match="document 1 of domain 'code' is in both parts"):
        verify(folder)
    with pytest.raises(InputError):
        verify(tmp_path / "nothing")


def test_held_out_hashes_are_those_of_the_held_out_texts(made):
    record, evalset = json.loads((made / "prepare.json").read_text()), EvalSet.load(made / "eval.parquet")
    tokenizer = load_tokenizer("bytes")
    for number in set(evalset.document[evalset.domain == "code"].tolist()):
        ids = np.array([*tokenizer.encode(rows()[number][0]), tokenizer.eot])
        assert token_hash(ids) in record["held_out"]


@pytest.mark.slow
def test_pile_sample(tmp_path):
    sample = Path(__file__).resolve().parents[2] / "shared" / "data" / "pile-sample.jsonl.zst"
    if not sample.exists():
        pytest.skip("the Pile sample is not beside the repository")
    folder = prepare([str(sample)], tmp_path / "d", eval_texts=1000, progress=False)
    verify(folder)
    record, evalset = json.loads((folder / "prepare.json").read_text()), EvalSet.load(folder / "eval.parquet")
    assert len(evalset) == 1000 and len(evalset.domains) == 12
    assert {name for name, entry in record["domains"].items() if entry["held_out_by"] == "ranges"} == {"Ubuntu IRC"}
    assert sum(entry["documents_read"] for entry in record["domains"].values()) == 6369


def test_hostile_names_stay_inside_the_folder(tmp_path):
    renamed = {"code": "../x", "logs": "..", "prose": " Ελληνικά/a "}
    inputs = write(tmp_path / "c.jsonl", [(t, renamed[d]) for t, d in rows(20)])
    folder = prepare(inputs, tmp_path / "d", tokenizer="bytes", eval_per_domain=2, progress=False)
    verify(folder)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.jsonl", "d"]
    assert set(TokenShards(folder).domains) == set(renamed.values())


def test_paths_single_names_and_nothing(corpus, tmp_path, monkeypatch):
    options = {"tokenizer": "bytes", "eval_per_domain": 2, "progress": False}
    folder = prepare(Path(corpus[0]), tmp_path / "d", domains="prose", **options)
    assert TokenShards(folder).domains == ["prose"]
    verify(folder / "shards")  # the shards inside mean their folder
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="out is empty"):
        prepare(corpus, "", **options)
    with pytest.raises(InputError, match="an input is empty"):
        prepare("", tmp_path / "e", **options)


@pytest.mark.parametrize(
    "damage",
    [
        lambda record: [record],
        lambda record: {**record, "version": 3},
        lambda record: {key: value for key, value in record.items() if key != "held_out"},
        lambda record: {**record, "domains": {}},
        lambda record: {**record, "domains": None},
    ],
)
def test_verify_names_a_damaged_record(made, tmp_path, damage):
    shutil.copytree(made, tmp_path / "d")
    record = json.loads((tmp_path / "d" / "prepare.json").read_text())
    (tmp_path / "d" / "prepare.json").write_text(json.dumps(damage(record)))
    with pytest.raises(CorruptError, match=r"prepare\.json"):
        verify(tmp_path / "d")


def test_all_copies_of_one_document_are_too_little(tmp_path):
    inputs = write(tmp_path / "c.jsonl", [(text("code", 1, 300), "code")] * 20)
    with pytest.raises(InputError, match="domain 'code' is too small for evaluation texts"):
        prepare(inputs, tmp_path / "d", tokenizer="bytes", progress=False)


def test_white_space_does_not_end_a_run_after_encoding(tmp_path):
    pages = [("\u00a0" * 40_000 + text("code", i, 60), "code") for i in range(3)]
    inputs = write(tmp_path / "c.jsonl", [*pages, *rows(20)])
    folder = prepare(inputs, tmp_path / "d", tokenizer="bytes", eval_per_domain=4, domains=["code"], progress=False)
    verify(folder)
    assert all(t.strip() for t in EvalSet.load(folder / "eval.parquet").texts)


def small_domains() -> list[tuple[str, str]]:
    """One domain that is large enough, and one of each kind that is not."""
    two = [(text("code", i, 300), "two twice") for i in (500, 501)]
    return [
        *((text("code", i, 300), "code") for i in range(40)),
        (text("code", 99, 300), "one"),
        ("short", "tiny"),
        (" ", "blank"),
        *two * 10,  # nothing would be left to train on
    ]


def test_all_small_domains_are_named_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("lldfast.data.making.prepare.encode", None)
    inputs = write(tmp_path / "c.jsonl", small_domains())
    with pytest.raises(InputError, match="4 domains are too small for evaluation texts: ") as caught:
        prepare(inputs, tmp_path / "d", tokenizer="bytes", eval_per_domain=2, progress=False)
    message = str(caught.value)
    assert "'one' (1 different documents with over 256 bytes of text, of 1 (" in message
    assert "'tiny' (0 different documents" in message and "'blank' (no text, its documents (1) are empty)" in message
    assert "'two twice' (" in message and "A domain needs three different documents" in message


def test_small_domains_are_left_out(tmp_path, capfd):
    inputs = write(tmp_path / "c.jsonl", small_domains())
    options = {"tokenizer": "bpe", "vocab_size": 270, "eval_per_domain": 2}
    folder = prepare(inputs, tmp_path / "d", drop_small_domains=True, **options)
    verify(folder)
    record = json.loads((folder / "prepare.json").read_text())
    assert TokenShards(folder).domains == list(record["domains"]) == ["code"]
    assert {name: entry["documents_read"] for name, entry in record["dropped_domains"].items()} == {
        "blank": 0, "one": 1, "tiny": 1, "two twice": 20,
    }  # fmt: skip
    assert "left out, too small for evaluation texts: 'blank', 'one', 'tiny', 'two twice'" in capfd.readouterr().err
    alone = prepare(inputs, tmp_path / "alone", domains=["code"], progress=False, **options)
    assert TokenShards(alone).corpus_hash == TokenShards(folder).corpus_hash
    inputs = write(tmp_path / "c.jsonl", small_domains()[40:])
    with pytest.raises(InputError, match="4 domains are too small"):
        prepare(inputs, tmp_path / "none", drop_small_domains=True, progress=False, **options)


def test_one_text_in_a_part_is_warned_of(tmp_path):
    inputs = write(tmp_path / "c.jsonl", [(text("code", i, 300), f"d{i % 12:02}") for i in range(120)])
    for texts, named in [(3, [f"d{i:02}" for i in range(10)]), (4, [])]:
        folder = prepare(inputs, tmp_path / f"d{texts}", tokenizer="bytes", eval_per_domain=texts, progress=False)
        warnings = json.loads((folder / "prepare.json").read_text())["warnings"]
        said = (
            f"one evaluation text in a part: {', '.join(map(repr, named))}, ... and 2 more; errors cannot be estimated from fewer"
        )
        assert warnings == [f"{said} than two (option eval_per_domain, --eval-per-domain)"] * bool(named)


def test_domains_with_fewer_texts_are_named_in_one_line(tmp_path):
    inputs = write(tmp_path / "c.jsonl", [(text("code", i, 300), f"d{i % 12:02}") for i in range(60)])
    for options, name in [({"eval_per_domain": 50}, "eval_per_domain"), ({"eval_texts": 600}, "eval_texts")]:
        folder = prepare(inputs, tmp_path / name, tokenizer="bytes", progress=False, **options)
        warning, *_ = json.loads((folder / "prepare.json").read_text())["warnings"]
        listed = re.fullmatch(r"fewer evaluation texts than asked for: (.*); more would take half of a domain from.*", warning)
        assert re.findall(r"'(d\d\d)' \(\d+ of \d\d\)", listed[1]) == [f"d{i:02}" for i in range(10)]
        assert listed[1].endswith("... and 2 more") and f"(option {name}, --{name.replace('_', '-')})" in warning


def test_a_folder_that_is_there_is_not_written_again(tmp_path, capfd):
    from lldfast.__main__ import main

    inputs = write(tmp_path / "c.jsonl", [(text("code", i, 300), "d") for i in range(9)])
    with open(inputs[0], "a", encoding="utf-8") as file:
        file.write("no record\n")
    out = tmp_path / "d"
    options = ["--tokenizer", "bytes", "--eval-per-domain", "50", "--on-error", "skip"]
    warned = []
    for last in (f"wrote {out}", f"{out} is there already, made of the same inputs with the same arguments"):
        assert main(["prepare", *inputs, "--out", str(out), *options]) == 0
        printed, err = capfd.readouterr()
        assert printed.splitlines()[-1] == last
        warned.append(re.findall(r"warning: .*", err))
    assert warned[0] == warned[1] and len(warned[0]) == 2
    assert main(["prepare", *inputs, "--out", str(out), *options, "--quiet"]) == 0
    assert "warning" not in capfd.readouterr().err
