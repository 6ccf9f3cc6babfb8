"""Loading a model for scoring: our own folders, Hugging Face folders and hub ids, GGUF files, modules in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from lldfast.backends import pick_device, require
from lldfast.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_from_manifest
from lldfast.errors import InputError
from lldfast.models import gguf
from lldfast.models.gpt import DTYPES, GPT, read_gpt_json
from lldfast.models.hf_config import context_length_of
from lldfast.models.identity import card_licence, folder_hash
from lldfast.models.language_model import LanguageModel


def load_model(
    spec: Any,
    *,
    tokenizer: Any = None,
    device: str | torch.device | None = None,
    dtype: str = "float32",
    bos: str = "auto",
    context_length: int | None = None,
) -> LanguageModel:
    """Load a model for scoring, in evaluation mode. A model in memory keeps its mode and its place: it may be in training.

    Args:
        spec: folder of `GPT.save`, Hugging Face folder or hub id, a .gguf file, or a loaded Hugging Face model (with tokenizer=).
        tokenizer: a Tokenizer or what `load_tokenizer` takes; default: the model's own.
        device: "auto" (cuda where there is one, else the CPU) or one by name. Default: auto for what is loaded here; a model in
            memory stays where it is.
        dtype: "float32", "bfloat16" or "float16", the dtype of the weights (a loaded model keeps its own).
        context_length: use less context than the model has.

    Raises:
        InputError: nothing that can be loaded, an argument is wrong, or the device cannot be used.
        CorruptError: a file does not fit the hash stored beside it.
        MissingDependencyError: transformers (for GGUF also gguf and accelerate) is not installed.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype={dtype!r} is not one of {', '.join(DTYPES)}")
    own = None if tokenizer is None else load_tokenizer(tokenizer)
    if isinstance(spec, LanguageModel):
        raise InputError(f"{spec!r} is loaded already")
    if device is None and not isinstance(spec, nn.Module):
        device = "auto"
    place = None if device is None else pick_device(device)  # told now, not after a long load
    if isinstance(spec, nn.Module):
        model = _from_module(spec, own, bos)
    elif gguf.is_gguf(spec):
        model = _from_gguf(Path(spec), own, dtype, bos)
    elif (Path(spec) / "model.json").is_file():
        model = _from_saved_gpt(Path(spec), own, bos)
        model.module.to(DTYPES[dtype])
    else:
        model = _from_hf(spec, own, dtype, bos)
    if context_length is not None:
        if not 1 <= context_length <= model.context_length:
            raise InputError(f"context_length={context_length} must be in [1, {model.context_length}] for {model.name}")
        model.context_length = context_length
    if not isinstance(spec, nn.Module):
        model.module.eval()
    return model if place is None else model.to(place)


def _from_module(module: nn.Module, tokenizer: Tokenizer | None, bos: str) -> LanguageModel:
    if tokenizer is None:
        raise InputError(f"a {type(module).__name__} in memory needs tokenizer=")
    if isinstance(module, GPT):
        return LanguageModel.from_gpt(module, tokenizer, bos=bos)
    name = str(getattr(module, "name_or_path", "") or type(module).__name__)
    return LanguageModel(
        module, tokenizer, name=name, kind="hf", source="memory", context_length=context_length_of(module), bos=bos
    )


def _from_saved_gpt(folder: Path, tokenizer: Tokenizer | None, bos: str) -> LanguageModel:
    about = read_gpt_json(folder)
    if tokenizer is None:
        if about.get("tokenizer") is None:
            raise InputError(f"{folder}: model.json names no tokenizer; pass tokenizer=")
        tokenizer = tokenizer_from_manifest(about["tokenizer"], folder)
    extra = about.get("extra") or {}
    facts = {"source": str(folder), "weights_hash": about["sha256"], "licence": extra.get("licence"), "extra": extra}
    return LanguageModel.from_gpt(GPT.load(folder), tokenizer, str(extra.get("name") or folder.name), bos=bos, **facts)


def _from_hf(spec: Any, tokenizer: Tokenizer | None, dtype: str, bos: str, **facts: Any) -> LanguageModel:
    transformers = require("transformers", "Hugging Face models need")
    path = Path(spec)
    if not path.is_dir() and (path.suffix or path.is_absolute() or str(spec).startswith(".") or str(spec).count("/") > 1):
        raise InputError(f"{spec}: no such model folder")
    if path.is_dir() and not (path / "config.json").is_file():
        raise InputError(f"{spec} is no model folder: it has neither model.json nor config.json")
    try:
        module = transformers.AutoModelForCausalLM.from_pretrained(str(spec), dtype=DTYPES[dtype])
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"transformers cannot load {spec} as a causal language model: {error}") from error
    folder = path if path.is_dir() else None
    defaults: dict[str, Any] = {
        "name": path.name if folder else str(spec),
        "kind": "hf",
        "source": str(spec),
        "weights_hash": None if folder is None else folder_hash(folder),
        "licence": None if folder is None else card_licence(folder),
    }
    own = load_tokenizer(spec) if tokenizer is None else tokenizer
    return LanguageModel(module.eval(), own, context_length=context_length_of(module), bos=bos, **{**defaults, **facts})


def _from_gguf(file: Path, tokenizer: Tokenizer | None, dtype: str, bos: str) -> LanguageModel:
    """Convert the file to fp32 safetensors in the cache (once per content) and load that."""
    if not file.is_file():
        raise InputError(f"{file}: no such file")
    folder, digest = gguf.converted(file, with_tokenizer=tokenizer is None)
    general = gguf.general(folder)
    return _from_hf(
        folder, tokenizer, dtype, bos, name=str(general.get("name") or file.stem), kind="gguf", source=str(file),
        weights_hash=digest, licence=general.get("license"), extra={"file": file.name, "converter": gguf.CONVERTER},
    )  # fmt: skip
