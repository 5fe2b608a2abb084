"""Adapters by name, each with its generations; and aliases, which spread requests over several.

A generation is a model of its own, `name@hash`; the name leads to the newest. To replace an adapter is to load the next
generation beside it and to move the name: requests under way stay with the generation that they began with, and it goes
when the last of them has ended. Contents are kept by their hash, so that a roll back finds what was there.
"""

import contextlib
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftkit.engine import Engine
from ftkit.errors import FtkitError, InputError
from ftkit.serve import contents
from ftkit.serve.fields import Fields
from ftkit.serve.refused import Refused, conflict, missing
from ftkit.serve.state import State, read_json, write_json

if TYPE_CHECKING:
    from ftkit.serve.jobs import Jobs

_MOST = 10_000
_GENERATIONS = 20

Generation = dict[str, Any]


class Adapters:
    """The adapters and aliases of a server. For several threads."""

    def __init__(self, engine: Engine, state: State, folder: Path, given: Mapping[str, Path]) -> None:
        """`folder`: where requests may load from. `given`: what the engine has loaded by these names already."""
        self._engine, self._state, self._folder = engine, state, folder
        self._lock = threading.RLock()
        self._known: dict[str, list[Generation]] = {}
        self._aliases: dict[str, list[tuple[str, int]]] = {}
        self._given = dict(given)
        self._leaving: list[threading.Thread] = []
        base = engine.loaded.fingerprint
        engine.describe(engine.name, None if base is None else f"base-{base.rpartition(':')[2][:16]}")
        for name, place in given.items():
            generation = _generation(contents.of(place), contents.lineage(place), model=name)
            self._known[name] = [generation]
            engine.describe(name, _fingerprint(generation))
        self.problems = self._recall()
        """What of the state directory could not be loaded again, and why."""

    def every(self) -> dict[str, Any]:
        """All adapters."""
        with self._lock:
            return {"object": "list", "data": [self._shown(name) for name in sorted(self._known)]}

    def retrieve(self, name: str) -> dict[str, Any]:
        """One of them."""
        with self._lock:
            self._there(name)
            return self._shown(name)

    def load(self, body: dict[str, Any], jobs: "Jobs") -> dict[str, Any]:
        """Loads an adapter, or the next generation of one: `name`, and `path` below the allowed directory, or the id of
        a `checkpoint` of a job."""
        fields = Fields(body)
        name, path, checkpoint = fields.name("name"), fields.take("path"), fields.take("checkpoint")
        fields.finish()
        if (path is None) == (checkpoint is None):
            raise Refused("expected a path or a checkpoint, got both or neither", param="path", code="invalid_value")
        if checkpoint is not None:
            if not isinstance(checkpoint, str):
                raise fields.wrong("checkpoint", "the id of one", checkpoint)
            place, lineage = jobs.checkpoint(checkpoint)
        else:
            if not isinstance(path, str):
                raise fields.wrong("path", "a path below the directory of adapters", path)
            place = contents.inside(self._folder, path)
            lineage = contents.lineage(place)
        return self.add(name, place, lineage)

    def add(self, name: str, place: Path, lineage: dict[str, Any]) -> dict[str, Any]:
        """The adapter in a directory becomes the newest generation of a name. Raises InputError when it doesn't fit."""
        room = self._state.room("adapters")
        kept = contents.keep(place, room)
        with self._lock:
            if name == self._engine.name or name in self._aliases:
                raise conflict(f"name: expected one that no model or alias has, got {name!r}")
            if len(self._known) >= _MOST and name not in self._known:
                raise Refused(f"expected at most {_MOST} adapters, got one more", status=507)
            before = self._known.get(name, [])
            if before and before[-1]["hash"] == kept.hash:
                return self._shown(name)
            if before and before[-1]["model"] == name:
                # Of the command line: so that a roll back finds it again.
                with contextlib.suppress(InputError):
                    contents.keep(self._given[name], room)
            self._move(name, [*before, _generation(kept, lineage, model=f"{name}@{kept.hash[:12]}")])
            self._save()
            return self._shown(name)

    def rollback(self, name: str, body: dict[str, Any]) -> dict[str, Any]:
        """The generation before this one answers again, or the one of number `generation`."""
        fields = Fields(body)
        wanted = fields.number("generation", 1, 10**9, whole=True)
        fields.finish()
        with self._lock:
            generations = self._there(name)
            number = int(wanted) if wanted is not None else generations[-1]["number"] - 1
            past = [generation for generation in generations[:-1] if generation["number"] == number]
            if not past:
                numbers = ", ".join(str(generation["number"]) for generation in generations[:-1]) or "none"
                raise conflict(f"generation: expected one of {numbers}, got {number}")
            older = past[0] | {"model": f"{name}@{past[0]['hash'][:12]}", "created": int(time.time())}
            older["back_to"] = older.pop("number")
            self._move(name, [*generations, older])
            self._save()
            return self._shown(name)

    def delete(self, name: str) -> dict[str, Any]:
        """Takes an adapter away. Requests under way are answered to their end."""
        with self._lock:
            generations = self._there(name)
            users = [alias for alias, targets in self._aliases.items() if any(target == name for target, _ in targets)]
            if users:
                raise conflict(f"expected an adapter that no alias leads to, got one of {', '.join(users)}")
            if name == self._engine.default:
                raise conflict("expected another adapter than the one that this server was started for")
            self._engine.remove_alias(name)
            del self._known[name]
            self._save()
            self._retire(generations[-1]["model"])
            self._sweep()
        return {"id": name, "object": "adapter", "deleted": True}

    def aliases(self) -> dict[str, Any]:
        """All aliases."""
        with self._lock:
            return {"object": "list", "data": [self.alias(name) for name in sorted(self._aliases)]}

    def alias(self, name: str) -> dict[str, Any]:
        """One of them."""
        with self._lock:
            if name not in self._aliases:
                raise missing("an alias", name)
            targets = [{"model": model, "weight": weight} for model, weight in self._aliases[name]]
            return {"id": name, "object": "alias", "targets": targets}

    def set_alias(self, body: dict[str, Any]) -> dict[str, Any]:
        """Sets an alias: `name`, and `targets` with `model` and `weight` each."""
        fields = Fields(body)
        name, given = fields.name("name"), fields.take("targets")
        fields.finish()
        if not isinstance(given, list) or not 1 <= len(given) <= 100:
            raise fields.wrong("targets", "a list of 1 to 100", given)
        targets = []
        with self._lock:
            known = {*self._known, self._engine.name}
            if name in known:
                raise conflict(f"name: expected one that no model has, got {name!r}")
            for number, target in enumerate(given):
                if not isinstance(target, dict):
                    raise fields.wrong(f"targets[{number}]", "an object with model and weight", target)
                one = Fields(target, f"targets[{number}]")
                model, weight = one.text("model", longest=200), one.number("weight", 1, 1_000_000, whole=True)
                one.finish()
                if model not in known:
                    raise one.wrong("model", f"one of {', '.join(sorted(known))}", "another")
                targets.append((model, int(weight or 1)))
            self._engine.set_alias(name, targets)
            self._aliases[name] = targets
            self._save()
            return self.alias(name)

    def delete_alias(self, name: str) -> dict[str, Any]:
        """Takes an alias away."""
        with self._lock:
            shown = self.alias(name)
            self._engine.remove_alias(name)
            del self._aliases[name]
            self._save()
        return {"id": shown["id"], "object": "alias", "deleted": True}

    def hash_of(self, model: str) -> str | None:
        """The content behind a name, or behind a generation; None for the base and for what is not there."""
        name, _, start = model.partition("@")
        with self._lock:
            for generation in reversed(self._known.get(name, [])):
                if generation["hash"].startswith(start):
                    return str(generation["hash"])
        return None

    def close(self) -> None:
        """Waits for nobody: what still leaves goes with the engine."""
        self._leaving = [thread for thread in self._leaving if thread.is_alive()]

    def _there(self, name: str) -> list[Generation]:
        if name not in self._known:
            raise missing("an adapter", name)
        return self._known[name]

    def _move(self, name: str, generations: list[Generation]) -> None:
        """Loads the last of the generations, and lets the name lead to it."""
        before = self._known.get(name, [])
        newest = generations[-1]
        newest["number"] = before[-1]["number"] + 1 if before else 1
        model = newest["model"]
        if model not in self._engine.models:
            self._engine.add_adapter(model, self._state.path / "adapters" / newest["hash"])
        self._engine.describe(model, _fingerprint(newest))
        self._engine.set_alias(name, [(model, 1)])
        self._known[name] = generations[-_GENERATIONS:]
        if before and before[-1]["model"] != model:
            self._retire(before[-1]["model"])

    def _retire(self, model: str) -> None:
        """Takes a model away when its requests have ended."""

        def work() -> None:
            with contextlib.suppress(FtkitError):
                self._engine.remove_adapter(model)

        self._leaving = [thread for thread in self._leaving if thread.is_alive()]
        thread = threading.Thread(target=work, name="ftkit-retire", daemon=True)
        self._leaving.append(thread)
        thread.start()

    def _sweep(self) -> None:
        """Removes contents that no generation has."""
        wanted = {generation["hash"] for generations in self._known.values() for generation in generations}
        contents.sweep(self._state.path / "adapters", wanted)

    def _save(self) -> None:
        managed = {
            name: [generation for generation in generations if generation["model"] != name]
            for name, generations in self._known.items()
            if generations[-1]["model"] != name
        }
        self._state.room("adapters")
        write_json(self._state.path / "adapters.json", {"adapters": managed, "aliases": self._aliases})

    def _recall(self) -> list[str]:
        """Loads what an earlier server had. What cannot be loaded is told and left out."""
        path = self._state.path / "adapters.json"
        if not path.exists():
            return []
        table, problems = read_json(path), []
        for name, generations in table.get("adapters", {}).items():
            if name in self._known:
                problems.append(f"{name}: the adapter of the command line answers, not the one that was managed")
                continue
            try:
                self._known[name] = generations
                self._engine.add_adapter(
                    generations[-1]["model"], self._state.path / "adapters" / generations[-1]["hash"]
                )
                self._engine.describe(generations[-1]["model"], _fingerprint(generations[-1]))
                self._engine.set_alias(name, [(generations[-1]["model"], 1)])
            except FtkitError as error:
                del self._known[name]
                problems.append(f"{name}: {error.message}")
        for name, targets in table.get("aliases", {}).items():
            there = [(model, weight) for model, weight in targets if model in {*self._known, self._engine.name}]
            if there and name not in self._known:
                self._aliases[name] = there
                self._engine.set_alias(name, there)
        return problems

    def _shown(self, name: str) -> dict[str, Any]:
        generations = self._known[name]
        newest = generations[-1]
        requests, prompt_tokens, generated_tokens = self._engine.traffic(name)
        return {
            "id": name,
            "object": "adapter",
            "created": newest["created"],
            "generation": newest["number"],
            **{key: newest[key] for key in ("hash", "bytes", "method", "lineage")},
            "generations": [
                {key: generation.get(key) for key in ("number", "created", "hash", "back_to")}
                for generation in generations
            ],
            "traffic": {
                "requests": requests,
                "prompt_tokens": prompt_tokens,
                "generated_tokens": generated_tokens,
            },
        }


def _generation(kept: contents.Content, lineage: dict[str, Any], *, model: str) -> Generation:
    return {
        "number": 1,
        "hash": kept.hash,
        "model": model,
        "created": int(time.time()),
        "bytes": kept.bytes,
        "method": kept.method,
        "lineage": lineage,
    }


def _fingerprint(generation: Generation) -> str:
    return f"adapter-{generation['hash'][:16]}"
