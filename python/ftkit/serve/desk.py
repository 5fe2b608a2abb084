"""The desk: what the core asks by name, and who does it."""

import json
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ftkit.engine import Engine
from ftkit.errors import FtkitError, InputError
from ftkit.serve.adapters import Adapters
from ftkit.serve.feedback import Feedback
from ftkit.serve.files import Files
from ftkit.serve.jobs import Jobs
from ftkit.serve.refused import Refused
from ftkit.serve.state import State

_Asked = Mapping[str, Any]


class Desk:
    """Adapters, aliases, files, jobs and feedback of one server. For several threads; close it with the server."""

    def __init__(
        self,
        engine: Engine,
        state_dir: Path,
        *,
        adapter_dir: Path,
        given: Mapping[str, Path] | None = None,
        quant: str = "none",
    ) -> None:
        """`adapter_dir`: where requests may load adapters from; `given`: those that the server was started with;
        `quant`: how jobs hold the base. Raises InputError when another server has the state directory."""
        self._state = State(state_dir)
        if state_dir.exists():
            self._state.claim()
        self.adapters = Adapters(engine, self._state, adapter_dir, given or {})
        files = Files(self._state)
        self.jobs = Jobs(engine, self._state, files, self.adapters, quant=quant)
        self.feedback = Feedback(engine, self._state, self.adapters)
        self._calls: dict[str, Callable[[_Asked], Any]] = {
            "adapters.list": lambda _: self.adapters.every(),
            "adapters.load": lambda asked: self.adapters.load(asked["body"], self.jobs),
            "adapters.retrieve": lambda asked: self.adapters.retrieve(asked["name"]),
            "adapters.delete": lambda asked: self.adapters.delete(asked["name"]),
            "adapters.rollback": lambda asked: self.adapters.rollback(asked["name"], asked["body"]),
            "aliases.list": lambda _: self.adapters.aliases(),
            "aliases.set": lambda asked: self.adapters.set_alias(asked["body"]),
            "aliases.retrieve": lambda asked: self.adapters.alias(asked["name"]),
            "aliases.delete": lambda asked: self.adapters.delete_alias(asked["name"]),
            "files.begin": lambda _: files.begin(),
            "files.create": files.create,
            "files.list": lambda asked: files.every(asked["query"]),
            "files.retrieve": lambda asked: files.retrieve(asked["name"]),
            "files.content": lambda asked: {"path": str(files.content(asked["name"]))},
            "files.delete": lambda asked: files.delete(asked["name"]),
            "jobs.create": lambda asked: self.jobs.create(asked["body"]),
            "jobs.list": lambda asked: self.jobs.every(asked["query"]),
            "jobs.retrieve": lambda asked: self.jobs.retrieve(asked["name"]),
            "jobs.cancel": lambda asked: self.jobs.cancel(asked["name"]),
            "jobs.pause": lambda asked: self.jobs.pause(asked["name"]),
            "jobs.resume": lambda asked: self.jobs.resume(asked["name"]),
            "jobs.events": lambda asked: self.jobs.events(asked["name"], asked["query"]),
            "jobs.checkpoints": lambda asked: self.jobs.checkpoints(asked["name"], asked["query"]),
            "server.leaving": lambda _: self.jobs.leave(),
            "feedback.create": lambda asked: self.feedback.create(asked["body"], asked["caller"]),
            "feedback.count": lambda _: self.feedback.count(),
        }

    def __call__(self, what: str, arguments: str) -> str:
        """What the core calls: JSON in, JSON out; never raises."""
        try:
            return json.dumps({"done": self._calls[what](json.loads(arguments))})
        except Refused as error:
            refused = {"status": error.status, "message": error.message, "param": error.param, "code": error.code}
        except InputError as error:
            # Where things lie here is no business of whoever asks.
            told = str(error).replace(f"{self._state.path}/", "").replace("\n", "; ")
            refused = {"status": 400, "message": told}
        except Exception as error:  # the server goes on; whoever runs it reads why
            if not isinstance(error, FtkitError):
                traceback.print_exc(file=sys.stderr)
            refused = {"status": 500, "message": f"{what}: the server failed; its standard error says how"}
        return json.dumps({"refused": refused})

    def start(self) -> None:
        """Begins to work on jobs, also on those that an earlier server did not end."""
        self.jobs.start()

    def close(self) -> None:
        """Stops the job under way after its step; the next server goes on with it."""
        self.jobs.close()
        self.adapters.close()
        self._state.close()
