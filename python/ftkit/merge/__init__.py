"""Ways to merge adapters into weights: one file a way."""
