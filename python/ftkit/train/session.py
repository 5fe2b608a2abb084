"""What a run is made of: model, adapter, data, loss and optimizer, put together from a configuration."""

import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ftkit import _core, adapters, data, models, optim, plugins
from ftkit.config import RunConfig
from ftkit.config.cache import cache_directory
from ftkit.errors import InputError
from ftkit.nn.batch import RaggedBatch
from ftkit.nn.decoder import Decoder
from ftkit.nn.eight_bits import EightBitProducts
from ftkit.nn.shards import local
from ftkit.plan.budget import written
from ftkit.plan.speed import advice, speeds
from ftkit.quant.gguf import stream
from ftkit.train import (
    fitting,
    lock,
    memory,
    offload,
    planned,
    rounding,
    samples,
    sharding,
    sparse_shapes,
    sparse_tokens,
)
from ftkit.train.directory import RunDirectory
from ftkit.train.processes import ALONE, Processes
from ftkit.train.step import Loss
from ftkit.train.tasks import Tasks

_TRACED = 4
"""Batches that are planned exactly, when it isn't plain which one is the worst."""
ADAPTER = 0  # the id under which the trained adapter hangs in the model


@dataclass(frozen=True, kw_only=True)
class Session:
    """Everything that stands still while a run moves."""

    config: RunConfig
    loaded: models.LoadedModel
    device: torch.device
    parameters: Mapping[str, torch.nn.Parameter]
    loss: Loss
    optimizer: optim.Optimizer | optim.SharedOut
    dataset: data.Dataset
    evaluation: Sequence[RaggedBatch] | None
    steps: int
    lock: lock.Lock
    notices: Sequence[str]
    plan: planned.Plan
    room: int
    """Bytes that the run may take."""
    processes: Processes = ALONE
    rounded: Sequence[EightBitProducts] = ()
    """The matrices whose products are rounded."""
    tasks: Tasks | None = None
    """Of an objective that balances several."""

    def feed(self, start: int) -> Iterator[list[int]]:
        """The rows of the training batches, pass after pass, from the `start`-th on."""
        return self.dataset.portions(self.config.training.batch_rows, start=start)

    def batch(self, rows: list[int]) -> RaggedBatch:
        """A training batch."""
        return self.dataset.batch(rows).to(self.device)

    def worst(self, parts: int) -> RaggedBatch:
        """The largest of the parts of the batch that needs most memory."""
        return max(self.batch(list(self.plan.shape.rows)).cut(parts), key=lambda part: part.tokens.numel())

    def spare(self, rows: list[int], parts: int) -> RaggedBatch | None:
        """A part of the first of the rows, for a process that has nothing of its own where all have to go along."""
        return self.batch(rows[:1]).cut(parts)[0] if self.processes.sharded else None

    def save_adapter(self, folder: Path | None) -> None:
        """Writes the trained weights in the format that chat, serve and merge take."""
        adapters.save(self.loaded.model, ADAPTER, folder, self.loaded.fingerprint, self.config.model.source)

    def learn_sparse_tokens(self, run: RunDirectory, done: int) -> list[str]:
        """Before the first step after `done`; what people should know."""
        rows = itertools.islice(self.feed(0), sparse_tokens.BATCHES)
        parts = (part for portion in rows for part in self.batch(portion).cut(self.plan.way.parts))
        path = run.sparse_tokens
        return sparse_tokens.prepare(self.loaded.model, parts, path, write=self.processes.first, done=done)

    def tensors(self) -> dict[str, Iterable[torch.Tensor]]:
        """What lives as long as the session, by the planner's categories."""
        trained = list(self.parameters.values())
        mine = {id(parameter) for parameter in trained}
        state = list(self.optimizer.state().values())
        on_disk = [tensor for tensor in state if self.plan.way.state_on_disk and offload.lies_on_disk(tensor)]
        elsewhere = {id(tensor) for tensor in on_disk}
        held = [*self.loaded.model.parameters(), *self.loaded.model.buffers()]
        return {
            "base weights": [tensor for tensor in held if id(tensor) not in mine],
            "adapter": [local(parameter) for parameter in trained],
            "optimizer": [tensor for tensor in state if id(tensor) not in elsewhere],
            memory.ELSEWHERE: on_disk,
        }

    def examples(self) -> list[samples.Example]:
        """Prompts for the report, held-out ones where there are any."""
        count = 0 if self.processes.sharded else self.config.output.samples  # no process has a model to ask
        rows = (self.dataset.batch([row]) for row in range(len(self.dataset)))
        return samples.examples(self.evaluation or rows, self.loaded.tokenizer, count) if count else []

    def seconds_left(self, step: int) -> float | None:
        """An estimate for the steps after `step`, by the plan; None on a GPU."""
        if self.plan.seconds_per_step is None:
            return None
        training, rows = self.config.training, self.dataset.rows
        batches = training.batch_rows * training.gradient_accumulation_steps
        tokens = rows.tokens / len(rows) * batches * (self.steps - step)
        return tokens * self.plan.seconds_per_step / self.plan.tokens_per_step

    def summary(self) -> str:
        """One line for people."""
        trained = sum(parameter.numel() for parameter in self.parameters.values())
        return (
            f"{Path(self.loaded.name).name}, {self.config.method.name}, {trained:,} trained parameters, "
            f"{self.steps:,} steps, {self.dataset.statistics['trained_tokens']:,} trained tokens in the data"
        )


