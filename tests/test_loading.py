"""models/loading.py and below: every weight accounted for, names of wrappers, adapters, modes, files that are not whole."""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
import torch.nn as nn
from safetensors.torch import load_file, save_file

from lldfast import gram
from lldfast.data.evalset import EvalSet
from lldfast.data.tokenizer import load_tokenizer, train_bpe
from lldfast.errors import CorruptError, InputError, MissingDependencyError
from lldfast.measure.score import score, token_kl
from lldfast.models.gpt import GPT, GPTConfig
from lldfast.models.identity import folder_hash
from lldfast.models.language_model import LanguageModel
from lldfast.models.loading import load_model
from lldfast.models.modes import evaluation_mode
from lldfast.models.pretrained import check_loaded
from lldfast.models.wrappers import plain_name, unwrap

transformers = pytest.importorskip("transformers")
TEXTS = EvalSet.from_texts(["The quick brown fox.", "naïve café", "0 1 2 3 4 5 6 7 8 9"], ["a", "b", "b"])
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
FIELDS = {
    "Llama": {**SIZES, "num_key_value_heads": 1, "max_position_embeddings": 64},
    "GPT2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "GPTNeoX": {**SIZES, "max_position_embeddings": 64},
    "Mixtral": {**SIZES, "num_key_value_heads": 1, "num_local_experts": 2, "max_position_embeddings": 64},
}


def few(values, *kept):
    """Parameters of which the `kept` ones are in the tests' quick tier."""
    return [value if value in kept else pytest.param(value, marks=pytest.mark.slow) for value in values]


def tiny(family="Llama", **fields):
    config = getattr(transformers, f"{family}Config")(
        vocab_size=260, bos_token_id=0, eos_token_id=0, pad_token_id=0, **{**FIELDS[family], **fields}
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p), alpha=0.1)
    return model


def keys_of(model):
    """What `save_pretrained` would write: tied weights once."""
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    return {name: p.detach().clone() for name, p in model.state_dict().items() if name not in tied}


