"""models/gpt.py: equality with Hugging Face's GPT-2, seeds, saving, and the padded vocabulary."""

import dataclasses
import hashlib
import math

import pytest
import torch
import torch.nn.functional as F

from lldfast.data.tokenizer import load_tokenizer, train_bpe
from lldfast.errors import CorruptError, InputError
from lldfast.files import read_json, write_json
from lldfast.models.gpt import GPT, PRESETS, GPTConfig

TINY = GPTConfig(vocab_size=128, valid_vocab=101, block_size=32, n_layer=2, n_head=2, n_embd=16)


def ids(*shape, vocab=101, seed=1):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def test_presets_have_the_sizes_in_their_names():
    with torch.device("meta"):
        sizes = {name: GPT(PRESETS[name], seed=0).num_params() for name in PRESETS if name != "nano-124m"}
    assert sizes["demo-330k"] == 334_464
    assert 0.9e6 < sizes["demo-1m"] < 1.1e6 and 3.4e6 < sizes["demo-4m"] < 4.4e6
    c = PRESETS["nano-124m"]
    assert (c.vocab_size, c.valid_vocab, c.block_size, c.n_layer, c.n_head, c.n_embd) == (50304, 50257, 1024, 12, 12, 768)


def test_seeded_init_leaves_the_global_random_state_alone():
    state = torch.get_rng_state()
    a, b, c = GPT(TINY, seed=3), GPT(TINY, seed=3), GPT(TINY, seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.wte.weight, c.wte.weight)
    assert not torch.equal(GPT(TINY).wte.weight, GPT(TINY).wte.weight)


def test_init_has_the_scales_of_nanogpt():
    model = GPT(GPTConfig(512, 512, 64, 4, 4, 64), seed=0).requires_grad_(False)
    assert float(model.wte.weight.std()) == pytest.approx(0.02, rel=0.03)
    assert float(model.blocks[0].down.weight.std()) == pytest.approx(0.02 / math.sqrt(8), rel=0.03)
    assert float(model.blocks[0].qkv.bias.abs().max()) == 0 and float(model.ln_f.weight.min()) == 1
    assert math.isclose(model.loss(ids(2, 64, vocab=512), ids(2, 64, vocab=512, seed=2)).item(), math.log(512), rel_tol=0.02)


def test_loss_is_cross_entropy_over_the_valid_vocabulary():
    model = GPT(TINY, seed=0)
    x, y = ids(3, 20), ids(3, 20, seed=2)
    y[0, :5] = -100
    with torch.no_grad():
        model.wte.weight[101:] = math.nan  # padding must not matter
    assert model.logits(x).shape == (3, 20, 101)
    want = F.cross_entropy(model.logits(x).flatten(0, 1), y.flatten())
    loss, logprob = model.loss(x, y, return_logprob=True)
    torch.testing.assert_close(loss, want)
    assert logprob.shape == (3, 20) and bool((logprob[0, :5] == 0).all())


def test_gradients_equal_plain_autograd():
    model = GPT(TINY, seed=0)
    x, y = ids(2, 32), ids(2, 32, seed=2)
    got = torch.autograd.grad(model.loss(x, y), list(model.parameters()))
    want = torch.autograd.grad(F.cross_entropy(model.logits(x).flatten(0, 1), y.flatten()), list(model.parameters()))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_it_is_causal():
    model = GPT(TINY, seed=0)
    x = ids(1, 16)
    changed = x.clone()
    changed[0, 10:] = (changed[0, 10:] + 1) % 101
    torch.testing.assert_close(model(x)[:, :10], model(changed)[:, :10])
    assert not torch.allclose(model(x)[:, 10:], model(changed)[:, 10:])


def test_it_learns():
    model, x = GPT(TINY, seed=0), ids(4, 33)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = model.loss(x[:, :-1], x[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] > 4.4 and losses[-1] < 1.0


def test_dropout_only_in_training():
    model = GPT(dataclasses.replace(TINY, dropout=0.3), seed=0)
    x = ids(2, 16)
    assert not torch.equal(model.train()(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


@pytest.mark.parametrize("bias", [True, False])
def test_to_hugging_face_and_back(bias):
    pytest.importorskip("transformers")
    model = GPT(dataclasses.replace(TINY, bias=bias), seed=5).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)  # far from the init, where GELU's forms and biases would hardly show
            if p.dim() == 1:
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(p))))
    state = torch.get_rng_state()
    hf = model.to_hf()
    assert torch.equal(torch.get_rng_state(), state)
    x = ids(3, 32)
    torch.testing.assert_close(hf(x).logits, model.logits(x), rtol=0, atol=1e-5)
    back = GPT.from_hf(hf)
    assert back.config == dataclasses.replace(TINY, bias=True)
    torch.testing.assert_close(back.logits(x), hf(x).logits, rtol=0, atol=1e-5)


def test_from_hugging_face_with_random_weights(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 150, "n_positions": 24, "n_embd": 24, "n_layer": 3, "n_head": 3}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    hf = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for p in hf.parameters():
            p.normal_(0, 0.2, generator=torch.Generator().manual_seed(p.numel()))
    hf.save_pretrained(tmp_path)
    x = ids(2, 24, vocab=150)
    for source in (hf, tmp_path):
        model = GPT.from_hf(source)
        assert (model.config.vocab_size, model.config.valid_vocab) == (192, 150)
        torch.testing.assert_close(model.logits(x), hf(x).logits, rtol=1e-5, atol=1e-5)