def build(config: RunConfig, while_reading: Callable[[int], None], processes: Processes = ALONE) -> Session:
    """Loads the model, prepares the data, attaches the adapter. Writes nothing but the data's cache.

    `while_reading` is called with the number of rows read so far, and may raise.
    """
    training, held_out = config.training, config.evaluation
    torch.set_num_threads(training.threads or threads_of_environment())
    _core.set_threads(torch.get_num_threads())
    device = device_of(config.model.device)
    if training.offload not in ("auto", "none") and (device.type != "cpu" or processes.sharded):
        raise InputError(
            f"training.offload: expected auto or none on a GPU or where weights are shared out, got {training.offload}",
            "it goes to disk in a process with all weights, on a CPU; training.shard=false makes it one",
        )
    started_bytes = planned.started_bytes()
    loaded = base_of(config, device)
    objective = plugins.load("objectives", config.objective.name)
    read = functools.partial(
        data.prepare,
        tokenizer=loaded.tokenizer,
        template=loaded.template,
        seed=training.seed,
        pairs=objective.PAIRS,
        labelled=getattr(objective, "LABELLED", False),
        together=getattr(objective, "TOGETHER", 1),
        explained=getattr(objective, "EXPLAINED", False),
        tasks=getattr(objective, "TASKS", False),
        share=objective.PAIRS and not getattr(objective, "LABELLED", False),
        progress=while_reading,
    )
    dataset, evaluation = processes.one_after_the_first(lambda: read(config.data, split=held_out.split))
    notices = _notices(dataset, "data")
    if held_out.path is not None:
        elsewhere = dataclasses.replace(config.data, path=held_out.path)
        evaluation, _ = processes.one_after_the_first(lambda: read(elsewhere))
        evaluation = evaluation.with_tasks(dataset.tasks) if dataset.tasks else evaluation
        notices += _notices(evaluation, "evaluation")
    rows_a_step = training.batch_rows * training.gradient_accumulation_steps
    steps = training.max_steps or max(1, math.ceil(training.epochs * len(dataset) / rows_a_step))
    adapters.attach(loaded.model, config.method.name, config.method.options, training.seed, ADAPTER)
    notices += adapters.notices(loaded.model, ADAPTER)
    rounded = rounding.attach(config, loaded.model)
    sparse_tokens.attach(config, loaded.model)
    if objective.PAIRS:
        notices += _notices_of_preferences(config, dataset)
    case = planned.Case(
        config=config,
        architecture=loaded.config,
        steps=_worst_steps(config, dataset, steps, processes),
        evaluated=_evaluated(config, evaluation),
        mapped_bytes=_mapped_bytes(loaded),
        formats=models.formats(loaded.path, config.model.quant),
        started_bytes=started_bytes,
    )
    room = min(processes.exchange(memory.room(training.budget, device)))
    if device.type == "cpu":
        room //= processes.size  # they share the machine's memory
    plan = fitting.fastest(case, room)
    if device.type == "cpu" and training.precision == "dtype":
        notices += filter(None, [advice(speeds(), config.model.dtype)])
    if plan.way.streamed:
        stream(linear.weight for linear in loaded.model.linears().values())
    if (
        plan.way.parts > 1
        or plan.way.streamed
        or plan.way.state_on_disk
        or plan.way.activations_on_disk
        or (plan.way.recomputed and training.activation_checkpointing == "auto")
    ):
        notices.append(f"memory: {fitting.described(plan.way)}, to stay within {written(room)}")
    recompute(loaded.model, plan)
    loaded.model.train()
    if processes.sharded:
        sharding.shard(loaded.model, ADAPTER, sharding.everybody(device, processes.size))
        notices.append(f"{processes.size} processes share out all weights; the report has no answers of the model")
    parameters = adapters.trainable(loaded.model, ADAPTER)
    options = {"config": objective.Config(**config.objective.options)} if hasattr(objective, "Config") else {}
    batches = None
    if evaluation is not None:
        batches = [batch.to(device) for batch in evaluation.batches(training.batch_rows, passes=1)]
    balanced = None
    if dataset.tasks:
        options |= {"names": dataset.tasks}
        balanced = Tasks(config, objective, dataset.tasks, batches, processes)
        batches = balanced.held_out
    loss = functools.partial(objective.loss, loaded.model, **options)
    many = {"processes": processes.size}
    made_of = {
        "base": loaded.fingerprint,
        "data": dataset.fingerprint,
        "evaluation": None if evaluation is None else evaluation.fingerprint,
    }
    return Session(
        config=config,
        loaded=loaded,
        device=device,
        parameters=parameters,
        loss=sharding.settled(loss, loaded.model) if processes.sharded else loss,
        optimizer=optim.build(config.optimizer, parameters, place_of(plan)),
        dataset=dataset,
        evaluation=batches,
        steps=steps,
        lock={"inputs": made_of, "surroundings": lock.surroundings(str(device)) | many | {"steps": steps}},
        notices=notices,
        processes=processes,
        rounded=rounded,
        tasks=balanced,
        plan=plan,
        room=room,
    )


