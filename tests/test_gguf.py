"""models/gguf/: files in llama.cpp's layout against the models that they were made from; broken files; the cache."""

import json
import re
import runpy
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

for package in ("gguf", "accelerate", "transformers", "tokenizers"):
    pytest.importorskip(package)


import lldfast as lld  # noqa: E402
from lldfast.data.evalset import EvalSet  # noqa: E402
from lldfast.errors import CorruptError, InputError, MissingDependencyError  # noqa: E402
from lldfast.models.gguf import convert  # noqa: E402

# The tests are no package: the helper is run from beside them.
made = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("tiny_gguf.py"))))
CASES, TEXTS, VOCAB = made.CASES, made.TEXTS, made.VOCAB
keys_of = made.keys_of
tensors_of = made.tensors_of
tiny = made.tiny
tokenizer_keys = made.tokenizer_keys
train_bpe = made.train_bpe
write = made.write
write_model = made.write_model


EVALSET = EvalSet.from_texts(TEXTS * 3, ["a", "b", "c"] * 3)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLDFAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


@pytest.fixture(scope="module")
def bpe():
    """A byte-level BPE with GPT-2's splitting, trained on the texts, as tokenizers holds it."""
    return train_bpe()


@pytest.fixture(scope="module")
def llama(bpe):
    return tiny("llama")


# Every architecture is slow in sum; these have what the others have: a permutation, biases and a tied head, a window on all
# layers and partial rotation, norms stored plus one and two kinds of layers.
FAST = ("llama", "qwen2", "phi3", "gemma3")


@pytest.mark.parametrize("architecture", [a if a in FAST else pytest.param(a, marks=pytest.mark.slow) for a in CASES])
def test_a_file_and_the_folder_of_the_same_weights(architecture, bpe, tmp_path):
    """The model's own logits, and eq. (2) between the two score vectors under 1e-6, all sizes and settings unlike any default."""
    model = tiny(architecture)
    loaded = lld.load_model(write_model(tmp_path / "m.gguf", architecture, model, bpe), device="cpu")
    assert loaded.context_length == 192
    ids = torch.tensor([bpe.encode(TEXTS[0] + TEXTS[1], add_special_tokens=False).ids])
    with torch.no_grad():
        got, want = loaded.module(ids).logits, model(ids).logits
    assert (got - want).abs().max() < 1e-4 * want.abs().max()
    model.save_pretrained(tmp_path / "folder")
    bpe.save(str(tmp_path / "folder" / "tokenizer.json"))
    folder = lld.load_model(tmp_path / "folder", device="cpu")
    assert lld.kl(lld.score(loaded, EVALSET), lld.score(folder, EVALSET)).nats_per_text < 1e-6


def test_name_licence_and_one_conversion(llama, bpe, tmp_path, monkeypatch):
    file = write_model(tmp_path / "tiny.gguf", "llama", llama, bpe)
    loaded = lld.load_model(file, device="cpu")
    identity = loaded.identity
    assert (identity["name"], identity["kind"], identity["licence"]) == ("Tiny", "gguf", "mit")
    assert loaded.separate_head and identity["dtype"] == "float32" and loaded.bos_id == 0
    assert identity["extra"] == {"file": "tiny.gguf", "converter": convert.CONVERTER}  # the hash is of the file alone
    monkeypatch.setattr(convert, "_convert", lambda *a: pytest.fail("converted a second time"))
    assert lld.load_model(file, device="cpu").identity == identity


def test_a_gguf_file_is_told_by_its_first_bytes(llama, bpe, tmp_path):
    file = write_model(tmp_path / "model", "llama", llama, bpe)
    assert lld.load_model(file, device="cpu").kind == "gguf"


def test_its_packages_are_named(tmp_path, monkeypatch):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(MissingDependencyError, match="GGUF files need the package gguf"):
        lld.load_model(tmp_path / "m.gguf")


@pytest.mark.slow
def test_windows_named_layer_by_layer(bpe, tmp_path):
    model = tiny("gemma3", layer_types=["full_attention", "sliding_attention"])
    file = write_model(tmp_path / "m.gguf", "gemma3", model, bpe, {"attention.sliding_window_pattern": [False, True]})
    ids = torch.arange(100)[None]
    with torch.no_grad():
        got, want = lld.load_model(file, device="cpu").module(ids).logits, model(ids).logits
    assert (got - want).abs().max() < 1e-4 * want.abs().max()
    with pytest.raises(InputError, match=r"gemma3\.attention\.sliding_window_pattern: 3 values for 2 layers"):
        keys = {"attention.sliding_window_pattern": [True, True, False]}
        lld.load_model(write_model(tmp_path / "m2.gguf", "gemma3", model, bpe, keys))


