"""Distillation beside mixture design, above the losses of ops/distill.

objective.py says what a training step minimises; teach.py records a teacher, cache.py holds what it recorded; generate.py lets a
model write text to train on.
"""
