#!/usr/bin/env bash
# tokenizers 0.23.3: `encode_special_tokens = True` promises that special tokens in a text are encoded like any other text. It only
# keeps the library from cutting them out of the text beforehand. The model sees their characters, and where "</s>" is an
# entry of the vocabulary itself, as in every Unigram made from SentencePiece and in WordLevel, the model answers with its id:
# the text forges the end of a document. In a BPE whose merges do not lead to the token it is spelled, as promised.
#
# Seen: on the text "a</s>b" with encode_special_tokens = True Unigram gives ['a', '</s>', 'b'], WordLevel (on "a </s> b") the same,
#       BPE gives ['a', '<', '/', 's', '>', 'b']; a full-width "＜/s＞" comes to the same under an NFKC normalizer.
# What to do: compare the ids with those of the control tokens, and encode such a text with a model that lacks their entries.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet tokenizers==0.23.3 2>/dev/null

cat >"$work/program.py" <<'PYTHON'
import tokenizers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

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
    tokenizer.normalizer = normalizers.NFKC()
    if kind == "WordLevel":
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    tokenizer.encode_special_tokens = True
    for text in ("a</s>b", "a\uff1c/s\uff1eb"):
        if kind == "WordLevel":  # a word is an entry or unknown
            text = text.replace("a", "a ").replace("b", " b")
        tokens = tokenizer.encode(text).tokens
        print(f"{kind:9} {text!r:14} {tokens}")
        same &= tokens == expected[kind]
raise SystemExit(0 if same else 1)
PYTHON

"$work/venv/bin/python" "$work/program.py" || { echo "CHANGED"; exit 1; }
echo "as described"
