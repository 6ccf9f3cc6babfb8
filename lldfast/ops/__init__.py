"""The ops: what is computed per token and per number, each with a reference in fp64 and its backends (C++, Triton, CUDA, torch).

logprob.py, linear_logprob.py: token log-likelihoods from logits, and from hidden states and a head; the training loss.
distill/: distillation losses. sketch/: gradients folded to k numbers. segments.py: sums of tokens by text or domain.

What they share: check.py (arguments), dispatch.py (which backend), chunks.py (rows of logits), head.py (products with a head),
grads.py (gradients from the same sweep), autocast.py, native.py (calls of the C++ and CUDA modules). torch_linear.py is the torch
path of linear_logprob. The Triton kernels are the package lldfast_kernels.
"""
