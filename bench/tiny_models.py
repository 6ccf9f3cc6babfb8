"""Tiny random models of the causal-LM classes of transformers, made so that a mistake in their scores shows. Not run by itself.

    from tiny_models import build, model_types      (bench/sweep_models.py, tests/test_sweep.py)

A configuration class's own defaults are shrunk by the names of its fields (`SIZES`), its lists of layer kinds to one layer of
each kind. Then every parameter is random, biases and norms too, and the scalars that follow the last hidden state (caps, scales,
multipliers) are set to values at which leaving one out changes the logits by nats. The head is scaled so that logits spread by
`SPREAD`: a model that predicts nothing would hide every mistake but the first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn

VOCAB = 320  # more than the 257 ids of the byte tokenizer: a padded vocabulary, as real models have
CONTEXT = 256
SPREAD = 3.0  # standard deviation of the logits, in nats
MOST_PARAMETERS = 20_000_000  # a class whose configuration stays larger is not tiny

SIZES: dict[str, Any] = {
    # widths
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "lru_width", "attention_hidden_size"), 32),
    **dict.fromkeys(("word_embed_proj_dim", "input_embedding_size", "output_embedding_size", "emb_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "dim_ff", "dff", "n_inner"), 48),
    **dict.fromkeys(("feed_forward_size", "ffn_hidden_size", "d_ff", "dense_intermediate_size", "intermediate_size_mlp"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 24),
    **dict.fromkeys(("shared_intermediate_size", "shared_experts_intermediate_size", "moe_shared_expert_intermediate_size"), 24),
    # layers
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_blocks"), 2),
    **dict.fromkeys(("num_decoder_layers",), 2),
    **dict.fromkeys(("encoder_layers", "num_encoder_layers", "depth", "num_global_layers"), 1),
    # attention
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "attention_heads", "num_decoder_attention_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("num_encoder_attention_heads", "num_attention_groups"), 4),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "swa_head_dim", "attention_head_size", "dim_head", "kv_channels", "rotary_dim"), 8),
    **dict.fromkeys(("sliding_window", "window_size", "local_attention", "sliding_window_size", "attention_window_size"), 32),
    **dict.fromkeys(("q_lora_rank", "o_lora_rank"), 16),
    **dict.fromkeys(("kv_lora_rank",), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("qk_head_dim",), 16),
    **dict.fromkeys(("index_head_dim",), 16),
    **dict.fromkeys(("index_n_heads",), 2),
    **dict.fromkeys(("index_topk",), 16),
    # mixtures of experts
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "n_group", "topk_group"), 1),
    **dict.fromkeys(("num_expert_group", "first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"), 1),
    # recurrent layers
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size"), 4),
    **dict.fromkeys(("mamba_n_heads", "linear_num_value_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("mamba_d_head",), 16),
    **dict.fromkeys(("mamba_d_ssm",), 64),
    **dict.fromkeys(("mamba_n_groups",), 1),
    **dict.fromkeys(("linear_num_key_heads",), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim", "mamba_head_dim"), 8),
    **dict.fromkeys(("mamba_dt_rank", "time_step_rank"), 4),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), 16),
    # texts
    "vocab_size": VOCAB,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_target_positions"), CONTEXT),
    "max_source_positions": 32,
    "decoder_start_token_id": 2,
}


def model_types() -> dict[str, str]:
    """{model_type: class} of what `AutoModelForCausalLM` can make."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


# What follows the last hidden state, or multiplies what comes before it, at values that matter.
TELLING: dict[str, float] = {
    "final_logit_softcapping": 8.0,
    "logits_soft_cap": 8.0,
    "attn_logit_softcapping": 5.0,
    "logit_scale": 0.3,
    "logits_scaling": 3.0,
    "logits_mup_width_multiplier": 3.0,
    "lm_head_multiplier": 0.3,
    "embedding_multiplier": 3.0,
    "embedding_scale": 3.0,
    "residual_multiplier": 0.7,
    "unpadded_vocab_size": 300,
    "initializer_range": 0.1,
}
# Also where the default is None.
ALWAYS = ("vocab_size", "num_key_value_heads", "head_dim", "pad_token_id", "bos_token_id", "eos_token_id")
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
LAYER_LISTS = ("layer_types", "layers_block_type", "mlp_layer_types", "block_types", "attn_layers", "indexer_types")

