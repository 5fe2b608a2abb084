"""A JSON object from outside, read field by field: each has one type and one range, and none is left over."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ftkit.serve.refused import Refused

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,99}")
"""Names of adapters and aliases. No `@`, which separates a name from its generation, and no `/`."""
_MOST_LISTED = 100


class Fields:
    """The fields of an object that have not been read yet; `where` names the object in messages."""

    def __init__(self, table: Mapping[str, Any], where: str = "") -> None:
        self._left = {name: value for name, value in table.items() if value is not None}
        self._where = f"{where}." if where else ""

    def wrong(self, name: str, expected: str, got: object) -> Refused:
        """400: a field with what it must be and what it is."""
        shown = "nothing" if got is None else str(got) if isinstance(got, int | float) else _kind(got)
        return Refused(
            f"{self._where}{name}: expected {expected}, got {shown}", param=self._where + name, code="invalid_value"
        )

    def take(self, name: str) -> Any:
        """A field of any type, None when it is missing or null."""
        return self._left.pop(name, None)

    def text(self, name: str, *, longest: int = 1000, default: str | None = None) -> str:
        """A string; required when there is no default."""
        value = self.take(name)
        value = default if value is None else value
        if not isinstance(value, str) or len(value) > longest:
            raise self.wrong(name, f"a string of at most {longest} characters", value)
        return value

    def name(self, name: str) -> str:
        """A name that may become one of a model."""
        value = self.take(name)
        if not isinstance(value, str) or not NAME.fullmatch(value):
            expected = "1 to 100 letters, digits, '.', '_', ':', '-', a letter or digit first"
            raise self.wrong(name, expected, value if value is None else "another")
        return value

    def number(self, name: str, low: float, high: float, *, whole: bool = False) -> float | None:
        """A number from `low` to `high`, None for `"auto"` and for nothing."""
        value = self.take(name)
        if value is None or value == "auto":
            return None
        kinds = int if whole else int | float
        if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
            raise self.wrong(name, f"auto or a {'whole ' if whole else ''}number from {low} to {high}", value)
        return value

    def table(self, name: str) -> "Fields":
        """An object, empty when it is missing."""
        value = self.take(name)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(name, "an object", value)
        return Fields(value or {}, self._where + name)

    def finish(self, ignored: Iterable[str] = ()) -> None:
        """Every field must have been read, but for those that change nothing here."""
        for name in self._left:
            if name not in ignored:
                raise Refused(
                    f"expected fields of the API, got {self._where + name[:100]!r}",
                    param=self._where + name[:100],
                    code="unknown_parameter",
                )


def page(rows: list[dict[str, Any]], query: Mapping[str, str], known: Iterable[str] = ()) -> dict[str, Any]:
    """A page of a list, newest first as `rows` is, by the API's `after` and `limit`; `known`: other parameters."""
    for name in query:
        if name not in ("after", "limit", *known):
            raise Refused(
                f"expected parameters of the API, got {name[:100]!r}", param=name[:100], code="unknown_parameter"
            )
    limit = query.get("limit", "20")
    if not (limit.isascii() and limit.isdigit()) or not 1 <= int(limit[:9]) <= 10_000:
        raise Refused("limit: expected a number from 1 to 10000, got another", param="limit", code="invalid_value")
    start = 0
    if "after" in query:
        ids = [row["id"] for row in rows]
        if query["after"] not in ids:
            raise Refused("after: expected an id of this list, got another", param="after", code="invalid_value")
        start = ids.index(query["after"]) + 1
    found = rows[start : start + int(limit)]
    return {
        "object": "list",
        "data": found,
        "first_id": found[0]["id"] if found else None,
        "last_id": found[-1]["id"] if found else None,
        "has_more": start + len(found) < len(rows),
    }


def _kind(value: object) -> str:
    kinds = {str: "a string", bool: "a boolean", list: "an array", dict: "an object"}
    return kinds.get(type(value), "another value")
