"""GGUF files as llama.cpp's converters write them, of tiny random models of transformers, for the tests of models/gguf/."""

import json
import re

import gguf
import numpy as np
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

TEXTS = [
    "Die Würde des Menschen ist unantastbar. 1949, 2024 and 12345678!",
    "def f(x):\n    return x ** 2  # don't\n\n\nYOU'RE 3.14159",
    "  leading blanks, tabs\t\tand 人工智能 ひらがな cafe\u0301 …",
]
VOCAB = 400


def train_bpe(pre_tokenizer=None, normalizer=None):
    """A byte-level BPE trained on the texts; GPT-2's splitting by default."""
    pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([*TEXTS, *(str(n) for n in range(300))] * 2, trainer)
    backend.add_tokens([AddedToken("<think>", normalized=False)])
    return backend


# What llama.cpp's converter writes for a model: keys, and tensors in its layout.


def sizes(config):
    return {
        "context_length": config.max_position_embeddings, "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers, "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads, "attention.head_count_kv": config.num_key_value_heads,
        "rope.freq_base": float((config.rope_parameters or {}).get("rope_theta", 1e4)), "vocab_size": config.vocab_size,
    }  # fmt: skip


def rms(config):
    return {"attention.layer_norm_rms_epsilon": config.rms_norm_eps}


def head(config):
    return {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}


SMALL = {
    "vocab_size": VOCAB + 8, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 192, "tie_word_embeddings": False,
}  # fmt: skip
THETA = {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}
PARTIAL = {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5}}
# architecture -> (model_type, the configuration's settings beside SMALL, the file's keys for it)
CASES = {
    "llama": (
        "llama", {"head_dim": 16, "rms_norm_eps": 1e-4, **THETA},
        lambda c: {**rms(c), **head(c), "rope.dimension_count": 16},
    ),
    "qwen2": ("qwen2", {"rms_norm_eps": 1e-4, "tie_word_embeddings": True, **THETA}, rms),
    "qwen3": ("qwen3", {"head_dim": 16, "rms_norm_eps": 1e-4, **THETA}, lambda c: {**rms(c), **head(c)}),
    "phi3": (
        "phi3",
        {"rms_norm_eps": 1e-4, "sliding_window": 40, "original_max_position_embeddings": 192, "pad_token_id": 0, **PARTIAL},
        lambda c: {
            **rms(c), "rope.dimension_count": 4, "attention.sliding_window": 40, "rope.scaling.original_context_length": 192,
        },
    ),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 16, "rms_norm_eps": 1e-4, "sliding_window": 24, "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "tie_word_embeddings": True, **THETA,
        },
        lambda c: {
            **rms(c), **head(c), "attention.sliding_window": 24, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 16, "rms_norm_eps": 1e-4, "sliding_window": 24, "query_pre_attn_scalar": 16, "tie_word_embeddings": True,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 700.0},
            },
        },
        lambda c: {
            **rms(c), **head(c), "attention.sliding_window": 24, "attention.sliding_window_pattern": 2, "rope.freq_base": 5000.0,
            "rope.freq_base_swa": 700.0, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0,
        },
    ),
    "stablelm": (
        "stablelm", {"layer_norm_eps": 1e-3, "use_qkv_bias": True, **PARTIAL},
        lambda c: {"attention.layer_norm_epsilon": 1e-3, "rope.dimension_count": 4, "use_parallel_residual": False},
    ),
    "starcoder2": (
        "starcoder2", {"norm_epsilon": 1e-3, "sliding_window": 40, "tie_word_embeddings": True, **THETA},
        lambda c: {"attention.layer_norm_epsilon": 1e-3, "attention.sliding_window": 40},
    ),
    "nemotron": (
        "nemotron", {"norm_eps": 1e-3, **PARTIAL},
        lambda c: {"attention.layer_norm_epsilon": 1e-3, "rope.dimension_count": 4, "rope.scaling.type": "none"},
    ),
    "gpt2": ("gpt2", {"layer_norm_epsilon": 1e-3, "n_inner": 48}, lambda c: {"attention.layer_norm_epsilon": 1e-3}),
    "bloom": (
        "bloom", {"layer_norm_epsilon": 1e-3, "seq_length": 192},
        lambda c: {"attention.layer_norm_epsilon": 1e-3, "feed_forward_length": 128},
    ),
    "falcon": (
        "falcon", {"layer_norm_epsilon": 1e-3, "num_kv_heads": 1, "ffn_hidden_size": 48, **THETA},
        lambda c: {"attention.layer_norm_epsilon": 1e-3, "attention.head_count_kv": 1, "tensor_data_layout": "jploski"},
    ),
    "mamba": (
        "mamba", {"layer_norm_epsilon": 1e-3, "state_size": 8, "conv_kernel": 3, "expand": 3, "time_step_rank": 5},
        lambda c: {
            "attention.layer_norm_rms_epsilon": 1e-3, "ssm.state_size": 8, "ssm.conv_kernel": 3, "ssm.inner_size": 96,
            "ssm.time_step_rank": 5, "feed_forward_length": 0, "attention.head_count": 0,
        },
    ),
    "lfm2": (
        "lfm2",
        {
            "norm_eps": 1e-4, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False, "conv_L_cache": 4,
            "tie_word_embeddings": True, **THETA,
        },
        lambda c: {"attention.layer_norm_rms_epsilon": 1e-4, "attention.head_count_kv": [0, 2], "shortconv.l_cache": 4},
    ),
    "qwen2moe": (
        "qwen2_moe",
        {
            "rms_norm_eps": 1e-4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
            "shared_expert_intermediate_size": 20, **THETA,
        },
        lambda c: {
            **rms(c), "expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 12,
            "expert_shared_feed_forward_length": 20,
        },
    ),
    "qwen3moe": (
        "qwen3_moe",
        {
            "rms_norm_eps": 1e-4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "head_dim": 16,
            "norm_topk_prob": True, **THETA,
        },
        lambda c: {**rms(c), **head(c), "expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 12},
    ),
}  # fmt: skip
NATIVE = {  # configurations with names of their own for what SMALL says
    "gpt2": {"n_positions": 192, "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB + 8},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB + 8},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": VOCAB + 8},
}


