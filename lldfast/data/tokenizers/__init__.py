"""The kinds of tokenizers behind `lldfast.data.tokenizer`, one a file, and what they share.

base: the interface, and bytes. tiktokens: tiktoken's encodings. huggingface: tokenizer.json and transformers' own classes.
control: which tokens are control tokens, and a vocabulary without them. training: a byte-level BPE made here.
"""
