"""A converted model against its file: every tensor used, every parameter filled, every value where it belongs.

The names come from package gguf, the layouts from llama.cpp's converters; neither from the code that is checked.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from lldfast.errors import InputError, listed
from lldfast.models.gguf.reader import GGUFFile
from lldfast.models.gguf.rope import DIVISORS

Array = npt.NDArray[np.float32]
TOLERANCE = 1e-6  # of a tensor's largest value: transformers unpacks the blocks of some architectures with code of its own


def compare(file: GGUFFile, model: Any) -> None:
    """Raise InputError, naming the tensor or parameter, where the model is not what the file holds."""
    used: set[str] = set()
    parameters = model.state_dict()
    names = _Names(file, model.config)
    for parameter, value in parameters.items():
        sources = names.of(parameter)
        missing = [name for name in sources if name not in file.tensors]
        if not sources or missing:
            raise InputError(
                f"{file.path}: no tensor {', '.join(missing) or 'that is known'} for the model's parameter {parameter}"
            )
        used.update(sources)
        expected = _expected(file, sources, parameter, model.config)
        _same(file, parameter, sources, value.detach().float().numpy(), expected)
    if unused := sorted(set(file.tensors) - used - _used_by_rope(model.config)):
        raise InputError(f"{file.path}: nothing in a {file.architecture} model of transformers takes tensors {listed(unused)}")


def _same(file: GGUFFile, parameter: str, sources: list[str], value: Array, expected: Array) -> None:
    what = f"{file.path}: tensor {' and '.join(sources)} against the converted parameter {parameter}"
    if value.shape != expected.shape:
        raise InputError(f"{what}: shape {expected.shape} against {value.shape}")
    largest = float(np.nanmax(np.abs(expected), initial=0.0))
    if not np.allclose(value, expected, rtol=0.0, atol=TOLERANCE * largest, equal_nan=True):
        raise InputError(f"{what}: the values differ by up to {np.nanmax(np.abs(value - expected)):.3g}")


def _used_by_rope(config: Any) -> set[str]:
    """The divisors of frequencies went into the configuration (rope.py), or into none where they are all one."""
    return set(DIVISORS) if getattr(config, "rope_parameters", None) else set()


class _Names:
    """The file's names for a parameter: one, or several that the model holds in one piece."""

    def __init__(self, file: GGUFFile, config: Any) -> None:
        import gguf

        kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
        self.map = gguf.get_tensor_name_map(kinds[file.architecture], config.num_hidden_layers)
        self.tied = config.tie_word_embeddings

    def of(self, parameter: str) -> list[str]:
        name, _, ending = parameter.rpartition(".")
        if ending not in ("weight", "bias"):
            name, ending = parameter, ""
        block = next((part for part in name.split(".") if part.isdigit()), "")
        if name.endswith("experts.gate_up_proj"):
            return [f"blk.{block}.ffn_gate_exps.weight", f"blk.{block}.ffn_up_exps.weight"]
        if name.endswith("experts.down_proj"):
            return [f"blk.{block}.ffn_down_exps.weight"]
        found = "token_embd" if name == "lm_head" and self.tied else self._find(name)
        if found is None:
            return []
        return [found + (f".{ending}" if ending else "")]

    def _find(self, name: str) -> str | None:
        for prefix in ("", "transformer.", "model.", "backbone."):
            if name.startswith(prefix) and (found := self.map.get_name(name.removeprefix(prefix))):
                return str(found)
        return None


def _expected(file: GGUFFile, sources: list[str], parameter: str, config: Any) -> Array:
    """What llama.cpp's converter had before it wrote these tensors."""
    arrays = [file.values(source) for source in sources]
    if len(arrays) > 1:
        return np.concatenate(arrays, axis=1)
    (array,), (source,) = arrays, sources
    kind = source.split(".", 2)[2] if source.startswith("blk.") else source
    match file.architecture:
        case "llama" if kind.startswith(("attn_q.", "attn_k.")):
            heads = config.num_attention_heads if kind.startswith("attn_q.") else config.num_key_value_heads
            return _halves(array, heads)
        case "gemma2" | "gemma3" | "nemotron" if source.endswith("norm.weight"):
            return array - np.float32(1)
        case "gpt2" if kind in ("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight"):
            return array.T
        case "bloom" if kind.startswith("attn_qkv."):
            return _by_head(array, config.num_attention_heads)
        case "mamba" if kind == "ssm_a":
            return np.log(-array)
        case "mamba" | "lfm2" if kind in ("ssm_conv1d.weight", "shortconv.conv.weight"):
            return array[:, None]
        case "qwen2moe" if kind == "ffn_gate_inp_shexp.weight" and array.ndim == 1:
            return array[None]
    return array


def _halves(array: Array, heads: int) -> Array:
    """Rows of a head as two halves (Hugging Face), from neighbouring pairs (llama.cpp): [heads, d/2, 2] -> [heads, 2, d/2]."""
    pairs = array.reshape(heads, -1, 2, *array.shape[1:])
    return np.moveaxis(pairs, 2, 1).reshape(array.shape)


def _by_head(array: Array, heads: int) -> Array:
    """Bloom's order, query, key and value head by head, from all queries, all keys, all values."""
    return np.moveaxis(array.reshape(3, heads, -1, *array.shape[1:]), 0, 1).reshape(array.shape)
