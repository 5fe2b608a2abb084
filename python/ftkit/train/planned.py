"""What a run will need, before a byte of its model is loaded: two optimizer steps of the real code on fake tensors.

The model's layers repeat, so two traces of few layers give the peak of any depth: what a further layer adds is the
difference between the second and the third.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ftkit import adapters, models, optim, plugins
from ftkit.config import RunConfig
from ftkit.nn.batch import UNTRAINED, RaggedBatch
from ftkit.nn.decoder import DecoderConfig
from ftkit.plan.recorder import Recorder
from ftkit.plan.speed import matmul_flops_per_second

OTHER_RESIDENT_BYTES = 1 << 30
"""Resident memory beside tensors, from above: Python, torch's libraries and their scratch space."""

RETAINED_SHARE = 0.25
"""Freed tensor memory that the allocator keeps, as a share of the peak, from above.

Measured with torch 2.15 on x86-64, runs of SmolLM2-135M: process and tensors differ by 0.75 to 1.35 GiB."""

MATMUL_SHARE = 0.5
"""The share of the machine's matmul speed that a training step reaches; the rest is attention, losses, small things."""

_ADAPTER = 0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The memory that a run's steps take."""

    peak_bytes: int
    """Tensor storage at the worst moment of a step."""
    by_category: dict[str, int]
    """What it is made of."""
    mapped_bytes: int
    """The model's file, as far as it stays mapped into memory."""
    flops: int
    """Floating-point operations of an optimizer step's matrix products."""

    @property
    def seconds_per_step(self) -> float:
        """An estimate for this machine, from how fast it multiplies matrices now."""
        return self.flops / matmul_flops_per_second() / MATMUL_SHARE

    @property
    def peak_rss_bytes(self) -> int:
        """The process' resident memory, from above."""
        return int(self.peak_bytes * (1 + RETAINED_SHARE)) + self.mapped_bytes + OTHER_RESIDENT_BYTES


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What decides the memory of a step's batches."""

    lengths: tuple[int, ...]
    """The sequences' lengths in the largest batch, in tokens."""
    trained: int
    """The most targets that are trained on in a batch."""
    accumulated: int = 1
    """Batches of an optimizer step."""

    @classmethod
    def largest(cls, config: RunConfig) -> "Shape":
        """Full rows, each one sequence, pair or group, all trained: nothing that is allowed needs more."""
        training = config.training
        objective = plugins.load("objectives", config.objective.name)
        sequences = getattr(objective, "TOGETHER", 2 if objective.PAIRS else 1)
        lengths = (config.data.max_tokens,) * (training.batch_rows * sequences)
        return cls(lengths=lengths, trained=sum(lengths), accumulated=training.gradient_accumulation_steps)


def plan(
    config: RunConfig,
    architecture: DecoderConfig,
    shape: Shape,
    mapped_bytes: int = 0,
    formats: Mapping[str, str] | None = None,
) -> Plan:
    """The peak of a training step of `config` on a model of `architecture`, exactly as the real one would count it.

    `formats`: the block formats of matrices that are held quantized, by name. Those that stay in their file are part of
    `mapped_bytes`, and no tensors of the plan.
    """
    formats = formats or {}
    if architecture.layers <= 4:
        found, flops = _trace(config, architecture, shape, formats)
    else:
        (few, few_flops), (more, more_flops) = (
            _trace(config, _with_layers(architecture, layers), shape, formats) for layers in (3, 4)
        )
        further = architecture.layers - 3
        found = {name: few.get(name, 0) + further * (more[name] - few.get(name, 0)) for name in more}
        flops = few_flops + further * (more_flops - few_flops)
    return Plan(peak_bytes=sum(found.values()), by_category=found, mapped_bytes=mapped_bytes, flops=flops)


def of_configuration(config: RunConfig) -> Plan:
    """The plan of a run whose data has not been read: the largest batch that the configuration allows."""
    source = models.resolve(config.model.source, config.output.runs_dir)
    size = source.path.stat().st_size if source.path.is_file() else 0
    formats = models.formats(source, config.model.quant)
    return plan(config, models.config_of(source), Shape.largest(config), size, formats)


