"""Evaluation suites: one file a suite.

A suite has `evaluate(loaded, adapter, data, against) -> dict`: the model, an adapter's directory or None, what is asked
or None, another model to compare with or None; the result is what `ftkit eval --json` prints.
"""