def write(folder, model, rename=lambda name: name, form="safetensors", drop=(), extra=None):
    """A Hugging Face folder of `model`, its weights under other names, in one of the four forms."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    state = {rename(n): p.contiguous() for n, p in keys_of(model).items() if not any(part in n for part in drop)}
    state |= extra or {}
    if form in ("safetensors", "bin"):
        parts = {"model.safetensors" if form == "safetensors" else "pytorch_model.bin": state}
    else:
        names, half = list(state), len(state) // 2
        suffix = form.removeprefix("sharded ")
        parts = {f"part-{i}.{suffix}": {n: state[n] for n in part} for i, part in enumerate((names[:half], names[half:]))}
        index = {"metadata": {}, "weight_map": {n: file for file, part in parts.items() for n in part}}
        stem = "model.safetensors" if suffix == "safetensors" else "pytorch_model.bin"
        (folder / f"{stem}.index.json").write_text(json.dumps(index))
    for name, part in parts.items():
        if name.endswith("safetensors"):
            save_file(part, folder / name, metadata={"format": "pt"})
        else:
            torch.save(part, folder / name)
    return folder


def nats(spec, **options):
    model = spec if isinstance(spec, LanguageModel) else load_model(spec, tokenizer="bytes", **options)
    return score(model, TEXTS).logprob


@pytest.fixture(scope="module")
def llama():
    return tiny()


@pytest.fixture(scope="module")
def expected(llama):
    return nats(llama).tolist()


WRAPPED = {
    "compiled": lambda n: f"_orig_mod.{n}",
    "compiled trunk": lambda n: n.replace("model.", "model._orig_mod.", 1),
    "compiled layers": lambda n: n.replace("layers.0.", "layers.0._orig_mod.").replace("layers.1.", "layers.1._orig_mod."),
    "DistributedDataParallel": lambda n: f"module.{n}",
    "both": lambda n: f"module._orig_mod.{n}",
    "FSDP": lambda n: f"_fsdp_wrapped_module.{n.replace('layers.0.', 'layers.0._fsdp_wrapped_module.')}",
    "checkpointed": lambda n: n.replace("mlp.", "mlp._checkpoint_wrapped_module."),
    "Fabric": lambda n: f"_forward_module.{n}",
    "Lightning": lambda n: f"model.{n}",
    "Lightning compiled": lambda n: f"model._orig_mod.{n}",
    "PEFT": lambda n: f"base_model.model.{n}",
}


@pytest.mark.parametrize("kind", few(WRAPPED, "compiled", "compiled layers", "both", "checkpointed"))
def test_names_of_wrappers_are_taken_off(tmp_path, llama, expected, kind):
    folder = write(tmp_path / "model", llama, WRAPPED[kind])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert nats(folder).tolist() == expected
    # What transformers takes off by itself (its own name of the trunk before every name) is as it should be, and not noted.
    assert kind == "Lightning" or any("as a compiler or trainer wraps them" in str(w.message) for w in said)


@pytest.mark.parametrize("form", few(["bin", "sharded safetensors", "sharded bin"], "sharded bin"))
def test_names_of_wrappers_in_every_form(tmp_path, llama, expected, form):
    assert nats(write(tmp_path / "plain", llama, form=form)).tolist() == expected
    with pytest.warns(UserWarning, match="_orig_mod"):
        assert nats(write(tmp_path / "wrapped", llama, WRAPPED["compiled"], form)).tolist() == expected


@pytest.mark.parametrize("family", few(["GPT2", "GPTNeoX", "Mixtral"], "Mixtral"))
@pytest.mark.parametrize("kind", few(["compiled", "Lightning", "PEFT"], "PEFT"))
def test_names_of_wrappers_of_other_families(tmp_path, family, kind):
    model = tiny(family)
    folder = tmp_path / "model"
    model.save_pretrained(folder)  # Mixtral's experts are stored one by one and put together by a load
    want = nats(folder)
    state = {WRAPPED[kind](name): value for name, value in load_file(folder / "model.safetensors").items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert nats(folder).tolist() == want.tolist()


def test_two_loads_are_equal_to_the_bit(tmp_path, llama):
    folder = write(tmp_path / "model", llama, WRAPPED["compiled"])
    with pytest.warns(UserWarning, match="all fit"):
        first, second = (load_model(folder, tokenizer="bytes").module.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


REFUSED = {
    "no MLP": ({"drop": ["layers.1.mlp"]}, "3 weights that the model has are missing: model.layers.1.mlp.down_proj"),
    "one norm": ({"drop": ["layers.0.input_layernorm"]}, "1 weight .* missing: model.layers.0.input_layernorm.weight"),
    "no head": ({"drop": ["lm_head"]}, "missing: lm_head.weight"),
    "trunk": ({"drop": ["lm_head"], "rename": lambda n: n.removeprefix("model.")}, "missing: lm_head.weight"),
    "unknown names": ({"rename": lambda n: f"student.{n}"}, "no place for 21 weights: student.lm_head.weight, .* and 18 more"),
    "a wrapper, and less": ({"rename": WRAPPED["compiled"], "drop": ["layers.1.mlp"]}, "model.layers.1.mlp.down_proj.weight"),
    "a layer more": ({"extra": {"model.layers.2.mlp.up_proj.weight": torch.ones(24, 16)}}, "no place for .*layers.2.mlp.up_proj"),
    "biases": ({"extra": {"model.layers.0.self_attn.q_proj.bias": torch.ones(16)}}, "no place for .*self_attn.q_proj.bias"),
    "a value head": ({"extra": {"v_head.summary.weight": torch.ones(1, 16)}}, "no place for .*v_head.summary.weight"),
    "another shape": (
        {"drop": ["norm.weight"], "extra": {f"model.{n}.weight": torch.ones(16) for n in (
            "layers.0.input_layernorm", "layers.0.post_attention_layernorm", "layers.1.input_layernorm",
            "layers.1.post_attention_layernorm")} | {"model.norm.weight": torch.ones(8)}},
        r"model.norm.weight is \[8\] in the file and \[16\] in the model",
    ),
    "integers": (
        {"drop": ["lm_head"], "extra": {"lm_head.weight": torch.ones(260, 16, dtype=torch.int8)}},
        "lm_head.weight is stored in integers",
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", few(["safetensors", "sharded bin"], "safetensors"))
@pytest.mark.parametrize("kind", REFUSED)
def test_weights_that_do_not_fit_are_named(tmp_path, llama, kind, form):
    options, message = REFUSED[kind]
    folder = write(tmp_path / "model", llama, form=form, **options)
    with pytest.raises(InputError, match=message) as error:
        load_model(folder, tokenizer="bytes")
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("shape", [None, (3, 3)], ids=["missing", "shape"])
def test_a_part_of_the_experts(tmp_path, shape):
    """The weights of experts are stored one by one, and put together by a load."""
    tiny("Mixtral").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    part = state.pop("model.layers.1.block_sparse_moe.experts.1.w1.weight")
    changed = {} if shape is None else {"model.layers.1.block_sparse_moe.experts.1.w1.weight": part.new_ones(shape)}
    save_file(state | changed, file, metadata={"format": "pt"})
    with pytest.raises(
        InputError, match=r"parts of 1 weight are missing or of another shape: model.layers.1.mlp.experts.gate_up"
    ):
        load_model(tmp_path, tokenizer="bytes")


def test_a_trunk_with_tied_embeddings_is_whole(tmp_path):
    model = tiny(tie_word_embeddings=True)
    folder = write(tmp_path / "model", model, lambda n: n.removeprefix("model."))
    assert nats(folder).tolist() == nats(model).tolist()


def test_buffers_of_older_versions_are_no_weights(tmp_path, llama, expected):
    table = llama.model.rotary_emb.inv_freq.bfloat16()
    old = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": table.clone() for i in range(2)}
    assert nats(write(tmp_path / "llama", llama, extra=old)).tolist() == expected
    gpt2 = tiny("GPT2")
    mask = {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64, dtype=torch.uint8) for i in range(2)} | {
        "h.0.attn.masked_bias": torch.tensor(-1e4)
    }
    got = nats(write(tmp_path / "gpt2", gpt2, lambda n: n.removeprefix("transformer."), extra=mask))
    assert got.tolist() == nats(gpt2).tolist()


def test_rotary_positions_that_the_configuration_does_not_tell_of(tmp_path, llama):
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    folder = write(tmp_path / "model", llama, extra={name: llama.model.rotary_emb.inv_freq / 4})
    with pytest.raises(InputError, match=rf"model.safetensors: {name} is not the table"):
        load_model(folder, tokenizer="bytes")
    # Scaled by config.json: older versions kept the table before scaling.
    scaled = tiny(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0})
    old = write(tmp_path / "scaled", scaled, extra={name: llama.model.rotary_emb.inv_freq.clone()})
    assert nats(old).tolist() == nats(scaled).tolist()


def test_a_classifier_is_no_language_model(tmp_path):
    classifier = transformers.LlamaForSequenceClassification(tiny().config)
    with pytest.raises(InputError, match=r"config.json is of LlamaForSequenceClassification.*lm_head.*score.weight"):
        load_model(write(tmp_path / "model", classifier), tokenizer="bytes")


def test_names_that_become_one_are_refused(tmp_path, llama):
    folder = write(tmp_path / "model", llama, extra={"_orig_mod.lm_head.weight": torch.zeros(260, 16)})
    with pytest.raises(InputError, match=r"_orig_mod.lm_head.weight.*are both lm_head.weight"):
        load_model(folder, tokenizer="bytes")


def test_a_report_that_is_clean_says_nothing():
    check_loaded({"missing_keys": set(), "unexpected_keys": {"h.0.attn.bias"}}, "x")
    with pytest.raises(InputError, match=r"x cannot be loaded: 1 weight that the model has is missing: a.weight"):
        check_loaded({"missing_keys": ["a.weight"]}, "x")
    with pytest.raises(InputError, match=r"no place for 1 weight: h.0.attn.c_attn.bias"):
        check_loaded({"unexpected_keys": ["h.0.attn.c_attn.bias"]}, "x")


HUB = """
import sys, lldfast as lld
print(lld.score(lld.load_model(sys.argv[1], tokenizer="bytes"), sys.argv[2]).logprob.tolist())
"""


@pytest.mark.slow
def test_models_of_the_hub_are_checked_too(tmp_path, llama, expected):
    """Of a hub that is a cache without a network."""
    TEXTS.save(tmp_path / "eval.parquet")
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    said = {}
    for name, options in {"wrapped": {"rename": WRAPPED["both"]}, "less": {"drop": ["layers.1.mlp"]}}.items():
        repository = tmp_path / "hub" / f"models--me--{name}"
        write(repository / "snapshots" / ("a" * 40), llama, **options)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("a" * 40)
        command = [sys.executable, "-c", HUB, f"me/{name}", str(tmp_path / "eval.parquet")]
        said[name] = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert json.loads(said["wrapped"].stdout) == expected
    assert "InputError" in said["less"].stderr and "missing: model.layers.1.mlp.down_proj.weight" in said["less"].stderr


# ---- files that are not whole


def cut(file, share):
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])


@pytest.mark.parametrize("share", few([0, 0.01, 0.5, 0.999], 0.5))
@pytest.mark.parametrize("form", ["safetensors", "bin", "sharded safetensors", "sharded bin"])
def test_truncated_weights_are_named(tmp_path, llama, form, share):
    folder = write(tmp_path / "model", llama, form=form)
    file = max(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))
    cut(file, share)
    with pytest.raises(CorruptError, match=f"{file.name} is truncated"):
        load_model(folder, tokenizer="bytes")


def test_pickles_that_hold_more_than_weights(tmp_path, llama):
    folder = write(tmp_path / "model", llama, form="bin")
    for content, message in (({"model": keys_of(llama)}, "entry 'model' is a dict"), ([1], "holds a list")):
        torch.save(content, folder / "pytorch_model.bin")
        with pytest.raises(CorruptError, match=rf"pytorch_model.bin .*{message}"):
            load_model(folder, tokenizer="bytes")


INDEXES = {
    "cut": (lambda text: text[: len(text) // 2], CorruptError, "index.json is not valid JSON"),
    "a list": (lambda text: "[]", CorruptError, "has no weight_map"),
    "no metadata": (lambda text: text.replace('"metadata"', '"x"'), CorruptError, "has no metadata"),
    "an absent shard": (
        lambda text: text.replace("part-1.", "part-7."),
        InputError,
        "weights in part-7.safetensors, which is not",
    ),
    "a shard too few": (lambda text: text.replace("part-1.", "part-0."), InputError, "weights that the model has are missing"),
}


@pytest.mark.parametrize("kind", INDEXES)
def test_an_index_that_does_not_fit(tmp_path, llama, kind):
    folder = write(tmp_path / "model", llama, form="sharded safetensors")
    file, (change, error, message) = folder / "model.safetensors.index.json", INDEXES[kind]
    file.write_text(change(file.read_text()))
    with pytest.raises(error, match=message):
        load_model(folder, tokenizer="bytes")


def test_two_shards_that_disagree(tmp_path, llama, expected):
    folder = write(tmp_path / "model", llama, form="sharded safetensors")
    parts = [load_file(folder / f"part-{i}.safetensors") for i in range(2)]
    name = next(iter(parts[0]))
    save_file(parts[1] | {name: parts[0][name]}, folder / "part-1.safetensors")
    assert nats(folder).tolist() == expected
    save_file(parts[1] | {name: parts[0][name] + 1}, folder / "part-1.safetensors")
    with pytest.raises(CorruptError, match=f"both hold {name}, with different values"):
        load_model(folder, tokenizer="bytes")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", few(["", "{", "[]", '"x"', "\0"], "[]"))
def test_json_that_is_none(tmp_path, llama, name, content):
    folder = write(tmp_path / "model", llama)
    train_bpe(["a b c"], 257).save(folder)
    (folder / name).write_text(content)
    with pytest.raises((InputError, CorruptError), match=f"{folder.name}|{name}"):
        load_model(folder)


def test_a_broken_generation_config_decides_no_score(tmp_path, llama, expected):
    folder = write(tmp_path / "model", llama)
    (folder / "generation_config.json").write_text("{")
    assert nats(folder).tolist() == expected


@pytest.mark.parametrize("method", few(["gptq", "bitsandbytes", "awq", "unheard of"], "gptq"))
def test_quantised_checkpoints_say_what_they_need(tmp_path, llama, method):
    folder = write(tmp_path / "model", llama)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4, "load_in_4bit": True, "group_size": 8}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises((InputError, MissingDependencyError), match=str(folder)):
        load_model(folder, tokenizer="bytes")


# ---- code of its own


@pytest.fixture
def with_code(tmp_path):
    """A folder whose model is Python code; running it would leave a file."""
    folder = tmp_path / "model"
    folder.mkdir()
    auto_map = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M", "AutoTokenizer": ["code.T", None]}
    (folder / "config.json").write_text(json.dumps({"model_type": "of_its_own", "auto_map": auto_map}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto_map, "tokenizer_class": "T"}))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    return folder


@pytest.mark.parametrize("answer", ["closed", "", "y\n" * 9])
def test_code_of_a_model_is_not_run_and_nobody_is_asked(with_code, monkeypatch, answer):
    monkeypatch.setattr("sys.stdin", io.StringIO(answer))
    if answer == "closed":
        sys.stdin.close()
    with pytest.raises(InputError, match=r"model brings Python code of its own .*trust_remote_code=True to load_model"):
        load_model(with_code, tokenizer="bytes")
    with pytest.raises(InputError, match=r"model brings Python code of its own"):
        load_tokenizer(with_code)
    assert not (with_code.parent / "ran").exists()


def test_code_of_a_model_is_run_where_that_is_wanted(with_code, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    with pytest.raises(InputError, match="cannot load"):  # the code has no class C
        load_model(with_code, tokenizer="bytes", trust_remote_code=True)
    assert (with_code.parent / "ran").exists()


def test_a_command_runs_code_of_a_model_where_that_is_wanted(with_code, tmp_path, monkeypatch):
    from lldfast.cli import main

    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    TEXTS.save(tmp_path / "eval.parquet")
    args = ["score", str(with_code), "--tokenizer", "bytes", "--data", str(tmp_path), "--out", str(tmp_path / "x.parquet")]
    assert main(args) == 1 and not (tmp_path / "ran").exists()
    assert main([*args, "--trust-remote-code"]) == 1 and (tmp_path / "ran").exists()  # the code has no class C


@pytest.mark.slow
def test_a_command_with_a_closed_stdin_ends_at_once(with_code, tmp_path):
    TEXTS.save(tmp_path / "eval.parquet")
    command = [sys.executable, "-m", "lldfast", "score", with_code, "--data", tmp_path, "--out", tmp_path / "x.parquet"]
    done = subprocess.run(command, input="y\n", capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "brings Python code of its own" in done.stderr


# ---- modules in memory


class Averaged(torch.optim.swa_utils.AveragedModel):
    """A class derived from a wrapper is one too."""


WRAP = {
    "compiled": torch.compile,
    "DataParallel": nn.DataParallel,
    "averaged": Averaged,
    "compiled DataParallel": lambda module: torch.compile(nn.DataParallel(module)),
}


@pytest.mark.parametrize("kind", few(WRAP, "DataParallel"))  # importing torch's compiler takes seconds
def test_wrapped_modules_are_scored_by_the_model_inside(llama, expected, kind):
    wrapped = WRAP[kind](llama)
    scorer = load_model(wrapped, tokenizer="bytes")
    assert scorer.separate_head and nats(scorer).tolist() == expected
    inner = dict(scorer.module.named_parameters())
    if kind != "averaged":  # which has a copy
        assert all(inner[name] is p for name, p in llama.named_parameters())
    assert scorer.identity["hash"] == load_model(llama, tokenizer="bytes").identity["hash"]


def test_a_wrapped_gpt_is_a_gpt():
    gpt = GPT("test-tiny", seed=0)
    scorer = load_model(nn.DataParallel(gpt), tokenizer="bytes")
    assert scorer.module is gpt and scorer.kind == "gpt"


@pytest.mark.parametrize("kind", ["meta", "FSDP", "no model"])
def test_modules_that_cannot_be_scored_are_refused(llama, monkeypatch, kind):
    module = nn.Linear(2, 2)
    if kind == "meta":
        module = tiny()
        module.lm_head.to("meta")
    elif kind == "FSDP":
        name = "torch.distributed.fsdp.fully_sharded_data_parallel"
        whole = type("FullyShardedDataParallel", (nn.Module,), {"__module__": name, "__qualname__": "FullyShardedDataParallel"})
        module = tiny()
        module.model.layers[0] = whole()
    wanted = {"meta": "lm_head.weight has no values", "FSDP": "holds a part of its parameters", "no model": "has no config"}
    with pytest.raises(InputError, match=wanted[kind]):
        load_model(module, tokenizer="bytes")


@pytest.mark.parametrize("kind", ["LlamaModel", "LlamaForSequenceClassification", "LlamaForQuestionAnswering"])
def test_classes_without_a_head_are_refused(llama, kind):
    with pytest.raises(InputError, match=f"{kind} has no head of a language model"):
        load_model(getattr(transformers, kind)(llama.config), tokenizer="bytes")


@pytest.mark.parametrize("spec", [None, 5, {"a.weight": torch.ones(2)}, transformers.LlamaForCausalLM])
def test_what_is_no_model(spec):
    with pytest.raises(InputError, match="is no model"):
        load_model(spec)


@pytest.mark.slow
def test_distributed_data_parallel(llama, expected, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(llama)
        assert nats(wrapped).tolist() == expected
    finally:
        torch.distributed.destroy_process_group()


# ---- adapters


def with_adapter(base, **options):
    peft = pytest.importorskip("peft")
    kind = options.pop("kind", "LoraConfig")
    defaults = {"r": 2, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"} if kind == "LoraConfig" else {}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = peft.get_peft_model(base, getattr(peft, kind)(**{**defaults, **options})).eval()
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(torch.randn_like(p), alpha=0.1)
    return model


def by_hand(module, tokenizer=None):
    """Log-likelihoods of the texts from the module's own logits."""
    tokenizer = load_tokenizer("bytes")
    found = []
    for text in TEXTS.texts:
        ids = torch.tensor([[tokenizer.eot, *tokenizer.encode(text)]])
        with torch.no_grad():
            logp = module(input_ids=ids).logits.double().log_softmax(-1)
        found.append(float(logp[0, :-1].gather(1, ids[0, 1:, None]).sum()))
    return found


