#!/usr/bin/env bash
# transformers 5.23.0: a model with rope of type "dynamic" (NTK scaling by the length of the text) makes its frequencies for the
# longest text that it has seen and keeps them. A shorter text that comes later gets them too, unless it is shorter than the length
# that the model was made for: the same tokens have other logits before and after a longer text, in evaluation mode and without any
# cache of keys and values. So log-likelihoods depend on the order in which texts are scored, and on who shares their batch.
#
# Seen: 20 tokens, in a Llama made for 16, before and after a text of 60: a logit changes by 7, where running it twice changes none;
#       after a text of one token it is 0 again.
# What to do: before a text of that length or more, run one token, which puts the frequencies back; do not pad such texts.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 2>/dev/null

cat >"$work/program.py" <<'PYTHON'
import sys

import torch
import transformers

torch.manual_seed(0)
config = transformers.LlamaConfig(
    vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.3,
    max_position_embeddings=16, rope_parameters={"rope_type": "dynamic", "factor": 8.0, "rope_theta": 10_000.0},
)
model = transformers.LlamaForCausalLM(config).eval()
text, longer, token = torch.arange(20)[None], torch.arange(60)[None], torch.tensor([[1]])


@torch.no_grad()
def logits(ids):
    return model(input_ids=ids, use_cache=False).logits


first, again = logits(text), logits(text)
logits(longer)
after = logits(text)
logits(token)
restored = logits(text)
repeat, kept, back = ((x - first).abs().max().item() for x in (again, after, restored))
print(f"transformers {transformers.__version__}: largest change of a logit when the text is run again {repeat:.1g}, "
      f"after a longer text {kept:.1g}, after one token more {back:.1g}")
if not (repeat < 1e-5 and kept > 0.01 and back < 1e-5):
    print("CHANGED")
    sys.exit(1)
PYTHON
"$work/venv/bin/python" "$work/program.py" 2>"$work/errors" || { cat "$work/errors"; exit 1; }
echo "as described"
