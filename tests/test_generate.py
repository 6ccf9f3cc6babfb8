"""generate.py: what the model writes is a data folder like any other, drawn from the distribution asked for, and resumable."""

import itertools
import json
import random
import shutil

import numpy as np
import pytest
import torch

from lldfast.__main__ import main
from lldfast.data.evalset import EvalSet
from lldfast.data.making.encode import token_hash
from lldfast.data.making.prepare import prepare, verify
from lldfast.data.mixture import DomainMixture
from lldfast.data.shards import TokenShards
from lldfast.data.tokenizer import load_tokenizer, train_bpe
from lldfast.distill import generate as module
from lldfast.distill.generate import Prompts, Sampling, generate, uniform
from lldfast.errors import BusyError, CorruptError, InputError
from lldfast.files import folder_lock, read_json, write_json
from lldfast.models.gpt import GPT, GPTConfig
from lldfast.models.language_model import LanguageModel
from lldfast.models.loading import load_model
from lldfast.run.config import Config, DataConfig
from lldfast.run.experiment import open_data

WORDS = {
    "code": "def return if else for ( ) = x y",
    "prose": "the of and a naïve whale sea captain — “quoted”",
    "a/b": "1 2 3 + - =",
}


def write_corpus(path):
    draw = random.Random(0)
    rows = [(" ".join(draw.choices(WORDS[d].split(), k=120 + i % 50)), d) for i in range(30) for d in WORDS]
    path.write_text("".join(json.dumps({"text": t, "meta": {"pile_set_name": d}}) + "\n" for t, d in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    return prepare(write_corpus(folder / "c.jsonl"), folder / "data", tokenizer="bytes", eval_per_domain=8, progress=False)


def model(seed=0):
    """Its weights are large: what it writes depends on all that went before."""
    gpt = GPT("test-tiny", seed=seed).eval()
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        for p in gpt.parameters():
            if p.dim() == 2:
                p.normal_(0, 0.3, generator=generator)
    return gpt


def scorer(gpt=None, **options):
    return LanguageModel.from_gpt(model() if gpt is None else gpt, load_tokenizer("bytes"), "writer", **options)


def fixed(probabilities):
    """A GPT whose next token has these probabilities always, {id: probability}; every other token has next to none."""
    gpt = GPT("test-tiny", seed=0).eval()
    with torch.no_grad():
        gpt.ln_f.weight.zero_()
        gpt.ln_f.bias.zero_()[0] = 1.0
        gpt.wte.weight[:, 0] = -40.0
        for token, p in probabilities.items():
            gpt.wte.weight[token, 0] = float(np.log(p))
    return gpt


def write(data, out, gpt=None, **options):
    options = {"tokens": 300, "prompt_tokens": 4, "length": 24, "progress": False, **options}
    return generate(gpt if isinstance(gpt, LanguageModel) else scorer(gpt), data, out, **options)


def documents(folder, domain):
    shards = TokenShards(folder)
    tokens, offsets = shards.tokens(domain), shards.offsets(domain)
    return [tokens[a:b].tolist() for a, b in itertools.pairwise(offsets.tolist())]


def content(folder):
    return {p.name: p.read_bytes() for p in sorted((folder / "shards").iterdir())}


@pytest.fixture(scope="module")
def made(data, tmp_path_factory):
    return write(data, tmp_path_factory.mktemp("made") / "out")


def test_the_result_is_a_data_folder(data, made):
    verify(made)
    assert sorted(p.name for p in made.iterdir()) == ["eval.parquet", "generate.json", "prepare.json", "shards"]
    assert [p.name for p in made.parent.iterdir()] == ["out"]  # the work folder is gone
    source, shards, about = TokenShards(data), TokenShards(made), read_json(made / "generate.json")
    assert shards.domains == source.domains and shards.tokenizer == source.tokenizer
    assert EvalSet.load(made / "eval.parquet").hash == EvalSet.load(data / "eval.parquet").hash
    assert about["corpus_hash"] == shards.corpus_hash and about["source"]["corpus_hash"] == source.corpus_hash
    assert about["model"]["name"] == "writer" and about["licence"] is None and about["config"]["first"] == 256
    for name in shards.domains:
        found, counts = documents(made, name), about["domains"][name]
        assert counts["documents"] == len(found) and counts["tokens"] == sum(map(len, found)) == shards.n_tokens[name]
        assert 300 <= counts["tokens"] < 300 + 25
        assert counts["prompt_tokens"] == 4 * len(found) and counts["ended"] + counts["cut"] == len(found)
        assert counts["ended"] >= sum(len(tokens) < 25 for tokens in found)
        assert all(4 < len(tokens) <= 25 and tokens.index(256) == len(tokens) - 1 for tokens in found)
    mixture = DomainMixture(shards, shards.proportions(), block_size=16, batch_size=4)
    assert mixture.next_batch().x.shape == (4, 16)
    opened = open_data(Config(data=DataConfig(path=str(made))))
    assert opened[0].corpus_hash == shards.corpus_hash and opened[2].hash == load_tokenizer("bytes").hash


def test_prepare_does_not_take_it_for_its_own(data, made, tmp_path):
    with pytest.raises(InputError, match=r"was made with other arguments.*inputs = .'generated by writer'"):
        prepare(str(data.parent / "c.jsonl"), made, tokenizer="bytes", eval_per_domain=8, progress=False)


def test_prompts_begin_pieces_of_training_documents(data, made):
    for name in TokenShards(data).domains:
        pieces = [d[at : at + 4] for d in documents(data, name) for at in range(0, len(d) - 4, 24)]
        found = [d[:4] for d in documents(made, name)]
        assert all(prompt in pieces for prompt in found)
        sampling = Sampling(4, 24, 1.0, None, 1.0, 0, 256, 257)
        prompts = Prompts(TokenShards(data), name, sampling)
        assert prompts.n == len(pieces) == read_json(made / "generate.json")["domains"][name]["prompts"]
        drawn = [prompts.tokens(i).tolist() for i in range(prompts.n)]
        assert sorted(drawn) == sorted(pieces) and drawn != pieces  # each once, in another order
        again = [prompts.tokens(prompts.n + i).tolist() for i in range(prompts.n)]
        assert sorted(again) == sorted(pieces) and again != drawn


def test_the_text_depends_on_seed_domain_and_number_only(data, made, tmp_path):
    for size in (1, 7, 500):
        assert content(write(data, tmp_path / f"b{size}", batch_size=size)) == content(made)
    part = write(data, tmp_path / "part", tokens=100, domains=["prose"])
    verify(part)
    assert TokenShards(part).domains == ["prose"] and EvalSet.load(part / "eval.parquet").domains == ["prose"]
    few = documents(part, "prose")
    assert few == documents(made, "prose")[: len(few)]
    by_domain = write(data, tmp_path / "map", tokens={"code": 30, "a/b": 200})
    assert TokenShards(by_domain).domains == ["a/b", "code"]
    assert documents(by_domain, "a/b") == documents(made, "a/b")[: len(documents(by_domain, "a/b"))]
    other = write(data, tmp_path / "seed", seed=1)
    assert documents(other, "prose")[0] != documents(made, "prose")[0]


def test_a_streams_numbers_are_uniform_and_its_own():
    a = uniform(0, "prose", 3, (4000,))
    assert a.dtype == np.float64 and a.min() >= 0 and a.max() < 1 and abs(a.mean() - 0.5) < 4 / np.sqrt(12 * 4000)
    assert np.array_equal(uniform(0, "prose", 3, (5, 2)), a[:10].reshape(5, 2))
    for other in (uniform(1, "prose", 3, (10,)), uniform(0, "code", 3, (10,)), uniform(0, "prose", 4, (10,))):
        assert not np.isin(other, a).any()
    assert a[:2].tolist() == pytest.approx(
        [0.9461628071734496, 0.7344739189389483], abs=1e-15
    )  # the same on every machine and version


def test_frequencies_are_the_models(data, tmp_path):
    probabilities = {65: 0.5, 66: 0.25, 67: 0.19, 256: 0.06}
    out = write(data, tmp_path / "o", fixed(probabilities), tokens=3000)
    # A document that was cut at 24 tokens has an end-of-text token that the model did not write.
    sampled = [t for name in TokenShards(out).domains for d in documents(out, name) for t in d[4:24]]
    n = len(sampled)
    assert set(sampled) == set(probabilities)
    for token, p in probabilities.items():
        assert abs(sampled.count(token) - n * p) < 4 * np.sqrt(n * p * (1 - p))
    counts = read_json(out / "generate.json")["domains"].values()
    share = sum(c["cut"] for c in counts) / sum(c["documents"] for c in counts)
    assert abs(share - 0.94**20) < 0.1


@torch.no_grad()
def test_temperature_zero_writes_the_likeliest_tokens(data, tmp_path):
    gpt = model()
    out = write(data, tmp_path / "o", gpt, tokens=100, temperature=0)
    for name in TokenShards(out).domains:
        for document in documents(out, name):
            x = torch.tensor([[256, *document[:-1]]])
            want = gpt.logits(x).argmax(-1)[0, 4 : 24 if len(document) == 25 else None].tolist()
            assert document[4:24] == want[:20]


def test_top_k_and_top_p_restrict(data, tmp_path):
    gpt = fixed({65: 0.5, 66: 0.3, 67: 0.2})
    for options, allowed in (({"top_k": 2}, {65, 66}), ({"top_p": 0.4}, {65}), ({"top_k": 2, "top_p": 0.7}, {65, 66})):
        out = write(data, tmp_path / str(options), gpt, tokens=300, **options)
        assert {t for name in TokenShards(out).domains for d in documents(out, name) for t in d[4:24]} == allowed


def test_padding_is_never_sampled(data, tmp_path):
    gpt = fixed({65: 0.5, 66: 0.5})
    padded = GPT(GPTConfig(320, 257, 64, 2, 2, 32), seed=0).eval()
    state = gpt.state_dict()
    state["wte.weight"] = torch.cat((state["wte.weight"], torch.full((63, 32), 100.0)))
    padded.load_state_dict(state)
    assert content(write(data, tmp_path / "p", padded)) == content(write(data, tmp_path / "o", gpt))
    # a model that has real ids which the shards' tokenizer lacks
    more = GPT(GPTConfig(320, 320, 64, 2, 2, 32), seed=0).eval()
    more.load_state_dict(state)
    verify(write(data, tmp_path / "m", more))
    assert content(tmp_path / "m") == content(tmp_path / "o")


def test_first_token(data, tmp_path):
    out = write(data, tmp_path / "none", scorer(bos="none"), tokens=100, length=64, temperature=0)
    assert read_json(out / "generate.json")["config"]["first"] is None
    with_eot = write(data, tmp_path / "auto", tokens=100, length=64, temperature=0)  # the 64th token is no input: it fits
    assert documents(out, "prose")[0][:4] == documents(with_eot, "prose")[0][:4]
    assert documents(out, "prose") != documents(with_eot, "prose")


def test_a_model_in_training_goes_on_training(data, tmp_path):
    gpt = GPT(GPTConfig(257, 257, 64, 2, 2, 32, dropout=0.5), seed=0).train()
    gpt.blocks[0].eval()  # a part that its trainer holds still
    modes = [part.training for part in gpt.modules()]
    write(data, tmp_path / "o", gpt, tokens=60)
    assert [part.training for part in gpt.modules()] == modes


def test_a_kill_loses_one_domain_at_most(data, made, tmp_path, monkeypatch):
    original, done = module._write_domain, []

    def write_domain(scorer, prompts, writer, *rest):
        counts = original(scorer, prompts, writer, *rest)
        if prompts.domain == "prose" and "prose" not in done:
            done.append(prompts.domain)
            raise KeyboardInterrupt  # after its tokens, before they are recorded
        done.append(prompts.domain)
        return counts

    monkeypatch.setattr(module, "_write_domain", write_domain)
    out = tmp_path / "o"
    with pytest.raises(KeyboardInterrupt):
        write(data, out)
    assert not out.exists() and (tmp_path / ".o.generate" / "progress.json").exists()
    with pytest.raises(InputError, match=r"\.o\.generate was made with another configuration \(seed = 0, now 5\)"):
        write(data, out, seed=5)
    write(data, out)
    assert done == ["a/b", "code", "prose", "prose"]
    assert content(out) == content(made) and not (tmp_path / ".o.generate").exists()
    assert write(data, out) == out and len(done) == 4  # there already
    (out / "shards" / "prose.bin").write_bytes(b"")
    with pytest.raises(CorruptError, match=r"prose\.bin"):
        write(data, out)


def test_damage_to_what_an_earlier_run_finished_is_noticed(data, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_finish", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write(data, tmp_path / "o")
    monkeypatch.undo()
    file = tmp_path / ".o.generate" / "data" / "shards" / "code.bin"
    raw = bytearray(file.read_bytes())
    raw[0] ^= 1
    file.write_bytes(raw)
    with pytest.raises(CorruptError, match=r"code\.bin: checksum"):
        write(data, tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_one_writer(data, tmp_path):
    with folder_lock(tmp_path / ".o.generate"), pytest.raises(BusyError):
        write(data, tmp_path / "o")


def test_other_folders_are_left_alone(data, made, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(InputError, match="not a folder that generate made"):
        write(data, tmp_path / "full")
    with pytest.raises(InputError, match=r"another configuration \(model = .*temperature = 1.0, now 0.5"):
        write(data, made, model(seed=1), temperature=0.5)
    (tmp_path / "empty").mkdir()
    assert content(write(data, tmp_path / "empty")) == content(made)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "full"]  # nothing is left of what was refused


def test_what_repeats_a_held_out_document_is_dropped(data, made, tmp_path):
    source = shutil.copytree(data, tmp_path / "data")
    record, first = read_json(source / "prepare.json"), documents(made, "prose")[0]
    write_json(source / "prepare.json", {**record, "held_out": [*record["held_out"], token_hash(np.array(first))]})
    out = write(source, tmp_path / "o")
    assert read_json(out / "generate.json")["domains"]["prose"]["held_out_dropped"] == 1
    assert documents(out, "prose")[:5] == documents(made, "prose")[1:6]


def test_prompts_that_repeat_are_reported(data, tmp_path):
    with pytest.warns(UserWarning, match=r"domain 'prose' has \d+ prompts for \d+ documents: they repeat; without chance"):
        out = write(data, tmp_path / "o", tokens=20000, domains="prose", length=64, prompt_tokens=60, temperature=0)
    counts = read_json(out / "generate.json")["domains"]["prose"]
    assert counts["prompts_repeated"] == counts["documents"] + counts["held_out_dropped"] - counts["prompts"] > 0


def test_logits_that_are_not_finite(data, tmp_path):
    gpt = model()
    with torch.no_grad():
        gpt.wpe.weight[9] = float("nan")
    with pytest.raises(InputError, match=r"logits that are not finite .domain 'a/b', document 0, token 9"):
        write(data, tmp_path / "o", gpt)
    assert not list(tmp_path.iterdir())


def test_another_tokenizer_is_refused(data, tmp_path):
    bpe = train_bpe(["to be or not to be", "that is the question"], 257)
    other = LanguageModel.from_gpt(GPT(GPTConfig(320, 300, 64, 2, 2, 32), seed=0), bpe, "writer")
    with pytest.raises(InputError, match=r"model writer uses the tokenizer .* but .* was made with 'bytes'"):
        write(data, tmp_path / "o", other)


def test_shards_of_another_run_are_refused(data, tmp_path):
    source = shutil.copytree(data, tmp_path / "data")
    write_json(source / "prepare.json", {**read_json(source / "prepare.json"), "corpus_hash": "0" * 16})
    with pytest.raises(CorruptError, match=r"corpus_hash is .*files of two runs are mixed"):
        write(source, tmp_path / "o")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 65}, "length=65 is more than the context of model writer, 64"),
        ({"prompt_tokens": 24}, "prompt_tokens=24 must be less than length=24"),
        ({"prompt_tokens": 0}, "prompt_tokens must be an integer of at least 1"),
        ({"tokens": 0}, "tokens must be an integer of at least 1, got 0 for domain 'a/b'"),
        ({"tokens": {"none": 3}}, "has no domain 'none'"),
        ({"tokens": {"code": 3}, "domains": ["code", "prose"]}, "tokens is given for"),
        ({"domains": []}, "empty list"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0}, "top_p"),
        ({"batch_size": 0}, "batch_size"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_arguments(data, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        write(data, tmp_path / "o", **options)
    assert not list(tmp_path.iterdir())


def test_documents_shorter_than_a_prompt(data, tmp_path):
    wide = GPT(GPTConfig(257, 257, 4096, 2, 2, 32), seed=0)
    with pytest.raises(InputError, match="no document of domain 'a/b' has the 4000 tokens of a prompt"):
        write(data, tmp_path / "o", wide, prompt_tokens=4000, length=None)


def test_a_hugging_face_model_and_a_trained_tokenizer(tmp_path):
    transformers = pytest.importorskip("transformers")
    corpus = write_corpus(tmp_path / "c.jsonl")
    data = prepare(corpus, tmp_path / "data", tokenizer="bpe", vocab_size=280, eval_per_domain=8, progress=False)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=300, max_position_embeddings=64, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf = transformers.LlamaForCausalLM(config).eval()
    hf.save_pretrained(tmp_path / "hf")
    shutil.copy(data / "tokenizer.json", tmp_path / "hf")
    own = load_model(hf, tokenizer=str(data / "tokenizer.json"))
    out = write(data, tmp_path / "o", own, tokens=150)
    verify(out)
    assert TokenShards(out).load_tokenizer().hash == own.tokenizer.hash and (out / "tokenizer.json").is_file()
    assert content(write(data, tmp_path / "one", own, tokens=150, batch_size=1)) == content(out)
    options = {"tokens": 150, "prompt_tokens": 4, "length": 24, "progress": False}
    assert content(generate(tmp_path / "hf", data, tmp_path / "folder", device="cpu", **options)) == content(out)


def test_a_gpu_is_not_passed_over(data, tmp_path, broken_gpu):
    model().save(tmp_path / "gpt", load_tokenizer("bytes"))
    with pytest.raises(InputError, match="device 'cuda' cannot be used here: out of order"):
        generate(tmp_path / "gpt", data, tmp_path / "o", tokens=20)


def test_the_command(data, made, tmp_path, capsys):
    model().save(tmp_path / "gpt", load_tokenizer("bytes"), extra={"name": "writer", "licence": "mit"})
    options = ["--data", str(data), "--tokens", "300", "--prompt-tokens", "4", "--length", "24", "--device", "cpu"]
    assert main(["generate", str(tmp_path / "gpt"), *options, "--out", str(tmp_path / "o")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["domain", "documents", "tokens", "mean", "length"] and lines[-1] == f"wrote {tmp_path / 'o'}"
    tokens = documents(made, "prose")
    assert lines[3].split()[:3] == ["prose", str(len(tokens)), f"{sum(map(len, tokens)):,}"]
    assert content(tmp_path / "o") == content(made)
    assert read_json(tmp_path / "o" / "generate.json")["licence"] == "mit"
    assert main(["generate", str(tmp_path / "gpt"), *options, "--out", str(tmp_path / "o"), "--seed", "3"]) == 1
    assert "another configuration" in capsys.readouterr().err
