"""Finetuning methods: one file a method."""
