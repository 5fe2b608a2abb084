"""What whoever runs a server relies on: keys that change, adapters of a directory, tiers, metrics, and silence."""

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from managing import adapter
from serving import Http, Server, start, stop
from speakers import speaker

from ftkit.serve import keys as key_file

pytestmark = pytest.mark.server

METRICS = Path(__file__).parents[2] / "docs" / "metrics.md"


class Run:
    """A server with a file of keys and a directory of adapters."""

    def __init__(self, server: Server, home: Path, key: str) -> None:
        self.server, self.home, self.keys = server, home, home / "keys.toml"
        self.http = Http(server.url, key)

    def ask(self, model: str, path: str = "/v1/chat/completions", **more: Any) -> Any:
        said = {"input": "Hi"} if path.endswith("responses") else {"messages": [{"role": "user", "content": "Hi"}]}
        most = {"max_output_tokens": 2} if path.endswith("responses") else {"max_tokens": 2}
        return self.http.post(path, {"model": model, **said, **most, **more})

    def metric(self, name: str) -> float:
        found = re.search(rf"^ftkit_{re.escape(name)} (\S+)$", self.http.get("/metrics").text, re.MULTILINE)
        return float(found[1]) if found else 0.0


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    home = tmp_path_factory.mktemp("operations")
    base = speaker(home / "speaker", "chatml")
    shelf = home / "shelf"
    shelf.mkdir()
    adapter(base, shelf / "one", 1)
    adapter(base, shelf / "two", 2)
    adapter(base, shelf / "run" / "adapter", 3)
    adapter(base, shelf / "broken", 4)
    (shelf / "broken" / "adapter_model.safetensors").write_bytes(b"nothing")
    (shelf / "link").symlink_to(shelf / "one")
    (shelf / "notes").mkdir()
    key, text = key_file.fresh("boss", admin=True)
    key_file.append(home / "keys.toml", text)
    server = start(
        str(base),
        "--port=0",
        f"--api-keys={home / 'keys.toml'}",
        f"--adapter-dir={shelf}",
        f"--state-dir={home / 'state'}",
        "--kv-cache=int8",
    )
    yield Run(server, home, key)
    assert stop(server) == 0


def test_a_directory_of_adapters_is_served_and_loaded_from(run: Run) -> None:
    names = [model["id"] for model in run.http.get("/v1/models").json()["data"]]
    assert names == ["speaker", "broken", "one", "run", "two"]
    before = run.metric("adapter_misses_total"), run.metric("adapter_hits_total")
    for name in ("one", "run", "one"):
        assert run.ask(name).json()["model"] == name
    assert (run.metric("adapter_misses_total"), run.metric("adapter_hits_total")) == (before[0] + 2, before[1] + 1)
    assert run.metric("adapters_resident") == 2
    assert run.metric("adapters_bytes") % run.metric("block_bytes") == 0 < run.metric("adapters_bytes")
    # managed, the name leads to what was loaded, and is gone with it
    assert run.http.post("/v1/adapters", {"name": "two", "path": "one"}).status_code == 200
    assert run.ask("two").json()["system_fingerprint"].startswith("adapter-")
    assert run.http.delete("/v1/adapters/two").status_code == 200
    run.server.until(lambda: run.ask("two").status_code == 404)


def test_an_adapter_that_cannot_be_read_does_not_tell_where_it_lies(run: Run) -> None:
    refused = run.ask("broken")
    assert refused.status_code == 500
    assert "broken" in refused.text
    assert str(run.home) not in refused.text
    assert "shelf" not in refused.text


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages"])
def test_tiers_hold_on_every_route(run: Run, path: str) -> None:
    def counts() -> dict[str, float]:
        return {tier: run.metric(f'queue_seconds_count{{priority="{tier}"}}') for tier in ("-2", "0", "2")}

    before = counts()
    for tier in ("priority", "flex", "default", "auto"):
        assert run.ask("speaker", path, service_tier=tier).status_code == 200
    if path == "/v1/messages":
        assert run.ask("speaker", path, service_tier="standard_only").status_code == 200
    more = {tier: count - before[tier] for tier, count in counts().items()}
    assert more == {"-2": 1, "0": 3 if path == "/v1/messages" else 2, "2": 1}
    assert run.ask("speaker", path, service_tier="scale").status_code == 400


def test_metrics_are_those_of_their_page(run: Run) -> None:
    run.ask("one")
    told = dict(re.findall(r"^# TYPE (\S+) (\S+)", run.http.get("/metrics").text, re.MULTILINE))
    written = dict(re.findall(r"^\| `(\S+)` \| (\S+) \|", METRICS.read_text(encoding="utf-8"), re.MULTILINE))
    assert told == written


def test_keys_come_and_go_while_it_serves(run: Run) -> None:
    before = run.keys.read_text()
    key, text = key_file.fresh("guest")
    key_file.append(run.keys, text)
    guest = Http(run.server.url, key)
    run.server.until(lambda: guest.get("/v1/models").status_code == 200)
    run.keys.write_text(before + "\n[[keys]]\nname = 'bad'\n")
    time.sleep(1.5)
    assert guest.get("/v1/models").status_code == 200  # what is wrong changes nothing
    run.keys.write_text(before)
    run.server.until(lambda: guest.get("/v1/models").status_code == 401)
    assert run.http.get("/v1/models").status_code == 200


def test_an_idle_server_takes_no_processor_time(run: Run) -> None:
    run.ask("speaker")
    time.sleep(0.5)

    def ticks() -> int:
        fields = Path(f"/proc/{run.server.process.pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    before = ticks()
    time.sleep(3)
    # three looks at the file of keys; a thread that spins or polls often would take tens
    assert (ticks() - before) / os.sysconf("SC_CLK_TCK") <= 0.03