_GEMMA3N: dict[str, Any] = {
    "layer_types": ["sliding_attention", "full_attention"],
    "num_kv_shared_layers": 0,
    "intermediate_size": [48, 48],
    "activation_sparsity_pattern": [0.5, 0.0],
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB,
    "laurel_rank": 8,
}
_GEMMA4: dict[str, Any] = {
    "layer_types": ["sliding_attention", "full_attention"],
    "per_layer_config": {},
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB,
}
_DOTS3 = {"head_dim": 16, "per_layer_config": {}}
_BLT = {"hidden_size_global": 32}
_ZAMBA = {"layers_block_type": ["linear_attention", "hybrid"] * 2, "attention_hidden_size": 64, "attention_head_dim": 16}
_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}
_QWEN4 = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 32, "indexer_compress_ratio": 4,
}  # fmt: skip
# Fields whose values hang together, or that a class cannot run without.
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {
        "encoder_hash_byte_group_vocab": 64,
        "encoder_config": {"hidden_size_global": 32},
        "decoder_config": {"hidden_size_global": 32},
    },
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10_000.0}}},
    "dbrx": {"attn_config": {"rope_theta": 10_000.0, "kv_n_heads": 2, "clip_qkv": 8.0}, "ffn_config": {"moe_top_k": 2}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": _EXPERTS,
    "dots3_note": {
        "text_config": _DOTS3,
        "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 32, "per_layer_config": {}},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "dots3_note_text": _DOTS3,
    "gemma3n": {"text_config": _GEMMA3N},
    "gemma3n_text": _GEMMA3N,
    "gemma4": {"text_config": _GEMMA4},
    "gemma4_text": _GEMMA4,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_hidden_layers": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds_dim": (16, 16),
        "axial_pos_shape": (16, 16),
        "attn_layers": ["local", "lsh"],
    },
    "xlstm": {"chunk_size": 64},
    "xmod": {"default_language": "en_XX"},
    "zamba": _ZAMBA,
    "zamba2": {**_ZAMBA, "mamba_headdim": 8, "num_key_value_heads": 4},
    "zaya": {"num_experts_per_tok": 1},
}


# Encoders that an option of their configuration makes causal.
ENCODERS = (
    "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert", "roberta",
    "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod",
)  # fmt: skip


def tiny_config(model_type: str, **options: Any) -> Any:
    """The configuration of a tiny model.

    Args:
        options: fields that differ from what is chosen here.
    """
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    made = _shrunk(kind())
    for name, value in {**SPECIAL.get(model_type, {}), **options}.items():
        made[name] = {**made.get(name, {}), **value} if name.endswith("_config") and isinstance(value, dict) else value
    for name in LAYER_COUNTS:
        for lists in LAYER_LISTS:
            if name in made and isinstance(made.get(lists), list):
                made[name] = len(made[lists])
    return kind(**made)


def _shrunk(config: Any) -> dict[str, Any]:
    """Arguments for the class of `config` that make it tiny."""
    default = vars(config)
    alias = getattr(type(config), "attribute_map", None) or {}
    found: dict[str, Any] = {}
    for name, value in {**SIZES, **TELLING}.items():
        field = alias.get(name, name)
        given = default.get(field)
        plain = given is None and field in default and name in ALWAYS
        if plain or (isinstance(given, (int, float)) and not isinstance(given, bool)):
            found[field] = value
    if "kv_lora_rank" in found:  # latent attention has a key of its own for every head
        found["num_key_value_heads"] = SIZES["num_attention_heads"]
    layers = SIZES["num_hidden_layers"]
    for name in LAYER_LISTS:
        given = default.get(name)
        if isinstance(given, (list, tuple)) and given and isinstance(given[0], str):
            layers = max(layers, len(set(given)))
    for name in LAYER_LISTS:
        given = default.get(name)
        if isinstance(given, (list, tuple)) and given and isinstance(given[0], str):
            kinds = list(dict.fromkeys(given))
            found[name] = (kinds * layers)[:layers]
    found |= {name: layers for name in LAYER_COUNTS if name in found}
    for name in getattr(type(config), "sub_configs", None) or {}:
        part = default.get(name)
        if part is not None:
            found[name] = {"model_type": part.model_type, **_shrunk(part)}
    return found


