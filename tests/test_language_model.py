"""models/language_model.py: taking models apart, first tokens, windows, identities."""

import numpy as np
import pytest
import torch

from lldfast import gram
from lldfast.data.evalset import EvalSet
from lldfast.data.tokenizer import load_tokenizer, train_bpe
from lldfast.errors import InputError
from lldfast.measure.score import score
from lldfast.models import language_model as module
from lldfast.models import loading
from lldfast.models.gpt import GPT, GPTConfig
from lldfast.models.hf_config import UNLIMITED
from lldfast.models.language_model import LanguageModel, windows
from lldfast.models.loading import load_model

TEXTS = ["The quick brown fox.", "naïve café", "x", "0 1 2 3 4 5 6 7 8 9 " * 4, "<|endoftext|> is text here"]
LAYERS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES = {**LAYERS, "intermediate_size": 48, "max_position_embeddings": 64}
FAMILIES = {
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "GPTNeoX": SIZES,
    "Llama": {**SIZES, "num_key_value_heads": 1},
    "Gemma2": {**SIZES, "num_key_value_heads": 1, "head_dim": 16, "final_logit_softcapping": 5.0},
    "Granite": {**SIZES, "logits_scaling": 4.0},
    "Cohere": {**SIZES, "logit_scale": 0.0625},
    "OPT": {**LAYERS, "ffn_dim": 48, "word_embed_proj_dim": 16},
    "Phi": SIZES,  # its head has a bias
    "Mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
}


