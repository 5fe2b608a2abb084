"""Several processes train what one does, and each goes on from the other's checkpoint."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ftkit import models, train
from ftkit.config import RunConfig
from ftkit.errors import InputError
from ftkit.export import Material, gguf
from ftkit.train import events, sharding
from ftkit.train.processes import Processes
from ftkit.train.signals import Interruption

pytestmark = pytest.mark.unit

Settings = Callable[..., dict[str, Any]]

IN_PROCESSES = """
import json, os, socket, sys
import torch._dynamo, torch.distributed.fsdp
import ftkit.train.start
from ftkit.cli import application

for size, runs in json.load(open(sys.argv[1])):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:  # as torchrun tells it
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_PORT": str(port)}
            os.environ["MASTER_ADDR"] = "127.0.0.1"
            for words in runs:
                application()(words, standalone_mode=False)
            sys.exit()
        children.append(child)
    if any([os.waitpid(child, 0)[1] for child in children]):
        sys.exit(1)
"""
DEAF = """
import ctypes
from ftkit.train.signals import Interruption

library, lock = ctypes.CDLL(None), ctypes.create_string_buffer(64)
with Interruption(deaf_seconds=0.5):
    library.pthread_mutex_lock(lock)
    print("locked", flush=True)
    library.pthread_mutex_lock(lock)
"""


def words(table: dict[str, Any], *options: str) -> list[str]:
    given = [word for key, value in table.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    return ["train", *given, *options]


def of(table: dict[str, Any]) -> tuple[list[float], dict[str, torch.Tensor]]:
    """A run's losses, of training and of evaluation, and the weights of its last step."""
    folder = Path(table["output.runs_dir"]) / table["output.name"]
    told = [event["loss"] for event in events.read(folder / "events.jsonl") if event["event"] in ("step", "evaluation")]
    return told, load_file(folder / "checkpoints" / "step-000004" / "weights.safetensors")


def common(settings: Settings) -> dict[str, Any]:
    return settings(
        training__batch_rows=2, training__gradient_accumulation_steps=3, schedule__name="constant",
        evaluation__split=0.2, evaluation__every_steps=2, optimizer__learning_rate=1e-3, data__max_tokens=64,
        output__checkpoint_every_steps=2, output__keep_checkpoints=0, training__max_steps=4,
    ) | {"schedule.warmup_steps": 0}  # fmt: skip


def full(table: dict[str, Any], **changes: Any) -> dict[str, Any]:
    kept = {key: value for key, value in table.items() if not key.startswith("method.")}
    return kept | {"method.name": "full"} | {key.replace("__", "."): value for key, value in changes.items()}


def named(table: dict[str, Any], name: str, steps: int | None = None) -> dict[str, Any]:
    return table | {"output.name": name} | ({} if steps is None else {"training.max_steps": steps})


def in_processes(groups: list[tuple[int, list[list[str]]]], folder: Path) -> tuple[str, str]:
    """What processes print of which each group runs its commands, all starting from one that has imported all."""
    script, told = folder / "in_processes.py", folder / "words.json"
    script.write_text(IN_PROCESSES)
    told.write_text(json.dumps(groups))
    done = subprocess.run([sys.executable, script, told], capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@contextmanager
def launched(size: int, *arguments: Any) -> Iterator[subprocess.Popen[str]]:
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(size), *map(str, arguments)]
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-m", *launcher], stdout=pipe, stderr=pipe, text=True)
    try:
        yield process
    finally:
        process.terminate()  # ends what it has started, too


def in_blocks(model: Path, folder: Path) -> Path:
    """The model as a GGUF file of Q4_1, with a rule for words that llama.cpp has a name for."""
    copy = shutil.copytree(model, folder / "tiny")
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"]["use_regex"] = True
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    gguf.write(Material.of(models.load(copy)), folder / "tiny.gguf", "q4_1")
    return folder / "tiny.gguf"


