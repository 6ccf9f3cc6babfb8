"""Language models, and token log-likelihoods and text from them.

language_model.py puts any causal model behind one interface. forward.py runs it, head.py measures what follows its output matrix,
probe.py asks whether it is causal and what neighbours do to a text, together.py says which texts may share a batch, hf_config.py
reads its configuration, identity.py says which model it is.

loading.py loads one: gguf/ from GGUF files, pretrained.py from Hugging Face's with every weight accounted for (which
checkpoint_files.py lists), adapters.py with a PEFT adapter; wrappers.py takes off what trainers put around a model, modes.py
keeps its training flags. gpt.py is the model that is trained here; batches.py gets log-likelihoods of segments of text, decode.py
one token after another.
"""
