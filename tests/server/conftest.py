"""One real server for all tests of this folder: a process of its own, with two adapters, a key and a small pool."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import torch
from managing import Managed, adapter
from serving import KEY, Server, start, stop
from speakers import speaker

from ftkit import adapters, models


@pytest.fixture(scope="session")
def server(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("adapters")
    loaded = models.load(smollm2)
    for number, name in enumerate(["one", "two"]):
        adapters.attach(loaded.model, "lora", {"rank": 3}, seed=number)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in adapters.trainable(loaded.model).values():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
        adapters.save(loaded.model, 0, folder / name)
        adapters.detach(loaded.model, 0)
    del loaded
    named = [f"--adapter={name}={folder / name}" for name in ("one", "two")]
    limits = [
        f"--state-dir={folder / 'state'}",
        "--pool-mib=64",
        "--max-sequences=4",
        "--max-waiting=12",
        "--context=1024",
    ]
    server = start(str(smollm2), "--port=0", f"--api-key={KEY}", *named, *limits)
    yield server
    assert stop(server) == 0


@pytest.fixture(scope="session")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=120)


@pytest.fixture(scope="session")
def caller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A tiny model whose template knows tools, as `speaker`, behind a key."""
    server = start(
        str(speaker(tmp_path_factory.mktemp("caller") / "speaker", "qwen2_5")), "--port=0", f"--api-key={KEY}"
    )
    yield server
    assert stop(server) == 0


@pytest.fixture(scope="session")
def managed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Managed]:
    home = tmp_path_factory.mktemp("managed")
    base = speaker(home / "speaker", "chatml")
    folder = home / "allowed"
    folder.mkdir()
    for number, name in enumerate(("v3", "v4", "v5")):
        adapter(base, folder / name, number)
    adapter(base, home / "outside", 9)
    (folder / "link").symlink_to(home / "outside")
    shutil.copytree(folder / "v3", folder / "linked-weights")
    (folder / "linked-weights" / "adapter_model.safetensors").unlink()
    (folder / "linked-weights" / "adapter_model.safetensors").symlink_to(folder / "v3" / "adapter_model.safetensors")
    server = start(
        str(base),
        "--port=0",
        f"--api-key={KEY}",
        f"--adapter=given={folder / 'v5'}",
        f"--adapter-dir={folder}",
        f"--state-dir={home / 'state'}",
    )
    yield Managed(server, folder, base, home / "state")
    assert stop(server) == 0