ADAPTERS = {
    "LoRA": {},
    "all linear": {"target_modules": "all-linear", "lora_alpha": 32},
    "DoRA": {"use_dora": True},
    "its own head": {"modules_to_save": ["lm_head"]},
    "head and embedding": {"target_modules": ["lm_head", "embed_tokens"]},
    "biases": {"bias": "lora_only"},
    "IA3": {"kind": "IA3Config", "target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
}


@pytest.mark.parametrize("kind", few(ADAPTERS, "LoRA", "its own head"))
def test_adapters_in_memory_and_from_a_folder(tmp_path, kind):
    base = write(tmp_path / "base", tiny())
    model = with_adapter(transformers.AutoModelForCausalLM.from_pretrained(base), **ADAPTERS[kind])
    want = by_hand(model)
    assert max(abs(a - b) for a, b in zip(want, nats(base), strict=True)) > 0.1  # it does something
    torch.testing.assert_close(nats(model), torch.tensor(want).double().numpy(), rtol=1e-5, atol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's about embedding layers
        model.save_pretrained(tmp_path / "adapter")
    scorer = load_model(tmp_path / "adapter", tokenizer="bytes")
    torch.testing.assert_close(nats(scorer), torch.tensor(want).double().numpy(), rtol=1e-5, atol=1e-4)
    assert scorer.name == "adapter" and all(p.requires_grad for p in scorer.module.parameters())


@pytest.fixture
def adapter(tmp_path):
    base = write(tmp_path / "base", tiny())
    model = with_adapter(transformers.AutoModelForCausalLM.from_pretrained(base))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def rename_adapter(folder, rename):
    file = folder / "adapter_model.safetensors"
    state = {rename(name): value for name, value in load_file(file).items()}
    save_file({name: value for name, value in state.items() if name}, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "rename",
    [lambda n: f"_orig_mod.{n}", lambda n: n.replace("base_model.model.", "base_model.model._orig_mod.")],
    ids=["outside", "inside"],
)
def test_names_of_wrappers_in_an_adapter(adapter, rename):
    want = nats(adapter).tolist()
    rename_adapter(adapter, rename)
    with pytest.warns(UserWarning, match="_orig_mod"):
        assert nats(adapter).tolist() == want


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        (lambda n: n.replace("base_model.model.", "base_model.model.student."), "no place for 8 weights: .*student"),
        (lambda n: n.replace("layers.1.", "layers.7."), "weights that the model has are missing: .*layers.1"),
        (lambda n: "" if "down_proj.lora_B" in n else n, "2 weights .* missing: .*down_proj.lora_B.default.weight"),
    ],
    ids=["unknown names", "another layer", "a part"],
)
def test_adapters_that_do_not_fit_are_refused(adapter, rename, message):
    rename_adapter(adapter, rename)
    with pytest.raises(InputError, match=message):
        load_model(adapter, tokenizer="bytes")


