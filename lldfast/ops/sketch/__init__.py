"""Sketches of gradients: random signs and folds of a vector to k numbers, so that inner products survive.

fold.py: the fold, and how it is specified. outer.py: gradients of single samples, folded without being stored. philox.py: the
random words behind both.
"""
