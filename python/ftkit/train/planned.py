"""What a run will need, before a byte of its model is loaded: an optimizer step of the real code on fake tensors.

The whole model is traced, layer after layer. A line through models of three and four layers mostly gives the same peak,
but says too little where the peak moves (gradients and optimizer grow with each layer, the head's losses do not: 4 % in
a case of 30 layers), and an allocator's replay needs every event. For a GPU the operations are its kernels
or torch's own, and the trace is replayed by the rules of torch's allocator there.
"""

import contextlib
import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ftkit import _core, adapters, models, optim, plugins
from ftkit.config import RunConfig
from ftkit.kernels import _gpu
from ftkit.nn.batch import UNTRAINED, RaggedBatch, cuts
from ftkit.nn.decoder import DecoderConfig, shapes
from ftkit.nn.eight_bits import packed_bytes, takes
from ftkit.nn.shards import local
from ftkit.plan.budget import Gpu
from ftkit.plan.recorder import Recorder
from ftkit.plan.speed import Work, speeds
from ftkit.train import memory, rounding, sharding, sparse_shapes, sparse_tokens
from ftkit.train.offload import ActivationFile, lies_on_disk
from ftkit.train.step import each_gradient

LATER_BYTES = 344 << 20
"""Resident memory beside tensors that a process takes after its start, from above: the libraries' code as it is
reached, scratch space, what oneDNN keeps for each shape of a product in bfloat16 and never gives back, holes in the
heap. Measured in 26 runs of up to ten batches, with the share below: 38 to 184 MiB, in bfloat16 146 to 403, and once
(recomputed layers over NF4 in float32) 364 to 382, of which the cause is not known."""

SHARING_BYTES = 256 << 20
"""What torch's FSDP2 takes besides: its modules, the compiler's among them. Measured once: 200 MiB beyond the rest."""

RETAINED_SHARE = 0.25
"""Freed tensor memory that the allocator keeps, as a share of the peak, from above."""

CONTEXT_BYTES = 600 << 20
"""What a process takes of a GPU beside tensors, from above: the driver's context, kernels, cuBLAS' workspace."""

_ADAPTER = 0


@dataclass(frozen=True, kw_only=True)
class Way:
    """How an update is computed. The update is the same in every way, but for rounding."""

    recomputed: int = 0
    """Layers, from the first on, whose activations are recomputed in the backward pass."""
    parts: int = 1
    """What a batch is cut into; one goes through the model after the other."""
    streamed: bool = False
    """Whether matrices are read from their file for each product."""
    state_on_disk: bool = False
    """Whether the optimizer's state lies in a file between updates."""
    activations_on_disk: bool = False
    """Whether the inputs of recomputed layers lie in a file until the backward pass."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What decides the memory of a step's batches."""

    lengths: tuple[int, ...]
    """The sequences' lengths in a batch, in tokens."""
    groups: tuple[int, ...]
    """Which of them belong together."""
    trained: int
    """Targets that are trained on in it."""
    shared: tuple[int, ...] = ()
    """As in `RaggedBatch`."""
    kept: tuple[int, ...] = ()
    """Of each sequence, the blocks that sparse layers keep; all of them where it is empty."""
    share: float = 1.0
    """What of a sequence's blocks they keep where trained tokens don't ask for more."""
    rows: tuple[int, ...] = ()
    """The rows of the dataset that it has; empty for a batch that is made up."""

    @classmethod
    def largest(cls, config: RunConfig) -> "Shape":
        """Full rows, each one sequence, pair or group, all trained: nothing that is allowed needs more."""
        training = config.training
        objective = plugins.load("objectives", config.objective.name)
        two = objective.PAIRS or getattr(objective, "EXPLAINED", False)
        together = getattr(objective, "TOGETHER", 2 if two else 1)
        lengths = (config.data.max_tokens,) * (training.batch_rows * together)
        groups = tuple(row for row in range(training.batch_rows) for _ in range(together))
        return cls(lengths=lengths, groups=groups, trained=sum(lengths))

    @property
    def tokens(self) -> int:
        """Of all sequences."""
        return sum(self.lengths)

    def cut(self, parts: int) -> "Shape":
        """The largest part, with all that may be trained in it."""
        ends = cuts(self.lengths, self.groups, parts)
        tokens = {part: sum(self.lengths[slice(*part)]) for part in ends}
        first, last = max(ends, key=lambda part: (sum(self.kept[slice(*part)]), tokens[part]))
        lengths, groups, shared, kept = (of[first:last] for of in (self.lengths, self.groups, self.shared, self.kept))
        lengths = sparse_shapes.longer(lengths, max(tokens.values()))  # another part may keep less of more
        trained = min(self.trained, sum(lengths))
        return dataclasses.replace(self, lengths=lengths, groups=groups, shared=shared, kept=kept, trained=trained)