def test_an_adapter_for_another_base(adapter):
    write(adapter.parent / "base", tiny(hidden_size=32))
    with pytest.raises(InputError, match=r"adapter .*size mismatch"):
        load_model(adapter, tokenizer="bytes")
    shutil.rmtree(adapter.parent / "base")
    with pytest.raises(InputError, match=r"adapter: its base model .*base is not here"):
        load_model(adapter, tokenizer="bytes")


def test_an_adapter_beside_a_whole_model_or_without_weights(adapter):
    shutil.copy(adapter.parent / "base" / "model.safetensors", adapter)
    with pytest.raises(InputError, match="does not say whether the adapter is in those weights"):
        load_model(adapter, tokenizer="bytes")
    (adapter / "model.safetensors").unlink()
    cut(adapter / "adapter_model.safetensors", 0.5)
    with pytest.raises(CorruptError, match=r"adapter_model.safetensors is truncated"):
        load_model(adapter, tokenizer="bytes")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match="has no adapter weights"):
        load_model(adapter, tokenizer="bytes")


def test_the_base_of_an_adapter_is_checked_too(adapter):
    write(adapter.parent / "base", tiny(), drop=["layers.1.mlp"])
    with pytest.raises(InputError, match=r"adapter, base model: .*missing: model.layers.1.mlp"):
        load_model(adapter, tokenizer="bytes")


