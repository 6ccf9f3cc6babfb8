"""Language models, and token log-likelihoods and text from them.

language_model.py puts any causal model behind one interface: head.py takes its output matrix apart from its layers,
hf_config.py reads its configuration, identity.py says which model it is. loading.py loads one, gguf/ from GGUF files,
pretrained.py from Hugging Face's with every weight accounted for (checkpoint_files.py lists them), adapters.py with a PEFT
adapter; wrappers.py takes off what trainers put around a model, modes.py keeps its training flags.
gpt.py is the model that is trained here; batches.py gets log-likelihoods of segments of text, decode.py one token after another.
"""
