"""The options that say what a run is, shared by the commands that take a configuration (`train`, `plan`).

Each option is a name for one key of the configuration; `--set` reaches the others.
"""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

_CONFIG = Annotated[
    Path | None,
    typer.Argument(metavar="[CONFIG.toml]", help="A configuration; options override it.", show_default=False),
]
_SET = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any key, such as optimizer.weight_decay=0.1; repeatable."),
]
# option: (key, type, help)
_OPTIONS: dict[str, tuple[str, type, str]] = {
    "model": ("model.source", str, "Directory of safetensors, .gguf file, hub name, or a run's name."),
    "data": ("data.path", str, "JSONL, JSON, CSV, Parquet or .txt file, or a directory of these."),
    "method": ("method.name", str, "Finetuning method, such as lora or full."),
    "objective": ("objective.name", str, "What is learned, such as sft."),
    "epochs": ("training.epochs", float, "Passes over the data."),
    "max_steps": ("training.max_steps", int, "Optimizer steps; decides instead of epochs."),
    "learning_rate": ("optimizer.learning_rate", float, "The highest learning rate."),
    "schedule": ("schedule.name", str, "Course of the learning rate, such as cosine or wsd."),
    "max_tokens": ("data.max_tokens", int, "Tokens of a packed row."),
    "train_on": ("data.train_on", str, "assistant, last or all."),
    "long_rows": ("data.long_rows", str, "truncate or split."),
    "skip_bad_rows": ("data.skip_bad_rows", int, "Unreadable rows that are let pass."),
    "batch_rows": ("training.batch_rows", int, "Packed rows in a forward pass."),
    "evaluation_split": ("evaluation.split", float, "Share of the rows that is held out."),
    "evaluation_data": ("evaluation.path", str, "A file of held-out rows."),
    "quant": ("model.quant", str, "How matrices are held: none, gguf, nf4, int8, … (ftkit list quant)."),
    "precision": ("training.precision", str, "int8: frozen matrices multiply in 8 bits, watched over; else dtype."),
    "sparse_tokens": (
        "training.sparse_tokens",
        float,
        "Share of a long context's tokens that most layers keep, such as 0.25; trained ones always.",
    ),
    "name": ("output.name", str, "The run's name."),
    "runs_dir": ("output.runs_dir", str, "The directory of runs (default: runs)."),
    "seed": ("training.seed", int, "Seed of order, first weights and dropout."),
    "budget": ("training.budget", str, "Memory that the run may take, such as 8GiB (default: what is free)."),
    "threads": ("training.threads", int, "Processor threads."),
}


def with_run_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives `command(config_path, overrides, ...)` the options above; `overrides` maps keys to what was given.

    Its other parameters stay options of their own.
    """
    own = [p for p in inspect.signature(command).parameters.values() if p.name not in ("config_path", "overrides")]
    keyword = inspect.Parameter.KEYWORD_ONLY
    ours = [inspect.Parameter("config_path", keyword, default=None, annotation=_CONFIG)]
    for name, (key, kind, text) in _OPTIONS.items():
        option = typer.Option(f"--{name.replace('_', '-')}", help=f"{text} ({key})", show_default=False)
        ours.append(inspect.Parameter(name, keyword, default=None, annotation=Annotated[kind | None, option]))
    ours.append(inspect.Parameter("settings", keyword, default=None, annotation=_SET))

    def wrapped(**arguments: Any) -> None:
        from ftkit.config import toml

        given = {name: arguments.pop(name) for name in _OPTIONS}
        overrides = {key: given[name] for name, (key, _, _) in _OPTIONS.items() if given[name] is not None}
        overrides |= {
            ".".join(path): value for path, value in map(toml.parse_override, arguments.pop("settings") or [])
        }
        command(config_path=arguments.pop("config_path"), overrides=overrides, **arguments)

    parameters = [*ours, *(parameter.replace(kind=keyword) for parameter in own)]
    wrapped.__doc__ = command.__doc__
    wrapped.__name__ = command.__name__
    wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapped
