#!/usr/bin/env bash
# tokenizers 0.23.3: with `encode_special_tokens = True` a text in which the characters of a special token stand is said to be encoded like any
# other. That concerns the cutting of a text beforehand only. Which pieces the rest becomes is left to the model, and where "</s>" is an
# entry of the model's own vocabulary, as in every Unigram made from SentencePiece and in WordLevel, its id comes out all the same: a
# corpus about HTML has document ends in the middle of documents. In a BPE whose merges do not lead to the token it is spelled out.
#
# Seen: on the text "a</s>b" Unigram gives ['a', '</s>', 'b'], WordLevel (on "a </s> b") the same, BPE ['a', '<', '/', 's', '>', 'b'].
# What to do: count the control tokens of what you have encoded: one at the end of each document, none elsewhere.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet tokenizers==0.23.3 2>/dev/null

cat >"$work/program.py" <<'PYTHON'
import tokenizers
from tokenizers import Tokenizer, models, pre_tokenizers

letters = "ab</s>"
vocab = {token: i for i, token in enumerate(["<unk>", "</s>", *dict.fromkeys(letters)])}
made = {
    "Unigram": models.Unigram([("<unk>", 0.0), ("</s>", 0.0)] + [(c, -2.0) for c in dict.fromkeys(letters)], 0, False),
    "WordLevel": models.WordLevel(vocab, unk_token="<unk>"),
    "BPE": models.BPE(vocab, [], unk_token="<unk>"),
}
spelled = ["a", "<", "/", "s", ">", "b"]
expected = {"Unigram": ["a", "</s>", "b"], "WordLevel": ["a", "</s>", "b"], "BPE": spelled}
print("tokenizers", tokenizers.__version__)
same = True
for kind, model in made.items():
    tokenizer = Tokenizer(model)
    if kind == "WordLevel":
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    tokenizer.encode_special_tokens = True
    text = "a </s> b" if kind == "WordLevel" else "a</s>b"  # a word is an entry or unknown
    tokens = tokenizer.encode(text).tokens
    print(f"{kind:9} {text!r:10} {tokens}")
    same &= tokens == expected[kind]
raise SystemExit(0 if same else 1)
PYTHON

"$work/venv/bin/python" "$work/program.py" || { echo "CHANGED"; exit 1; }
echo "as described"
