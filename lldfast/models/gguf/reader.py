"""A GGUF file: its metadata as plain values and its tensors, or an error that names the file."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lldfast.errors import CorruptError, InputError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
# What package gguf raises on a file that ends early or whose counts are wrong: it indexes and reshapes slices of a memory map.
_MISSHAPEN = (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError, struct.error)


@dataclass(frozen=True)
class GGUFFile:
    """An opened file.

    Attributes:
        architecture: `general.architecture`, the prefix of the model's keys.
        metadata: {key: int, float, bool, str or a list of these}.
        tensors: {name: gguf's ReaderTensor}, memory-mapped and still quantised.
    """

    path: Path
    architecture: str
    metadata: dict[str, Any]
    tensors: dict[str, Any]

    def values(self, name: str) -> npt.NDArray[np.float32]:
        """A tensor in fp32, in torch's order of dimensions.

        Raises:
            InputError: package gguf cannot unpack this kind of quantisation.
        """
        import gguf

        tensor = self.tensors[name]
        try:
            return np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32)
        except NotImplementedError as error:
            raise InputError(f"{self.path}: tensor {name} is {tensor.tensor_type.name}, which gguf cannot unpack") from error

    def require(self, key: str) -> Any:
        if key not in self.metadata:
            raise InputError(f"{self.path}: the metadata lack {key}")
        return self.metadata[key]


def open_gguf(path: Path) -> GGUFFile:
    """Read the header and check that every tensor lies within the file and apart from the others.

    Raises:
        InputError: no GGUF file, a version, part or kind of it that cannot be loaded.
        CorruptError: the file ends early or contradicts itself.
    """
    size = path.stat().st_size
    with open(path, "rb") as handle:
        start = handle.read(8)
    if start[:4] != MAGIC:
        raise InputError(f"{path} is no GGUF file: it does not begin with {MAGIC.decode()}")
    if len(start) < 8:
        raise CorruptError(f"{path} ends after {size} bytes")
    (version,) = struct.unpack("<I", start[4:])
    if version not in VERSIONS:
        kind = "a big-endian GGUF file" if version & 0xFFFF == 0 else f"version {version} of GGUF"
        raise InputError(f"{path} is {kind}; little-endian files of versions {' and '.join(map(str, VERSIONS))} can be loaded")
    import gguf

    try:
        reader = gguf.GGUFReader(str(path))
        metadata = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    except _MISSHAPEN as error:
        raise CorruptError(f"{path} is a truncated or misshapen GGUF file ({type(error).__name__}: {error})") from error
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise InputError(f"{path}: the metadata lack general.architecture")
    _check_kind(path, metadata)
    _check_places(path, reader.tensors, size)
    return GGUFFile(path, architecture, metadata, {tensor.name: tensor for tensor in reader.tensors})


def _check_kind(path: Path, metadata: dict[str, Any]) -> None:
    if (parts := metadata.get("split.count", 1)) > 1:
        raise InputError(f"{path} is one of {parts} parts: join them first, with llama.cpp's llama-gguf-split --merge")
    if (kind := metadata.get("general.type", "model")) != "model":
        raise InputError(f"{path} holds no model: its general.type is {kind!r}")


def _check_places(path: Path, tensors: list[Any], size: int) -> None:
    if not tensors:
        raise InputError(f"{path} holds no tensors")
    end, before = 0, ""
    for tensor in sorted(tensors, key=lambda tensor: int(tensor.data_offset)):
        first, last = int(tensor.data_offset), int(tensor.data_offset) + int(tensor.n_bytes)
        if last > size:
            raise CorruptError(f"{path}: tensor {tensor.name} ends at byte {last}, but the file has {size}")
        if first < end:
            raise CorruptError(f"{path}: tensors {before} and {tensor.name} overlap")
        end, before = last, tensor.name
