"""report.html: one self-contained page about a run, for reading, keeping and sending; light and dark."""

from collections.abc import Sequence
from html import escape
from typing import Any

from ftkit.train.progress import duration
from ftkit.train.report.chart import line_chart

Event = dict[str, Any]

_STYLE = """
:root { color-scheme: light dark; --page: #fbfaf8; --card: #fff; --text: #22252a; --soft: #6a7078; --edge: #e4e1db;
  --accent: #2563a8; --second: #c2571a; --warn: #8a5a00; --warn-page: #fff6e0; }
@media (prefers-color-scheme: dark) { :root { --page: #16181c; --card: #1e2126; --text: #e4e6e9; --soft: #9aa1ab;
  --edge: #31353c; --accent: #7db2ec; --second: #eda06a; --warn: #f0c674; --warn-page: #2c2618; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 74rem; background: var(--page); color: var(--text);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { margin: 0; font-size: 1.7rem; letter-spacing: -.01em; } h2 { margin: 2.5rem 0 .8rem; font-size: 1.15rem; }
.under { margin: .2rem 0 1.6rem; color: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.2rem, 1fr)); gap: .8rem; }
.tile, figure, .sample, pre, .warnings { background: var(--card); border: 1px solid var(--edge); border-radius: 10px; }
.tile { padding: .75rem 1rem; }
.tile b { display: block; font-size: 1.15rem; white-space: nowrap; font-variant-numeric: tabular-nums; }
.tile span, figcaption, .sample h4, .legend { color: var(--soft); font-size: .85rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: .8rem; }
figure { margin: 0; padding: .8rem 1rem; } .legend { color: var(--second); margin-left: .6em; }
svg { display: block; width: 100%; height: auto; margin-top: .4rem; }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif; font-variant-numeric: tabular-nums; }
svg polyline { fill: none; stroke: var(--accent); stroke-width: 1.8; stroke-linejoin: round; }
svg .raw { stroke-width: 1; opacity: .3; } svg .marks { stroke: var(--second); } svg .mark { fill: var(--second); }
svg .grid { stroke: var(--edge); }
.empty { color: var(--soft); }
.warnings { background: var(--warn-page); color: var(--warn); padding: .8rem 1rem .8rem 2.2rem; margin: 1rem 0 0; }
.sample { padding: 1rem; margin-bottom: .8rem; } .sample > p { margin: 0 0 .8rem; font-weight: 600; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 16rem), 1fr)); gap: 1rem; }
.sample h4 { margin: 0 0 .2rem; font-weight: 500; } .sample p, .answers p { white-space: pre-wrap; margin: 0;
  overflow-wrap: anywhere; }
pre { padding: 1rem; overflow-x: auto; font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
details summary { cursor: pointer; color: var(--soft); }
"""


def page(run: str, events: Sequence[Event], config_toml: str, lock_json: str, samples: Sequence[dict[str, str]]) -> str:
    """The page from a run's events, configuration and lock, and samples (`prompt`, `before`, `after`, `expected`)."""
    steps = [event for event in events if event["event"] == "step" and event.get("loss") is not None]
    evaluations = [event for event in events if event["event"] == "evaluation" and event.get("loss") is not None]
    charts = [
        line_chart(
            "loss",
            _points(steps, "loss"),
            marks=_points(evaluations, "loss"),
            marks_label="held out",
            smooth=len(steps) > 20,
        ),
        line_chart("learning rate", _points(steps, "learning_rate")),
        line_chart("tokens a second", _points(steps, "tokens_per_second"), smooth=len(steps) > 20),
        line_chart("gradient norm", _points(steps, "gradient_norm"), smooth=len(steps) > 20),
        *_metric_charts(steps, evaluations),
    ]
    body = [
        f"<h1>{escape(run)}</h1>",
        f"<p class='under'>{escape(_summary(events))}</p>",
        f"<div class='tiles'>{''.join(_tile(*tile) for tile in _tiles(steps, evaluations, events))}</div>",
        _warnings(events),
        f"<h2>Curves</h2><div class='charts'>{''.join(charts)}</div>",
        _samples(samples),
        f"<h2>Configuration</h2><pre>{escape(config_toml)}</pre>",
        f"<details><summary>What it was made of</summary><pre>{escape(lock_json)}</pre></details>",
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(run)} · ftkit</title><style>{_STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )


def _points(events: Sequence[Event], key: str) -> list[tuple[float, float]]:
    return [(event["step"], event[key]) for event in events if event.get(key) is not None]


def _metric_charts(steps: Sequence[Event], evaluations: Sequence[Event]) -> list[str]:
    """A chart for each number that the objective reports beside its loss."""
    names = list(dict.fromkeys(name for event in [*steps, *evaluations] for name in event.get("metrics", {})))

    def points(events: Sequence[Event], name: str) -> list[tuple[float, float]]:
        return _points([{"step": event["step"], **event.get("metrics", {})} for event in events], name)

    return [
        line_chart(
            name.replace("_", " "),
            points(steps, name),
            marks=points(evaluations, name),
            marks_label="held out",
            smooth=len(steps) > 20,
        )
        for name in names
    ]


def _summary(events: Sequence[Event]) -> str:
    first = next((event for event in events if event["event"] == "started"), None)
    ends = {"finished": "finished", "interrupted": "interrupted"}
    state = next((ends[event["event"]] for event in reversed(events) if event["event"] in ends), "unfinished")
    return f"{first['summary']} · {state}" if first else state


def _tiles(steps: Sequence[Event], evaluations: Sequence[Event], events: Sequence[Event]) -> list[tuple[str, str]]:
    tiles = []
    if steps:
        tiles.append((f"loss, from {steps[0]['loss']:.3f}", f"{steps[-1]['loss']:.3f}"))
    if evaluations:
        tiles.append(("best held-out loss", f"{min(event['loss'] for event in evaluations):.3f}"))
    if steps:
        seconds = sum(event["seconds"] for event in steps)
        tiles.append(("optimizer steps", f"{steps[-1]['step']:,}"))
        tiles.append(("tokens seen", f"{sum(event['tokens'] for event in steps):,}"))
        tiles.append(("tokens a second", f"{sum(event['tokens'] for event in steps) / max(seconds, 1e-9):,.0f}"))
        tiles.append(("time in steps", duration(seconds)))
    finished = next((event for event in reversed(events) if event["event"] == "finished"), None)
    if finished:
        tiles.append(("peak memory", f"{finished['peak_rss_bytes'] / 2**30:.2f} GiB"))
    return tiles


def _tile(name: str, value: str) -> str:
    return f"<div class='tile'><b>{escape(value)}</b><span>{escape(name)}</span></div>"


def _warnings(events: Sequence[Event]) -> str:
    """Each kind of warning once, with how often it came."""
    kinds: dict[str, list[Event]] = {}
    for event in events:
        if event["event"] in ("warning", "notice"):
            kinds.setdefault(str(event.get("kind", event["message"])), []).append(event)
    items = []
    for found in kinds.values():
        times = f" ({len(found)} times)" if len(found) > 1 else ""
        hint = f" <em>{escape(found[-1]['hint'])}</em>" if found[-1].get("hint") else ""
        items.append(f"<li>{escape(found[-1]['message'])}{times}{hint}</li>")
    return f"<ul class='warnings'>{''.join(items)}</ul>" if items else ""


def _samples(samples: Sequence[dict[str, str]]) -> str:
    if not samples:
        return ""
    cards = []
    for sample in samples:
        answers = "".join(
            f"<div><h4>{title}</h4><p>{escape(sample[key])}</p></div>"
            for title, key in (("before", "before"), ("after", "after"), ("in the data", "expected"))
            if sample.get(key)
        )
        cards.append(f"<div class='sample'><p>{escape(sample['prompt'])}</p><div class='answers'>{answers}</div></div>")
    return f"<h2>Before and after</h2>{''.join(cards)}"