def test_an_adapters_identity_is_of_both_parts(adapter):
    def identity():
        return load_model(adapter, tokenizer="bytes").identity["hash"]

    first = identity()
    assert identity() == first
    about = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(about | {"lora_alpha": 16}))
    second = identity()
    file = adapter.parent / "base" / "model.safetensors"
    state = load_file(file)
    save_file(state | {"lm_head.weight": state["lm_head.weight"] + 1}, file, metadata={"format": "pt"})
    assert len({first, second, identity()}) == 3


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig", "PromptEncoderConfig"])
def test_a_learnt_prompt_is_read_and_takes_places(tmp_path, kind):
    peft = pytest.importorskip("peft")
    base = tmp_path / "base"
    write(base, tiny())
    prompt = getattr(peft, kind)(num_virtual_tokens=5, task_type="CAUSAL_LM")
    model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), prompt).eval()
    for weight in model.prompt_encoder.parameters():
        torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path / "adapter")
    plain, memory, file = (load_model(spec, tokenizer="bytes") for spec in (base, model, tmp_path / "adapter"))
    assert memory.context_length == file.context_length == plain.context_length - 5
    want = []
    for text in TEXTS.texts:
        ids = torch.tensor([[256, *text.encode()]])
        with torch.no_grad():
            rows = model(input_ids=ids).logits[0, -ids.shape[1] :].double().log_softmax(-1)
        want.append(float(rows[:-1].gather(-1, ids[0, 1:, None]).sum()))
    for lm in (memory, file):
        np.testing.assert_allclose(score(lm, TEXTS).logprob, want, rtol=1e-5)
    assert (np.abs(score(plain, TEXTS).logprob - want) > 1e-3).all()
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({"prompt": load_file(weights)["prompt_embeddings"]}, weights)
    with pytest.raises(InputError, match="adapter into its base model: there is no 'prompt_embeddings'"):
        load_model(tmp_path / "adapter", tokenizer="bytes")


