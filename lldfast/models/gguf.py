"""GGUF files: converted once to a Hugging Face folder of fp32 safetensors, by transformers, and kept in the cache."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from lldfast.backends import require
from lldfast.errors import InputError
from lldfast.files import atomic_folder, write_json
from lldfast.models.identity import file_hash


def converted(file: Path) -> tuple[Path, str]:
    """(folder, content hash) of the conversion; made when the cache has none of this content.

    Raises:
        InputError: transformers cannot convert the file.
        MissingDependencyError: gguf, accelerate or transformers is not installed.
    """
    for package in ("gguf", "accelerate", "transformers"):
        require(package, "GGUF files need")
    digest = file_hash(file)
    folder = cache_folder() / "gguf" / f"{file.stem}-{digest[:16]}"
    if not (folder / "lldfast.json").is_file():
        _convert(file, folder, digest)
    return folder, digest


def _convert(file: Path, folder: Path, digest: str) -> None:
    import transformers
    from transformers.utils.quantization_config import GgufConfig

    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            **where, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        raise InputError(f"transformers cannot convert {file}: {error}") from error
    # The weights are plain fp32 now; a leftover quantisation entry would make the next load look for the GGUF blocks.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        write_json(temporary / "lldfast.json", {"source": file.name, "xxh3": digest, "transformers": transformers.__version__})


def general(file: Path) -> dict[str, str]:
    """The general.* strings of a GGUF header (name, license, ...)."""
    import gguf

    fields = gguf.GGUFReader(str(file)).fields
    found = {}
    for key, field in fields.items():
        if key.startswith("general.") and field.types[:1] == [gguf.GGUFValueType.STRING]:
            found[key.removeprefix("general.")] = bytes(field.parts[field.data[0]]).decode("utf-8", "replace")
    return found


def cache_folder() -> Path:
    """LLDFAST_CACHE, or lldfast below XDG_CACHE_HOME or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("LLDFAST_CACHE") or Path(base) / "lldfast")
