"""One fine-tuning job: what was asked, how far it is, and its words for OpenAI's clients."""

import time
from pathlib import Path
from typing import Any

from ftkit import plugins
from ftkit.serve.fields import Fields
from ftkit.serve.refused import Refused
from ftkit.serve.state import read_json, write_json
from ftkit.train.directory import RunDirectory
from ftkit.train.events import Event, read

UNDER_WAY = ("validating_files", "queued", "running", "paused")
KINDS = {
    "supervised": ("messages", "sharegpt", "alpaca", "prompt_completion", "text"),
    "dpo": ("preference", "preferred_output"),
}
"""The schemas that a method learns from."""
_OBJECTIVES = {"supervised": "sft", "dpo": "dpo"}
_DPO_RATE = 2e-5
_OF_SAMPLE = ("moment", "prompt", "expected", "answer")
CHECKPOINT_EVERY = 10
"""Optimizer steps; so much is done again after a kill."""


class Job:
    """A job's record, in a folder of its own."""

    def __init__(self, folder: Path, runs: Path) -> None:
        self.folder = folder
        self.id = folder.name
        self.run = RunDirectory(path=runs / folder.name)
        self.record = read_json(folder / "job.json")

    @property
    def status(self) -> str:
        """As the API calls it."""
        return str(self.record["status"])

    @property
    def rows(self) -> Path:
        """What is trained on."""
        return self.folder / "training.jsonl"

    def update(self, **changes: Any) -> None:
        """Changes the record, on disk first."""
        write_json(self.folder / "job.json", self.record | changes)
        self.record |= changes

    def told(self, message: str, *, level: str = "info") -> None:
        """Adds an event of the server's."""
        event = {"time": time.time(), "level": level, "message": message[:4000]}
        self.update(events=[*self.record.get("events", []), event][-500:])

    def arguments(self, model: str, quant: str, threads: int, context: int) -> list[str]:
        """Of `ftkit`, to begin with."""
        how, kind = self.record["hyperparameters"], self.record["method"]
        rate = _rate(kind) * (how["learning_rate_multiplier"] or 1.0)
        given = {
            "--model": model,
            "--data": str(self.rows),
            "--objective": _OBJECTIVES[kind],
            "--method": "lora",
            "--quant": quant,
            "--epochs": str(how["n_epochs"]),
            "--batch-rows": str(how["batch_size"]),
            "--learning-rate": repr(rate),
            "--max-tokens": str(min(1024, context)),
            "--seed": str(self.record["seed"]),
            "--threads": str(threads),
            "--set": f"output.checkpoint_every_steps={CHECKPOINT_EVERY}",
            **self._place(),
        }
        found = ["train", *(part for pair in given.items() for part in pair)]
        if (self.folder / "validation.jsonl").exists():
            found += ["--evaluation-data", str(self.folder / "validation.jsonl")]
        if kind == "dpo" and how.get("beta"):
            found += ["--set", f"objective.beta={how['beta']!r}"]
        return found

    def resuming(self) -> list[str]:
        """Of `ftkit`, to go on."""
        return ["train", "--resume", *(part for pair in self._place().items() for part in pair)]

    def _place(self) -> dict[str, str]:
        return {"--name": self.id, "--runs-dir": str(self.run.path.parent)}

    def shown(self) -> dict[str, Any]:
        """The job for clients."""
        record = self.record
        how = {name: value for name, value in record["hyperparameters"].items() if value is not None}
        return {
            "id": self.id,
            "object": "fine_tuning.job",
            "created_at": record["created_at"],
            "error": record.get("error"),
            "fine_tuned_model": record.get("fine_tuned_model"),
            "finished_at": record.get("finished_at"),
            "hyperparameters": {name: value for name, value in how.items() if name != "beta"},
            "model": record["model"],
            "organization_id": "ftkit",
            "result_files": record.get("result_files", []),
            "seed": record["seed"],
            "status": record["status"],
            "trained_tokens": record.get("trained_tokens"),
            "training_file": record["training_file"],
            "validation_file": record.get("validation_file"),
            "estimated_finish": self._estimated_finish(),
            "integrations": [],
            "metadata": record.get("metadata"),
            "method": {"type": record["method"], record["method"]: {"hyperparameters": how}},
        }

    def _estimated_finish(self) -> int | None:
        if self.status != "running":
            return None
        steps = self.steps()
        return None if not steps else int(steps[-1]["time"] + steps[-1].get("seconds_left", 0))

    def steps(self) -> list[Event]:
        """The steps that its run has done."""
        return [event for event in read(self.run.events) if event["event"] == "step"]

    def events(self) -> list[dict[str, Any]]:
        """What happened, newest first."""
        found: list[tuple[float, str, str, str, dict[str, Any]]] = [
            (event["time"], event["level"], event["message"], "message", {}) for event in self.record.get("events", [])
        ]
        total = None
        for event in read(self.run.events):
            total = event.get("steps", total)
            if event["event"] == "step":
                step, loss = event["step"], event.get("loss")
                data = {"step": step, "train_loss": loss, "total_steps": total}
                text = f"Step {step}/{total}: training loss={loss if loss is None else format(loss, '.4f')}"
                found.append((event["time"], "info", text, "metrics", data))
            elif event["event"] == "evaluation":
                data = {"step": event["step"], "valid_loss": event.get("loss")}
                found.append((event["time"], "info", f"Step {event['step']}: validation", "metrics", data))
            elif event["event"] == "memory":
                data = {"peak_bytes": event["peak_bytes"], "planned_bytes": event.get("planned_by_category", {})}
                found.append((event["time"], "info", "The largest batch's memory was measured", "message", data))
            elif event["event"] == "sample":
                data = {"sample": event["number"], **{name: event[name] for name in _OF_SAMPLE}}
                text = f"Sample {event['number']}, {event['moment']} training: {event['answer'][:200]}"
                found.append((event["time"], "info", text, "message", data))
            elif event["event"] in ("warning", "notice"):
                level = "warn" if event["event"] == "warning" else "info"
                found.append((event["time"], level, event["message"], "message", {}))
        found.sort(key=lambda event: event[0])
        shown = [
            {
                "id": f"ftevent-{self.id.removeprefix('ftjob-')}-{number}",
                "object": "fine_tuning.job.event",
                "created_at": int(when),
                "level": level,
                "message": message,
                "type": kind,
                "data": data,
            }
            for number, (when, level, message, kind, data) in enumerate(found)
        ]
        return shown[::-1]

    def checkpoints(self) -> list[dict[str, Any]]:
        """The checkpoints that are there, newest first."""
        losses = {event["step"]: event for event in self.steps()}
        valid = {event["step"]: event.get("loss") for event in read(self.run.events) if event["event"] == "evaluation"}
        found = []
        for folder in sorted(self.run.checkpoints.glob("step-*"), reverse=True):
            step = int(folder.name.removeprefix("step-"))
            metrics = {"step": step, "train_loss": losses.get(step, {}).get("loss"), "full_valid_loss": valid.get(step)}
            found.append(
                {
                    "id": f"ftckpt-{self.id.removeprefix('ftjob-')}-{step}",
                    "object": "fine_tuning.job.checkpoint",
                    "created_at": int(folder.stat().st_mtime),
                    "fine_tuned_model_checkpoint": f"{self.model_name()}:ckpt-step-{step}",
                    "fine_tuning_job_id": self.id,
                    "step_number": step,
                    "metrics": {name: value for name, value in metrics.items() if value is not None},
                }
            )
        return found

    def model_name(self) -> str:
        """What the finished adapter is called."""
        return f"ft:{self.record['model']}:{self.record.get('suffix') or ''}:{self.id.removeprefix('ftjob-')[:8]}"

    def metrics_csv(self) -> str:
        """Every step's numbers, as OpenAI's result files have them."""
        rows = (f"{event['step']},{event.get('loss')},{event.get('learning_rate')}" for event in self.steps())
        return "\n".join(["step,train_loss,learning_rate", *rows]) + "\n"


