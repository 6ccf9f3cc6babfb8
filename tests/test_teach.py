from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lldfast.__main__ import main
from lldfast.data.shards import TokenShards, write_manifest
from lldfast.data.tokenizer import load_tokenizer
from lldfast.distill import teach as teach_module
from lldfast.distill.cache import CacheWriter, TeacherCache
from lldfast.distill.teach import teach, top_k_
from lldfast.errors import BusyError, CorruptError, InputError
from lldfast.files import folder_lock
from lldfast.models.gpt import GPT, GPTConfig
from lldfast.models.head import Head
from lldfast.models.language_model import LanguageModel
from lldfast.models.loading import load_model

T = 16
BYTES = load_tokenizer("bytes")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, shards) -> TokenShards:
    """The shared shards under the byte tokenizer's own name and hash, as `prepare` makes them."""
    folder = tmp_path_factory.mktemp("corpus")
    shutil.copytree(shards.path, folder / "shards")
    entries = {domain: {**entry, "dtype": "uint16"} for domain, entry in shards.manifest["domains"].items()}
    write_manifest(folder / "shards", BYTES.describe(), BYTES.vocab_size, entries)
    return TokenShards(folder)


def teacher(scale: float = 20.0, seed: int = 0) -> LanguageModel:
    """A small GPT whose predictions are sharp enough to differ."""
    model = GPT("test-tiny", seed=seed)
    with torch.no_grad():
        model.ln_f.weight.mul_(scale)
    return LanguageModel.from_gpt(model, BYTES, "teacher")


def quiet(scorer, data, out, **options) -> TeacherCache:
    return TeacherCache(teach(scorer, data, out, **{"block_size": T, "max_windows": 9, "progress": False, **options}))


def exact(scorer: LanguageModel, corpus: TokenShards, domain: str, windows: int, length: int = T) -> torch.Tensor:
    """The teacher's log-softmax in fp64, [windows * T, V]: every window by itself."""
    model = copy.deepcopy(scorer.module).double().eval()
    ids = np.asarray(corpus.tokens(domain)[: windows * length], np.int64).reshape(windows, length)
    with torch.no_grad():
        rows = [torch.log_softmax(model.logits(torch.from_numpy(row)[None])[0], -1) for row in ids]
    return torch.cat(rows)


def check_against(cache: TeacherCache, scorer: LanguageModel, corpus: TokenShards, tolerance: float = 1e-5) -> None:
    for domain, windows in cache.windows.items():
        full = exact(scorer, corpus, domain, windows, cache.block_size)
        ids = torch.from_numpy(cache.part(domain, "ids").astype(np.int64))
        logprob, rest = (torch.from_numpy(np.array(cache.part(domain, part))) for part in ("logprob", "rest"))
        assert ids.shape == (windows * cache.block_size, cache.k)
        assert (full.gather(1, ids) - logprob).abs().max() < tolerance
        assert (full.topk(cache.k).values - logprob).abs().max() < tolerance  # the k likeliest, the likeliest first
        assert (logprob.diff(dim=1) <= 0).all() and all(len(set(row)) == cache.k for row in ids.tolist())
        others = full.scatter(1, ids, -torch.inf).logsumexp(1)
        if cache.k == cache.vocab_size:
            assert (rest == -torch.inf).all()
        else:
            assert (others - rest).abs().max() < tolerance
            assert (logprob.double().exp().sum(1) + rest.double().exp() - 1).abs().max() < tolerance


@pytest.mark.parametrize("k", [1, 5, 257])
@pytest.mark.parametrize("batch_tokens", [1, 48, 16_384])
def test_equals_the_live_teacher(tmp_path, corpus, k, batch_tokens):
    scorer = teacher()
    cache = quiet(scorer, corpus, tmp_path / "out", k=k, batch_tokens=batch_tokens)
    assert cache.windows == dict.fromkeys(corpus.domains, 9) and cache.dtype == np.uint16 and cache.vocab_size == 257
    assert cache.teacher["name"] == "teacher" and cache.teacher["hash"] == scorer.identity["hash"]
    cache.check(corpus, T)
    cache.verify()
    check_against(cache, scorer, corpus)


