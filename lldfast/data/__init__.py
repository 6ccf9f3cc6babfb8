"""Tokens and texts as they lie on disk, and what training draws from them.

shards.py holds token shards by domain (their manifest, checks and writer), evalset.py the evaluation corpus, tokenizer.py every
tokenizer behind one interface (tokenizers/ has its kinds, gpt2bpe.py GPT-2's files without network), mixture.py the batches that
domain weights draw. The room making/ turns text into such folders.
"""