Step = tuple[Shape, ...]
"""The first batch of an optimizer step, whose gradients come into being, and one that adds to them, if there are more.
"""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The memory that a run's steps take."""

    way: Way
    peak_bytes: int
    """Tensor storage at the worst moment of a step."""
    by_category: dict[str, int]
    """What it is made of."""
    mapped_bytes: int
    """The model's file, as far as it stays mapped into memory, and what is in use of the optimizer's."""
    own_bytes: int
    """What the process has beside its tensors, from above."""
    seconds_per_step: float | None
    """An estimate for an optimizer step of such batches on this machine; None for a GPU."""
    tokens_per_step: int
    """Of such an optimizer step."""
    shape: Shape
    """The largest batch of the step that needs it."""
    reserved_bytes: int | None = None
    """What torch's allocator takes of a GPU for it; None on the CPU."""

    @property
    def peak_rss_bytes(self) -> int:
        """The process' resident memory, from above."""
        return self.peak_bytes + self.mapped_bytes + self.own_bytes

    @property
    def batch_bytes(self) -> int:
        """What comes and goes with each batch, from above: all that a model and its optimizer don't hold."""
        held = sum(self.by_category.get(name, 0) for name in ("base weights", "adapter", "optimizer"))
        return self.peak_bytes - held

    @property
    def needed_bytes(self) -> int:
        """What must be free: on the GPU, or for the process."""
        return self.peak_rss_bytes if self.reserved_bytes is None else self.reserved_bytes + CONTEXT_BYTES


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run whose memory is in question."""

    config: RunConfig
    architecture: DecoderConfig
    steps: Sequence[Step]
    """Among which the worst is."""
    evaluated: Shape | None = None
    """The largest batch of an evaluation."""
    mapped_bytes: int = 0
    formats: Mapping[str, str] = field(default_factory=dict)
    """The block formats of matrices that are held quantized, by name. Those that stay in their file are part of
    `mapped_bytes`, and no tensors of the plan."""
    gpu: Gpu | None = None
    """The GPU that it would run on, which need not be here."""
    started_bytes: int = field(default_factory=lambda: started_bytes())
    """What the process has before its model is loaded, as `started_bytes` measures it."""

    @classmethod
    def of_configuration(
        cls, config: RunConfig, gpu: Gpu | None = None, architecture: DecoderConfig | None = None
    ) -> "Case":
        """A run whose data has not been read: the largest batch that the configuration allows.

        `architecture`: of a model that is not here, instead of the configuration's.
        """
        shape = Shape.largest(config)
        steps = [(shape,) * min(config.training.gradient_accumulation_steps, 2)]
        evaluated = shape if config.evaluation.enabled else None
        if architecture is not None:
            return cls(
                config=config,
                architecture=architecture,
                steps=steps,
                evaluated=evaluated,
                formats=models.formats_of(architecture, config.model.quant),
                gpu=gpu,
            )
        source = models.resolve(config.model.source, config.output.runs_dir)
        return cls(
            config=config,
            architecture=models.config_of(source),
            steps=steps,
            evaluated=evaluated,
            mapped_bytes=source.path.stat().st_size if source.path.is_file() else 0,
            formats=models.formats(source, config.model.quant),
            gpu=gpu,
        )

    def with_few_trained(self) -> "Case":
        """The same where the trained tokens of each sequence fit into what sparse layers keep of it."""
        share = self.config.training.sparse_tokens
        steps = [
            tuple(dataclasses.replace(s, **sparse_shapes.with_few_trained(share, s.lengths)) for s in step)
            for step in self.steps
        ]
        return dataclasses.replace(self, steps=steps)

    def plan(self, way: Way) -> Plan:
        """The peak of a training step, exactly as the real one would count it."""
        plans = []
        for step in dict.fromkeys(self._cut(step, way.parts) for step in self.steps):
            recorder, of_batches, of_step, kept, of_disk = _trace(self, step, way)
            peak = recorder.peak()
            batches = self.config.training.gradient_accumulation_steps * min(way.parts, self.most_parts)
            seconds = None
            if self.gpu is None:
                seconds = speeds().seconds(of_batches) / len(step) * batches + speeds().seconds(of_step)
                on_disk = of_disk.state + of_disk.inputs / len(step) * batches
                seconds += 2 * on_disk / speeds().disk  # read, and written
            peak_bytes = peak.bytes + (batches - len(step)) * kept
            found = Plan(
                way=way,
                peak_bytes=peak_bytes,
                by_category=peak.by_category,
                mapped_bytes=(self._streamed_bytes if way.streamed else self.mapped_bytes)
                + self._packed_bytes
                + of_disk.largest,
                own_bytes=self.started_bytes
                + LATER_BYTES
                + (SHARING_BYTES if sharding.shares(self.config) > 1 else 0)
                + int(RETAINED_SHARE * peak_bytes),
                shape=max(step, key=lambda shape: shape.tokens),
                seconds_per_step=seconds,
                tokens_per_step=sum(shape.tokens for shape in step) * batches // len(step),
                reserved_bytes=None if self.gpu is None else recorder.reserved(self.gpu),
            )
            plans.append(found)
        return max(plans, key=lambda plan: plan.needed_bytes)

    @property
    def can_stream(self) -> bool:
        """Whether matrices are multiplied with where they stand in their file."""
        return self.config.model.quant == "gguf" and self.mapped_bytes > 0

    def can_offload(self, what: Literal["optimizer", "activations"]) -> bool:
        """Whether the optimizer's state, or the inputs of recomputed layers, may lie on disk."""
        asked = self.config.training.offload in ("auto", what)
        return asked and self.gpu is None and sharding.shares(self.config) == 1

    @property
    def _streamed_bytes(self) -> int:
        """Of the largest matrix and the next, in their file."""
        sides = dict(shapes(self.architecture))
        block = {name: nbytes / size for name, size, nbytes in _core.quant_formats()}
        sizes = [int(math.prod(sides[name]) * block[kind]) for name, kind in self.formats.items()]
        return 2 * max(sizes, default=0)

    @property
    def _packed_bytes(self) -> int:
        """Of matrices whose products are rounded: their packed forms, which are the core's and no tensors."""
        if self.config.training.precision != "int8":
            return 0
        layers = [shape for name, shape in shapes(self.architecture) if ".layers." in name and len(shape) == 2]
        return sum(packed_bytes((shape[0], shape[1])) for shape in layers if takes((shape[0], shape[1])))

    @property
    def most_parts(self) -> int:
        """What the batches can be cut into."""
        if self.config.training.optimizer_in_backward:
            return 1
        return max(len(set(shape.groups)) for step in self.steps for shape in step)

    def _cut(self, step: Step, parts: int) -> Step:
        cut = tuple(shape.cut(parts) for shape in step)
        return cut if cut == step or len(cut) > 1 else (*cut, *cut)


