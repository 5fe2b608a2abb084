"""The Rust core, as Python sees it. `just check` holds this file against the module (stubtest)."""

__version__: str

# plan

def replay(events: list[tuple[int, int, int]], categories: int) -> tuple[int, list[int], int, int]:
    """The peak of a trace of `(id, bytes, category)` lines: `(bytes, bytes by category, event index, bytes left)`.

    A line with `bytes >= 0` is a birth, one with `bytes < 0` the death of that id.
    Raises FtkitError for a trace that frees what does not live, or allocates what lives.
    """
