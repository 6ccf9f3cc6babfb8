"""The distillation losses of the alpha-mixture family."""
