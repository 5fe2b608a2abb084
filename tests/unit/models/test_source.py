"""What a user may call a model, and that a local path never reaches the network."""

from pathlib import Path

import huggingface_hub
import pytest

from ftkit import models
from ftkit.errors import InputError

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def hub(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names that the hub is asked for; it has none of them."""
    asked: list[str] = []

    def snapshot_download(name: str, **_: object) -> str:
        asked.append(name)
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def a_model(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    return path


def a_run(path: Path, source: str, adapter: bool = True) -> Path:
    path.mkdir(parents=True)
    (path / "config.toml").write_text(f"[model]\nsource = {source!r}\n")
    if adapter:
        (path / "adapter").mkdir()
    return path


def test_paths(tmp_path: Path, hub: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = a_model(tmp_path / "owner" / "name")
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    monkeypatch.chdir(tmp_path)
    for name in (folder, str(folder), "owner/name", "./owner/name"):
        assert models.resolve(name).path.resolve() == folder
    assert models.resolve("model.gguf").path.resolve() == file
    assert not hub


def test_a_run_brings_its_base_and_its_adapter(tmp_path: Path, hub: list[str]) -> None:
    base = a_model(tmp_path / "base")
    run = a_run(tmp_path / "runs" / "mine", str(base))
    for name in ("mine", str(run)):
        found = models.resolve(name, tmp_path / "runs")
        assert (found.path, found.adapter, found.run, found.name) == (base, run / "adapter", run, name)
    assert not hub


@pytest.mark.parametrize("name", ["nothing", "./owner/name", "/a/b/c", "a/b/c", "model.gguf", "owner/model.gguf", ""])
def test_what_looks_like_a_path_is_not_asked_of_the_hub(name: str, tmp_path: Path, hub: list[str]) -> None:
    with pytest.raises(InputError, match="model: expected a directory"):
        models.resolve(name, tmp_path)
    assert not hub


def test_hub_names(tmp_path: Path, hub: list[str]) -> None:
    with pytest.raises(InputError, match="expected 'owner/name' in the local hub cache"):
        models.resolve("owner/name", tmp_path)
    assert hub == ["owner/name"]


def test_the_real_hub_client_stays_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With HF_HUB_OFFLINE set (as in these tests' environment or set here), no connection is tried."""
    import socket

    monkeypatch.undo()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    with pytest.raises(InputError, match="in the local hub cache"):
        models.resolve("owner/name", tmp_path)


def test_what_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    a_run(tmp_path / "runs" / "unfinished", str(a_model(tmp_path / "base")), adapter=False)
    for name, expected in (
        ("empty", "expected a model with a config.json"),
        ("notes.txt", "expected a directory of safetensors or a .gguf file, got another file"),
        ("adapter", "expected a model, got an adapter"),
        ("runs/unfinished", "expected a finished run with an adapter"),
    ):
        with pytest.raises(InputError, match=expected):
            models.resolve(tmp_path / name)
