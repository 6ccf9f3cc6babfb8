"""GGUF files: converted once to a Hugging Face folder of fp32 safetensors, compared with the file, and kept in the cache.

reader.py opens a file. architectures.py says what its keys mean for the models of transformers, rope.py what those of rotary
positions mean, keys.py that none is passed over. tokenizer.py and pretokenizers.py build its tokenizer, check.py compares the
converted model with the file, convert.py puts these together. docs/GGUF.md lists what is applied and what is refused.
"""

from lldfast.models.gguf.convert import CONVERTER, converted, general, is_gguf

__all__ = ["CONVERTER", "converted", "general", "is_gguf"]
