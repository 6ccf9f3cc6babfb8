"""Language models, and token log-likelihoods and text from them.

language_model.py puts any causal model behind one interface: head.py takes its output matrix apart from its layers,
hf_config.py reads its configuration, identity.py says which model it is. loading.py loads one, gguf/ from GGUF files.
gpt.py is the model that is trained here; batches.py gets log-likelihoods of segments of text, decode.py one token after another.
"""
