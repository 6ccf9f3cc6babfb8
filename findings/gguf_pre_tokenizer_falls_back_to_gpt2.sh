#!/usr/bin/env bash
# A GGUF file names the way its tokenizer cuts texts before merging (tokenizer.ggml.pre) and does not hold it. transformers 5.23.0 knows
# 23 of the names that llama.cpp writes. For any other, "smollm" and "starcoder" among them, it takes GPT-2's splitting, without an error
# or a warning: the vocabulary is right, the ids are not. For "qwen2", which it knows, it takes the published expression without the NFC
# normalisation of the published tokenizer.json, so a decomposed accent gets other ids.
#
# Seen: with one vocabulary, in which "12" is a token, the text "12" is ['12'] for pre=smollm, whose published tokenizers cut every
#       digit off (Digits(individual_digits=True), then ByteLevel), and ['12'] for a name that nobody has; 'e' and U+0301 stay two
#       characters for pre=qwen2.
# What to do: build the splitting from the name yourself (llama.cpp's src/llama-vocab.cpp lists them), and refuse names you do not know.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.23.0 tokenizers==0.23.3 gguf==0.19.0 torch==2.13.0 2>/dev/null

cat >"$work/program.py" <<'PYTHON'
import logging
import sys
import warnings
from pathlib import Path

import gguf
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, logging as library

warnings.simplefilter("error")
library.set_verbosity_warning()
said = []
handler = logging.Handler()
handler.emit = lambda record: said.append(record.getMessage())
logging.getLogger("transformers").addHandler(handler)


def tokens(pre, text):
    folder = Path(sys.argv[1])
    writer = gguf.GGUFWriter(str(folder / "m.gguf"), "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    writer.add_token_list([*alphabet, "12"])
    writer.add_token_types([1] * (len(alphabet) + 1))
    writer.add_token_merges(["1 2"])
    for key, value in {"block_count": 1, "context_length": 8, "embedding_length": 8, "feed_forward_length": 8}.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_head_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return AutoTokenizer.from_pretrained(str(folder), gguf_file="m.gguf").tokenize(text)


print("smollm", tokens("smollm", "12"))
print("nobody's", tokens("a-name-that-nobody-has", "12"))
print("qwen2", tokens("qwen2", "12"), len(tokens("qwen2", "e\u0301")))
print("said", [line for line in said if "pre" in line.lower()])
PYTHON

got=$("$work/venv/bin/python" "$work/program.py" "$work" 2>/dev/null)
echo "$got"
wanted="smollm ['12']
nobody's ['12']
qwen2 ['1', '2'] 3
said []"
[[ $got == "$wanted" ]] || { echo "CHANGED"; exit 1; }
echo "as described"