def test_all_windows(tmp_path, corpus):
    cache = quiet(teacher(), corpus, tmp_path / "out", k=3, max_windows=None, block_size=64)
    assert cache.windows == {domain: n // 64 for domain, n in corpus.n_tokens.items()}
    check_against(cache, teacher(), corpus)


@pytest.mark.parametrize("separate", [True, False])
def test_a_sure_teacher_keeps_the_digits_of_the_rest(tmp_path, corpus, separate):
    """Where the k ids have all but 1e-9 of the mass, log(1 - sum) would have no digit left in fp32."""
    scorer = teacher(scale=300.0)
    scorer.separate_head = separate
    cache = quiet(scorer, corpus, tmp_path / "out", k=16)
    rests = np.concatenate([cache.part(domain, "rest") for domain in cache.domains])
    assert np.quantile(rests, 0.2) < np.log(1e-9)
    check_against(cache, scorer, corpus, tolerance=1e-3)  # of logits of hundreds


def test_a_head_that_cannot_be_taken_apart(tmp_path, corpus, monkeypatch):
    scorer = teacher()
    monkeypatch.setattr("lldfast.models.batches.LOGITS_BYTES", 4 * 257 * 40)  # two windows at once
    scorer.separate_head = False
    seen = []
    logits = scorer.logits
    monkeypatch.setattr(scorer, "logits", lambda ids: seen.append(len(ids)) or logits(ids))
    monkeypatch.setattr(scorer, "hidden", None)
    cache = quiet(scorer, corpus, tmp_path / "out", k=5, domains=["Prose"])
    assert seen == [2, 2, 2, 2, 1]
    check_against(cache, scorer, corpus)


def test_no_logits_of_a_batch_are_alive(tmp_path, corpus, monkeypatch):
    rows = []
    monkeypatch.setattr("lldfast.ops.chunks.CHUNK_BYTES", {"cpu": 257 * 4 * 20, "cuda": 0})
    monkeypatch.setattr(teach_module, "LEAST_ROWS", 1)
    original = teach_module.top_k_
    monkeypatch.setattr(teach_module, "top_k_", lambda z, k: rows.append(len(z)) or original(z, k))
    cache = quiet(teacher(), corpus, tmp_path / "out", k=5)
    assert max(rows) <= 20 and sum(rows) == 4 * 9 * T
    check_against(cache, teacher(), corpus)


def test_padding_softcap_scale_and_bias(tmp_path, corpus, monkeypatch):
    """The head's options count, and padding rows never do; a vocabulary beyond uint16 gets wider ids."""
    model = GPT(GPTConfig(70_000, 69_000, 64, 1, 2, 8), seed=1)
    scorer = LanguageModel.from_gpt(model, BYTES, "wide")
    rng = torch.Generator().manual_seed(0)
    bias = torch.randn(70_000, generator=rng)
    bias[68_000] = 20.0
    bias[69_000:] = 1e4
    head = Head(model.head_weight, bias, 3.0, 0.5, 69_000)
    monkeypatch.setattr(scorer, "head", lambda: head)
    cache = quiet(scorer, corpus, tmp_path / "out", k=4, domains=["Prose"], max_windows=2)
    assert cache.vocab_size == 69_000 and cache.dtype == np.uint32 and cache.part("Prose", "ids").max() > 65_535
    ids = torch.from_numpy(np.asarray(corpus.tokens("Prose")[: 2 * T], np.int64).reshape(2, T))
    with torch.no_grad():
        z = (model.double()(ids).flatten(0, 1) @ model.head_weight[:69_000].T + bias[:69_000]) * 0.5
    full = torch.log_softmax(3.0 * torch.tanh(z / 3.0), -1)
    assert (full.topk(4).values - torch.from_numpy(np.array(cache.part("Prose", "logprob")))).abs().max() < 1e-5
    masked = full.scatter(1, full.topk(4).indices, -torch.inf).logsumexp(1)
    assert (masked - torch.from_numpy(np.array(cache.part("Prose", "rest")))).abs().max() < 1e-5


def test_a_hugging_face_teacher(tmp_path, corpus):
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(vocab_size=320, max_position_embeddings=64, initializer_range=0.1, **shape)
        model = transformers.LlamaForCausalLM(config).eval()
    scorer = load_model(model, tokenizer=BYTES)
    assert scorer.separate_head
    cache = quiet(scorer, corpus, tmp_path / "out", k=7)
    assert cache.vocab_size == 320  # more ids than the tokenizer has: the teacher's own normalisation is kept
    for domain in cache.domains:
        ids = torch.from_numpy(np.asarray(corpus.tokens(domain)[: 9 * T], np.int64).reshape(9, T))
        with torch.no_grad():
            full = torch.log_softmax(copy.deepcopy(model).double()(input_ids=ids).logits.flatten(0, 1), -1)
        top = full.topk(7)
        assert (top.values - torch.from_numpy(np.array(cache.part(domain, "logprob")))).abs().max() < 1e-5
        others = full.scatter(1, top.indices, -torch.inf).logsumexp(1)
        assert (others - torch.from_numpy(np.array(cache.part(domain, "rest")))).abs().max() < 1e-5


def test_bfloat16_weights(tmp_path, corpus):
    scorer = teacher()
    scorer.module.bfloat16()
    cache = quiet(scorer, corpus, tmp_path / "out", k=5)
    assert cache.teacher["dtype"] == "bfloat16"
    check_against(cache, scorer, corpus, tolerance=0.5)  # of hidden states in 8 bits


def test_dropout_is_off_and_the_mode_comes_back(tmp_path, corpus):
    model = GPT(GPTConfig(257, 257, 64, 2, 2, 32, dropout=0.5), seed=0).train()
    model.blocks[0].eval()  # a part that its trainer holds still
    modes = [part.training for part in model.modules()]
    scorer = LanguageModel.from_gpt(model, BYTES)
    cache = quiet(scorer, corpus, tmp_path / "out", k=5, domains=["Prose"])
    assert [part.training for part in model.modules()] == modes and all(p.grad is None for p in model.parameters())
    check_against(cache, scorer, corpus)


class Killed(Exception):
    pass


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


@pytest.mark.parametrize("at", [0, 1, 4, 7])
def test_a_killed_run_goes_on(tmp_path, corpus, monkeypatch, at):
    """The finished pieces are not computed again, and the files are the same to the byte."""
    options = {"k": 5, "batch_tokens": 5 * T, "max_windows": 9}
    quiet(teacher(), corpus, tmp_path / "whole", **options)
    append, written, runs = CacheWriter.append, [], []

    def killed(self, domain, *parts):
        if len(written) == at:
            raise Killed
        written.append((domain, len(parts[0])))
        append(self, domain, *parts)

    with monkeypatch.context() as patch:
        patch.setattr(CacheWriter, "append", killed)
        with pytest.raises(Killed):
            quiet(teacher(), corpus, tmp_path / "broken", **options)
    again = teacher()
    hidden = again.hidden
    monkeypatch.setattr(again, "hidden", lambda ids: runs.append(len(ids)) or hidden(ids))
    quiet(again, corpus, tmp_path / "broken", **options)
    assert sum(runs) == 4 * 9 - sum(n for _, n in written)
    assert files(tmp_path / "broken") == files(tmp_path / "whole")


def test_a_killed_process_goes_on(tmp_path, corpus):
    """SIGKILL, which leaves no time to save anything: what was committed stays."""
    teacher().module.save(tmp_path / "model", BYTES)
    program = f"""
import os, signal
from lldfast.distill import cache as teachercache
from lldfast.distill.teach import teach
teachercache.COMMIT_SECONDS = 0.0
append, calls = teachercache.CacheWriter.append, []
def killed(self, domain, ids, logprob, rest):
    if len(calls) == 3:
        self._select(domain)
        self._handles["ids"].write(ids.astype("<u2").tobytes())
        self._handles["ids"].flush()
        os.kill(os.getpid(), signal.SIGKILL)
    calls.append(domain)
    append(self, domain, ids, logprob, rest)
teachercache.CacheWriter.append = killed
teach({str(tmp_path / "model")!r}, {str(corpus.path)!r}, {str(tmp_path / "broken")!r}, k=5, block_size={T},
      batch_tokens={5 * T}, max_windows=9, progress=False)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    assert list(json.loads((tmp_path / "broken" / "progress.json").read_text())["done"].values()) == [9, 5, 0, 0]
    for name in ("broken", "whole"):
        quiet(tmp_path / "model", corpus, tmp_path / name, k=5, batch_tokens=5 * T)
    assert files(tmp_path / "broken") == files(tmp_path / "whole")


def test_a_finished_cache_is_returned(tmp_path, corpus, monkeypatch):
    cache = quiet(teacher(), corpus, tmp_path / "out", k=5)
    before = files(tmp_path / "out")
    monkeypatch.setattr(teach_module, "_write", None)
    (tmp_path / "out" / "progress.json").write_text("{}")  # as after a kill between the last two steps
    assert quiet(teacher(), corpus, tmp_path / "out", k=5).spec == cache.spec and files(tmp_path / "out") == before
    for options, message in [
        ({"k": 6}, "out holds a teacher cache whose k is 5, not 6"),
        ({"k": 5, "block_size": 8}, "block_size is 16, not 8"),
        ({"k": 5, "max_windows": 8}, "domain 'Prose' has 9 windows, not 8"),
        ({"k": 5, "domains": ["Prose"]}, "domains is"),
    ]:
        with pytest.raises(InputError, match=message):
            quiet(teacher(), corpus, tmp_path / "out", **options)
    with pytest.raises(InputError, match="teacher hash is"):
        quiet(teacher(seed=1), corpus, tmp_path / "out", k=5)


def test_the_place(tmp_path, corpus):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("x")
    for out, message in [
        ("", "out is empty"),
        (tmp_path / "file", "is a file, where a folder is needed"),
        (tmp_path / "folder", "not a folder that teach made"),
    ]:
        with pytest.raises(InputError, match=message):
            quiet(teacher(), corpus, out)
    with folder_lock(tmp_path / "busy"), pytest.raises(BusyError, match="busy is being written"):
        quiet(teacher(), corpus, tmp_path / "busy")


def test_wrong_tokenizer(tmp_path, shards):
    with pytest.raises(InputError, match=rf"teacher teacher uses the tokenizer 'bytes' \(hash {BYTES.hash}\).*hash b+\)"):
        quiet(teacher(), shards, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 258}, "k 258 is more than the 257 ids of teacher teacher"),
        ({"k": 0}, "k must be an integer of at least 1, not 0"),
        ({"block_size": 65}, "block_size 65 is more than the 64 tokens that teacher teacher sees"),
        ({"block_size": 0}, "block_size must be"),
        ({"batch_tokens": 0}, "batch_tokens must be"),
        ({"max_windows": 0}, "max_windows must be"),
        ({"max_windows": 1.5}, "max_windows must be"),
        ({"domains": ["Prose", "Code"]}, "has no domain 'Code'; it has: Prose"),
        ({"domains": []}, "no domain to cache has the 16 tokens"),
        ({"device": "gpu"}, "device 'gpu' cannot be used"),
    ],
)
def test_wrong_arguments(tmp_path, corpus, options, message):
    with pytest.raises(InputError, match=message):
        quiet(teacher(), corpus, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_tokenizer(tmp_path, corpus):
    with pytest.raises(InputError, match=r"pass LanguageModel\.from_gpt"):
        quiet(GPT("test-tiny", seed=0), corpus, tmp_path / "out")


def test_a_gpu_is_not_passed_over(tmp_path, corpus, broken_gpu):
    teacher().module.save(tmp_path / "model", BYTES)
    with pytest.raises(InputError, match="device 'cuda' cannot be used here: out of order"):
        quiet(tmp_path / "model", corpus, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert quiet(teacher(), corpus, tmp_path / "out", max_windows=1).windows["Prose"] == 1  # in memory: it stays where it is


def test_short_domains(tmp_path, make_shards, monkeypatch):
    shards = make_shards(tmp_path, {"a": [np.arange(40)], "short": [np.arange(5)], "one": [np.arange(T - 1)]})
    monkeypatch.setattr(shards, "check_tokenizer", lambda *_: None)
    cache = quiet(teacher(), shards, tmp_path / "out", k=2)
    assert cache.windows == {"a": 2, "short": 0, "one": 1} and cache.part("short", "ids").shape == (0, 2)
    assert torch.equal(exact(teacher(), shards, "one", 1).topk(2).indices, torch.from_numpy(cache.part("one", "ids").astype(int)))
    with pytest.raises(InputError, match="no domain to cache has the 64 tokens of one window"):
        quiet(teacher(), shards, tmp_path / "other", block_size=64)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("separate", [True, False])
def test_logits_that_are_not_finite(tmp_path, corpus, monkeypatch, value, separate):
    scorer = teacher()
    scorer.separate_head = separate
    name = "hidden" if separate else "logits"
    original, calls = getattr(scorer, name), []

    def broken(ids):
        out = original(ids)
        calls.append(ids)
        if len(calls) == 4:
            out[1, 7, 3] = value
        return out

    monkeypatch.setattr(scorer, name, broken)
    with pytest.raises(
        InputError, match=r"teacher teacher gives logits that are not finite: domain 'Code .*', window 3, token 7"
    ):
        quiet(scorer, corpus, tmp_path / "out", k=5, batch_tokens=2 * T, max_windows=4)
    assert json.loads((tmp_path / "out" / "progress.json").read_text())["done"]["Code (Python)"] == 2


def test_ids_of_probability_zero(tmp_path, corpus, monkeypatch):
    """A logit of -inf is the probability 0: fine outside the k ids, refused among them."""
    scorer = teacher()
    scorer.separate_head = False
    original = scorer.logits
    monkeypatch.setattr(
        scorer, "logits", lambda ids: torch.cat((original(ids)[..., :20], original(ids)[..., 20:] - torch.inf), -1)
    )
    cache = quiet(scorer, corpus, tmp_path / "out", k=20)
    assert all(cache.part(domain, "ids").max() == 19 for domain in cache.domains)
    assert all((cache.part(domain, "rest") == -np.inf).all() for domain in cache.domains)
    with pytest.raises(InputError, match="only 20 ids a probability above 0, fewer than k=21: domain 'Prose', window 0, token 0"):
        quiet(scorer, corpus, tmp_path / "other", k=21)


def test_tokens_outside_the_vocabulary(tmp_path, corpus, monkeypatch):
    shutil.copytree(corpus.path, tmp_path / "shards")
    tokens = np.fromfile(tmp_path / "shards" / "Prose.bin", "<u2")
    tokens[37] = 999
    tokens.tofile(tmp_path / "shards" / "Prose.bin")
    with pytest.raises(CorruptError, match=r"Prose\.bin: token id 999 at position 37 of domain 'Prose'"):
        quiet(teacher(), tmp_path, tmp_path / "out", k=5)
    small = LanguageModel.from_gpt(GPT("test-tiny", seed=0), BYTES, "small")
    monkeypatch.setattr(LanguageModel, "vocab_size", 100)
    with pytest.raises(InputError, match=r"has token \d+ at position \d+, outside the vocabulary of 100 of teacher small"):
        quiet(small, corpus, tmp_path / "other", k=5)


def test_top_k_of_given_logits():
    z = torch.tensor([[1.0, 3.0, 2.0, -torch.inf], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    full = torch.log_softmax(z, -1)
    ids, logprob, rest = top_k_(z.clone(), 2)
    assert ids[0].tolist() == [1, 2] and ids.dtype == torch.int32 and logprob.dtype == rest.dtype == torch.float32
    assert torch.allclose(logprob, torch.tensor([[full[0, 1], full[0, 2]], [full[1, 0]] * 2]).float())
    assert torch.allclose(rest, torch.stack((full[0, 0], torch.tensor(np.log(0.5)))).float())
    for bad in (torch.nan, torch.inf):
        assert top_k_(torch.tensor([[0.0, bad, 1.0]]), 1)[1].isnan().all()


def test_top_k_of_large_logits_keeps_its_digits():
    """GPT-2's logits lie around -100, where fp32 has steps of 8e-6: log p and the rest are better than that."""
    z = torch.randn(20, 50_257, generator=torch.Generator().manual_seed(0)) * 3 - 100
    ids, logprob, rest = top_k_(z.clone(), 64)
    full = torch.log_softmax(z.double(), -1)
    assert (full.gather(1, ids.long()) - logprob).abs().max() < 1e-6
    assert (full.scatter(1, ids.long(), -torch.inf).logsumexp(1) - rest).abs().max() < 1e-6


def test_the_command(tmp_path, corpus, capsys):
    teacher().module.save(tmp_path / "model", BYTES)
    model, out = str(tmp_path / "model"), tmp_path / "out"
    args = ["teach", model, "--data", str(corpus.path.parent), "--out", str(out), "--block-size", "32", "--k", "8"]
    assert main([*args, "--max-windows", "3", "--domains", "Prose", "DM/Maths", "--batch-tokens", "64"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["domain", "windows", "other", "mass", "entropy", ">=", "MiB"]
    cache = TeacherCache(out)
    assert (cache.k, cache.block_size, cache.windows) == (8, 32, {"Prose": 3, "DM/Maths": 3})
    for line, name in zip(lines[1:3], cache.domains, strict=True):
        mass, entropy = cache.statistics(name)
        assert line.split() == [name, "3", f"{mass:.4f}", f"{entropy:.4f}", f"{cache.n_bytes(name) / 2**20:.1f}"]
    assert lines[3].startswith("8 of 257 ids, windows of 32 tokens") and lines[4] == f"wrote {out}"
    assert main([*args, "--max-windows", "3", "--device", "gpu"]) == 1
    assert "--device 'gpu' cannot be used here" in capsys.readouterr().err