def close(name: str, table: dict[str, Any], expected: tuple[list[float], dict[str, torch.Tensor]]) -> None:
    """Losses and weights to 1e-6.

    Sums in another order differ by some 1e-7 of a gradient in float32, and the optimizers' first steps pass on what a
    gradient is off relative to itself, times the learning rate. States in 8 bits may then round to the code next to
    theirs, which is 1/127 of a block's greatest away: a weight was seen 1.6e-6 off.
    """
    near = 1e-5 if name.startswith("adamw8bit") else 1e-6
    losses, weights = of(named(table, name))
    assert losses == pytest.approx(expected[0], rel=1e-6), name
    for key, weight in weights.items():
        torch.testing.assert_close(weight, expected[1][key], rtol=0, atol=near, msg=lambda text: f"{name}: {text}")


@pytest.mark.slow
def test_several_processes_are_one_and_resume_what_others_began(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """LoRA begins in two and ends in one; full finetuning begins in one and goes on in two, or begins in two and goes
    on in three. Six rows a step, in three batches, leave one of two processes with fewer than the other; two batches of
    three rows leave each of three with parts of a batch.
    """
    base = common(settings)
    lora = base | {"method.dropout": 0.0}
    blocks = in_blocks(Path(base["model.source"]), tmp_path)
    tables = {
        "lora": lora,
        "lora-q4_1": lora | {"model.source": str(blocks), "model.quant": "gguf"},
        "full": full(base),
        "muon": full(base, optimizer__name="muon"),
        "adamw8bit": full(base, optimizer__name="adamw8bit", training__batch_rows=3) | {
            "training.gradient_accumulation_steps": 2
        },
        "in-backward": full(
            base, training__optimizer_in_backward=True, training__max_gradient_norm=0.0, training__batch_rows=3,
            training__gradient_accumulation_steps=1, optimizer__name="adafactor",
        ),
    }  # fmt: skip
    ends = {}
    for name, table in tables.items():
        train.run(RunConfig.from_toml(None, named(table, f"{name}-alone")))
        ends[name] = of(named(table, f"{name}-alone"))
    train.run(RunConfig.from_toml(None, named(tables["full"], "full-1-2", 2)))
    in_two = [
        words(named(tables["lora"], "lora-2-1", 2)),
        words(named(tables["lora-q4_1"], "lora-q4_1-2")),
        words(named(tables["full"], "full-1-2"), "--resume", "--json"),
        words(named(tables["muon"], "muon-2")),
        words(named(tables["muon"], "muon-2-3", 2)),
        words(named(tables["full"], "full-2-1", 2)),
    ]
    in_three = [
        words(named(tables["muon"], "muon-2-3"), "--resume"),
        words(named(tables["adamw8bit"], "adamw8bit-3")),
        words(named(tables["in-backward"], "in-backward-3")),
    ]
    _, errors = in_processes([(2, in_two), (3, in_three)], tmp_path)
    assert errors.count("lora-2-1: done") == 1, "one of them speaks"
    for name in ("lora", "full"):
        train.run(RunConfig.from_toml(None, named(tables[name], f"{name}-2-1")), resume=True)
    for run in (
        "lora-2-1", "lora-q4_1-2", "full-1-2", "full-2-1", "muon-2", "muon-2-3", "adamw8bit-3", "in-backward-3"
    ):  # fmt: skip
        name = max((each for each in tables if run.startswith(each)), key=len)
        close(run, tables[name], ends[name])
        ended = run.removeprefix(name).strip("-").partition("-")[2]
        notices = [event["message"] for event in told(base, run) if event["event"] == "notice"]
        assert any("resumed with another processes" in notice for notice in notices) == bool(ended)
    alone, shared = (
        next(event for event in told(base, run) if event["event"] == "memory") for run in ("muon-alone", "muon-2")
    )
    with capsys.disabled():
        print(f"\nbytes of tensors in a process: {alone['peak_bytes']:,} alone, {shared['peak_bytes']:,} of two")
    assert shared["peak_bytes"] <= shared["planned_peak_bytes"]
    assert shared["planned_by_category"]["optimizer"] < 0.6 * alone["planned_by_category"]["optimizer"]
    assert shared["planned_by_category"]["adapter"] < 0.6 * alone["planned_by_category"]["adapter"]
    # the file of one process, byte for byte but for the values
    for file in ("weights.safetensors", "optimizer.safetensors", "adapter/adapter_model.safetensors"):
        one, other = (
            (Path(base["output.runs_dir"]) / run / "checkpoints" / "step-000004" / file).read_bytes()
            for run in ("muon-alone", "muon-2-3")
        )
        header = 8 + int.from_bytes(one[:8], "little")
        assert one[:header] == other[:header]
        assert len(one) == len(other)


def told(table: dict[str, Any], run: str) -> list[dict[str, Any]]:
    return list(events.read(Path(table["output.runs_dir"]) / run / "events.jsonl"))


@pytest.mark.slow
def test_sigterm_ends_all_with_a_checkpoint_and_a_dead_process_ends_the_others(settings: Settings) -> None:
    table = full(common(settings), training__max_steps=100_000, output__checkpoint_every_steps=100_000)
    with launched(2, "-m", "ftkit", *words(named(table, "stopped"))) as process:
        wait_for_step(process, table, "stopped", 2)
        process.terminate()
        _, errors = process.communicate(timeout=300)
    last = told(table, "stopped")[-1]
    assert last["event"] == "interrupted", errors
    assert (Path(table["output.runs_dir"]) / "stopped" / "checkpoints" / f"step-{last['step']:06d}").is_dir()
    with launched(2, "-m", "ftkit", *words(named(table, "bereft"))) as process:
        wait_for_step(process, table, "bereft", 2)
        os.kill(worker(process.pid, rank=1), signal.SIGKILL)
        _, errors = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "error: process 0 of 2: expected the others to go on, got one that has ended" in errors
    assert "expected the others to go on" in told(table, "bereft")[-1]["message"]


def wait_for_step(process: subprocess.Popen[str], table: dict[str, Any], run: str, step: int) -> None:
    until = time.monotonic() + 600
    path = Path(table["output.runs_dir"]) / run / "events.jsonl"
    while not (path.exists() and any(event.get("step", 0) >= step for event in told(table, run))):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until
        time.sleep(0.2)


def worker(launcher: int, rank: int) -> int:
    """The process of that rank."""
    for folder in Path("/proc").iterdir():
        with suppress(OSError):  # some end meanwhile
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            if parent == str(launcher) and f"RANK={rank}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                return int(folder.name)
    raise AssertionError(f"expected a process of rank {rank}")


def test_a_process_that_waits_in_c_hears_a_signal_all_the_same() -> None:
    """A lock of the C library that never opens stands for a collective whose other side never comes."""
    process = subprocess.Popen([sys.executable, "-c", DEAF], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "S":  # until it waits in C
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM
    assert "expected an answer of the other processes" in errors


def test_a_step_is_dealt_out_whole_and_no_batch_grows() -> None:
    for portions in ([[1, 2, 3], [4, 5, 6], [7]], [[1, 2, 3, 4, 5, 6, 7]], [[5]]):
        for size in (1, 2, 3, 5):
            parts = [Processes(rank, size).part(portions) for rank in range(size)]
            assert sorted(row for part in parts for rows in part for row in rows) == sorted(
                row for rows in portions for row in rows
            )
            assert all(any(set(rows) <= set(portion) for portion in portions) for part in parts for rows in part)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {},
            "training: expected a step of at least 3 batches, or batches of as many rows, for 3 processes, got 1 of 2",
        ),
        (
            {"training.batch_rows": 3, "training.optimizer_in_backward": True, "training.max_gradient_norm": 0.0},
            "training.optimizer_in_backward: expected one process, or weights that processes share out, got 3 with",
        ),
    ],
)
def test_what_processes_cannot_share_is_refused(settings: Settings, changes: dict[str, Any], message: str) -> None:
    config = RunConfig.from_toml(None, settings() | changes)
    Processes(0, 1).check(config)
    with pytest.raises(InputError, match=message):
        Processes(0, 3).check(config)


def test_weights_are_shared_out_where_all_are_trained(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    table = settings()
    configs = [RunConfig.from_toml(None, each) for each in (table, full(table), full(table, training__shard=False))]
    assert [sharding.shares(config) for config in configs] == [1, 1, 1]
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert [sharding.shares(config) for config in configs] == [1, 3, 1]
    with pytest.raises(InputError, match=r"training\.shard: expected the method full, got lora"):
        sharding.shares(RunConfig.from_toml(None, table | {"training.shard": True}))


def test_a_signal_that_comes_twice_at_once_is_one() -> None:
    with Interruption(once_seconds=0.2) as stop:
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
        assert stop.requested
        time.sleep(0.25)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
