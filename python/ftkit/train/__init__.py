"""The training loop, checkpoints, events and the watchdog."""
