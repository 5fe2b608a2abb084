"""The page about a run that people read: `page` puts it together, `chart` draws its curves."""

from ftkit.train import events, files
from ftkit.train.directory import RunDirectory
from ftkit.train.report.page import page


def write(run: RunDirectory) -> None:
    """Writes report.html from what is in the run directory."""
    found = events.read(run.events)
    samples: dict[int, dict[str, str]] = {}
    for event in found:
        if event["event"] == "sample":
            told = samples.setdefault(event["number"], {"prompt": event["prompt"], "expected": event["expected"]})
            told[event["moment"]] = event["answer"]
    config = run.config.read_text(encoding="utf-8")
    lock = run.lock.read_text(encoding="utf-8") if run.lock.is_file() else ""
    files.write_text(run.report, page(run.name, found, config, lock, list(samples.values())))
