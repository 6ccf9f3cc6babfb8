"""The Hugging Face configuration of a GGUF file, for the architectures that transformers maps and that were compared with it.

transformers 5.23 fills a configuration from a part of the keys and leaves the rest at the defaults of one published model, so
the configuration is built here, from every key, and only the tensors are left to transformers. What llama.cpp computes without
a key is written as that value. docs/GGUF.md has the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from lldfast.errors import InputError
from lldfast.models.gguf.keys import Keys
from lldfast.models.gguf.reader import GGUFFile
from lldfast.models.gguf.rope import DIVISORS, rope_parameters

Settings = dict[str, Any]


def configuration(file: GGUFFile) -> Any:
    """The transformers configuration that computes what the file says.

    Raises:
        InputError: an architecture that is not known, or a key whose effect is not, by name.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    if file.architecture not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise InputError(f"{file.path}: architecture {file.architecture!r} is not among those that can be converted: {known}")
    model_type, build = ARCHITECTURES[file.architecture]
    keys = Keys(file)
    settings = build(keys)
    keys.finish()
    if settings.get("rope_parameters") is None and (extra := [name for name in DIVISORS if name in file.tensors]):
        raise InputError(f"{file.path}: tensors {', '.join(extra)} in a model without rotary positions")
    ids = {f"{name}_token_id": file.metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in SPECIAL.items()}
    try:
        config = AutoConfig.for_model(model_type, **ids, **settings, tie_word_embeddings="output.weight" not in file.tensors)
    except (ValueError, TypeError, ZeroDivisionError, StrictDataclassError) as error:
        raise InputError(f"{file.path}: transformers takes no {model_type} model of these sizes: {error}") from error
    return config


SPECIAL = {"bos": "bos", "eos": "eos", "pad": "padding"}


def _vocabulary(keys: Keys) -> int:
    rows = _rows(keys.file)
    said = keys.take("vocab_size", rows)
    if said != rows:
        raise keys.refusal("vocab_size", f"{said}, but token_embd.weight has {rows} rows")
    return rows


def _rows(file: GGUFFile) -> int:
    if "token_embd.weight" not in file.tensors:
        raise InputError(f"{file.path}: tensor token_embd.weight is missing")
    return int(file.tensors["token_embd.weight"].shape[-1])


def _has(keys: Keys, *endings: str) -> bool:
    return any(name.endswith(endings) for name in keys.file.tensors)


