"""The Rust core, as Python sees it. `just check` holds this file against the module (stubtest)."""

__version__: str