@dataclass(frozen=True, kw_only=True)
class Option:
    """Settings that give the same update, and what they need."""

    settings: dict[str, object]
    """What differs from the configuration, by key."""
    plan: Plan


def options(config: RunConfig) -> list[Option]:
    """The configuration as it is, then ways to the same update in less memory, the fastest first."""
    training = config.training
    ways: list[dict[str, object]] = [{}]
    if not training.activation_checkpointing:
        ways.append({"training.activation_checkpointing": True})
    if training.batch_rows > 1:
        alone: dict[str, object] = {
            "training.batch_rows": 1,
            "training.gradient_accumulation_steps": training.batch_rows * training.gradient_accumulation_steps,
        }
        ways.insert(1, alone)
        if not training.activation_checkpointing:
            ways.append(alone | {"training.activation_checkpointing": True})
    found = []
    for way in ways:
        changes = {key.removeprefix("training."): value for key, value in way.items()}
        changed = dataclasses.replace(config, training=dataclasses.replace(training, **changes))  # type: ignore[arg-type]
        found.append(Option(settings=way, plan=of_configuration(changed)))
    return found


def _with_layers(architecture: DecoderConfig, layers: int) -> DecoderConfig:
    return dataclasses.replace(architecture, layers=layers, windows=architecture.windows[:layers])


def _trace(
    config: RunConfig, architecture: DecoderConfig, shape: Shape, formats: Mapping[str, str]
) -> tuple[dict[str, int], int]:
    """Bytes by category at the peak of two optimizer steps (in the first there is no state yet), and a step's FLOPs."""
    recorder, training = Recorder(), config.training
    dtype: torch.dtype = getattr(torch, config.model.dtype)
    objective = plugins.load("objectives", config.objective.name)
    options = {"config": objective.Config(**config.objective.options)} if hasattr(objective, "Config") else {}
    with FakeTensorMode():
        model = models.build(architecture, dtype, quant=config.model.quant, formats=formats)
        adapters.attach(model, config.method.name, config.method.options, training.seed, _ADAPTER)
        model.activation_checkpointing = training.activation_checkpointing
        model.train()
        parameters = adapters.trainable(model, _ADAPTER)
        optimizer = optim.build(config.optimizer, parameters)
        mine = {id(parameter) for parameter in parameters.values()}
        held = [*model.parameters(), *model.buffers()]
        recorder.adopt([tensor for tensor in held if id(tensor) not in mine], "base weights")
        recorder.adopt(parameters.values(), "adapter")
        recorder.adopt(optimizer.state().values(), "optimizer")
        batches = [_batch(shape) for _ in range(min(shape.accumulated, 2))]
        with recorder:
            for _ in range(2):
                for batch in batches:
                    with recorder.category("activations"):
                        loss = objective.loss(model, batch, **options).sum.sum()
                        loss.backward()
                        del loss
                    recorder.adopt((parameter.grad for parameter in parameters.values()), "gradients")
                gradients = [parameter.grad for parameter in parameters.values() if parameter.grad is not None]
                with recorder.category("optimizer"):
                    torch._foreach_div_(gradients, 2.0)
                    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
                    torch.linalg.vector_norm(torch.stack(norms))
                    optimizer.step(1.0)
                del gradients
                for parameter in parameters.values():
                    parameter.grad = None
        flops = recorder.flops // (2 * len(batches)) * shape.accumulated
        return recorder.peak().by_category, flops


def _batch(shape: Shape) -> RaggedBatch:
    """A batch of this shape; which of its tokens are trained on changes nothing."""
    flat = iter([0] * shape.trained + [UNTRAINED] * (sum(shape.lengths) - shape.trained))
    sequences = [[0] * length for length in shape.lengths]
    targets = [[next(flat) for _ in sequence] for sequence in sequences]
    return RaggedBatch.pack(sequences, targets=targets, adapter=_ADAPTER, group=[0] * len(sequences))
