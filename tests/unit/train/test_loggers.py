"""Loggers hear every number of a run, are only imported when asked for, and are missed in words."""

import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ftkit import plugins
from ftkit.errors import InputError
from ftkit.train import loggers

pytestmark = pytest.mark.unit

EVENTS: list[dict[str, Any]] = [
    {"event": "started", "step": 0},
    {"event": "step", "step": 1, "loss": 2.5, "learning_rate": 1e-4, "gradient_norm": 0.5, "tokens_per_second": 9.0},
    {"event": "step", "step": 2, "loss": None, "learning_rate": 1e-4, "gradient_norm": None, "tokens_per_second": 9.0},
    {"event": "evaluation", "step": 2, "loss": 2.0, "best": True, "metrics": {"kl": 0.25, "reward_margin": None}},
    {"event": "finished", "step": 2},
]
EXPECTED = [
    (1, {"train/loss": 2.5, "train/learning_rate": 1e-4, "train/gradient_norm": 0.5, "train/tokens_per_second": 9.0}),
    (2, {"train/learning_rate": 1e-4, "train/tokens_per_second": 9.0}),
    (2, {"evaluation/loss": 2.0, "evaluation/kl": 0.25}),
]


class Service(ModuleType):
    """Stands in for wandb and trackio, whose calls are the same: neither can be reached from a test."""

    def __init__(self) -> None:
        super().__init__("service")
        self.told: list[tuple[int, dict[str, float]]] = []
        self.started: dict[str, Any] = {}
        self.finished = False

    def init(self, **values: Any) -> None:
        self.started = values

    def log(self, values: dict[str, float], step: int) -> None:
        self.told.append((step, values))

    def finish(self) -> None:
        self.finished = True


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_service_hears_every_number(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    service = Service()
    monkeypatch.setitem(sys.modules, name, service)
    (listen,) = loggers.open_all([name], "run", tmp_path, {"training": {"seed": 1}})
    for event in EVENTS:
        listen(event)
    assert service.started["name"] == "run"
    assert service.told == EXPECTED
    assert service.finished


def test_a_service_that_is_not_installed_or_unknown_is_an_input_error() -> None:
    with pytest.raises(InputError, match="did you mean 'wandb'"):
        loggers.check(["wadnb"])
    for name in plugins.names("train.loggers"):
        program = (
            "import sys; sys.modules[sys.argv[1]] = None\n"
            "from ftkit.train import loggers\n"
            "try: loggers.check([sys.argv[1]])\n"
            "except Exception as error: print(type(error).__name__, error)\n"
        )
        result = subprocess.run([sys.executable, "-c", program, name], capture_output=True, text=True, check=True)
        assert f"InputError output.loggers: expected the package '{name}' to be installed" in result.stdout


def test_no_service_is_imported_unless_asked_for() -> None:
    program = "import sys, ftkit.train.start; print(sorted({'tensorboard', 'wandb', 'trackio'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
