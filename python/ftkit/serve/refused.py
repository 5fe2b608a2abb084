"""Why the desk did not do something, in the words of an HTTP answer."""

from ftkit.errors import InputError


class Refused(InputError):
    """A request that cannot be done. `status` is HTTP's; `param` names the field that is wrong, if it is one."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


def missing(what: str, name: str) -> Refused:
    """404: nothing of this name."""
    return Refused(f"expected {what} that is there, got {name[:100]!r}", status=404, param="id", code="not_found")


def conflict(message: str) -> Refused:
    """409: it is not in a state for this."""
    return Refused(message, status=409, code="conflict")