# Rotary positions, against a Llama written out in fp64.


def plain_llama(model, ids, inv_freq, scale):
    """Logits [T, V] of a Llama in fp64; `inv_freq` [d/2] and the factor of cosine and sine are given."""
    config, w = model.config, {name: value.double() for name, value in model.state_dict().items()}
    heads, groups, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    angles = torch.arange(len(ids), dtype=torch.float64)[:, None] * torch.as_tensor(inv_freq, dtype=torch.float64)
    cos, sin = (torch.cat([f(angles), f(angles)], 1) * scale for f in (torch.cos, torch.sin))

    def norm(x, name):
        return x * (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).rsqrt() * w[name]

    def turned(x):  # [heads, T, d]
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat([-b, a], -1) * sin

    x = w["model.embed_tokens.weight"][ids]
    mask = torch.full((len(ids), len(ids)), -torch.inf, dtype=torch.float64).triu(1)
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}."
        h = norm(x, at + "input_layernorm.weight")
        q, k, v = ((h @ w[f"{at}self_attn.{n}_proj.weight"].T).view(len(ids), -1, d).transpose(0, 1) for n in "qkv")
        k, v = (z.repeat_interleave(heads // groups, 0) for z in (turned(k), v))
        attention = (turned(q) @ k.transpose(1, 2) / d**0.5 + mask).softmax(-1) @ v
        x = x + attention.transpose(0, 1).reshape(len(ids), -1) @ w[at + "self_attn.o_proj.weight"].T
        h = norm(x, at + "post_attention_layernorm.weight")
        gate, up = (h @ w[f"{at}mlp.{n}_proj.weight"].T for n in ("gate", "up"))
        x = x + (torch.nn.functional.silu(gate) * up) @ w[at + "mlp.down_proj.weight"].T
    return norm(x, "model.norm.weight") @ w["lm_head.weight"].T


FREQUENCIES = 5000.0 ** (-np.arange(0, 16, 2) / 16)
DIVISORS = np.array([1, 1, 1.7, 3, 8, 8, 8, 8], np.float32)


def yarn(factor, original, fast=32.0, slow=1.0):
    """llama.cpp's: interpolated where a pair turns less than `slow` times in the original context, kept above `fast`."""
    low, high = (16 * np.log(original / (2 * np.pi * turns)) / (2 * np.log(5000.0)) for turns in (fast, slow))
    low, high = max(np.floor(low), 0), min(np.ceil(high), 15)
    share = np.clip((np.arange(8) - low) / max(high - low, 0.001), 0, 1)
    return FREQUENCIES * (1 - share + share / factor), 0.1 * np.log(factor) + 1


@pytest.mark.parametrize(
    "keys, divisors, expected",
    [
        ({}, DIVISORS, (FREQUENCIES / DIVISORS, 1)),
        pytest.param({}, np.ones(8, np.float32), (FREQUENCIES, 1), marks=pytest.mark.slow),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, None, (FREQUENCIES / 4, 1)),
        pytest.param({"rope.scaling.factor": 4.0}, None, (FREQUENCIES / 4, 1), marks=pytest.mark.slow),
        ({"rope.scale_linear": 2.5}, DIVISORS, (FREQUENCIES / DIVISORS / 2.5, 1)),
        pytest.param(
            {"rope.scaling.type": "none", "rope.scaling.factor": 4.0, "rope.scaling.finetuned": True},
            None, (FREQUENCIES, 1), marks=pytest.mark.slow,
        ),
        pytest.param({"rope.scaling.attn_factor": 1.25}, None, (FREQUENCIES, 1.25), marks=pytest.mark.slow),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 48},
            None, yarn(4.0, 48),
        ),
        pytest.param(
            {
                "rope.scaling.type": "yarn", "rope.scaling.factor": 2.0, "rope.scaling.original_context_length": 96,
                "rope.scaling.yarn_beta_fast": 16.0, "rope.scaling.yarn_beta_slow": 2.0,
            },
            None, yarn(2.0, 96, 16.0, 2.0), marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_rotary_positions(keys, divisors, expected, llama, bpe, tmp_path):
    tensors = {} if divisors is None else {"rope_freqs.weight": divisors}
    loaded = lld.load_model(write_model(tmp_path / "m.gguf", "llama", llama, bpe, keys, tensors), device="cpu")
    ids = bpe.encode(TEXTS[0] + TEXTS[1], add_special_tokens=False).ids
    want = plain_llama(llama, ids, *expected)
    with torch.no_grad():
        got = loaded.module(torch.tensor([ids])).logits[0].double()
    assert (got - want).abs().max() < 1e-4 * want.abs().max()
    assert loaded.context_length == 192


def test_long_and_short_factors(bpe, tmp_path):
    """Phi-3's: the same as its folder, on texts within the original context and beyond it."""
    long, short = [1.0, 5.5], [1.0, 1.25]
    rope = {
        "rope_type": "longrope", "rope_theta": 5000.0, "long_factor": long, "short_factor": short, "partial_rotary_factor": 0.5,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    model = tiny("phi3", rope_parameters=rope, original_max_position_embeddings=64, sliding_window=None)
    keys = {
        "rope.scaling.original_context_length": 64, "attention.sliding_window": 0,
        "rope.scaling.attn_factor": float(np.sqrt(1 + np.log(3) / np.log(64))),
    }  # fmt: skip
    factors = {f"rope_factors_{kind}.weight": np.array(values, np.float32) for kind, values in (("long", long), ("short", short))}
    loaded = lld.load_model(write_model(tmp_path / "m.gguf", "phi3", model, bpe, keys, factors), device="cpu")
    for length in (40, 150):
        ids = torch.arange(length)[None] % VOCAB
        with torch.no_grad():
            got, want = loaded.module(ids).logits, model(ids).logits
        assert (got - want).abs().max() < 1e-4 * want.abs().max()
    with pytest.raises(InputError, match=r"m2\.gguf: tensors rope_factors_long\.weight without their counterpart"):
        only = {"rope_factors_long.weight": factors["rope_factors_long.weight"]}
        lld.load_model(write_model(tmp_path / "m2.gguf", "phi3", model, bpe, keys, only))


@pytest.mark.parametrize(
    "keys",
    [
        {"attention.sliding_window": 24}, {"logit_scale": 0.5}, {"embedding_scale": 12.0}, {"residual_scale": 0.2},
        {"attention.scale": 0.1}, {"attention.causal": False}, {"expert_count": 4}, {"final_logit_softcapping": 30.0},
        {"attn_logit_softcapping": 50.0}, {"rope.dimension_count": 8}, {"rope.scaling.type": "su"}, {"rope.freq_base_swa": 1e4},
        {"attention.value_length": 8}, {"attention.head_count": [4, 2]}, {"feed_forward_length": [48, 32]}, {"brand_new": 7},
        {"rope.scaling.yarn_log_multiplier": 0.1, "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, {"vocab_size": 99},
        {"attention.layer_norm_epsilon": 1e-5},
    ],
    ids=lambda keys: next(iter(keys)),
)  # fmt: skip
def test_what_is_not_known_is_refused_by_name(keys, llama, bpe, tmp_path, cache):
    file = write_model(tmp_path / "m.gguf", "llama", llama, bpe, keys)
    with pytest.raises(InputError, match=re.escape(f"m.gguf: llama.{next(iter(keys))}")):
        lld.load_model(file)
    assert not cache.exists() or not list(cache.rglob("*"))


def test_keys_that_change_nothing(llama, bpe, tmp_path):
    keys = {
        "attention.sliding_window": 192, "logit_scale": 1.0, "attention.scale": 0.25, "attention.causal": True, "expert_count": 0,
        "rope.scaling.finetuned": False,
    }  # fmt: skip
    assert lld.load_model(write_model(tmp_path / "m.gguf", "llama", llama, bpe, keys), device="cpu").context_length == 192


def test_architectures_are_named(llama, bpe, tmp_path):
    file = write(tmp_path / "m.gguf", "granite", {}, tensors_of("llama", llama), tokenizer_keys(bpe))
    with pytest.raises(InputError, match=r"m\.gguf: architecture 'granite' is not among those .* qwen2"):
        lld.load_model(file)


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({"blk.1.ffn_up.weight": None}, r"no tensor blk\.1\.ffn_up\.weight for the model's parameter model\.layers\.1\.mlp"),
        pytest.param({"token_embd.weight": None}, "token_embd", marks=pytest.mark.slow),
        ({"blk.0.attn_q_norm.weight": np.ones(16, np.float32)}, r"takes tensors blk\.0\.attn_q_norm\.weight"),
        ({"blk.0.ffn_up.weight": np.ones((48, 31), np.float32)}, r"m\.gguf"),
        ({"rope_freqs.weight": np.ones(7, np.float32)}, r"rope_freqs\.weight must hold 8"),
        pytest.param(
            {"rope_freqs.weight": np.zeros(8, np.float32)}, r"rope_freqs\.weight must hold 8 positive", marks=pytest.mark.slow
        ),
        pytest.param(
            {"blk.0.attn_q.bias": np.ones(64, np.float32)}, r"parameter model\.layers\.0\.self_attn", marks=pytest.mark.slow
        ),
    ],
)
def test_every_tensor_has_its_place(tensors, message, llama, bpe, tmp_path, cache):
    with pytest.raises(InputError, match=message):
        lld.load_model(write_model(tmp_path / "m.gguf", "llama", llama, bpe, tensors=tensors))
    assert not cache.exists() or not list(cache.rglob("*"))


@pytest.mark.parametrize("parameter", ["model.layers.1.self_attn.q_proj.weight", "model.norm.weight"])
def test_values_are_compared(parameter, llama, bpe, tmp_path, cache, monkeypatch):
    """A conversion that loses a single value publishes nothing."""
    load = convert._load

    def altered(file):
        model = load(file)
        with torch.no_grad():
            model.get_parameter(parameter).view(-1)[3] += 0.01
        return model

    monkeypatch.setattr(convert, "_load", altered)
    with pytest.raises(InputError, match=rf"converted parameter {re.escape(parameter)}: the values differ by up to 0\.01"):
        lld.load_model(write_model(tmp_path / "m.gguf", "llama", llama, bpe))
    assert not cache.exists() or not list(cache.rglob("*"))


# Files that end early or contradict themselves.


@pytest.fixture(scope="module")
def content(llama, bpe, tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("whole") / "m.gguf", "llama", llama, bpe).read_bytes()


@pytest.mark.parametrize("share", [0.0002, 0.01, 0.1, 0.3, 0.9, 0.999])
def test_truncated(share, content, tmp_path, cache):
    (tmp_path / "cut.gguf").write_bytes(content[: int(share * len(content))])
    with pytest.raises(CorruptError, match=r"cut\.gguf"):
        lld.load_model(tmp_path / "cut.gguf")
    assert not cache.exists() or not list(cache.rglob("*"))


def test_misshapen(content, llama, bpe, tmp_path):
    bad = tmp_path / "bad.gguf"

    def refused(kind, message, data):
        bad.write_bytes(data)
        with pytest.raises(kind, match=message):
            lld.load_model(bad)

    refused(InputError, r"bad\.gguf is no GGUF file", b"PK\3\4" + content[4:])
    refused(InputError, r"bad\.gguf is no GGUF file", b"")
    refused(InputError, r"bad\.gguf is version 1", content[:4] + struct.pack("<I", 1) + content[8:])
    refused(InputError, r"bad\.gguf is a big-endian", content[:4] + struct.pack(">I", 3) + content[8:])
    refused(CorruptError, r"bad\.gguf", content[:8] + struct.pack("<QQ", 1 << 40, 5) + content[24:])
    name = struct.pack("<Q", len(b"output.weight")) + b"output.weight"
    at = content.index(name) + len(name) + 4 + 16 + 4  # past its two dimensions and its type lies the offset
    refused(CorruptError, r"bad\.gguf", content[:at] + struct.pack("<Q", 1 << 30) + content[at + 8 :])
    refused(CorruptError, r"bad\.gguf: tensors .* overlap", content[:at] + struct.pack("<Q", 32) + content[at + 8 :])
    write(bad, "llama", keys_of("llama", llama), {}, tokenizer_keys(bpe))
    with pytest.raises(InputError, match=r"bad\.gguf holds no tensors"):
        lld.load_model(bad)
    part = {**tokenizer_keys(bpe), "split.count": 3, "split.no": 0}
    file = write(tmp_path / "m-00001-of-00003.gguf", "llama", keys_of("llama", llama), tensors_of("llama", llama), part)
    with pytest.raises(InputError, match=r"m-00001-of-00003\.gguf is one of 3 parts"):
        lld.load_model(file)


def test_an_older_conversion_is_not_used(llama, bpe, tmp_path, cache, monkeypatch):
    """Neither one of the first converter, which lay beside, nor one by another version of this code or of a library."""
    file = write_model(tmp_path / "m.gguf", "llama", llama, bpe)
    folder, digest = convert.converted(file)
    old = cache / f"m-{digest[:16]}"
    old.mkdir()
    (old / "lldfast.json").write_text(json.dumps({"source": "m.gguf", "xxh3": digest, "transformers": "5.23.0"}))
    assert convert.converted(file)[0] == folder
    about = json.loads((folder / "lldfast.json").read_text())
    (folder / "lldfast.json").write_text(json.dumps({**about, "xxh3": "0" * 32}))
    monkeypatch.setattr(convert, "_convert", lambda file, folder, *rest: made.append(folder))
    made = []
    assert convert.converted(file)[0] == folder  # the same place, written anew
    monkeypatch.setattr(convert, "CONVERTER", convert.CONVERTER + 1)
    newer = convert.converted(file)[0]
    monkeypatch.setattr(convert, "version", lambda package: "6.0")
    newest = convert.converted(file)[0]
    assert made == [folder, newer, newest] and len({folder, newer, newest, old}) == 4
