"""Language models, and token log-likelihoods and text from them.

language_model.py puts any causal model behind one interface and loads it (gguf.py: from GGUF files), gpt.py is the model that is
trained here; batches.py gets log-likelihoods of segments of text, decode.py one token after another.
"""
