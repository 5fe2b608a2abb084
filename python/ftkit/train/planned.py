"""What a run will need, before a byte of its model is loaded: an optimizer step of the real code on fake tensors.

The whole model is traced, layer after layer. A line through models of three and four layers mostly gives the same peak,
but says too little where the peak moves (gradients and optimizer grow with each layer, the head's losses do not: 4 % in
a case of 30 layers), and an allocator's replay needs every event. For a GPU the operations are its kernels
or the references, and the trace is replayed by the rules of torch's allocator there.
"""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ftkit import adapters, models, optim, plugins
from ftkit.config import RunConfig
from ftkit.kernels import _gpu
from ftkit.nn.batch import UNTRAINED, RaggedBatch
from ftkit.nn.decoder import DecoderConfig
from ftkit.plan.budget import Gpu
from ftkit.plan.recorder import Recorder
from ftkit.plan.speed import matmul_flops_per_second
from ftkit.train.step import each_gradient

OTHER_RESIDENT_BYTES = 1152 << 20
"""Resident memory beside tensors, from above: Python, torch's libraries and their scratch space."""

RETAINED_SHARE = 0.25
"""Freed tensor memory that the allocator keeps, as a share of the peak, from above.

Measured with torch 2.15 on x86-64, runs of SmolLM2-135M: process and tensors differ by 0.75 to 1.35 GiB."""

CONTEXT_BYTES = 600 << 20
"""What a process takes of a GPU beside tensors, from above: the driver's context, kernels, cuBLAS' workspace."""

MATMUL_SHARE = 0.5
"""The share of the machine's matmul speed that a training step reaches; the rest is attention, losses, small things."""

_ADAPTER = 0


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What decides the memory of a step's batches."""

    lengths: tuple[int, ...]
    """The sequences' lengths in a batch, in tokens."""
    trained: int
    """Targets that are trained on in it."""
    accumulated: int = 1
    """Batches of an optimizer step."""
    rows: tuple[int, ...] = ()
    """The rows of the dataset that it has; empty for a batch that is made up."""

    @classmethod
    def largest(cls, config: RunConfig) -> "Shape":
        """Full rows, each one sequence, pair or group, all trained: nothing that is allowed needs more."""
        training = config.training
        objective = plugins.load("objectives", config.objective.name)
        sequences = getattr(objective, "TOGETHER", 2 if objective.PAIRS else 1)
        lengths = (config.data.max_tokens,) * (training.batch_rows * sequences)
        return cls(lengths=lengths, trained=sum(lengths), accumulated=training.gradient_accumulation_steps)


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
    shape: Shape
    """The batch that needs it."""
    reserved_bytes: int | None = None
    """What torch's allocator takes of a GPU for it; None on the CPU."""

    @property
    def seconds_per_step(self) -> float | None:
        """An estimate for this machine, from how fast it multiplies matrices now; None for a GPU."""
        return None if self.reserved_bytes is not None else self.flops / matmul_flops_per_second() / MATMUL_SHARE

    @property
    def peak_rss_bytes(self) -> int:
        """The process' resident memory, from above."""
        return int(self.peak_bytes * (1 + RETAINED_SHARE)) + self.mapped_bytes + OTHER_RESIDENT_BYTES

    @property
    def batch_bytes(self) -> int:
        """What comes and goes with each batch."""
        return sum(self.by_category.get(name, 0) for name in ("activations", "gradients"))

    @property
    def needed_bytes(self) -> int:
        """What must be free: on the GPU, or for the process."""
        return self.peak_rss_bytes if self.reserved_bytes is None else self.reserved_bytes + CONTEXT_BYTES


def plan(
    config: RunConfig,
    architecture: DecoderConfig,
    shapes: Sequence[Shape],
    mapped_bytes: int = 0,
    formats: Mapping[str, str] | None = None,
    gpu: Gpu | None = None,
) -> Plan:
    """The peak of a training step of `config` on a model of `architecture`, exactly as the real one would count it.

    `shapes`: of the batches among which the worst is. `formats`: the block formats of matrices that are held quantized,
    by name. Those that stay in their file are part of `mapped_bytes`, and no tensors of the plan. `gpu`: one that it
    would run on, which need not be here.
    """
    plans = []
    for shape in shapes:
        recorder = _trace(config, architecture, shape, formats or {}, gpu)
        peak = recorder.peak()
        found = Plan(
            peak_bytes=peak.bytes,
            by_category=peak.by_category,
            mapped_bytes=mapped_bytes,
            shape=shape,
            flops=recorder.flops // min(shape.accumulated, 2) * shape.accumulated,
            reserved_bytes=None if gpu is None else recorder.reserved(gpu),
        )
        plans.append(found)
    return max(plans, key=lambda plan: plan.needed_bytes)