def test_variants_of_gpt2_that_are_not_computed_are_refused():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 1, "bos_token_id": 0, "eos_token_id": 0}
    with pytest.raises(InputError, match="activation_function='relu'"):
        GPT.from_hf(transformers.GPT2LMHeadModel(transformers.GPT2Config(activation_function="relu", **sizes)))
    with pytest.raises(InputError, match="not Linear"):
        GPT.from_hf(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("dtype,tolerance", [("float32", 0), ("float16", 2e-3), ("bfloat16", 2e-2)])
def test_save_and_load(tmp_path, dtype, tolerance):
    model = GPT(TINY, seed=0)
    model.save(tmp_path / "m", extra={"name": "ours", "domain_weights": {"Ünïcode": 1.0}}, dtype=dtype)
    back = GPT.load(tmp_path / "m")
    assert back.config == TINY and not back.training
    for p, q in zip(model.parameters(), back.parameters(), strict=True):
        assert q.dtype == torch.float32
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance * 1e-2)
    size = (tmp_path / "m" / "model.safetensors").stat().st_size
    width = 4 if dtype == "float32" else 2
    assert size < model.num_params() * width + 8192  # the tied head is stored once
    about = read_json(tmp_path / "m" / "model.json")
    assert about["format"] == "lldfast-gpt" and about["tokenizer"] is None
    assert about["extra"]["domain_weights"] == {"Ünïcode": 1.0}


def test_saving_with_a_tokenizer(tmp_path):
    GPT(TINY, seed=0).save(tmp_path / "a", tokenizer_describe=load_tokenizer("bytes").describe())
    assert read_json(tmp_path / "a" / "model.json")["tokenizer"]["kind"] == "bytes"
    tokenizer = train_bpe(["to be or not to be", "that is the question"], 270)
    GPT(TINY, seed=0).save(tmp_path / "b", tokenizer_describe=tokenizer)
    assert (tmp_path / "b" / "tokenizer.json").is_file()
    assert read_json(tmp_path / "b" / "model.json")["tokenizer"]["hash"] == tokenizer.hash


def test_altered_files_are_noticed(tmp_path):
    GPT(TINY, seed=0).save(tmp_path)
    weights, about = tmp_path / "model.safetensors", read_json(tmp_path / "model.json")
    good = weights.read_bytes()
    weights.write_bytes(good[:-8])
    with pytest.raises(CorruptError, match="SHA-256"):
        GPT.load(tmp_path)
    weights.write_bytes(good)
    write_json(tmp_path / "model.json", {**about, "config": {**about["config"], "n_layer": 3}})
    with pytest.raises(CorruptError, match=r"(?s)do not fit.*blocks\.2"):
        GPT.load(tmp_path)
    write_json(tmp_path / "model.json", {**about, "format": "other"})
    with pytest.raises(InputError, match="lldfast-gpt"):
        GPT.load(tmp_path)
    weights.unlink()
    write_json(tmp_path / "model.json", about)
    with pytest.raises(CorruptError, match="missing"):
        GPT.load(tmp_path)


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    model = GPT(TINY, seed=0)
    with torch.no_grad():
        model.ln_f.weight[0] = 1e6  # beyond fp16
    with pytest.raises(InputError, match=r"ln_f\.weight.*not finite in float16"):
        model.save(tmp_path / "m", dtype="float16")
    assert not (tmp_path / "m" / "model.safetensors").exists()


@pytest.mark.parametrize(
    "change,message",
    [
        ({"n_head": 3}, "multiple of n_head"),
        ({"valid_vocab": 129}, "valid_vocab=129"),
        ({"dropout": 1.0}, "dropout"),
        ({"n_layer": 0}, "n_layer"),
    ],
)
def test_bad_configurations(change, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(TINY, **change)


def test_bad_calls():
    with pytest.raises(InputError, match="unknown GPT preset"):
        GPT("gpt-5")
    with pytest.raises(InputError, match="33 tokens do not fit a block_size of 32"):
        GPT(TINY, seed=0)(ids(1, 33))


def test_compiles_without_a_graph_break():
    model = GPT(TINY, seed=0)
    x, y = ids(2, 16), ids(2, 16, seed=2)
    compiled = torch.compile(model.loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, y), model.loss(x, y))


@pytest.mark.parametrize("field", ["config", "sha256", "tokenizer", "extra"])
def test_a_model_json_of_wrong_types(tmp_path, field):
    GPT("test-tiny", seed=0).save(tmp_path)
    about = read_json(tmp_path / "model.json")
    write_json(tmp_path / "model.json", {**about, field: 5})
    with pytest.raises(CorruptError, match=rf"model\.json: field '{field}' is missing or of a wrong type"):
        GPT.load(tmp_path)


def test_corrupted_weights_with_a_fitting_hash(tmp_path):
    GPT("test-tiny", seed=0).save(tmp_path)
    for content in (b"", b"\xff" * 500):
        (tmp_path / "model.safetensors").write_bytes(content)
        about = {**read_json(tmp_path / "model.json"), "sha256": hashlib.sha256(content).hexdigest()}
        write_json(tmp_path / "model.json", about)
        with pytest.raises(CorruptError, match=r"weights and model\.json do not fit"):
            GPT.load(tmp_path)
