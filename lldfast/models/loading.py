"""Loading a model for scoring: our own folders, Hugging Face folders and hub ids, GGUF files, modules in memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from lldfast.backends import pick_device
from lldfast.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_from_manifest
from lldfast.errors import InputError, naming
from lldfast.models import adapters, gguf
from lldfast.models.gpt import DTYPES, GPT, read_gpt_json
from lldfast.models.hf_config import context_length_of
from lldfast.models.identity import card_licence, file_hash, folder_hash, joint_hash, parameter_hash
from lldfast.models.language_model import LanguageModel
from lldfast.models.pretrained import load_pretrained
from lldfast.models.wrappers import unwrap


def load_model(
    spec: Any,
    *,
    tokenizer: Any = None,
    device: str | torch.device | None = None,
    dtype: str = "float32",
    bos: str = "auto",
    context_length: int | None = None,
    trust_remote_code: bool = False,
) -> LanguageModel:
    """Load a model for scoring, in evaluation mode. A model in memory keeps its mode and its place: it may be in training.

    Every weight of the model is in the files and every weight of the files in the model, or it is not loaded. Of a model in
    memory that is wrapped (torch.compile, DataParallel, DistributedDataParallel, PEFT) the model inside is taken, with the same
    parameters and, for PEFT, with its adapters.

    Args:
        spec: folder of `GPT.save`, Hugging Face folder or hub id, folder of a PEFT adapter that names its base model, a .gguf
            file, or a loaded Hugging Face model (with tokenizer=).
        tokenizer: a Tokenizer or what `load_tokenizer` takes; default: the model's own.
        device: "auto" (cuda where there is one, else the CPU) or one by name. Default: auto for what is loaded here; a model in
            memory stays where it is.
        dtype: "float32", "bfloat16" or "float16", the dtype of the weights (a loaded model keeps its own).
        context_length: use less context than the model has.
        trust_remote_code: run the Python code that a Hugging Face model brings along. Read it first.

    Raises:
        InputError: nothing that can be loaded, weights that the model lacks or has no place for (named), an argument is wrong, or
            the device cannot be used.
        CorruptError: a file is truncated, or does not fit the hash stored beside it.
        MissingDependencyError: transformers (for GGUF also gguf and accelerate, for an adapter peft) is not installed.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype={dtype!r} is not one of {', '.join(DTYPES)}")
    own = None if tokenizer is None else load_tokenizer(tokenizer)
    if isinstance(spec, LanguageModel):
        raise InputError(f"{spec!r} is loaded already")
    if not isinstance(spec, (nn.Module, str, os.PathLike)):
        raise InputError(f"a {type(spec).__name__} is no model: expected a folder, a file, a hub id or a module")
    if device is None and not isinstance(spec, nn.Module):
        device = "auto"
    place = None if device is None else pick_device(device)  # told now, not after a long load
    if isinstance(spec, nn.Module):
        model = _from_module(spec, own, bos)
    elif gguf.is_gguf(spec):
        model = _from_gguf(Path(spec), own, dtype, bos)
    elif (Path(spec) / "model.json").is_file():
        model = _from_saved_gpt(Path(spec), own, dtype, bos)
    else:
        model = _from_hf(spec, own, dtype, bos, trust_remote_code)
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
    module = unwrap(module)
    if isinstance(module, GPT):
        return LanguageModel.from_gpt(module, tokenizer, bos=bos)
    if not hasattr(module, "config"):
        raise InputError(f"a {type(module).__name__} is no language model that is known here: it has no config of Hugging Face")
    # Only of the library's own classes: one from elsewhere may make logits in another way.
    if type(module).__module__.startswith("transformers.") and module.get_output_embeddings() is None:  # type: ignore[operator]
        raise InputError(f"a {type(module).__name__} has no head of a language model")
    name = str(getattr(module, "name_or_path", "") or type(module).__name__)
    return LanguageModel(
        module, tokenizer, name=name, kind="hf", source="memory", context_length=context_length_of(module), bos=bos
    )


def _from_saved_gpt(folder: Path, tokenizer: Tokenizer | None, dtype: str, bos: str) -> LanguageModel:
    about = read_gpt_json(folder)
    if tokenizer is None:
        if about.get("tokenizer") is None:
            raise InputError(f"{folder}: model.json names no tokenizer; pass tokenizer=")
        tokenizer = tokenizer_from_manifest(about["tokenizer"], folder)
    extra = about.get("extra") or {}
    facts = {"source": str(folder), "weights_hash": about["sha256"], "licence": extra.get("licence"), "extra": extra}
    gpt = GPT.load(folder).to(DTYPES[dtype])
    return LanguageModel.from_gpt(gpt, tokenizer, str(extra.get("name") or folder.name), bos=bos, **facts)


def _from_hf(
    spec: Any, tokenizer: Tokenizer | None, dtype: str, bos: str, trust_remote_code: bool = False, **facts: Any
) -> LanguageModel:
    path = Path(spec)
    if not path.is_dir() and (path.suffix or path.is_absolute() or str(spec).startswith(".") or str(spec).count("/") > 1):
        raise InputError(f"{spec}: no such model folder")
    if path.is_dir() and adapters.is_adapter(path):
        return _from_adapter(path, tokenizer, dtype, bos, trust_remote_code)
    if path.is_dir() and not (path / "config.json").is_file():
        raise InputError(f"{spec} is no model folder: it has neither model.json nor config.json")
    module = load_pretrained(spec, DTYPES[dtype], trust_remote_code=trust_remote_code)
    defaults: dict[str, Any] = {"name": str(spec), "kind": "hf", "source": str(spec)}
    if path.is_dir():
        extra = (path / name for name in getattr(type(module.config), "extra_files", ()))
        weights_hash = folder_hash(path, *(file for file in extra if file.is_file()))
        defaults |= {"name": path.name, "weights_hash": weights_hash, "licence": card_licence(path)}
    own = load_tokenizer(spec) if tokenizer is None else tokenizer
    return LanguageModel(module, own, context_length=context_length_of(module), bos=bos, **{**defaults, **facts})


def _from_adapter(folder: Path, tokenizer: Tokenizer | None, dtype: str, bos: str, trust_remote_code: bool) -> LanguageModel:
    """The base model that the adapter's configuration names, with the adapter in it."""
    base, files = adapters.base_of(folder), adapters.adapter_files(folder)
    if tokenizer is None:
        own = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
        tokenizer = load_tokenizer(folder if own else base)
    with naming(f"{folder}, base model"):
        module = load_pretrained(base, DTYPES[dtype], trust_remote_code=trust_remote_code)
        base_hash = folder_hash(Path(base)) if Path(base).is_dir() else parameter_hash(module)
    adapted = adapters.put_into(module, folder)
    return LanguageModel(
        adapted, tokenizer, name=folder.name, kind="hf", source=str(folder), bos=bos,
        context_length=context_length_of(adapted), weights_hash=joint_hash(base_hash, file_hash(*files)),
        licence=card_licence(folder), extra={"base": base},
    )  # fmt: skip


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
