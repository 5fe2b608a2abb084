"""The official client's files and fine-tuning jobs, from an upload to an answer; kills and bad rows, too."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from serving import KEY, Http, Server, start, stop
from speakers import speaker

pytestmark = pytest.mark.server

FEW: dict[str, Any] = {"n_epochs": 6, "batch_size": 1, "learning_rate_multiplier": 50}


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


CHATS = [chat(f"Say {word}.", "yes " * 6) for word in ("one", "two", "three", "four")] * 4
PAIRS = [
    {
        "input": {"messages": [{"role": "user", "content": f"Choose {number}."}]},
        "preferred_output": [{"role": "assistant", "content": "good"}],
        "non_preferred_output": [{"role": "assistant", "content": "bad!"}],
    }
    for number in range(6)
]


class Studio:
    """A server that trains, and its clients."""

    def __init__(self, server: Server, state: Path) -> None:
        self.server, self.state, self.http = server, state, Http(server.url)
        self.client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=60)

    def upload(self, rows: list[Any], name: str = "rows.jsonl") -> str:
        return self.client.files.create(file=(name, lines(rows)), purpose="fine-tune").id

    def job(self, rows: list[Any], **arguments: Any) -> str:
        how = {"hyperparameters": FEW} if "method" not in arguments else {}
        file = self.upload(rows)
        return self.client.fine_tuning.jobs.create(model="speaker", training_file=file, **(how | arguments)).id

    def until(self, job: str, what: Callable[[Any], bool], seconds: float = 240) -> Any:
        end = time.monotonic() + seconds
        while not what(found := self.client.fine_tuning.jobs.retrieve(job)):
            assert found.status != "failed", found.error
            assert time.monotonic() < end, found
            time.sleep(0.2)
        return found

    def told(self, job: str) -> list[str]:
        """What its events say."""
        return [event.message for event in self.client.fine_tuning.jobs.list_events(job, limit=1000).data]

    def step(self, job: str) -> int:
        """The newest step that the job tells of; 0 before the first."""
        events = self.client.fine_tuning.jobs.list_events(job, limit=50).data
        steps: list[int] = [event.data["step"] for event in events if event.type == "metrics"]  # type: ignore[index]
        return max(steps, default=0)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return speaker(tmp_path_factory.mktemp("base") / "speaker", "chatml")


@pytest.fixture(scope="module")
def studio(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    state = tmp_path_factory.mktemp("studio") / "state"
    server = start(str(base), "--port=0", f"--api-key={KEY}", f"--state-dir={state}", "--threads=1", "--upload-mib=1")
    yield Studio(server, state)
    assert stop(server) == 0


def test_files_come_and_go(studio: Studio) -> None:
    files = studio.client.files
    content = lines(CHATS)
    file = files.create(file=("../../etc/my chats.jsonl", content), purpose="fine-tune")
    assert (file.object, file.bytes, file.filename) == ("file", len(content), "my chats.jsonl")
    assert (file.purpose, file.status) == ("fine-tune", "processed")
    assert files.content(file.id).read() == content
    assert files.retrieve(file.id) == file
    assert file.id in [one.id for one in files.list(purpose="fine-tune")]
    other = files.create(file=("b.jsonl", content), purpose="fine-tune").id
    assert [one.id for one in files.list(limit=1)][:1] == [other] or len(list(files.list(limit=1))) >= 2
    assert files.delete(file.id).deleted
    for gone in (files.retrieve, files.delete, files.content):
        with pytest.raises(openai.NotFoundError):
            gone(file.id)
    assert not [path for path in (studio.state / "files").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (lines(CHATS[:2]) + b"{broken\n", "line 3: expected a JSON object"),
        (lines(CHATS[:1]) + b"\n\n" + lines([{"messages": "none"}]), "line 4: messages"),
        (lines([*CHATS[:1], {"text": "x"}]), "line 2: expected a row of the schema messages"),
        (lines([{"nothing": 1}]), "line 1: expected the columns of a schema"),
        (b"", "file: expected"),
        (b"[1, 2]", "file: expected JSONL"),
        (b"\xff\xfe{}\n", "file: "),
        (b"PAR1" + b"\x00" * 100, "file: "),
        (b"[" * 100_000 + b"\n", "file: "),
    ],
)
def test_bad_rows_are_told_with_their_lines(studio: Studio, content: bytes, told: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        studio.client.files.create(file=("rows.jsonl", content), purpose="fine-tune")
    assert told in str(caught.value)
    assert str(studio.state) not in str(caught.value)
    assert not [path for path in (studio.state / "files").iterdir() if path.name.startswith(".")]


def test_a_file_that_is_too_large_is_refused_and_leaves_nothing(studio: Studio) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        studio.client.files.create(file=("rows.jsonl", b"x" * (3 << 20)), purpose="fine-tune")
    assert caught.value.status_code == 413
    assert not [path for path in (studio.state / "files").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    "name", ["..", "../state", "file-" + "0" * 24, "file-zz", "file-%2e%2e%2f%2e%2e", "file-" + "0" * 23 + "%00", "%ff"]
)
def test_ids_are_no_paths(studio: Studio, name: str) -> None:
    real = studio.upload(CHATS[:1])
    for trick in (f"{real}%2f..%2f{real}", f"{real}%2f.", f"{real}%2f", f"{real}%00", real.upper()):
        assert studio.http.get(f"/v1/files/{trick}").status_code in (400, 404), trick
        assert studio.http.delete(f"/v1/files/{trick}").status_code in (400, 404), trick
    assert studio.http.get(f"/v1/files/{real}").status_code == 200
    for path in (f"/v1/files/{name}", f"/v1/files/{name}/content", f"/v1/fine_tuning/jobs/{name}"):
        assert studio.http.get(path).status_code in (400, 404), path


@pytest.mark.parametrize(
    ("arguments", "param"),
    [
        ({"model": "nobody"}, "model"),
        ({"training_file": "file-" + "0" * 24}, "training_file"),
        ({"training_file": "../../etc/passwd"}, "training_file"),
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"batch_size": "many"}}, "hyperparameters.batch_size"),
        ({"method": {"type": "reinforcement"}}, "method.type"),
        ({"method": {"type": "dpo"}}, "training_file"),
        ({"suffix": "../x"}, "suffix"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "x"}}]}, "integrations"),
        ({"extra_body": {"command": "x"}}, "command"),
    ],
)
def test_jobs_that_cannot_be_are_refused(studio: Studio, arguments: dict[str, Any], param: str) -> None:
    given: dict[str, Any] = {"model": "speaker", "training_file": studio.upload(CHATS)} | arguments
    with pytest.raises(openai.APIStatusError) as caught:
        studio.client.fine_tuning.jobs.create(**given)
    assert caught.value.status_code in (400, 404)
    assert caught.value.param == param


def test_a_job_from_upload_to_answer(studio: Studio) -> None:
    client = studio.client
    file = studio.upload(CHATS)
    created = client.fine_tuning.jobs.create(
        model="speaker",
        training_file=file,
        validation_file=studio.upload(CHATS[:4]),
        suffix="yes-man",
        seed=7,
        metadata={"team": "a"},
        method={
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": 14, "learning_rate_multiplier": 50}},
        },
    )
    assert (created.object, created.status, created.seed) == ("fine_tuning.job", "queued", 7)
    assert (created.training_file, created.metadata) == (file, {"team": "a"})
    client.files.delete(file)  # the job has its own
    job = studio.until(created.id, lambda job: job.status == "succeeded")
    assert job.fine_tuned_model == f"ft:speaker:yes-man:{job.id.removeprefix('ftjob-')[:8]}"
    assert job.trained_tokens > 0
    assert job.finished_at >= job.created_at
    assert job.method.supervised.hyperparameters.n_epochs == 14
    asked: dict[str, Any] = {"messages": CHATS[0]["messages"][:1], "temperature": 0, "max_tokens": 12}
    answers = {
        name: client.chat.completions.create(model=name, **asked).choices[0].message.content
        for name in ("speaker", job.fine_tuned_model)
    }
    assert answers["speaker"] != answers[job.fine_tuned_model]
    events = client.fine_tuning.jobs.list_events(job.id, limit=1000).data
    assert events[0].message.startswith("The job has successfully completed")
    assert events[-1].message.startswith("Created")
    assert events[0].created_at >= events[-1].created_at
    losses = [
        event.data["train_loss"] for event in reversed(events) if event.type == "metrics" and "train_loss" in event.data
    ]
    assert losses[-1] < losses[0] / 2
    samples = [event.data for event in reversed(events) if event.data.get("moment")]
    assert [one["moment"] for one in samples] == ["before"] * 3 + ["after"] * 3
    assert {one["prompt"] for one in samples} < {row["messages"][0]["content"] for row in CHATS}
    # in evaluation mode and to 64 tokens, but else as the models answer
    first = next(one for one in samples if one["moment"] == "after")
    said = client.chat.completions.create(
        model=job.fine_tuned_model,
        messages=[{"role": "user", "content": first["prompt"]}],
        temperature=0,
        max_tokens=64,
    )
    assert (said.choices[0].message.content or "").strip() == first["answer"]
    pages = list(client.fine_tuning.jobs.list_events(job.id, limit=20))
    assert [event.id for event in pages] == [event.id for event in events]
    checkpoints = client.fine_tuning.jobs.checkpoints.list(job.id).data
    assert checkpoints[0].fine_tuning_job_id == job.id
    assert checkpoints[0].metrics.train_loss is not None
    early = min(checkpoints, key=lambda checkpoint: checkpoint.step_number)
    loaded = studio.http.post("/v1/adapters", {"name": "early", "checkpoint": early.id}).json()
    assert loaded["lineage"]["job"] == job.id
    csv = client.files.content(job.result_files[0]).text
    assert csv.startswith("step,train_loss")
    assert csv.count("\n") == len(losses) + 1
    assert job.id in [one.id for one in client.fine_tuning.jobs.list(limit=50)]
    managed = studio.http.get(f"/v1/adapters/{job.fine_tuned_model}").json()
    assert managed["lineage"]["job"] == job.id


def test_a_job_whose_training_fails_says_why(studio: Studio) -> None:
    rows = [chat("x" * 3000, "y")]  # longer than a row may be, and nothing of it is left to train on
    job = studio.job(rows)
    studio.server.until(lambda: studio.client.fine_tuning.jobs.retrieve(job).status == "failed", seconds=240)
    error = studio.client.fine_tuning.jobs.retrieve(job).error
    assert error is not None
    assert "expected" in error.message
    assert str(studio.state) not in error.message
    assert studio.client.fine_tuning.jobs.list_events(job).data[0].level == "error"


def held(pid: int) -> bool:
    """Whether the process is stopped."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def test_a_job_waits_for_requests_and_outlives_its_server(base: Path, tmp_path: Path) -> None:
    """Preferences, so that both methods are seen to train."""
    arguments = (str(base), "--port=0", f"--api-key={KEY}", "--threads=1", f"--state-dir={tmp_path / 'state'}")
    studio = Studio(start(*arguments), tmp_path / "state")
    method: Any = {"type": "dpo", "dpo": {"hyperparameters": {"n_epochs": 1000, "beta": 0.2}}}
    job = studio.job(PAIRS, method=method)
    studio.until(job, lambda found: found.status == "running" and studio.step(job) > 0)
    pid = json.loads((studio.state / "jobs" / job / "job.json").read_text())["pid"]
    # It stops at once when somebody asks, and goes on when nobody does.
    how: dict[str, Any] = {"model": "speaker", "max_tokens": 1500, "extra_body": {"ignore_eos": True}}
    stream = studio.client.completions.create(prompt="Once", stream=True, **how)
    next(stream)
    studio.server.until(lambda: held(pid), seconds=10)
    still = studio.step(job)
    for _ in zip(range(200), stream, strict=False):
        pass
    assert held(pid)
    assert studio.step(job) == still
    stream.close()
    studio.until(job, lambda _: studio.step(job) > still)
    # The server is killed: its job goes with it, and the next server goes on from the last checkpoint.
    studio.until(job, lambda _: studio.step(job) > 20)
    os.kill(studio.server.process.pid, signal.SIGKILL)
    studio.server.process.communicate()
    studio.server.until(lambda: not Path(f"/proc/{pid}").exists(), seconds=30)
    studio = Studio(start(*arguments), tmp_path / "state")
    studio.until(job, lambda _: "Fine-tuning goes on" in studio.told(job))
    events = studio.state / "runs" / job / "events.jsonl"
    studio.server.until(lambda: '"resumed"' in events.read_text(), seconds=240)
    resumed = [event for event in map(json.loads, events.read_text().splitlines()) if event["event"] == "resumed"]
    assert resumed[0]["step"] >= 10
    config = (studio.state / "runs" / job / "config.toml").read_text()
    assert 'name = "dpo"' in config
    assert "beta = 0.2" in config
    # By hand it leaves with a checkpoint.
    assert studio.http.post(f"/v1/fine_tuning/jobs/{job}/pause").json()["status"] == "paused"
    assert studio.http.post(f"/v1/fine_tuning/jobs/{job}/pause").status_code == 409
    pid = json.loads((studio.state / "jobs" / job / "job.json").read_text())["pid"]
    studio.server.until(lambda: not Path(f"/proc/{pid}").exists(), seconds=60)
    assert studio.http.post(f"/v1/fine_tuning/jobs/{job}/resume").json()["status"] in ("queued", "running")
    assert studio.client.fine_tuning.jobs.cancel(job).status == "cancelled"
    with pytest.raises(openai.ConflictError):
        studio.client.fine_tuning.jobs.cancel(job)
    studio.server.until(lambda: not (studio.state / "runs" / job).exists())
    assert stop(studio.server) == 0