def of_configuration(config: RunConfig, gpu: Gpu | None = None, architecture: DecoderConfig | None = None) -> Plan:
    """The plan of a run whose data has not been read: the largest batch that the configuration allows.

    `architecture`: of a model that is not here, instead of the configuration's.
    """
    shapes = [Shape.largest(config)]
    if architecture is not None:
        return plan(config, architecture, shapes, 0, models.formats_of(architecture, config.model.quant), gpu)
    source = models.resolve(config.model.source, config.output.runs_dir)
    size = source.path.stat().st_size if source.path.is_file() else 0
    formats = models.formats(source, config.model.quant)
    return plan(config, models.config_of(source), shapes, size, formats, gpu)


@dataclass(frozen=True, kw_only=True)
class Option:
    """Settings that give the same update, and what they need."""

    settings: dict[str, object]
    """What differs from the configuration, by key."""
    plan: Plan


def options(config: RunConfig, gpu: Gpu | None = None, architecture: DecoderConfig | None = None) -> list[Option]:
    """The configuration as it is, then ways to the same update in less memory, the fastest first."""
    training = config.training
    ways: list[dict[str, object]] = [{}]
    freed: dict[str, object] = {"training.optimizer_in_backward": True}
    may_free = not training.max_gradient_norm and training.gradient_accumulation_steps == 1
    if may_free and not training.optimizer_in_backward:
        ways.append(freed)
    if not training.activation_checkpointing:
        ways += [way | {"training.activation_checkpointing": True} for way in ways]
    if training.batch_rows > 1 and not training.optimizer_in_backward:
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
        found.append(Option(settings=way, plan=of_configuration(changed, gpu, architecture)))
    return found


def _trace(
    config: RunConfig,
    architecture: DecoderConfig,
    shape: Shape,
    formats: Mapping[str, str],
    gpu: Gpu | None,
) -> Recorder:
    """What an optimizer step and an evaluation allocate and free."""
    recorder, training = Recorder(), config.training
    dtype: torch.dtype = getattr(torch, config.model.dtype)
    objective = plugins.load("objectives", config.objective.name)
    options = {"config": objective.Config(**config.objective.options)} if hasattr(objective, "Config") else {}
    with FakeTensorMode(), _gpu.foreseen() if gpu is not None else contextlib.nullcontext():
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
        state = optimizer.state()  # held as a run holds it, its counter of steps included
        recorder.adopt(state.values(), "optimizer")
        batches = [_batch(shape) for _ in range(min(shape.accumulated, 2))]

        def update(name: str, gradient: torch.Tensor) -> None:
            recorder.adopt([gradient], "gradients")
            with recorder.category("optimizer"):
                torch.linalg.vector_norm(gradient.div_(2.0), dtype=torch.float32)
                optimizer.update(name, 1.0)

        with recorder:
            if training.optimizer_in_backward:
                with recorder.category("activations"):
                    parts = objective.loss(model, batches[0], **options)
                    summed = parts.sum.sum()
                    del parts
                    optimizer.begin()
                    with each_gradient(parameters, update):
                        summed.backward()
                    del summed
            else:
                for batch in batches:  # as in `step.gradients`, whose numbers cannot be read here
                    with recorder.category("activations"):
                        parts = objective.loss(model, batch, **options)
                        parts.sum.sum().backward()
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
            flops = recorder.flops
            if config.evaluation.enabled:
                with torch.no_grad(), recorder.category("activations"):
                    objective.loss(model.eval(), _batch(shape), **options)
            recorder.flops = flops
        return recorder


def _batch(shape: Shape) -> RaggedBatch:
    """A batch of this shape; which of its tokens are trained on changes nothing."""
    flat = iter([0] * shape.trained + [UNTRAINED] * (sum(shape.lengths) - shape.trained))
    sequences = [[0] * length for length in shape.lengths]
    targets = [[next(flat) for _ in sequence] for sequence in sequences]
    return RaggedBatch.pack(sequences, targets=targets, adapter=_ADAPTER, group=[0] * len(sequences))