def asked(body: dict[str, Any], base: str) -> dict[str, Any]:
    """A job's record from what a client asks. Raises Refused for what cannot be done."""
    fields = Fields(body)
    model = fields.text("model", longest=200)
    if model != base:
        raise Refused(
            f"model: expected {base!r}, which this server can train, got {model[:100]!r}", param="model", status=404
        )
    training, validation = fields.text("training_file", longest=100), fields.take("validation_file")
    if validation is not None and not isinstance(validation, str):
        raise fields.wrong("validation_file", "the id of a file", validation)
    suffix = fields.text("suffix", longest=64, default="")
    if not all(letter.isascii() and (letter.isalnum() or letter in "-_.") for letter in suffix):
        raise fields.wrong("suffix", "letters, digits, '.', '_', '-'", "another")
    seed = fields.number("seed", 0, 2**31 - 1, whole=True)
    metadata = fields.take("metadata")
    if metadata is not None and not _is_metadata(metadata):
        raise fields.wrong("metadata", "at most 16 short texts", metadata)
    if fields.take("integrations"):
        raise Refused("integrations: expected none, since nothing leaves this machine, got some", param="integrations")
    older = fields.table("hyperparameters")
    method = fields.table("method")
    kind = method.text("type", default="supervised")
    if kind not in KINDS:
        raise method.wrong("type", "supervised or dpo", "another")
    how = method.table(kind).table("hyperparameters")
    method.finish()
    fields.finish()
    learned: dict[str, Any] = {}
    for name, low, high, default in _HYPERPARAMETERS:
        whole = name != "learning_rate_multiplier"
        value, other = how.number(name, low, high, whole=whole), older.number(name, low, high, whole=whole)
        learned[name] = value if value is not None else other if other is not None else default
    if kind == "dpo":
        learned["beta"] = how.number("beta", 1e-6, 100.0)
    how.finish()
    older.finish()
    return {
        "status": "queued",
        "created_at": int(time.time()),
        "model": model,
        "training_file": training,
        "validation_file": validation,
        "suffix": suffix,
        "seed": 0 if seed is None else int(seed),
        "metadata": metadata,
        "method": kind,
        "hyperparameters": learned,
    }


# (name, least, most, what "auto" is)
_HYPERPARAMETERS = (("n_epochs", 1, 1000, 3), ("batch_size", 1, 256, 1), ("learning_rate_multiplier", 1e-4, 1e4, 1.0))


def _rate(method: str) -> float:
    """The learning rate that a multiplier of 1 stands for."""
    default: float = plugins.load("optim", "adamw").Config().learning_rate
    return _DPO_RATE if method == "dpo" else default


def _is_metadata(value: object) -> bool:
    return (
        isinstance(value, dict)
        and len(value) <= 16
        and all(len(key) <= 64 and isinstance(text, str) and len(text) <= 512 for key, text in value.items())
    )
