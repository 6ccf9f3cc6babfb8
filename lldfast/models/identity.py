"""What tells one model from another: hashes of its weights, and the licence that its card states."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
import torch.nn as nn
import xxhash


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
    """XXH3-128 (hex) over names and fp32 values of the parameters."""
    digest = xxhash.xxh3_128()
    for name, p in module.named_parameters():
        digest.update(name.encode())
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


def folder_hash(folder: Path) -> str:
    """XXH3-128 over the weight files and config.json of a Hugging Face folder."""
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not weights:
        warnings.warn(f"{folder} has no weight files to hash; its identity covers config.json only", stacklevel=2)
    return file_hash(folder / "config.json", *weights)
