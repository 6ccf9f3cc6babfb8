"""Sketches of gradients: random signs and folds of a vector to k numbers."""
