"""What tells one model from another: hashes of its weights, and the licence that its card states."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn as nn
import xxhash

from lldfast.models.checkpoint_files import weight_files
from lldfast.models.wrappers import plain_name


def card_licence(folder: Path) -> str | None:
    """`license:` in the front matter of the folder's README.md."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    lines = card.read_text(encoding="utf-8", errors="replace").splitlines()
    if lines[:1] != ["---"]:
        return None
    for line in lines[1:]:
        if line == "---":
            break
        if line.startswith("license:"):
            return line.partition(":")[2].strip().strip("\"'") or None
    return None


def parameter_hash(module: nn.Module) -> str:
    """XXH3-128 (hex) over names and fp32 values of the parameters; layers that are wrapped have the names of plain ones."""
    digest = xxhash.xxh3_128()
    for name, p in module.named_parameters():
        digest.update(plain_name(name).encode())
        digest.update(p.detach().to("cpu", torch.float32).contiguous().numpy().data)
    return digest.hexdigest()


def file_hash(*files: Path) -> str:
    """XXH3-128 (hex) over names and contents."""
    digest = xxhash.xxh3_128()
    for file in files:
        digest.update(file.name.encode())
        with open(file, "rb") as handle:
            while block := handle.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def folder_hash(folder: Path, *extra: Path) -> str:
    """XXH3-128 over config.json and the weight files that a load of a Hugging Face folder takes, and no others.

    Args:
        extra: more files that the model is loaded from.

    Raises:
        InputError: the folder has no weights.
        CorruptError: its index of weights is none.
    """
    return file_hash(folder / "config.json", *weight_files(folder), *extra)


def joint_hash(*hashes: str) -> str:
    """XXH3-128 (hex) of several hashes, in order."""
    return xxhash.xxh3_128(" ".join(hashes).encode()).hexdigest()
