"""Every plugin is listed with what it is; the machine's facts are facts."""

import json

import pytest
from typer.testing import CliRunner

from ftkit import plugins
from ftkit.cli import application
from ftkit.cli.list import ROOMS, entries
from ftkit.errors import InputError

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("room", [*ROOMS, "quant"])
def test_every_entry_has_a_description(room: str) -> None:
    found = entries(room)
    assert found
    assert all(text.strip() for text in found.values())


def test_methods_are_the_files_of_their_room() -> None:
    result = CliRunner().invoke(application(), ["list", "methods", "--json"])
    assert result.exit_code == 0
    assert list(json.loads(result.stdout)["methods"]) == plugins.names("adapters")


def test_an_unknown_room_is_an_error_with_a_hint() -> None:
    with pytest.raises(InputError, match="did you mean 'methods'"):
        entries("metods")


def test_doctor_tells_what_is_there() -> None:
    import torch

    result = CliRunner().invoke(application(), ["doctor", "--json"])
    assert result.exit_code == 0
    facts = json.loads(result.stdout)
    assert torch.__version__.startswith(facts["packages"]["torch"])
    assert facts["cores"] >= 1
    assert all(facts["gflops"][kind] > 1 for kind in ("float32", "bfloat16", "blocks", "attention"))
    assert facts["memory_gigabytes_per_second"] > 0.1
    plain = CliRunner().invoke(application(), ["doctor"])
    assert facts["processor"] in plain.stdout


@pytest.mark.parametrize("command", plugins.names("cli"))
def test_every_command_has_help_with_an_example(command: str) -> None:
    result = CliRunner().invoke(application(), [command, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert "ftkit" in result.stdout or "Commands" in result.stdout
