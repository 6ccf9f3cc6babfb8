#!/usr/bin/env bash
# transformers 5.23.0: some classes that AutoModelForCausalLM gives are not causal: the logits at a position change with the
# tokens that come after it. So `model(input_ids).logits` and a gather of the labels, which is how log-likelihoods are computed,
# give a number that is none: the label itself was among the inputs. No error is raised, and nothing in the output says so.
#
# Seen (tiny random models; the last of eight tokens is changed; largest change of the logits before it):
#       BERT and RoBERTa: look ahead unless the configuration has is_decoder=True, which that of an encoder's checkpoint does not have.
#       XLNet: always, unless it is given a permutation mask. CPM-Ant: always; no option of its forward makes it causal.
#       GPT-2, for comparison: exactly 0.
# What to do: change a token and look, before any text is scored.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.23.0 torch==2.13.0 2>/dev/null

cat >"$work/program.py" <<'PYTHON'
import torch
import transformers
from transformers import AutoModelForCausalLM, BertConfig, CpmAntConfig, GPT2Config, RobertaConfig, XLNetConfig

transformers.logging.set_verbosity_error()
small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
bert = {**small, "intermediate_size": 64, "initializer_range": 0.2}
cases = {
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, initializer_range=0.2),
    "bert": BertConfig(**bert),
    "bert, is_decoder": BertConfig(**bert, is_decoder=True),
    "roberta": RobertaConfig(**bert),
    "roberta, is_decoder": RobertaConfig(**bert, is_decoder=True),
    "xlnet": XLNetConfig(d_model=32, n_layer=2, n_head=2, d_inner=64, vocab_size=64, initializer_range=0.2),
    "cpmant": CpmAntConfig(**small, dim_head=16, dim_ff=64, init_std=0.2),
}
ids = torch.arange(8, 16)[None]
other = ids.clone()
other[0, -1] = 40
print("transformers", transformers.__version__)
for name, config in cases.items():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        moved = (model(input_ids=ids).logits - model(input_ids=other).logits)[0, :-1].abs().max().item()
    print(f"{name}: {type(model).__name__} {'LOOKS AHEAD' if moved > 1e-3 else 'causal'} {moved:.1e}")
PYTHON

"$work/venv/bin/python" "$work/program.py" 2>/dev/null | tee "$work/said"
changed() { echo "CHANGED: $1"; exit 1; }
for name in bert roberta xlnet cpmant; do
  grep -q "^$name: .* LOOKS AHEAD" "$work/said" || changed "$name does not look ahead"
done
for name in gpt2 "bert, is_decoder" "roberta, is_decoder"; do
  grep -q "^$name: .* causal 0.0e+00" "$work/said" || changed "$name looks ahead"
done
echo "as described"
