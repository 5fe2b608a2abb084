"""Ratios against peers, measured in one run: `just bench`, or `just bench NAME [--json]`.

A benchmark is a file with `run() -> dict` (or a list of them), whose keys are `name ours peer unit ratio ratio_min
ratio_max share_of_roof`; `ratio` is ours over the peer's where more is better, and the peer's over ours where less is.
"""
