"""Datasets as packed, ragged batches (the work is done in the core)."""
