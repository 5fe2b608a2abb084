"""Targets of export: one file a target."""
