"""Uploaded files of rows, as OpenAI's clients know them. The core has received and checked them before."""

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ftkit.serve.fields import page
from ftkit.serve.refused import Refused, conflict
from ftkit.serve.state import State, fresh, read_json, write_json
from ftkit.train import files as disk

MOST_BYTES = 16 << 30
"""All files together."""
MOST_FILES = 10_000


class Files:
    """The files of a state directory."""

    def __init__(self, state: State) -> None:
        self._state = state

    def begin(self) -> dict[str, Any]:
        """Where an upload may be written. Raises Refused when there is no room for one."""
        folder = self._state.room("files")
        kept = self._all()
        if len(kept) >= MOST_FILES or sum(file["bytes"] for file in kept) >= MOST_BYTES:
            raise Refused("expected room for this file, got a full store; delete some files", status=507)
        return {"folder": str(folder)}

    def create(self, upload: Mapping[str, Any]) -> dict[str, Any]:
        """Takes in what was uploaded to `path`."""
        return self.add(Path(upload["path"]), upload, purpose="fine-tune")

    def add(self, path: Path, what: Mapping[str, Any], *, purpose: str) -> dict[str, Any]:
        """Takes a file in by renaming it. `what`: filename, bytes, rows, kind, hash."""
        place = self._state.room("files") / fresh("file")
        record = {
            "filename": what["filename"] or "file.jsonl",
            "bytes": what["bytes"],
            "created_at": int(time.time()),
            "purpose": purpose,
            **{name: what.get(name) for name in ("rows", "kind", "hash")},
        }
        with disk.new_directory(place) as folder:
            path.rename(folder / "content.jsonl")
            write_json(folder / "file.json", record)
        return _shown(place.name, record)

    def every(self, query: Mapping[str, str]) -> dict[str, Any]:
        """The files, newest first."""
        rows = self._all()
        if query.get("purpose"):
            rows = [row for row in rows if row["purpose"] == query["purpose"]]
        if query.get("order", "desc") not in ("asc", "desc"):
            raise Refused("order: expected asc or desc, got another", param="order", code="invalid_value")
        if query.get("order") == "asc":
            rows.reverse()
        return page(rows, {"limit": "10000"} | dict(query), ("purpose", "order"))

    def retrieve(self, name: str) -> dict[str, Any]:
        """One of them."""
        return _shown(name, read_json(self._state.place("files", "file", name) / "file.json"))

    def record(self, name: str) -> dict[str, Any]:
        """All that is known of one of them."""
        return read_json(self._state.place("files", "file", name) / "file.json")

    def content(self, name: str) -> Path:
        """Where its rows lie."""
        return self._state.place("files", "file", name) / "content.jsonl"

    def delete(self, name: str) -> dict[str, Any]:
        """Removes it. A job keeps the rows that it began with."""
        place = self._state.place("files", "file", name)
        gone = place.parent / f".tmp-gone-{name}"
        try:
            place.rename(gone)
        except FileNotFoundError:
            raise conflict("expected a file that is there, got one that is being deleted") from None
        shutil.rmtree(gone, ignore_errors=True)
        return {"id": name, "object": "file", "deleted": True}

    def _all(self) -> list[dict[str, Any]]:
        rows = [_shown(place.name, read_json(place / "file.json")) for place in self._state.found("files")]
        return sorted(rows, key=lambda row: (row["created_at"], row["id"]), reverse=True)


def _shown(name: str, record: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("bytes", "created_at", "filename", "purpose")
    return {"id": name, "object": "file", **{key: record[key] for key in keys}, "status": "processed"}