def started_bytes() -> int:
    """What this process has now, the modules included that a trace reads: fake tensors' are a fifth of it."""
    with FakeTensorMode(), Recorder():
        torch.ones(2, requires_grad=True).sum().backward()
    return memory.rss_bytes()


@dataclass(frozen=True, kw_only=True)
class _OfDisk:
    """The bytes that lie on disk."""

    state: int
    """Of the optimizer."""
    largest: int
    """Of the state of one parameter, in memory while it is updated."""
    inputs: int
    """Of recomputed layers, over all batches of the trace."""


def _of(state: Mapping[str, torch.Tensor], name: str) -> list[torch.Tensor]:
    """The state of one parameter."""
    return [tensor for key, tensor in state.items() if key.partition("/")[2] == name]


def _trace(case: Case, step: Step, way: Way) -> tuple[Recorder, Work, Work, int, _OfDisk]:
    """What an optimizer step and an evaluation allocate; the work of the step's batches, and its other work; the bytes
    that a batch keeps until the step is done; what is on disk."""
    recorder, config, training = Recorder(), case.config, case.config.training
    dtype: torch.dtype = getattr(torch, config.model.dtype)
    objective = plugins.load("objectives", config.objective.name)
    options = {"config": objective.Config(**config.objective.options)} if hasattr(objective, "Config") else {}
    parts_of = sharding.shares(config)
    with (
        sharding.pretended(parts_of) if parts_of > 1 else contextlib.nullcontext() as mesh,
        FakeTensorMode(),
        _gpu.foreseen() if case.gpu is not None else contextlib.nullcontext(),
    ):
        model = models.build(case.architecture, dtype, quant=config.model.quant, formats=case.formats)
        adapters.attach(model, config.method.name, config.method.options, training.seed, _ADAPTER)
        rounded = rounding.attach(config, model)
        sparse_tokens.attach(config, model)
        model.recomputed_layers = way.recomputed
        inputs = ActivationFile(None)
        if way.activations_on_disk:
            model.input_hooks = inputs.hooks
        model.train()
        parameters = adapters.trainable(model, _ADAPTER)
        if mesh is not None:
            recorder.adopt(parameters.values(), "adapter")  # whole until they are shared out
            with recorder, recorder.category("adapter"):
                sharding.shard(model, _ADAPTER, mesh)
            parameters = adapters.trainable(model, _ADAPTER)
        optimizer = optim.build(config.optimizer, parameters)
        mine = {id(parameter) for parameter in parameters.values()}
        held = [*model.parameters(), *model.buffers()]
        recorder.adopt([tensor for tensor in held if id(tensor) not in mine], "base weights")
        recorder.adopt(map(local, parameters.values()), "adapter")
        state = optimizer.state()  # held as a run holds it, its counter of steps included
        on_disk = {key: tensor for key, tensor in state.items() if way.state_on_disk and lies_on_disk(tensor)}
        recorder.elsewhere(on_disk.values())
        recorder.adopt(state.values(), "optimizer")
        tasks = hasattr(objective, "balanced")
        batches = [batch_of(shape, tasks) for shape in step]
        # the gradients of a step in 8 bits, while it is made exactly
        held_against = [torch.empty_like(parameter) for parameter in parameters.values()] if rounded else []
        recorder.adopt(held_against, "gradients")

        def update(name: str, gradient: torch.Tensor) -> None:
            recorder.adopt([local(gradient)], "gradients")
            with recorder.category("optimizer"):
                torch.linalg.vector_norm(local(gradient).div_(2.0), dtype=torch.float32)
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
                of_batches = recorder.work.copy()
            else:
                for batch in batches:  # as in `step.gradients`, whose numbers cannot be read here
                    with recorder.category("activations"):
                        parts = objective.loss(model, batch, **options)
                        parts.sum.sum().backward()
                    found = [local(one.grad) for one in parameters.values() if one.grad is not None]
                    recorder.adopt(found, "gradients")
                    del found
                of_batches = recorder.work.copy()
                gradients = [local(one.grad) for one in parameters.values() if one.grad is not None]
                with recorder.category("optimizer"):
                    torch._foreach_div_(gradients, 2.0)
                    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
                    torch.linalg.vector_norm(torch.stack(norms))
                    optimizer.step(1.0)
                del gradients
                for parameter in parameters.values():
                    parameter.grad = None
            of_step = recorder.work - of_batches
            if case.evaluated is not None:
                with torch.no_grad(), recorder.category("activations"):
                    objective.loss(model.eval(), batch_of(case.evaluated.cut(way.parts), tasks), **options)
                    if mesh is not None:
                        model.reshard()  # type: ignore[operator]
            if any(shape.kept for shape in step):
                with recorder.category("activations"):
                    sparse_tokens.Learner(model.eval()).read(sparse_shapes.dearest(step[0].tokens), updates=2)
        given = {field.name for field in dataclasses.fields(RaggedBatch)}
        made = [value for name, value in vars(batches[-1]).items() if name not in given]
        kept = sum(value.nbytes for value in made if isinstance(value, torch.Tensor))
        of_disk = _OfDisk(
            state=sum(tensor.nbytes for tensor in on_disk.values()),
            largest=max((sum(t.nbytes for t in _of(on_disk, name)) for name in parameters), default=0),
            inputs=inputs.written_bytes,
        )
        return recorder, of_batches, of_step, kept, of_disk


def batch_of(shape: Shape, tasks: bool) -> RaggedBatch:
    """A batch of this shape; which of its tokens are trained on changes nothing, but for sparse layers."""
    trained: Collection[int] = range(shape.trained)
    if shape.kept:
        trained = set(sparse_shapes.trained_places(shape.lengths, shape.kept, shape.share, shape.trained))
    flat = iter([0 if place in trained else UNTRAINED for place in range(shape.tokens)])
    sequences = [[0] * length for length in shape.lengths]
    targets = [[next(flat) for _ in sequence] for sequence in sequences]
    task = [0] * len(sequences) if tasks else None
    return RaggedBatch.pack(
        sequences, targets=targets, adapter=_ADAPTER, group=shape.groups, task=task, shared=shape.shared
    )
