"""The configuration of a run: frozen dataclasses, read from TOML and the command line, checked as a whole.

    [model]       source = "model.gguf"
    [data]        path = "conversations.jsonl"
    [method]      name = "lora"     and the options of adapters/lora.py
    [objective]   name = "sft"      and the options of objectives/sft.py
    [optimizer]   name = "adamw"    and the options of optim/adamw.py
    [schedule]    name = "cosine"   and the options of optim/schedules/cosine.py
    [training] [evaluation] [output]

What a method, an objective, an optimizer or a schedule can be told stands in its own file, as a settings class
called `Config`; so adding one needs no edit here. Unknown keys, wrong types and values out of range are errors, all
reported together with the lines they stand on.
"""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from ftkit import plugins
from ftkit.config import toml
from ftkit.config.fields import Problem, nearest, option, read, shown, table_of
from ftkit.errors import InputError

__all__ = [
    "Choice",
    "DataConfig",
    "EvaluationConfig",
    "ModelConfig",
    "OutputConfig",
    "RunConfig",
    "TrainingConfig",
    "option",
]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The base model, and how it computes."""

    source: str = option(meaning="a directory of safetensors, a .gguf file, a hub name, or a run's name")
    dtype: Literal["float32", "bfloat16"] = option(
        "float32", "what the model computes in; trained weights and the optimizer's state are float32 either way"
    )
    device: str = option("auto", "cpu, cuda, cuda:1, …; auto takes a GPU where there is one")
    quant: str = option(
        "none",
        "how frozen matrices are held: none (dense), gguf (as the file has them), nf4, … (ftkit list quant); "
        "where it is not given, a method that needs a scheme decides",
    )

    def __post_init__(self) -> None:
        known = ["none", *plugins.names("quant")]
        name, _, option = self.quant.partition(":")
        if name not in known:
            raise InputError(f"quant: expected one of {', '.join(known)}, got {self.quant!r}")
        options = getattr(plugins.load("quant", name), "OPTIONS", ("",)) if name != "none" else ("",)
        if option not in options or self.quant.endswith(":"):
            known = [f"{name}:{allowed}" if allowed else name for allowed in options]
            raise InputError(f"quant: expected one of {', '.join(known)}, got {self.quant!r}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is trained on, and how rows become tokens."""

    path: str | tuple[str, ...] = option(
        meaning="a file (JSONL, JSON, CSV, Parquet, text), a directory, feedback:DIR, or a list of these"
    )
    schema: str = option("auto", "how rows are laid out; auto looks at them")
    columns: dict[str, str] = field(default_factory=dict, metadata={"meaning": "names that the data uses for ours"})
    train_on: Literal["assistant", "last", "all"] = option(
        "assistant", "assistant: every answer; last: the last answer; all: every token"
    )
    max_tokens: int = option(
        1024, "tokens of a packed row, and so of the longest conversation", at_least=8, at_most=10_000_000
    )
    long_rows: Literal["truncate", "split"] = option(
        "truncate", "what becomes of a longer conversation: cut after its last whole turn that fits, or split"
    )
    skip_bad_rows: int = option(0, "rows that may be unreadable; one more is an error", at_least=0)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How long and in which portions."""

    epochs: float = option(1.0, "passes over the data", above=0)
    max_steps: int | None = option(None, "optimizer steps; when given, it decides instead of epochs", at_least=1)
    batch_rows: int = option(1, "packed rows in one forward pass; memory grows with it", at_least=1)
    gradient_accumulation_steps: int = option(
        1, "forward passes in one optimizer step; the update is that of one big batch", at_least=1
    )
    max_gradient_norm: float = option(1.0, "longer gradients are scaled down to this; 0 leaves them", at_least=0)
    activation_checkpointing: Literal["auto"] | bool | int = option(
        "auto",
        "recompute activations in the backward pass, which takes less memory and more time: in all layers, in so many "
        "from the first on, or (auto) in as few as the memory asks for",
        at_least=0,
    )
    budget: str | None = option(None, "memory that the run may take, such as 8GiB; what is free when not given")
    precision: Literal["dtype", "int8"] = option(
        "dtype",
        "what frozen matrices multiply in: dtype: as model.dtype says; int8: both sides rounded to 8 bits, on a CPU, "
        "watched over, and faster",
    )
    sparse_tokens: float = option(
        1.0,
        "share of a long row's blocks of 64 tokens that most layers take, trained ones always; 1: all. Below it the "
        "others' activations are neither computed nor kept",
        above=0,
        at_most=1,
    )
    optimizer_in_backward: bool = option(
        False, "update each weight as soon as its gradient is there, and free it: gradients are never all in memory"
    )
    offload: Literal["auto", "none", "optimizer", "activations"] = option(
        "auto",
        "what lies in a file on disk between its uses, on a CPU: nothing, the optimizer's state, the inputs of "
        "recomputed layers (all are recomputed then), or (auto) either or both where nothing cheaper fits the memory",
    )
    shard: Literal["auto"] | bool = option(
        "auto",
        "several processes share out weights, gradients and optimizer states instead of having all: auto: where all "
        "weights are trained",
    )
    seed: int = option(0, "of the data's order, the adapter's first weights and dropout", at_least=0, below=2**63)
    threads: int | None = option(
        None, "processor threads; all that this process may use when not given", at_least=1, at_most=1024
    )
    stop_after_bad_steps: int = option(
        10,
        "steps in a row without a usable gradient (NaN, infinite, all zero, nothing trained) that end the run",
        at_least=1,
    )

    def __post_init__(self) -> None:
        if self.offload == "activations" and not self.activation_checkpointing:
            raise InputError(
                "offload: expected auto, none or optimizer where no layers are recomputed, got activations",
                "their inputs are what goes to disk; leave activation_checkpointing at auto",
            )
        if not self.optimizer_in_backward:
            return
        if self.gradient_accumulation_steps > 1:
            raise InputError(
                "gradient_accumulation_steps: expected 1 with optimizer_in_backward, got "
                f"{self.gradient_accumulation_steps}",
                "gradients that are freed cannot add up; batch_rows makes a batch larger",
            )
        if self.max_gradient_norm:
            raise InputError(
                f"max_gradient_norm: expected 0 with optimizer_in_backward, got {self.max_gradient_norm}",
                "the norm is not known before the last gradient is; set training.max_gradient_norm=0",
            )


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is held out, and how often it is looked at."""

    path: str | tuple[str, ...] | None = option(None, "a file of held-out rows")
    split: float = option(0.0, "without a file: this share of the rows is held out", at_least=0, below=1)
    every_steps: int = option(
        100, "optimizer steps between two evaluations; there is always one at the end", at_least=1
    )
    patience: int = option(0, "evaluations without a better loss that end the run; 0 goes on", at_least=0)

    def __post_init__(self) -> None:
        if self.path is not None and self.split:
            raise InputError(f"expected a path or a split, got both ({self.path!r} and {self.split})")
        if self.patience and not self.enabled:
            raise InputError(
                f"patience: expected a path or a split to evaluate on, got neither (patience is {self.patience})"
            )

    @property
    def enabled(self) -> bool:
        """Whether anything is held out."""
        return self.path is not None or self.split > 0


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """Where the run leaves what it makes."""

    name: str | None = option(None, "of the run; made from model and data when not given")
    runs_dir: str = option("runs", "the directory of all runs")
    checkpoint_every_steps: int = option(100, "optimizer steps between two checkpoints", at_least=1)
    keep_checkpoints: int = option(2, "newest checkpoints that stay, besides the best; 0 keeps all", at_least=0)
    samples: int = option(3, "rows whose prompts are answered before and after training, for the report", at_least=0)
    loggers: tuple[str, ...] = option((), "where events go besides events.jsonl: tensorboard, wandb, trackio")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A plugin by name, with its options; `options` is complete once the configuration was checked."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)


