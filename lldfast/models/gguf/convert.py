"""The conversion of a GGUF file, from the cache where it is there."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lldfast.backends import require
from lldfast.errors import InputError
from lldfast.files import atomic_folder, read_json, write_json
from lldfast.models.gguf import tokenizer as tokenizers
from lldfast.models.gguf.architectures import configuration
from lldfast.models.gguf.check import compare
from lldfast.models.gguf.reader import MAGIC, GGUFFile, open_gguf
from lldfast.models.identity import file_hash

# Of what this package makes of a file. A folder of another version, or made with other libraries, is not used again.
CONVERTER = 2
ABOUT = "lldfast.json"  # in the folder: what it was made from, by what
STEM = 40  # characters of the file's name in the cached folder's


def is_gguf(spec: Any) -> bool:
    """Whether this names a GGUF file, by its suffix or by its first bytes."""
    path = Path(spec)
    if path.suffix.lower() == ".gguf":
        return True
    if not path.is_file():
        return False
    with open(path, "rb") as handle:
        return handle.read(len(MAGIC)) == MAGIC


def converted(file: Path, *, with_tokenizer: bool = True) -> tuple[Path, str]:
    """(folder, content hash) of the conversion; made when the cache has none of this content by this converter.

    Args:
        with_tokenizer: whether the folder needs the file's own tokenizer. Without, one that cannot be rebuilt does not matter.

    Raises:
        InputError: something in the file, or the file itself, cannot be converted without changing what it computes.
        CorruptError: the file is truncated or misshapen.
        MissingDependencyError: gguf, accelerate or transformers is not installed.
    """
    for package in ("gguf", "accelerate", "transformers"):
        require(package, "GGUF files need")
    digest = file_hash(file)
    made_by = {"converter": CONVERTER, **{package: version(package) for package in ("transformers", "gguf", "tokenizers")}}
    about = {"source": file.name, "xxh3": digest, **made_by}
    room = cache_folder() / "gguf" / "-".join(["v" + str(CONVERTER), *(f"{name}{made_by[name]}" for name in list(made_by)[1:])])
    whole = room / f"{file.stem[:STEM]}-{digest[:16]}"
    bare = whole.with_name(whole.name + "-weights")
    for folder in (whole,) if with_tokenizer else (whole, bare):
        if (folder / ABOUT).is_file() and about.items() <= read_json(folder / ABOUT).items():
            return folder, digest
    folder = whole if with_tokenizer else bare
    _convert(open_gguf(file), folder, about, with_tokenizer)
    return folder, digest


def _convert(file: GGUFFile, folder: Path, about: dict[str, Any], with_tokenizer: bool) -> None:
    """Everything is checked before the folder gets its name: what stands in the cache is right."""
    built = tokenizers.build(file) if with_tokenizer else None
    model = _load(file)
    compare(file, model)
    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary)
        if built is not None:
            tokenizers.save(*built, temporary)
        write_json(temporary / ABOUT, {**about, "general": _general(file)})


def _load(file: GGUFFile) -> Any:
    """The model in fp32: our configuration, transformers' reading of the tensors."""
    import transformers
    from transformers.utils.quantization_config import GgufConfig

    config = configuration(file)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            str(file.path.parent), gguf_file=file.path.name, config=config, dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )  # fmt: skip
    except (OSError, ValueError, KeyError, IndexError, TypeError, NotImplementedError, RuntimeError) as error:
        raise InputError(f"transformers cannot convert {file.path}: {error}") from error
    # The weights are plain fp32 now; a leftover quantisation entry would make the next load look for the GGUF blocks.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model


def general(folder: Path) -> dict[str, str]:
    """The general.* strings (name, license, ...) of the file that `folder` was converted from."""
    return dict(read_json(folder / ABOUT)["general"])


def _general(file: GGUFFile) -> dict[str, str]:
    pairs = file.metadata.items()
    return {key.removeprefix("general."): value for key, value in pairs if key.startswith("general.") and isinstance(value, str)}


def cache_folder() -> Path:
    """LLDFAST_CACHE, or lldfast below XDG_CACHE_HOME or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("LLDFAST_CACHE") or Path(base) / "lldfast")
