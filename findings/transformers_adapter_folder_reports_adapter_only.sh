#!/usr/bin/env bash
# transformers 5.23.0 loads a folder with a PEFT adapter (peft 0.21.2) by loading the base model that adapter_config.json names and
# then the adapter. What `output_loading_info=True` gives is the adapter's report alone: it says that nothing is missing when
# weights of the base are, which are random then. The base here is a checkpoint of LlamaModel, as `save_pretrained` writes it:
# it has no lm_head.
#
# Seen: from the base folder missing_keys is {'lm_head.weight'}; from the adapter's folder it is empty, and two loads of it give
#       different logits for the same tokens. Only a table in the log tells.
# What to do: load the base by itself, look at its report, and put the adapter into it with peft.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2 safetensors==0.8.0 2>/dev/null

cat >"$work/program.py" <<'PYTHON'
import sys

import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

work = sys.argv[1]
config = LlamaConfig(
    vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, tie_word_embeddings=False
)
model = LlamaForCausalLM(config)
model.model.save_pretrained(f"{work}/base")
adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
adapted.peft_config["default"].base_model_name_or_path = f"{work}/base"
adapted.save_pretrained(f"{work}/adapter")

ids = torch.arange(8)[None]
for folder in ("base", "adapter"):
    loads = [AutoModelForCausalLM.from_pretrained(f"{work}/{folder}", output_loading_info=True) for _ in range(2)]
    with torch.no_grad():
        first, second = (loaded(ids).logits for loaded, _ in loads)
    missing = sorted(loads[0][1]["missing_keys"])
    print(f"{transformers.__version__} {folder}: missing_keys {missing}, two loads equal: {torch.equal(first, second)}")
PYTHON

said=$("$work/venv/bin/python" "$work/program.py" "$work" 2>/dev/null)
echo "$said"
changed() { echo "CHANGED: $1"; exit 1; }
[[ $said == *"base: missing_keys ['lm_head.weight'], two loads equal: False"* ]] || changed "the base's own report"
[[ $said == *"adapter: missing_keys [], two loads equal: False"* ]] || changed "the report of the adapter's folder"
echo "as described"
