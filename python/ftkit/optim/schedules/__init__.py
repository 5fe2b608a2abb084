"""Schedules of the learning rate: one file each.

A plugin has a settings class `Config`, a `Warmup` with its own fields, and `factor(progress, config)`: the share of
the highest rate, where `progress` in [0, 1) is the part of the steps after the warm-up that is done.
"""

from ftkit import config, plugins


def factor(choice: config.Choice, step: int, steps: int) -> float:
    """The share of the highest learning rate at `step` (from 0) of `steps`."""
    plugin = plugins.load("optim.schedules", choice.name)
    settings = plugin.Config(**choice.options)
    warmup: int = min(settings.warmup_length(steps), steps)
    if step < warmup:
        return (step + 1) / warmup
    share: float = plugin.factor((step - warmup) / (steps - warmup), settings)
    return share