def tiny(family, vocab=300):
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, f"{family}ForCausalLM") and family not in ("GPT2",):
        pytest.skip(f"this transformers has no {family}")
    config = getattr(transformers, f"{family}Config")(
        vocab_size=vocab, bos_token_id=0, eos_token_id=0, pad_token_id=0, **FAMILIES[family]
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM")(config).eval()
        with torch.no_grad():
            for p in model.parameters():
                if p.dim() >= 2:
                    p.normal_(0, 0.15)
                elif p.abs().max() == 0:
                    p.normal_(0, 0.05)
    return model


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(["the quick brown fox jumps over the lazy dog", "0 1 2 3 4 5 6 7 8 9"], 290)


@pytest.fixture
def texts():
    return EvalSet.from_texts(TEXTS, ["a", "b", "b", "c", "c"])


def adding_bos(tokenizer):
    """The same BPE whose own default is to put <|endoftext|> first."""
    from tokenizers import Tokenizer as Backend
    from tokenizers.processors import TemplateProcessing

    backend = Backend.from_str(tokenizer.backend.to_str())
    eot = "<|endoftext|>"
    backend.post_processor = TemplateProcessing(single=f"{eot} $A", special_tokens=[(eot, tokenizer.eot)])
    transformers = pytest.importorskip("transformers")
    return load_tokenizer(transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=eot, eos_token=eot))


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_head_give_the_models_logits(family, bpe):
    model = tiny(family)
    scorer = load_model(model, tokenizer=bpe)
    assert scorer.separate_head and scorer.identity["head"] == "weight", scorer.identity["head"]
    ids = torch.randint(300, (2, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = model(input_ids=ids).logits
        torch.testing.assert_close(scorer.head().logits(scorer.hidden(ids)), want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(scorer.logits(ids), want)
    assert scorer.vocab_size == 300
    assert scorer.context_length == (UNLIMITED if family == "Mamba" else 2048 if family == "OPT" else 64)


@pytest.mark.parametrize(
    "family,option,value", [("Gemma2", "softcap", 5.0), ("Granite", "logit_scale", 0.25), ("Cohere", "logit_scale", 0.0625)]
)
def test_the_head_carries_its_options(family, option, value, bpe):
    assert load_model(tiny(family), tokenizer=bpe).head().options()[option] == value


def test_a_model_in_memory_keeps_its_mode(bpe):
    model = tiny("Llama").train()
    assert load_model(model, tokenizer=bpe).module is model and model.training


def test_the_head_carries_its_bias(bpe):
    model = tiny("Phi")
    assert load_model(model, tokenizer=bpe).head().bias is model.lm_head.bias


def test_a_head_that_does_something_else_falls_back_to_logits(bpe):
    model = tiny("Llama")
    plain = model.forward
    model.forward = lambda **kwargs: _squared(plain(**kwargs))
    scorer = load_model(model, tokenizer=bpe)
    assert not scorer.separate_head and "not a scale and a soft cap" in scorer.identity["head"]
    with pytest.raises(InputError, match="cannot be told apart"):
        scorer.hidden(torch.zeros(1, 2, dtype=torch.long))
    with pytest.raises(InputError, match="cannot be told apart"):
        scorer.head()


def _squared(out):
    out.logits = out.logits.square()
    return out


def test_a_quantised_head_falls_back_to_logits(bpe):
    class Packed(torch.nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.linear = linear

        def forward(self, x):
            return self.linear(x)

    model = tiny("Llama")
    model.lm_head = Packed(model.lm_head)
    scorer = load_model(model, tokenizer=bpe)
    assert not scorer.separate_head and "no plain output matrix" in scorer.identity["head"]


def test_taking_apart_leaves_the_mode(bpe):
    model = tiny("Llama").train()
    LanguageModel(model, bpe, name="m", kind="hf", source="memory", context_length=64)
    assert model.training


def test_bos_is_put_once(bpe, texts):
    first = adding_bos(bpe)
    assert first.adds_bos and first.bos == bpe.eot
    for tokenizer, mode, prefix in [
        (bpe, "auto", [bpe.eot]),
        (first, "auto", [bpe.eot]),
        (first, "native", [bpe.eot]),
        (bpe, "native", []),
        (bpe, "none", []),
        (first, "none", []),
    ]:
        scorer = load_model(tiny("Llama"), tokenizer=tokenizer, bos=mode)
        for segment, text in zip(_by_text(scorer.tokenize(texts)), TEXTS, strict=True):
            assert segment == [*prefix, *bpe.encode(text)][: len(segment)] or len(segment) == 0
            assert segment.count(bpe.eot) == (len(prefix) if segment else 0)
        assert scorer.with_bos("none").bos_id is None and scorer.bos == mode


def _by_text(segments):
    return [next((s.ids.tolist() for s in segments if s.text == i), []) for i in range(len(TEXTS))]


def test_models_without_any_first_token(texts):
    tokenizer = load_tokenizer("bytes")
    tokenizer.eot = None
    scorer = LanguageModel.from_gpt(GPT(GPTConfig(257, 257, 16, 1, 1, 8), seed=0), tokenizer)
    assert scorer.bos_id is None
    assert sum(len(s) - s.first for s in scorer.tokenize(texts)) == sum(len(t.encode()) - 1 for t in TEXTS)


@pytest.mark.parametrize("n", [0, 1, 2, 5, 6, 7, 11, 16, 17, 40])
@pytest.mark.parametrize("overlap", [0, 1, 4])
def test_windows_score_every_token_once(n, overlap):
    ids = np.arange(n)
    found = []
    for s in windows(3, ids, 5, overlap):
        assert s.text == 3 and 1 <= len(s) <= 5 and np.array_equal(np.diff(s.ids), np.ones(len(s)))
        assert len(s) == 5 or s.first == 0 or n - 1 == s.ids[-1]
        found += s.ids[1 + s.first :].tolist()
    assert found == list(range(1, n))


def test_tokenisation_is_cached_per_set_rule_and_overlap(texts, monkeypatch):
    scorer = LanguageModel.from_gpt(GPT(GPTConfig(257, 257, 16, 1, 1, 8), seed=0), load_tokenizer("bytes"))
    calls = []
    encode = scorer._encode
    monkeypatch.setattr(scorer, "_encode", lambda t: calls.append(1) or encode(t))
    for _ in range(3):
        scorer.tokenize(texts)
    assert len(calls) == 1
    scorer.tokenize(texts, overlap=3)
    scorer.tokenize(texts.select(domains="b"))
    assert len(calls) == 3
    for i in range(6):
        scorer.tokenize(EvalSet.from_texts([f"text {i}"], ["a"]))
    assert len(scorer.tokenized) == module.TOKENIZED_SETS


def test_tokenizer_larger_than_the_model(bpe, texts):
    scorer = load_model(tiny("Llama", vocab=100), tokenizer=bpe)
    with pytest.raises(InputError, match=r"text \d \(domain [abc]\) has token \d+, outside the vocabulary of 100"):
        scorer.tokenize(texts)
    with pytest.raises(InputError, match="ids, the model only 257"):
        LanguageModel.from_gpt(GPT(GPTConfig(257, 257, 16, 1, 1, 8), seed=0), bpe)


def test_gpt_folder(tmp_path, texts):
    tokenizer = train_bpe(TEXTS, 280)
    gpt = GPT(GPTConfig(320, tokenizer.vocab_size, 32, 1, 2, 16), seed=1)
    extra = {"name": "Mine", "licence": "MIT", "domain_weights": {"a": 1.0}}
    gpt.save(tmp_path / "mine", tokenizer_describe=tokenizer, extra=extra)
    scorer = load_model(tmp_path / "mine", device="cpu")
    identity = scorer.identity
    assert (identity["name"], identity["kind"], identity["licence"]) == ("Mine", "gpt", "MIT")
    assert identity["extra"]["domain_weights"] == {"a": 1.0} and len(identity["hash"]) == 64
    assert scorer.tokenizer.hash == tokenizer.hash and scorer.vocab_size == tokenizer.vocab_size
    assert torch.equal(scorer.head().weight, gpt.head_weight) and not scorer.module.training
    gpt.save(tmp_path / "bare")
    with pytest.raises(InputError, match="names no tokenizer"):
        load_model(tmp_path / "bare")
    assert load_model(tmp_path / "bare", tokenizer=tokenizer).tokenizer is tokenizer


def test_a_path_is_loaded_on_the_auto_device_and_a_model_in_memory_stays(tmp_path, monkeypatch, texts):
    gpt = GPT(GPTConfig(300, 300, 16, 1, 2, 16), seed=1)
    gpt.save(tmp_path / "model", load_tokenizer("bytes"))
    texts.save(tmp_path / "eval.parquet")
    picked = []

    def pick(device, what="device"):
        picked.append((device, what))
        return torch.device("cpu")

    monkeypatch.setattr(loading, "pick_device", pick)
    load_model(tmp_path / "model")
    score(tmp_path / "model", tmp_path / "eval.parquet")
    assert {device for device, what in picked if what == "device"} == {"auto"}
    picked.clear()
    load_model(tmp_path / "model", device="cuda:1")
    assert picked[0] == ("cuda:1", "device")
    picked.clear()
    score(load_model(gpt, tokenizer="bytes"), texts)
    assert picked == []


@pytest.mark.parametrize("use", [lambda path, texts: load_model(path), score, gram.estimate])
def test_a_gpu_is_not_passed_over(tmp_path, texts, use, broken_gpu):
    """The one that is there is chosen without being asked for, also where it turns out that it cannot be used."""
    GPT(GPTConfig(300, 300, 16, 1, 2, 16), seed=1).save(tmp_path / "model", load_tokenizer("bytes"))
    with pytest.raises(InputError, match="device 'cuda' cannot be used here: out of order"):
        use(tmp_path / "model", texts)


def test_identity_follows_weights_in_training():
    gpt = GPT(GPTConfig(257, 257, 16, 1, 1, 8), seed=0)
    scorer = LanguageModel.from_gpt(gpt, load_tokenizer("bytes"), name="run")
    before = scorer.identity
    assert before == scorer.identity and before["parameters"] == gpt.num_params() and before["bos"] == {"mode": "auto", "id": 256}
    with torch.no_grad():
        gpt.wte.weight[0, 0] += 1
    assert scorer.identity["hash"] != before["hash"]


def test_identity_of_a_loaded_model_follows_its_weights(tmp_path, bpe):
    tiny("Llama").save_pretrained(tmp_path)
    bpe.save(tmp_path)
    scorer = load_model(tmp_path)
    of_the_file = scorer.identity["hash"]
    assert scorer.to("cpu").identity["hash"] == of_the_file
    with torch.no_grad():
        scorer.module.lm_head.weight[0, 0] += 1
    changed = scorer.identity["hash"]
    assert changed != of_the_file
    scorer.module.lm_head.weight = torch.nn.Parameter(scorer.module.lm_head.weight.detach() * 2)
    assert scorer.identity["hash"] not in (of_the_file, changed)


def test_hugging_face_folder(tmp_path, bpe):
    model = tiny("Llama")
    model.save_pretrained(tmp_path)
    bpe.save(tmp_path)
    (tmp_path / "README.md").write_text("---\ntags: [x]\nlicense: apache-2.0\n---\n# Model\n")
    scorer = load_model(tmp_path, dtype="bfloat16")
    assert scorer.identity["licence"] == "apache-2.0" and scorer.identity["dtype"] == "bfloat16"
    assert scorer.tokenizer.hash == bpe.hash and scorer.identity["head"] == "weight"
    again = load_model(tmp_path).identity["hash"]
    assert again == scorer.identity["hash"]
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    model.save_pretrained(tmp_path)
    assert load_model(tmp_path).identity["hash"] != again
    assert load_model(tmp_path, context_length=8).context_length == 8
    with pytest.raises(InputError, match="context_length=65"):
        load_model(tmp_path, context_length=65)


def test_bad_arguments(tmp_path, bpe):
    with pytest.raises(InputError, match="no such model folder"):
        load_model(tmp_path / "absent")
    with pytest.raises(InputError, match=r"neither model\.json nor config\.json"):
        load_model(tmp_path)
    with pytest.raises(InputError, match="no such file"):
        load_model(tmp_path / "m.gguf")
    with pytest.raises(InputError, match="dtype='int8'"):
        load_model(tmp_path, dtype="int8")
    with pytest.raises(InputError, match="bos='twice'"):
        load_model(tiny("Llama"), tokenizer=bpe, bos="twice")
    with pytest.raises(InputError, match="needs tokenizer="):
        load_model(tiny("Llama"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="transformers cannot load"):
        load_model(tmp_path)
    with pytest.raises(InputError, match="overlap=64"):
        load_model(tiny("Llama"), tokenizer=bpe).tokenize(EvalSet.from_texts(["a"], ["b"]), overlap=64)


@pytest.mark.parametrize("device", ["gpu", "cpu:x"])
def test_no_such_device(device):
    scorer = LanguageModel.from_gpt(GPT("test-tiny", seed=0), load_tokenizer("bytes"))
    with pytest.raises(InputError, match=f"device '{device}' cannot be used here"):
        scorer.to(device)