def _sizes(keys: Keys) -> Settings:
    """What a transformer of any kind has, under the names of most configurations."""
    for suffix in ("attention.head_count", "attention.head_count_kv"):
        if keys.is_list(suffix):
            raise keys.refusal(suffix, "a list, one number a layer, which transformers does not take apart")
    heads = keys.take("attention.head_count")
    return {
        "vocab_size": _vocabulary(keys),
        "max_position_embeddings": keys.take("context_length"),
        "hidden_size": keys.take("embedding_length"),
        "num_hidden_layers": keys.take("block_count"),
        "intermediate_size": keys.take("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.take("attention.head_count_kv", heads),
    }


def _head_dim(keys: Keys, sizes: Settings, *, free: bool) -> int:
    """Dimensions of a head. `free`: the configuration can state one that is not hidden_size / heads."""
    natural = sizes["hidden_size"] // sizes["num_attention_heads"]
    found: int = keys.take("attention.key_length", natural)
    if (value := keys.take("attention.value_length", found)) != found:
        raise keys.refusal("attention.value_length", f"{value}, but keys have {found} dimensions")
    if not free and found != natural:
        raise keys.refusal("attention.key_length", f"{found}, but {natural} follows from the sizes")
    return found


def _plain_attention(keys: Keys, head_dim: int, context_length: int) -> None:
    """Take the keys that change nothing: the usual scale of scores, and a window that no text of the context can leave."""
    scale = keys.take("attention.scale", 0.0)
    if scale and not math.isclose(scale, head_dim**-0.5, rel_tol=1e-5):
        raise keys.refusal("attention.scale", f"{scale} is not 1 / sqrt({head_dim})")
    window = keys.take("attention.sliding_window", 0)
    if window and window < context_length:
        raise keys.refusal("attention.sliding_window", f"{window} of {context_length} tokens; the model attends to all")
    keys.ignore("attention.sliding_window_pattern")


def _decoder(
    keys: Keys, eps: str = "rms_norm_eps", *, rms: bool = True, head_dim: bool = True, partial: bool = False, window: bool = False
) -> Settings:
    """A decoder with rotary positions.

    Args:
        eps: the configuration's name of the norms' epsilon; `rms` says which of the file's two keys it is.
        head_dim, partial, window: whether the configuration has a head_dim, a partial rotary factor, a sliding window.
    """
    sizes = _sizes(keys)
    dimensions, context = _head_dim(keys, sizes, free=head_dim), sizes["max_position_embeddings"]
    if head_dim:
        sizes["head_dim"] = dimensions
    if window:
        sizes["sliding_window"] = keys.take("attention.sliding_window", 0) or None
    _plain_attention(keys, dimensions, context)
    sizes[eps] = keys.take(f"attention.layer_norm_{'rms_' if rms else ''}epsilon")
    sizes["rope_parameters"] = rope_parameters(keys, dimensions, context, partial=partial)
    return sizes


def _llama(keys: Keys) -> Settings:
    biases = {"attention_bias": _has(keys, ".attn_q.bias", ".attn_output.bias"), "mlp_bias": _has(keys, ".ffn_up.bias")}
    return _decoder(keys) | biases


def _qwen2(keys: Keys) -> Settings:
    return _decoder(keys, head_dim=False)


def _qwen3(keys: Keys) -> Settings:
    return _decoder(keys) | {"attention_bias": _has(keys, ".attn_q.bias")}


def _experts(keys: Keys, sizes: Settings) -> Settings:
    if keys.take("expert_gating_func", 1) not in (0, 1):  # 0: not stated; 1: softmax
        raise keys.refusal("expert_gating_func", "not the softmax of this model")
    return {
        "num_experts": keys.take("expert_count"),
        "num_experts_per_tok": keys.take("expert_used_count"),
        "moe_intermediate_size": keys.take("expert_feed_forward_length", sizes["intermediate_size"]),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _qwen2moe(keys: Keys) -> Settings:
    sizes = _decoder(keys, head_dim=False)
    shared = keys.take("expert_shared_feed_forward_length", sizes["intermediate_size"])
    return sizes | _experts(keys, sizes) | {"shared_expert_intermediate_size": shared, "norm_topk_prob": False}


def _qwen3moe(keys: Keys) -> Settings:
    sizes = _decoder(keys)
    return sizes | _experts(keys, sizes) | {"norm_topk_prob": True}


def _phi3(keys: Keys) -> Settings:
    sizes = _sizes(keys)
    head_dim, context = _head_dim(keys, sizes, free=False), sizes["max_position_embeddings"]
    window = keys.take("attention.sliding_window", 0) or None
    _plain_attention(keys, head_dim, context)
    rope = rope_parameters(keys, head_dim, context, partial=True, linear=False)
    return sizes | {
        "rms_norm_eps": keys.take("attention.layer_norm_rms_epsilon"),
        "sliding_window": window,
        "rope_parameters": rope,
        "original_max_position_embeddings": rope.get("original_max_position_embeddings", context),
    }


def _gemma2(keys: Keys) -> Settings:
    sizes = _sizes(keys)
    head_dim = _head_dim(keys, sizes, free=True)
    return sizes | {
        "head_dim": head_dim,
        "rms_norm_eps": keys.take("attention.layer_norm_rms_epsilon"),
        "query_pre_attn_scalar": _query_scalar(sizes, head_dim, largest=46),
        "sliding_window": keys.take("attention.sliding_window", 4096),
        "layer_types": _layer_types(keys, sizes["num_hidden_layers"], 2),
        "attn_logit_softcapping": keys.take("attn_logit_softcapping", 50.0) or None,
        "final_logit_softcapping": keys.take("final_logit_softcapping", 30.0) or None,
        "rope_parameters": rope_parameters(keys, head_dim, sizes["max_position_embeddings"]),
    }


def _gemma3(keys: Keys) -> Settings:
    sizes = _sizes(keys)
    head_dim, context = _head_dim(keys, sizes, free=True), sizes["max_position_embeddings"]
    if divisors := [name for name in DIVISORS if name in keys.file.tensors]:
        raise InputError(f"{keys.file.path}: tensors {', '.join(divisors)} are not known for a gemma3 model")
    local = {"rope_type": "default", "rope_theta": keys.take("rope.freq_base_swa", 10000.0)}
    return sizes | {
        "head_dim": head_dim,
        "rms_norm_eps": keys.take("attention.layer_norm_rms_epsilon"),
        "query_pre_attn_scalar": _query_scalar(sizes, head_dim, largest=62),
        "sliding_window": keys.take("attention.sliding_window"),
        "layer_types": _layer_types(keys, sizes["num_hidden_layers"], 6),
        "attn_logit_softcapping": keys.take("attn_logit_softcapping", 0.0) or None,
        "final_logit_softcapping": keys.take("final_logit_softcapping", 0.0) or None,
        # llama.cpp scales the layers with full attention only.
        "rope_parameters": {"full_attention": rope_parameters(keys, head_dim, context), "sliding_attention": local},
    }


def _query_scalar(sizes: Settings, head_dim: int, *, largest: int) -> int:
    """No key states it: llama.cpp takes hidden_size / heads for the 27B model, told by its number of layers, else head_dim."""
    whole = sizes["num_hidden_layers"] == largest
    return int(sizes["hidden_size"] // sizes["num_attention_heads"] if whole else head_dim)


def _layer_types(keys: Keys, layers: int, usual: int) -> list[str]:
    """The file says it layer by layer (whether it slides), or that the last of so many layers attends to all tokens."""
    pattern = keys.take_list("attention.sliding_window_pattern")
    if isinstance(pattern, list):
        if len(pattern) != layers:
            raise keys.refusal("attention.sliding_window_pattern", f"{len(pattern)} values for {layers} layers")
        slides = [bool(value) for value in pattern]
    else:
        every = usual if pattern is None else int(pattern)
        slides = [not every or (layer + 1) % every != 0 for layer in range(layers)]
    return ["sliding_attention" if slide else "full_attention" for slide in slides]


def _stablelm(keys: Keys) -> Settings:
    parallel = not _has(keys, ".ffn_norm.weight")
    if keys.take("use_parallel_residual", parallel) != parallel:
        raise keys.refusal("use_parallel_residual", "it contradicts the tensors ffn_norm")
    found = _decoder(keys, "layer_norm_eps", rms=False, head_dim=False, partial=True)
    return found | {"use_parallel_residual": parallel, "use_qkv_bias": _has(keys, ".attn_q.bias")}


def _starcoder2(keys: Keys) -> Settings:
    found = _decoder(keys, "norm_epsilon", rms=False, head_dim=False, window=True)
    return found | {"use_bias": _has(keys, ".attn_q.bias")}


def _nemotron(keys: Keys) -> Settings:
    biases = {"attention_bias": _has(keys, ".attn_q.bias"), "mlp_bias": _has(keys, ".ffn_up.bias")}
    return _decoder(keys, "norm_eps", rms=False, partial=True) | biases


def _falcon(keys: Keys) -> Settings:
    sizes = _sizes(keys)
    if (heads := sizes.pop("num_key_value_heads")) != 1:
        raise keys.refusal("attention.head_count_kv", f"{heads}: transformers does not undo the order of this kind's attn_qkv")
    keys.ignore("tensor_data_layout")  # the order of attn_qkv, the same in any layout for one head of keys and values
    head_dim, context = _head_dim(keys, sizes, free=False), sizes["max_position_embeddings"]
    _plain_attention(keys, head_dim, context)
    return sizes | {
        "ffn_hidden_size": sizes.pop("intermediate_size"),
        "num_kv_heads": 1,
        "layer_norm_epsilon": keys.take("attention.layer_norm_epsilon"),
        "rope_parameters": rope_parameters(keys, head_dim, context),
    }


def _gpt2(keys: Keys) -> Settings:
    sizes = _sizes(keys)
    _plain_attention(keys, _head_dim(keys, sizes, free=False), sizes["max_position_embeddings"])
    return {
        "vocab_size": sizes["vocab_size"],
        "n_positions": sizes["max_position_embeddings"],
        "n_embd": sizes["hidden_size"],
        "n_layer": sizes["num_hidden_layers"],
        "n_head": _single(keys, sizes),
        "n_inner": sizes["intermediate_size"],
        "layer_norm_epsilon": keys.take("attention.layer_norm_epsilon"),
    }


def _bloom(keys: Keys) -> Settings:
    sizes = _sizes(keys)
    if sizes["intermediate_size"] != 4 * sizes["hidden_size"]:
        raise keys.refusal("feed_forward_length", "transformers' Bloom has four times the embedding's length")
    _plain_attention(keys, _head_dim(keys, sizes, free=False), sizes["max_position_embeddings"])
    return {
        "vocab_size": sizes["vocab_size"],
        "seq_length": sizes["max_position_embeddings"],
        "hidden_size": sizes["hidden_size"],
        "n_layer": sizes["num_hidden_layers"],
        "n_head": _single(keys, sizes),
        "layer_norm_epsilon": keys.take("attention.layer_norm_epsilon"),
    }


def _single(keys: Keys, sizes: Settings) -> int:
    heads = int(sizes["num_attention_heads"])
    if sizes["num_key_value_heads"] != heads:
        raise keys.refusal(
            "attention.head_count_kv", f"{sizes['num_key_value_heads']}, but the model has one per query head, {heads}"
        )
    return heads


def _mamba(keys: Keys) -> Settings:
    hidden, inner = keys.take("embedding_length"), keys.take("ssm.inner_size")
    for suffix in ("feed_forward_length", "attention.head_count"):
        if keys.take(suffix, 0):
            raise keys.refusal(suffix, "a Mamba model has none")
    if inner % hidden:
        raise keys.refusal("ssm.inner_size", f"{inner} is no multiple of embedding_length {hidden}")
    return {
        "vocab_size": _vocabulary(keys),
        "max_position_embeddings": keys.take("context_length"),
        "hidden_size": hidden,
        "num_hidden_layers": keys.take("block_count"),
        "expand": inner // hidden,
        "conv_kernel": keys.take("ssm.conv_kernel"),
        "state_size": keys.take("ssm.state_size"),
        "time_step_rank": keys.take("ssm.time_step_rank"),
        "layer_norm_epsilon": keys.take("attention.layer_norm_rms_epsilon"),
        "use_conv_bias": _has(keys, ".ssm_conv1d.bias"),
        "use_bias": _has(keys, ".ssm_in.bias"),
    }


def _lfm2(keys: Keys) -> Settings:
    counts = keys.take_list("attention.head_count_kv")
    if not isinstance(counts, list) or len({count for count in counts if count}) != 1:
        raise keys.refusal("attention.head_count_kv", "expected one count a layer, 0 or the same number")
    found = _decoder(keys, "norm_eps", head_dim=False)
    return found | {
        "num_key_value_heads": max(counts),
        "layer_types": ["full_attention" if count else "conv" for count in counts],
        "conv_L_cache": keys.take("shortconv.l_cache"),
        "conv_bias": _has(keys, ".shortconv.in_proj.bias"),
        "block_auto_adjust_ff_dim": False,  # feed_forward_length is the final width
    }


# general.architecture -> (model_type of transformers, its settings)
ARCHITECTURES: dict[str, tuple[str, Callable[[Keys], Settings]]] = {
    "bloom": ("bloom", _bloom),
    "falcon": ("falcon", _falcon),
    "gemma2": ("gemma2", _gemma2),
    "gemma3": ("gemma3_text", _gemma3),
    "gpt2": ("gpt2", _gpt2),
    "lfm2": ("lfm2", _lfm2),
    "llama": ("llama", _llama),
    "mamba": ("mamba", _mamba),
    "nemotron": ("nemotron", _nemotron),
    "phi3": ("phi3", _phi3),
    "qwen2": ("qwen2", _qwen2),
    "qwen2moe": ("qwen2_moe", _qwen2moe),
    "qwen3": ("qwen3", _qwen3),
    "qwen3moe": ("qwen3_moe", _qwen3moe),
    "stablelm": ("stablelm", _stablelm),
    "starcoder2": ("starcoder2", _starcoder2),
}