def test_adapters_that_act_in_a_part_of_a_text_are_refused():
    with pytest.raises(InputError, match="not supported"):
        load_model(with_adapter(tiny(), alora_invocation_tokens=[5, 6], task_type="CAUSAL_LM"), tokenizer="bytes")


def test_an_adapter_whose_base_is_elsewhere(adapter):
    about = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(about | {"base_model_name_or_path": "/elsewhere/llama"}))
    with pytest.raises(InputError, match=r"adapter .*its base model /elsewhere/llama is not here"):
        load_model(adapter)


def test_an_adapter_without_peft(adapter, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingDependencyError, match="pip install peft"):
        load_model(adapter, tokenizer="bytes")


# ---- modes


class Training(nn.Module):
    """A frozen part in evaluation mode within a model in training; `fails` makes a forward pass raise."""

    def __init__(self):
        super().__init__()
        self.gpt = GPT(GPTConfig(257, 257, 64, 2, 2, 32, dropout=0.5), seed=0).train()
        self.gpt.blocks[0].eval()
        self.scorer = LanguageModel.from_gpt(self.gpt, load_tokenizer("bytes"))
        self.modes = [m.training for m in self.gpt.modules()]
        assert True in self.modes and False in self.modes

    def unchanged(self):
        return [m.training for m in self.gpt.modules()] == self.modes