# Section → the room whose plugins it chooses from, and the one that is taken when nothing is said.
_CHOICES = {
    "method": ("adapters", "lora"),
    "objective": ("objectives", "sft"),
    "optimizer": ("optim", "adamw"),
    "schedule": ("optim.schedules", "cosine"),
}
_SECTIONS = {
    "model": ModelConfig,
    "data": DataConfig,
    "training": TrainingConfig,
    "evaluation": EvaluationConfig,
    "output": OutputConfig,
}


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides a run."""

    model: ModelConfig
    data: DataConfig
    method: Choice = Choice(name="lora")
    objective: Choice = Choice(name="sft")
    optimizer: Choice = Choice(name="adamw")
    schedule: Choice = Choice(name="cosine")
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    output: OutputConfig = OutputConfig()

    @classmethod
    def from_toml(cls, path: str | Path | None, overrides: Sequence[str] | Mapping[str, Any] = ()) -> Self:
        """The file's configuration (none: the defaults) with `a.b=c` overrides on top.

        Overrides are texts as on the command line, or a mapping from `a.b` to values. Raises InputError with
        everything that is wrong.
        """
        table: dict[str, Any] = {}
        lines: dict[tuple[str, ...], int] = {}
        if path is not None:
            table, lines = toml.read_file(Path(path))
        if isinstance(overrides, Mapping):
            pairs = [(tuple(key.split(".")), value) for key, value in overrides.items()]
        else:
            pairs = [toml.parse_override(text) for text in overrides]
        for keys, value in pairs:
            if len(keys) == 1 and keys[0] in _CHOICES and isinstance(value, str):
                keys = (*keys, "name")
            _put(table, keys, value)
            for known in [known for known in lines if known[: len(keys)] == keys]:
                del lines[known]
        return cls.from_table(table, str(path) if path is not None else None, lines)

    @classmethod
    def from_table(
        cls, table: Mapping[str, Any], where: str | None = None, lines: Mapping[tuple[str, ...], int] | None = None
    ) -> Self:
        """The configuration in a nested table; `where` and `lines` say in messages where its keys stand."""
        problems: list[Problem] = []
        known = {section.name for section in dataclasses.fields(cls)}
        for key in table:
            if key not in known:
                problems.append(Problem(path=(key,), message=f"unknown section{nearest(key, known)}"))
        sections: dict[str, Any] = {
            name: read(kind, table.get(name, {}), (name,), problems) for name, kind in _SECTIONS.items()
        }
        for name, (room, default) in _CHOICES.items():
            sections[name] = _read_choice(room, default, table.get(name, {}), name, problems)
        if problems:
            raise _error(problems, where, lines or {})
        scheme_for = getattr(plugins.load("adapters", sections["method"].name), "scheme_for", None)
        if scheme_for is not None and "quant" not in table["model"]:
            model: ModelConfig = sections["model"]
            sections["model"] = dataclasses.replace(model, quant=scheme_for(model.source, sections["method"].options))
        return cls(**sections)

    def table(self) -> dict[str, Any]:
        """The configuration as `from_table` takes it."""
        table = {name: table_of(getattr(self, name)) for name in _SECTIONS}
        for name in _CHOICES:
            choice: Choice = getattr(self, name)
            table[name] = {"name": choice.name, **choice.options}
        return {section.name: table[section.name] for section in dataclasses.fields(self)}

    def changed(self, settings: Mapping[str, Any]) -> Self:
        """The same configuration with other values, by keys such as `training.max_steps`."""
        table = self.table()
        for key, value in settings.items():
            _put(table, tuple(key.split(".")), value)
        return self.from_table(table)

    def resolved(self) -> Self:
        """The same configuration, checked, with every option of its plugins filled in."""
        return self.from_table(self.table())

    def to_toml(self) -> str:
        """The configuration as TOML that `from_toml` reads back to an equal one."""
        return toml.write(self.table())


def _read_choice(room: str, default: str, table: Any, section: str, problems: list[Problem]) -> Choice | None:
    """A plugin and its options. A text instead of a table is its name."""
    if isinstance(table, str):
        table = {"name": table}
    if not isinstance(table, Mapping):
        problems.append(Problem(path=(section,), message=f"expected a table, got {shown(table)}"))
        return None
    name = table.get("name", default)
    known = plugins.names(room)
    if name not in known:
        guess = nearest(name, known) if isinstance(name, str) else ""
        message = f"expected one of {', '.join(map(repr, known))}, got {shown(name)}{guess if 'did' in guess else ''}"
        problems.append(Problem(path=(section, "name"), message=message))
        return None
    settings = getattr(plugins.load(room, name), "Config", None)
    options = {key: value for key, value in table.items() if key != "name"}
    if settings is None:  # a plugin without options
        problems += [Problem(path=(section, key), message=f"unknown key, {name!r} has no options") for key in options]
        return Choice(name=name)
    found = read(settings, options, (section,), problems)
    return None if found is None else Choice(name=name, options=table_of(found))


def _put(table: dict[str, Any], keys: tuple[str, ...], value: Any) -> None:
    """Sets a value in a nested table. A plugin's section given as a text becomes a table first."""
    for key in keys[:-1]:
        inner = table.get(key, {})
        if isinstance(inner, str) and key in _CHOICES:
            inner = {"name": inner}
        if not isinstance(inner, dict):
            raise InputError(f"{'.'.join(keys)}: expected {key!r} to be a table, got {shown(inner)}")
        table[key] = inner
        table = inner
    table[keys[-1]] = value


def _error(problems: list[Problem], where: str | None, lines: Mapping[tuple[str, ...], int]) -> InputError:
    """One error that lists all problems, in the order of their lines."""

    def text(problem: Problem) -> str:
        number = lines.get(problem.path)
        place = f"line {number}: " if number is not None else ""
        return f"{place}{'.'.join(problem.path)}: {problem.message}"

    ordered = sorted(problems, key=lambda problem: lines.get(problem.path, sys.maxsize))
    head = f"{where}: " if where else ""
    if len(ordered) == 1:
        return InputError(head + text(ordered[0]))
    return InputError(
        f"{head}expected a valid configuration, got {len(ordered)} problems\n  " + "\n  ".join(map(text, ordered))
    )