def place_of(plan: planned.Plan) -> optim.Place | None:
    """Where the optimizer's state lies, if not in memory."""
    return offload.Shelf(_scratch()) if plan.way.state_on_disk else None


def recompute(model: Decoder, plan: planned.Plan) -> None:
    """Has the model recompute layers as planned, and keep their inputs where the plan says."""
    model.recomputed_layers = plan.way.recomputed
    if plan.way.activations_on_disk:
        model.input_hooks = offload.ActivationFile(_scratch()).hooks


def _scratch() -> Path:
    return cache_directory() / "scratch"


def _worst_steps(config: RunConfig, dataset: data.Dataset, steps: int, processes: Processes) -> list[planned.Step]:
    """The run's largest first batches of a step, each beside one of the largest that come later in a step."""
    size, accumulated = config.training.batch_rows, config.training.gradient_accumulation_steps
    count, a_pass = steps * accumulated, -(-len(dataset) // size)
    alike = size == accumulated == 1  # the same batches in every pass
    orders = (dataset.rows.order(config.training.seed, number) for number in range(1 if alike else -(-count // a_pass)))
    cut = [tuple(order[start : start + size]) for order in orders for start in range(0, len(order), size)][:count]
    first, later = set(cut[::accumulated]), {rows for place, rows in enumerate(cut) if place % accumulated}
    if processes.size > 1:
        first = later = set(cut)  # either may be a process' first
    if config.training.sparse_tokens < 1:
        shape = planned.Shape(**sparse_shapes.largest(config.training.sparse_tokens, dataset, dict.fromkeys(cut)))
        return [(shape,) * min(accumulated, 2)]
    fronts = [_largest(dataset, batches) for batches in (first, later) if batches]
    longest = max(map(len, fronts))
    return list(zip(*(front + front[-1:] * (longest - len(front)) for front in fronts), strict=True))


def _largest(dataset: data.Dataset, batches: Iterable[tuple[int, ...]]) -> list[planned.Shape]:
    """Of batches, by their rows, those that may need most: none has more tokens and more trained ones."""
    found = [
        planned.Shape(
            lengths=tuple(dataset.rows.lengths(list(rows))),
            groups=(),
            shared=tuple(dataset.rows.shared(list(rows))),
            trained=dataset.rows.trained(list(rows)),
            rows=rows,
        )
        for rows in batches
    ]
    found.sort(key=lambda shape: (-shape.tokens, -shape.trained, shape.rows))
    front: list[planned.Shape] = []
    for shape in found:
        if not front or shape.trained > front[-1].trained:
            front.append(shape)
    if len(front) > _TRACED:
        front = [dataclasses.replace(front[0], trained=front[-1].trained)]  # from above
    return [dataclasses.replace(shape, groups=dataset.batch(list(shape.rows)).groups) for shape in front]


def _evaluated(config: RunConfig, evaluation: data.Dataset | None) -> planned.Shape | None:
    """The largest batch of an evaluation, from above."""
    if evaluation is None:
        return None
    size = config.training.batch_rows
    rows = evaluation.rows.order(evaluation.seed, 0)
    largest = _largest(evaluation, [tuple(rows[start : start + size]) for start in range(0, len(rows), size)])
    return dataclasses.replace(largest[0], trained=largest[-1].trained)


def _mapped_bytes(loaded: models.LoadedModel) -> int:
    """The model's file, which stays mapped where it is GGUF."""
    return loaded.path.stat().st_size if loaded.path.is_file() else 0


def base_of(config: RunConfig, device: torch.device) -> models.LoadedModel:
    """The base model. Raises InputError for a run, whose adapter would silently be left out."""
    source = models.resolve(config.model.source, config.output.runs_dir)
    if source.adapter is not None:
        raise InputError(
            f"model.source: expected a base model to train, got the run {config.model.source!r} with its adapter",
            f"merge it first: ftkit merge {config.model.source} --out DIR",
        )
    dtype: torch.dtype = getattr(torch, config.model.dtype)
    return models.load(source, dtype=dtype, device=device, quant=config.model.quant)


_COUNTS = {
    "bad_rows": "rows could not be read and were skipped",
    "truncated_rows": "rows were longer than data.max_tokens and lost what is beyond (data.long_rows = split keeps it)",
    "split_rows": "rows were longer than data.max_tokens and were split",
    "masked_rows": "rows have nothing to train on",
    "duplicate_rows": "rows are there more than once",
}


def _notices(dataset: data.Dataset, what: str) -> list[str]:
    """What people should know of the data."""
    counts = dataset.statistics
    found = [
        f"{what}: {counts[name]:,} of {counts['rows']:,} {text}" for name, text in _COUNTS.items() if counts.get(name)
    ]
    return [*found, *dataset.problems]


_MOST_LONGER = 1.2
_MOST_FULL_RATE = 1e-5


def _notices_of_preferences(config: RunConfig, dataset: data.Dataset) -> list[str]:
    """How preferences may teach something else than what is meant."""
    counts, rate, found = dataset.statistics, config.optimizer.options["learning_rate"], []
    chosen, rejected = counts["chosen_tokens"], counts["rejected_tokens"]
    if rejected and chosen / rejected > _MOST_LONGER:
        found.append(
            f"data: chosen answers are {chosen / rejected:.2f} times as long as rejected ones, so the model may learn "
            "to write at length; the objective lc_dpo takes length out"
        )
    if config.method.name == "full" and rate > _MOST_FULL_RATE:
        found.append(
            f"optimizer.learning_rate: {rate:g} is much for preferences with all weights trained; 1e-6 is usual, and "
            f"above {_MOST_FULL_RATE:g} models tend to fall apart"
        )
    return found


def threads_of_environment() -> int:
    """The threads that the environment asks for, or else the processors that this process may use."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdigit() and int(given) > 0:
        return int(given)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_of(name: str) -> torch.device:
    """The device that the configuration names. Raises InputError for one that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"model.device: expected auto, cpu or cuda, got {name!r}") from None
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
        raise InputError(f"model.device: expected a device that this machine has, got {name!r}", "auto finds one")
    return device
