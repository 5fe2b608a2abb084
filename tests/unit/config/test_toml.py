"""The lines of keys in TOML, and overrides of the command line."""

from pathlib import Path

import pytest

from ftkit.config import toml
from ftkit.errors import InputError

pytestmark = pytest.mark.unit

TEXT = '''# a comment
top = 1

[training]   # another
"max steps" = 3
text = """
[not.a.table]
rank = 3
"""
a.b = 2
list = [
  1,
  2,
]
[[many]]
x = 1
[[many]]
y = 2
'''


def test_every_key_has_the_line_of_its_statement() -> None:
    lines = toml.lines_of(TEXT)
    expected = {
        ("top",): 2,
        ("training",): 4,
        ("training", "max steps"): 5,
        ("training", "text"): 6,
        ("training", "a", "b"): 10,
        ("training", "list"): 11,
        ("many",): 15,
        ("many", "x"): 16,
        ("many", "y"): 18,
    }
    assert expected.items() <= lines.items()
    assert ("not", "a", "table") not in lines


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.b=1", (("a", "b"), 1)),
        ("a.b=1e-4", (("a", "b"), 1e-4)),
        ("a.b=true", (("a", "b"), True)),
        ("a.b=[1, 2]", (("a", "b"), [1, 2])),
        ('a.b="1"', (("a", "b"), "1")),
        ("a.b=plain text", (("a", "b"), "plain text")),
        ("a=b=c", (("a",), "b=c")),
        ("a.b=", (("a", "b"), "")),
    ],
)
def test_overrides_are_toml_or_plain_text(text: str, expected: object) -> None:
    assert toml.parse_override(text) == expected


@pytest.mark.parametrize("text", ["a.b", "=1", "a..b=1", ""])
def test_an_override_without_key_or_value_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="expected KEY=VALUE"):
        toml.parse_override(text)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"a = ", b"a = 1\na = 2", b"[" * 5000])
def test_a_file_that_is_no_toml_is_an_input_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"run\.toml: expected"):
        toml.read_file(path)


def test_a_missing_file_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        toml.read_file(tmp_path / "none.toml")
