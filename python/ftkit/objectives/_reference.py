"""The reference that an adapted model is compared with: the same weights without the adapter, no second model."""

from ftkit.errors import InputError
from ftkit.objectives import Forward


def check(forward: Forward, objective: str) -> None:
    """Raises InputError when training changes the base itself, so that there is nothing left to compare with."""
    attached = getattr(forward, "attached", {})
    if any(known.edits_base for known in attached.values()):
        raise InputError(
            f"{objective}: expected a method that leaves the base as it is, got one that edits it",
            "method.keep_base = true trains a copy",
        )
