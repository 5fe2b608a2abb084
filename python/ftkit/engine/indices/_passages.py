"""Files as passages: a folder of texts, one text, or rows with a `text`.

Texts are cut where paragraphs end, then where sentences or words do; a passage has at most `PASSAGE_CHARACTERS`. It is
named after its file and the line on which it begins, or what its row has for `source` or `title`.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ftkit.errors import InputError

PASSAGE_CHARACTERS = 1000
"""About 250 tokens, the length of the paper's passages."""
MOST_BYTES = 1 << 30
"""Of all files together: passages are held in memory."""
TEXTS = (".txt", ".md", ".markdown", ".rst", ".jsonl")
_SHOWN = 10


@dataclass(frozen=True)
class Passage:
    """A piece of a text."""

    source: str
    """Where it stands, for people."""
    text: str


@dataclass(frozen=True, kw_only=True)
class Collection:
    """All passages of a place."""

    path: Path
    passages: tuple[Passage, ...]
    notes: tuple[str, ...]
    """What was left out, for people."""


def read(path: Path) -> Collection:
    """The passages of a folder or a file. Raises InputError, with all that is wrong, for what cannot be used."""
    files, others = _files(path)
    if not files:
        what = "an empty one" if path.is_dir() and not others else f"{others} files of other kinds"
        raise InputError(f"{path}: expected a folder with {', '.join(TEXTS)} files, got {what}")
    size = sum(file.stat().st_size for file in files)
    if size > MOST_BYTES:
        raise InputError(
            f"{path}: expected at most {MOST_BYTES:,} bytes of text, got {size:,}", "take a part of the files"
        )
    problems: list[str] = []
    found: dict[str, Passage] = {}
    twice = 0
    for file in files:
        name = str(file.relative_to(path)) if path.is_dir() else file.name
        for passage in _passages(file, name, problems):
            twice += passage.text in found
            found.setdefault(passage.text, passage)
    if problems:
        more = f"\n… and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise InputError("\n".join(problems[:_SHOWN]) + more)
    if not found:
        raise InputError(f"{path}: expected texts, got {len(files)} files without any")
    notes = []
    if others:
        notes.append(f"{others} files are not {', '.join(TEXTS)} and were left out")
    if twice:
        notes.append(f"{twice} passages are there more than once")
    return Collection(path=path, passages=tuple(found.values()), notes=tuple(notes))


def _files(path: Path) -> tuple[list[Path], int]:
    """The files of a place in order, and how many there are of other kinds; hidden ones don't count."""
    if path.is_file():
        return [path], 0
    if not path.is_dir():
        raise InputError(f"{path}: expected a folder of texts, or a .jsonl file of rows, got nothing there")
    files, others = [], 0
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            file = Path(folder, name)
            if name.startswith(".") or not file.is_file():
                continue
            if file.suffix.lower() in TEXTS:
                files.append(file)
            else:
                others += 1
    return files, others


def _passages(file: Path, name: str, problems: list[str]) -> Iterator[Passage]:
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        problems.append(f"{file}: expected UTF-8, got the byte 0x{error.object[error.start]:02x} at {error.start}")
        return
    except OSError as error:
        problems.append(f"{file}: expected a file that can be read, got: {str(error.strerror).lower()}")
        return
    if file.suffix.lower() != ".jsonl":
        for line, piece in cut(text):
            yield Passage(f"{name}:{line}", piece)
        return
    for number, row in enumerate(text.split("\n"), 1):
        if not row.strip():
            continue
        try:
            fields = json.loads(row)
        except (ValueError, RecursionError) as error:
            problems.append(f"{file}:{number}: expected a JSON object, got {error}")
            continue
        if not isinstance(fields, dict) or not isinstance(fields.get("text"), str):
            got = f"the fields {', '.join(fields)}" if isinstance(fields, dict) else type(fields).__name__
            problems.append(f"{file}:{number}: expected an object with a `text`, got {got or 'none'}")
            continue
        title, source = (fields.get(key) if isinstance(fields.get(key), str) else None for key in ("title", "source"))
        whole = f"{title}\n{fields['text']}" if title else fields["text"]
        if any("\ud800" <= character <= "\udfff" for character in whole):
            problems.append(f"{file}:{number}: expected text, got half of a surrogate pair")
            continue
        for _, piece in cut(whole):
            yield Passage(source or title or f"{name}:{number}", piece)


def cut(text: str) -> Iterator[tuple[int, str]]:
    """Pieces of at most `PASSAGE_CHARACTERS`, and the line on which each begins, from 1; nothing but blanks is lost."""
    line, start, begin = 1, 0, 0
    while True:
        while begin < len(text) and text[begin].isspace():
            begin += 1
        if begin == len(text):
            return
        line += text.count("\n", start, begin)
        end = min(begin + PASSAGE_CHARACTERS, len(text))
        if end < len(text):
            # in the second half only, so that passages stay of a length
            middle = begin + PASSAGE_CHARACTERS // 2
            places = (text.rfind(mark, middle, end) + len(mark) for mark in ("\n\n", ".\n", ". ", "\n", " "))
            end = next((place for place in places if place > middle), end)
        yield line, text[begin:end].rstrip()
        start, begin = begin, end
