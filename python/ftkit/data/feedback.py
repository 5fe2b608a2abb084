"""Ratings that a server kept, as rows that an objective learns from: `--data feedback:` or `feedback:DIR`.

    kto                    every answer with its label: rated up or down, preferred or not
    dpo and its kin        pairs: what was preferred to what, and answers to one prompt, one rated up and one down
    sft and the others     answers that were rated up or preferred

`DIR` is a server's `--state-dir`; without one, that of a server that was started here.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ftkit.config.cache import cache_directory
from ftkit.errors import InputError

PREFIX = "feedback:"
_DEFAULT = "runs/.serve"

Row = dict[str, Any]


def is_feedback(path: str) -> bool:
    """Whether a path of data means feedback."""
    return path.startswith(PREFIX)


def absolute(path: str) -> str:
    """The same feedback from everywhere."""
    return PREFIX + os.path.abspath(path.removeprefix(PREFIX) or _DEFAULT)


def rows_file(path: str, *, pairs: bool | None, labelled: bool) -> str:
    """A file with the rows that an objective takes; `pairs` and `labelled` as for `ftkit.data.prepare`.

    Raises InputError when there is no such feedback, or none of a kind that the objective learns from.
    """
    place = Path(path.removeprefix(PREFIX) or _DEFAULT)
    source = place if place.is_file() else place / "feedback" / "feedback.jsonl"
    if not source.is_file():
        hint = "`ftkit serve` keeps ratings of /v1/feedback below its --state-dir"
        raise InputError(f"{path}: expected feedback, got none at {source}", hint)
    kept = list(_kept(source))
    if pairs and labelled:
        rows = [labelled_row for row in kept for labelled_row in _labelled(row)]
    elif pairs:
        pair = ("prompt", "chosen", "rejected")
        rows = [*({key: row[key] for key in pair} for row in kept if "chosen" in row), *_paired(kept)]
    else:
        rows = [_answer(row) for row in kept if row.get("label") is not False]
    if not rows:
        needed = "preferred answers, or ratings up and down of one prompt" if pairs else "answers that were rated up"
        raise InputError(f"{path}: expected {needed}, got none in {len(kept):,} rows of feedback")
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    target = cache_directory() / "feedback" / f"{hashlib.sha256(text.encode()).hexdigest()}.jsonl"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".tmp-{os.getpid()}-{target.name}")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(target)
    return str(target)


def _kept(source: Path) -> Iterator[Row]:
    """The feedback in a file; a last line that a crash cut off is left out."""
    with source.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith("\n"):
                return
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict) or "prompt" not in row or not ("chosen" in row or "label" in row):
                raise InputError(f"{source}:{number}: expected a row of feedback, got another")
            yield row


def _labelled(row: Row) -> Iterator[Row]:
    """Answers, each with whether it is wanted."""
    if "chosen" in row:
        yield {"prompt": row["prompt"], "completion": row["chosen"], "label": True}
        yield {"prompt": row["prompt"], "completion": row["rejected"], "label": False}
    else:
        yield {"prompt": row["prompt"], "completion": row["completion"], "label": row["label"]}


def _answer(row: Row) -> Row:
    return {"prompt": row["prompt"], "completion": _like(row["prompt"], row.get("chosen", row.get("completion")))}


def _like(prompt: object, answer: object) -> object:
    """An answer to messages is a message, too."""
    return answer if isinstance(prompt, str) else [{"role": "assistant", "content": answer}]


def _paired(kept: Iterable[Row]) -> Iterator[Row]:
    """Pairs of an answer rated up and one rated down, by prompt; each answer once."""
    rated: dict[str, tuple[list[str], list[str]]] = {}
    for row in kept:
        if "label" in row:
            up, down = rated.setdefault(json.dumps(row["prompt"], sort_keys=True), ([], []))
            (up if row["label"] else down).append(row["completion"])
    for prompt, (up, down) in rated.items():
        for chosen, rejected in zip(up, down, strict=False):
            if chosen != rejected:
                yield {"prompt": json.loads(prompt), "chosen": chosen, "rejected": rejected}
