"""The report is one page that needs nothing else, and shows nobody's text as markup."""

import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftkit.train.report.chart import line_chart, nice_ticks
from ftkit.train.report.page import page

pytestmark = pytest.mark.unit

EVENTS = [
    {"event": "started", "step": 0, "time": 0, "summary": "<b>base</b> & lora", "steps": 3},
    *(
        {
            "event": "step",
            "step": step,
            "loss": None if step == 2 else 3.0 / step,
            "learning_rate": 1e-4,
            "gradient_norm": 0.5,
            "tokens": 100,
            "seconds": 0.5,
            "tokens_per_second": 200.0,
        }
        for step in (1, 2, 3)
    ),
    {"event": "evaluation", "step": 3, "loss": 1.2},
    {"event": "warning", "step": 2, "kind": "loss_not_finite", "message": "step 2: <script>", "hint": "a hint"},
]


class Elements(HTMLParser):
    """Collects elements and checks that what is opened is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:  # noqa: ARG002
        self.seen.append(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_page_needs_nothing_from_elsewhere_and_escapes_what_it_shows() -> None:
    samples = [{"prompt": "<img src=x>", "before": "no & no", "after": "<script>alert(1)</script>", "expected": "yes"}]
    html = page("run-<1>", EVENTS, "[model]\nsource = '<x>'", '{"a": "<y>"}', samples)
    elements = Elements()
    elements.feed(html)
    assert elements.open == []
    assert not {"script", "img", "link", "iframe", "b>"} & set(elements.seen)
    assert not re.search(r"https?://|url\(|@import|src=[\"']", html)
    assert "prefers-color-scheme: dark" in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "<b>1.000</b><span>loss, from 3.000</span>" in html
    assert elements.seen.count("svg") == 4


def test_a_page_of_a_run_without_steps_is_a_page() -> None:
    assert "nothing was recorded" in page("empty", [], "", "", [])


@given(st.lists(st.tuples(st.integers(0, 10**6), st.floats(-1e30, 1e30)), max_size=50), st.booleans())
def test_any_finite_points_make_a_drawing_inside_its_frame(points: list[tuple[float, float]], smooth: bool) -> None:
    figure = line_chart("a < b", sorted(points), marks=points[:3], smooth=smooth)
    root = ElementTree.fromstring(figure)
    for drawn in root.iter("polyline"):
        for x, y in (pair.split(",") for pair in drawn.attrib["points"].split()):
            assert 0 <= float(x) <= 640
            assert 0 <= float(y) <= 220


def test_many_points_are_thinned_and_values_that_are_not_finite_left_out() -> None:
    figure = line_chart("loss", [(step, math.nan if step % 2 else 1.0 + step) for step in range(100_000)])
    assert len(figure) < 40_000


@given(st.floats(-1e12, 1e12), st.floats(0, 1e12))
def test_ticks_cover_the_values_and_are_few(low: float, span: float) -> None:
    ticks = nice_ticks(low, low + span)
    assert 2 <= len(ticks) <= 8
    assert ticks[0] <= low + 1e-6 * max(1, abs(low))
    assert ticks[-1] >= low + span - 1e-6 * max(1, abs(low + span))
