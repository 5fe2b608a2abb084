"""Evaluation suites: one file a suite."""
