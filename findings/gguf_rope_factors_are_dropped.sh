#!/usr/bin/env bash
# llama.cpp writes Llama 3's rotary scaling as a tensor, rope_freqs.weight (one divisor a frequency), and linear or yarn scaling as keys
# llama.rope.scaling.*. transformers 5.23.0 reads neither: the model loads with plain rotary positions, nothing is said at its usual
# level of logging, and output_loading_info lists no unexpected key, because tensors without a place are skipped before it looks.
#
# Seen: three files of the same weights, plain, with divisors (1, 8, 8, 8), and with rope.scaling.type=linear and factor=4, load as models
#       with rope_type "default" and give the same logits to the last bit.
# What to do: compare the file's tensors and keys with what the loaded model uses. rope_type "longrope" with short_factor = long_factor =
# the divisors and attention_factor 1 holds them exactly and survives save_pretrained.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.23.0 accelerate==1.15.0 gguf==0.19.0 torch==2.13.0 2>/dev/null

cat >"$work/program.py" <<'PYTHON'
import logging
import sys
import warnings
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM, logging as library

warnings.simplefilter("error")
library.disable_progress_bar()
said = []
handler = logging.Handler()
handler.emit = lambda record: said.append(record.getMessage())
logging.getLogger("transformers").addHandler(handler)
folder, width, vocabulary = Path(sys.argv[1]), 16, 32


def logits(scaling=None, divisors=None):
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(folder / "m.gguf"), "llama")
    for key, value in {"block_count": 1, "context_length": 64, "embedding_length": width, "feed_forward_length": 32}.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(vocabulary)
    if scaling:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(scaling)
    shapes = {
        "token_embd": (vocabulary, width), "output": (vocabulary, width), "output_norm": (width,), "blk.0.attn_norm": (width,),
        "blk.0.ffn_norm": (width,), "blk.0.ffn_gate": (32, width), "blk.0.ffn_up": (32, width), "blk.0.ffn_down": (width, 32),
    } | {f"blk.0.attn_{part}": (width, width) for part in ("q", "k", "v", "output")}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.normal(0, 1, shape).astype(np.float32))
    if divisors:
        writer.add_tensor("rope_freqs.weight", np.array(divisors, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model, info = AutoModelForCausalLM.from_pretrained(str(folder), gguf_file="m.gguf", output_loading_info=True)
    print(model.config.rope_parameters["rope_type"], sorted(info["unexpected_keys"]))
    with torch.no_grad():
        return model(torch.arange(30)[None]).logits


plain, divided, scaled = logits(), logits(divisors=[1, 8, 8, 8]), logits(scaling=4.0)
print("equal", torch.equal(plain, divided), torch.equal(plain, scaled))
print("said", [line for line in said if "rope" in line.lower()])
PYTHON

got=$("$work/venv/bin/python" "$work/program.py" "$work" 2>/dev/null)
echo "$got"
wanted="default []
default []
default []
equal True True
said []"
[[ $got == "$wanted" ]] || { echo "CHANGED"; exit 1; }
echo "as described"
