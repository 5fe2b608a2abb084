"""Settings classes: every problem is reported, with what was expected and what was there; good tables survive."""

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftkit.config import option
from ftkit.config.fields import Problem, read, table_of

pytestmark = pytest.mark.unit


@dataclass(frozen=True, kw_only=True)
class Inner:
    share: float = option(0.5, "a share", at_least=0, at_most=1)


@dataclass(frozen=True, kw_only=True)
class Settings:
    name: str = option(meaning="required")
    rank: int = option(8, "a count", at_least=1)
    kind: Literal["one", "two"] = option("one", "a choice")
    files: str | tuple[str, ...] = option("a", "one or more")
    limit: int | None = option(None, "optional")
    on: bool = option(False, "a switch")
    inner: Inner = Inner()
    names: dict[str, str] = field(default_factory=dict)


def problems(table: Any) -> dict[str, str]:
    found: list[Problem] = []
    assert (read(Settings, table, (), found) is None) == bool(found)
    return {".".join(problem.path): problem.message for problem in found}


def test_every_problem_is_reported_with_both_values() -> None:
    table = {
        "rnk": 4,
        "rank": 0,
        "kind": "three",
        "files": ["a", 3],
        "limit": True,
        "on": "yes",
        "inner": {"share": 2},
        "names": {"x": 1},
    }
    found = problems(table)
    assert found == {
        "rnk": "unknown key, did you mean 'rank'?",
        "name": "expected text, got nothing",
        "rank": "expected an integer, at least 1, got 0",
        "kind": "expected one of 'one', 'two', got 'three'",
        "files": "expected text or a list, each text, got the list ['a', 3]",
        "limit": "expected an integer, got true",
        "on": "expected true or false, got 'yes'",
        "inner.share": "expected a number, at least 0 and at most 1, got 2",
        "names": "expected a table, got the table {'x': 1}",
    }


@pytest.mark.parametrize("share", [float("nan"), float("inf"), -1e-9, "0.5", None, [0.5]])
def test_a_number_out_of_range_or_of_another_kind_is_refused(share: Any) -> None:
    assert list(problems({"name": "x", "inner": {"share": share}})) == ["inner.share"]


def test_an_integer_is_a_number_but_not_the_reverse() -> None:
    assert problems({"name": "x", "inner": {"share": 1}}) == {}
    assert problems({"name": "x", "rank": 2.0}) == {"rank": "expected an integer, at least 1, got 2.0"}


@given(
    name=st.text(),
    rank=st.integers(1, 2**70),
    share=st.floats(0, 1),
    files=st.one_of(st.text(), st.lists(st.text()).map(tuple)),
    limit=st.none() | st.integers(),
    on=st.booleans(),
)
def test_what_is_written_as_a_table_is_read_back_equal(
    name: str, rank: int, share: float, files: Any, limit: int | None, on: bool
) -> None:
    settings = Settings(name=name, rank=rank, inner=Inner(share=share), files=files, limit=limit, on=on)
    found: list[Problem] = []
    assert read(Settings, table_of(settings), (), found) == settings
    assert not found
