"""Distillation beside mixture design: teachers that run or were recorded, and text that a model writes."""