def test_every_submodule_keeps_its_mode():
    m = Training()
    load_model(m.gpt, tokenizer="bytes")
    assert m.unchanged()
    score(m.scorer, TEXTS)
    assert m.unchanged()
    token_kl(m.scorer, m.scorer, TEXTS)
    assert m.unchanged()
    gram.estimate(m.scorer, TEXTS, mode="exact", groups=2)
    assert m.unchanged()
    with pytest.raises(RuntimeError, match="in the middle"), evaluation_mode(m.gpt):
        assert not any(part.training for part in m.gpt.modules())
        raise RuntimeError("in the middle")
    assert m.unchanged()


def test_a_class_with_a_mode_of_its_own():
    class Merging(nn.Linear):
        merged = False

        def train(self, mode=True):
            self.merged = not mode
            return super().train(mode)

    module = Merging(2, 2).train()
    with evaluation_mode(module):
        assert module.merged
    assert not module.merged and module.training


# ---- folders of GPT.save


@pytest.fixture
def saved(tmp_path):
    GPT("test-tiny", seed=0).save(tmp_path / "gpt", load_tokenizer("bytes"))
    return tmp_path / "gpt"


def rewrite(folder, change):
    """Other weights, under a model.json that describes them."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file)
    about = json.loads((folder / "model.json").read_text())
    about["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    (folder / "model.json").write_text(json.dumps(about))


GPT_FAULTS = {
    "missing": (lambda s: {n: v for n, v in s.items() if "ln_f" not in n}, "2 weights .* missing: ln_f.bias, ln_f.weight"),
    "unused": (lambda s: s | {"blocks.7.up.bias": torch.ones(2)}, "no place for 1 weight: blocks.7.up.bias"),
    "shape": (lambda s: s | {"ln_f.bias": torch.ones(2)}, r"ln_f.bias is \[2\] in the file and \[32\] in the model"),
    "integers": (lambda s: s | {"ln_f.bias": torch.ones(32, dtype=torch.int8)}, "ln_f.bias is of torch.int8"),
}


@pytest.mark.parametrize("kind", GPT_FAULTS)
def test_saved_gpts_that_do_not_fit_are_refused(saved, kind):
    change, message = GPT_FAULTS[kind]
    rewrite(saved, change)
    with pytest.raises(CorruptError, match=rf"model.safetensors: weights and model.json do not fit: .*{message}"):
        load_model(saved)


def test_a_saved_gpt_with_names_of_wrappers(saved):
    want = nats(saved).tolist()
    rewrite(saved, lambda s: {f"_orig_mod.{n}": v for n, v in s.items()})
    with pytest.warns(UserWarning, match="_orig_mod"):
        assert nats(saved).tolist() == want


@pytest.mark.slow
def test_a_gpt_with_compiled_layers_is_saved_under_plain_names(tmp_path):
    gpt = GPT("test-tiny", seed=0)
    want = {name: p.clone() for name, p in gpt.state_dict().items()}
    gpt.blocks[0] = torch.compile(gpt.blocks[0])
    gpt.save(tmp_path)
    again = GPT.load(tmp_path).state_dict()
    assert again.keys() == want.keys() and all(torch.equal(again[name], want[name]) for name in want)


def test_from_hf_takes_whole_models_only(tmp_path):
    model = tiny("GPT2")
    with pytest.raises(InputError, match=r"missing: transformer.h.1.mlp"):
        GPT.from_hf(write(tmp_path / "less", model, drop=["h.1.mlp"]))
    own_head = write(tmp_path / "head", model, extra={"lm_head.weight": torch.ones(260, 16)})
    with pytest.raises(InputError, match="a head of its own"):
        GPT.from_hf(own_head)
    assert torch.equal(GPT.from_hf(nn.DataParallel(model)).ln_f.weight, model.transformer.ln_f.weight)


# ---- identities


def test_the_hash_covers_what_is_loaded_and_nothing_else(tmp_path, llama):
    folder = write(tmp_path / "model", llama)
    first = load_model(folder, tokenizer="bytes").identity["hash"]
    assert first == folder_hash(folder)
    for name in ("pytorch_model.bin", "generation_config.json", "README.md", "other.safetensors", "training_args.bin"):
        (folder / name).write_bytes(b"{}")
        assert load_model(folder, tokenizer="bytes").identity["hash"] == first
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert folder_hash(folder) != first


def test_every_shard_is_part_of_the_hash(tmp_path, llama):
    folder = write(tmp_path / "model", llama, form="sharded bin")
    hashes = {folder_hash(folder)}
    for name in ("part-0.bin", "part-1.bin"):
        with open(folder / name, "ab") as file:
            file.write(b"\0")
        hashes.add(folder_hash(folder))
    assert len(hashes) == 3


def test_plain_names():
    assert plain_name("module._orig_mod.h.0._checkpoint_wrapped_module.w") == "h.0.w"
    assert plain_name("module.w", own={"module"}) == "module.w"
    assert unwrap(nn.Linear(2, 2)).in_features == 2