def build(model_type: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    """A tiny causal LM in evaluation mode, the same for the same seed.

    Raises:
        ValueError: the class is not tiny with this configuration. Whatever the class raises else.
    """
    from transformers import AutoModelForCausalLM

    config = tiny_config(model_type, **options)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size:,} parameters with a configuration that should be tiny")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        roughen(model)
        spread_logits(model)
    return model.to(dtype)


# State-space and recurrent layers take exponentials of these: their own initial values are the sensible ones.
DYNAMICS = ("A_log", "dt_bias", "time_decay", "time_first", "dt_proj", "recurrent_param", "decay")


def roughen(model: nn.Module) -> None:
    """Move biases, norms and zero-initialised parameters off the values at which leaving them out changes nothing."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not p.is_floating_point() or any(part in name for part in DYNAMICS):
                continue
            if p.dim() == 1:
                p.add_(torch.randn_like(p), alpha=0.1)
            elif not bool(p.any()):
                p.normal_(0, 0.1)


def spread_logits(model: nn.Module) -> None:
    """Scale the head to logits of standard deviation `SPREAD`; a tied embedding scales with it."""
    head = model.get_output_embeddings()
    if getattr(head, "weight", None) is None:
        return
    probe = torch.arange(3, 67)[None]
    for _ in range(3):
        with torch.no_grad():
            spread = float(model(input_ids=probe, use_cache=False).logits.std())
            if not math.isfinite(spread) or spread == 0:
                return
            head.weight.mul_(min(SPREAD / spread, 100.0))


@dataclass(frozen=True)
class Kind:
    """A model type with options that make a kind of it.

    Attributes:
        what: which way of making logits it stands for.
        expected: "right", "right by full logits", or "refused" for one that gives no text a log-likelihood.
        dtypes: those that the class itself runs in; it is refused in others.
    """

    name: str
    what: str = ""
    model_type: str = ""  # default: the name
    options: dict[str, Any] = field(default_factory=dict)
    expected: str = "right"
    dtypes: tuple[str, ...] = ("fp32", "bf16")

    def build(self, seed: int = 0) -> nn.Module:
        return build(self.model_type or self.name, seed=seed, **self.options)


_LONG_ROPE = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 64,
    },
    "original_max_position_embeddings": 64,
}
# One of each kind, as far as log-likelihoods go.
KINDS = (
    Kind("llama", "rotary positions, grouped queries"),
    Kind("gpt2", "absolute positions, tied embeddings"),
    Kind("bloom", "ALiBi"),
    Kind("phi", "a head with a bias"),
    Kind("gemma2", "soft caps, sliding windows"),
    Kind("cohere", "a logit scale"),
    Kind("granite", "multipliers of embeddings, residuals and logits"),
    Kind("falcon_h1", "a multiplier of the head; attention beside a state space"),
    Kind("recurrent_gemma", "a soft cap by another name; linear recurrences"),
    Kind("mamba", "a state space"),
    Kind("mamba2", "a state space in chunks"),
    Kind("rwkv", "a recurrence over time"),
    Kind("xlstm", "a matrix memory; a soft-capped head", dtypes=("fp32",)),
    Kind("jamba", "attention and state-space layers, some with experts"),
    Kind("qwen3_moe", "a mixture of experts"),
    Kind("deepseek_v3", "latent attention"),
    Kind("deepseek_v32", "attention to what an indexer selects"),
    Kind("bart", "the decoder of an encoder-decoder"),
    Kind("gemma3", "a vision-language model"),
    Kind("long rope", "rope by the length of the longest text", "phi3", _LONG_ROPE),
    Kind("bert as a decoder", "a head behind a layer of its own", "bert", {"is_decoder": True}),
    Kind("bert", "an encoder", expected="refused"),
    Kind("reformer", "attention by random hashes", expected="refused"),
)


def every_kind() -> list[Kind]:
    """All that `AutoModelForCausalLM` makes, as it is by default, and what options make of it."""
    decoders = [Kind(f"{name} as a decoder", "", name, {"is_decoder": True}) for name in ENCODERS]
    decoders.append(Kind("xlm as a decoder", "", "xlm", {"causal": True}))
    return [Kind(name) for name in model_types()] + decoders + [kind for kind in KINDS if kind.options]
