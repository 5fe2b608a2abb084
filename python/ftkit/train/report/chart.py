"""Line charts as inline SVG: no script, no fonts, colours by the page's variables."""

import math
from collections.abc import Sequence
from html import escape

Point = tuple[float, float]

_WIDTH, _HEIGHT = 640, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 12, 12, 28
_MOST_POINTS = 1000


def line_chart(
    title: str, points: Sequence[Point], *, marks: Sequence[Point] = (), marks_label: str = "", smooth: bool = False
) -> str:
    """A figure of (step, value) points; `smooth` draws their moving average over them, `marks` are dots with a line."""
    points = _thin([p for p in points if math.isfinite(p[1])])
    marks = [p for p in marks if math.isfinite(p[1])]
    if not points:
        return f"<figure><figcaption>{escape(title)}</figcaption><p class='empty'>nothing was recorded</p></figure>"
    everything = [*points, *marks]
    left, right = min(x for x, _ in everything), max(x for x, _ in everything)
    low, high = min(y for _, y in everything), max(y for _, y in everything)
    ticks = nice_ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])

    def place(point: Point) -> tuple[float, float]:
        x = _LEFT + (point[0] - left) / ((right - left) or 1) * (_WIDTH - _LEFT - _RIGHT)
        y = _HEIGHT - _BOTTOM - (point[1] - low) / ((high - low) or 1) * (_HEIGHT - _TOP - _BOTTOM)
        return round(x, 1), round(y, 1)

    def path(line: Sequence[Point], kind: str) -> str:
        text = " ".join(f"{x},{y}" for x, y in map(place, line))
        return f'<polyline class="{kind}" points="{text}"/>'

    parts = []
    for tick in ticks:
        y = place((left, tick))[1]
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4}" text-anchor="end">{_label(tick)}</text>')
    for step, anchor in ((left, "start"), (right, "end")):
        parts.append(f'<text x="{place((step, low))[0]}" y="{_HEIGHT - 8}" text-anchor="{anchor}">step {step:g}</text>')
    parts.append(path(points, "raw" if smooth else "line"))
    if smooth:
        parts.append(path(moving_average(points), "line"))
    if marks:
        parts.append(path(marks, "marks"))
        for point in marks:
            x, y = place(point)
            parts.append(f'<circle class="mark" cx="{x}" cy="{y}" r="3"><title>{_label(point[1])}</title></circle>')
    legend = f" <span class='legend'>● {escape(marks_label)}</span>" if marks and marks_label else ""
    drawing = "".join(parts)
    return (
        f"<figure><figcaption>{escape(title)}{legend}</figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">{drawing}</svg></figure>'
    )


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers that cover [low, high]."""
    if high - low < 1e-12:  # nothing to see between them, or nothing that has a logarithm
        high = low + (abs(low) * 0.1 if abs(low) > 1e-9 else 1.0)
    rough = (high - low) / (count - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [number * step for number in range(first, last + 1)]


def moving_average(points: Sequence[Point]) -> list[Point]:
    """Each value as the mean of those around it, over a twentieth of the chart."""
    reach = max(1, len(points) // 40)
    averaged = []
    for index, (x, _) in enumerate(points):
        near = points[max(0, index - reach) : index + reach + 1]
        averaged.append((x, sum(y for _, y in near) / len(near)))
    return averaged


def _thin(points: Sequence[Point]) -> list[Point]:
    """At most as many points as a screen can show, the last one among them."""
    stride = math.ceil(len(points) / _MOST_POINTS) or 1
    return [*points[:-1:stride], *points[-1:]]


def _label(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.3g}"
