"""GGUF files: converted once to a Hugging Face folder of fp32 safetensors, compared with the file, and kept in the cache.

reader.py opens a file, architectures.py says what its keys mean for the models of transformers, rope.py what its rotary keys and
tensors mean, tokenizer.py and pretokenizers.py build its tokenizer, check.py compares the converted model with the file, and
convert.py puts these together. docs/GGUF.md lists what is applied and what is refused, with sources.
"""

from lldfast.models.gguf.convert import converted, general, is_gguf

__all__ = ["converted", "general", "is_gguf"]
