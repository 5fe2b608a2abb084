"""docs/security.md names tests: they are there."""

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]


def test_every_test_that_the_page_names_is_there() -> None:
    text = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    named = re.findall(r"`([a-z_/]+\.(?:py|rs))::([a-z_0-9]+)`", text)
    assert len(named) > 12
    paths = [path for top in ("tests", "src") for end in ("py", "rs") for path in (ROOT / top).rglob(f"*.{end}")]
    sources = {path: path.read_text(encoding="utf-8") for path in paths}
    for file, test in named:
        found = [text for path, text in sources.items() if str(path).endswith(f"/{file}")]
        assert any(re.search(rf"\b(?:def|fn) {test}\b", text) for text in found), f"{file}::{test}"