def tiny(architecture, **settings):
    """A model of two layers, all its parameters random, in fp32 and evaluation mode."""
    model_type, special, _ = CASES[architecture]
    config = transformers.AutoConfig.for_model(model_type, **{**NATIVE.get(architecture, SMALL), **special, **settings})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(0, 0.3)
            if name.endswith("norm.weight") or "layernorm" in name or ".ln_" in name:
                p.add_(1)
            if name.endswith("A_log"):
                p.abs_()
    return model


def keys_of(architecture, model):
    config = model.config
    own = CASES[architecture][2](config)
    if architecture in ("gpt2", "bloom", "falcon", "mamba"):
        shared = {
            "context_length": 192, "embedding_length": 32, "block_count": 2, "feed_forward_length": 48, "attention.head_count": 4,
            "vocab_size": VOCAB + 8,
        } | ({"rope.freq_base": 5000.0} if architecture == "falcon" else {})  # fmt: skip
    else:
        shared = {k: v for k, v in sizes(config).items() if not (architecture == "gemma3" and k == "rope.freq_base")}
    return {**shared, **own}


def tensors_of(architecture, model):
    """{file's name: fp32 array}, as llama.cpp's converter lays them out."""
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture], 2)
    config, found = model.config, {}
    for parameter, value in model.state_dict().items():
        if parameter == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array, block = value.numpy(), re.search(r"\.(\d+)\.", parameter)
        if parameter.endswith("experts.gate_up_proj"):
            for half, part in zip(np.split(array, 2, axis=1), ("gate", "up"), strict=True):
                found[f"blk.{block[1]}.ffn_{part}_exps.weight"] = np.ascontiguousarray(half)
            continue
        if parameter.endswith("experts.down_proj"):
            found[f"blk.{block[1]}.ffn_down_exps.weight"] = array
            continue
        stem, ending = parameter.rsplit(".", 1) if parameter.endswith((".weight", ".bias")) else (parameter, "")
        candidates = [names.get_name(stem.removeprefix(prefix)) for prefix in ("", "transformer.", "model.", "backbone.")]
        name = next(filter(None, candidates)) + (f".{ending}" if ending else "")
        if architecture == "llama" and (".attn_q." in name or ".attn_k." in name):
            heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
            array = array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        if architecture in ("gemma2", "gemma3", "nemotron") and name.endswith("norm.weight"):
            array = array + 1
        if architecture == "gpt2" and re.search(r"(attn_qkv|attn_output|ffn_up|ffn_down)\.weight", name):
            array = array.T
        if architecture == "bloom" and "attn_qkv" in name:
            parts = array.reshape(4, 3, 8, *array.shape[1:])
            array = np.concatenate([parts[:, i].reshape(32, *array.shape[1:]) for i in range(3)])
        if name.endswith(("ssm_conv1d.weight", "shortconv.conv.weight")):
            array = array[:, 0]
        if name.endswith("ssm_a"):
            array = -np.exp(array)
        if name.endswith("ffn_gate_inp_shexp.weight"):
            array = array[0]
        found[name] = np.ascontiguousarray(array, np.float32)
    return found


def tokenizer_keys(backend, pre="gpt-2", **more):
    content = json.loads(backend.to_str())
    added = {t["content"]: t["special"] for t in content["added_tokens"]}
    vocabulary = backend.get_vocab(with_added_tokens=True)
    tokens = sorted(vocabulary, key=vocabulary.get)
    return {
        "tokenizer.ggml.model": "gpt2",
        **({"tokenizer.ggml.pre": pre} if pre else {}),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [(3 if added[t] else 4) if t in added else 1 for t in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in content["model"]["merges"]],
        "tokenizer.ggml.eos_token_id": 0,
        **more,
    }


def write(file, architecture, keys, tensors, tokenizer):
    """Write a GGUF file of fp32 tensors. Keys of the model come without their prefix."""
    writer = gguf.GGUFWriter(str(file), architecture)
    writer.add_name("Tiny")
    writer.add_license("mit")
    for key, value in {**{f"{architecture}.{k}": v for k, v in keys.items()}, **tokenizer}.items():
        kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        kinds.get(type(value), writer.add_array)(key, value)
    for tensor, array in tensors.items():
        writer.add_tensor(tensor, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def write_model(file, architecture, model, backend, keys=None, tensors=None, tokenizer=None):
    """The file of `model`; `keys` and `tensors` are added, or taken out where they are None."""
    all_keys = {**keys_of(architecture, model), **(keys or {})}
    all_tensors = {**tensors_of(architecture, model), **(tensors or {})}
    return write(
        file, architecture, {k: v for k, v in all_keys.items() if v is not None},
        {k: v for k, v in all_tensors.items() if v is not None}, tokenizer or tokenizer_keys(backend),
    )  # fmt: skip
