"""Holds a plan against one real step: what docs/memory.md assumes, measured on this machine.

The weights are the model's, the tokens are made up: as many as the largest batch that the configuration allows.
"""

import dataclasses
import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ftkit import adapters, optim, plugins
from ftkit.config import RunConfig
from ftkit.plan.budget import Gpu
from ftkit.quant.gguf import stream
from ftkit.train import fitting, heap, memory, offload, planned, session, sparse_tokens
from ftkit.train.planned import Case, Plan
from ftkit.train.step import clear, gradients, means, step_in_backward


@dataclass(frozen=True, kw_only=True)
class Check:
    """One assumption."""

    name: str
    planned: float
    measured: float
    bound: bool
    """Whether what is measured must not exceed what is planned."""
    unit: str
    """`bytes` or `seconds`."""

    @property
    def holds(self) -> bool:
        """Whether the plan was right."""
        return not self.bound or self.measured <= self.planned


def verify(config: RunConfig) -> tuple[Plan, list[Check]]:
    """The plan that a run would have on its device, and what two of its steps and an evaluation really take.

    Raises InputError for a run that does not fit, and as `models.load` does.
    """
    heap.settle()  # as a run does
    device = session.device_of(config.model.device)
    gpu = Gpu.of(torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else None
    case = Case.of_configuration(config, gpu)
    case = dataclasses.replace(case, evaluated=case.evaluated or case.steps[0][0])
    plan = fitting.fastest(case, memory.room(config.training.budget, device))
    objective = plugins.load("objectives", config.objective.name)
    options = {"config": objective.Config(**config.objective.options)} if hasattr(objective, "Config") else {}
    model = session.base_of(config, device).model
    adapters.attach(model, config.method.name, config.method.options, config.training.seed, session.ADAPTER)
    sparse_tokens.attach(config, model)
    session.recompute(model, plan)
    if plan.way.streamed:
        stream(linear.weight for linear in model.linears().values())
    parameters = adapters.trainable(model, session.ADAPTER)
    optimizer = optim.build(config.optimizer, parameters, session.place_of(plan))
    batch = planned.batch_of(case.steps[0][0], hasattr(objective, "balanced")).to(device)
    batches = [part for _ in range(config.training.gradient_accumulation_steps) for part in batch.cut(plan.way.parts)]
    seconds: list[float] = []

    def work() -> None:
        model.train()
        for _ in range(2):
            start = time.perf_counter()
            if config.training.optimizer_in_backward:
                step_in_backward(lambda b: objective.loss(model, b, **options), parameters, batch, optimizer, 1.0)
            else:
                clip = config.training.max_gradient_norm
                gradients(lambda b: objective.loss(model, b, **options), parameters, batches, clip)
                optimizer.step(1.0)
            clear(parameters)
            seconds.append(time.perf_counter() - start)
        model.eval()
        means(lambda b: objective.loss(model, b, **options), batch.cut(plan.way.parts))

    trained = {id(parameter) for parameter in parameters.values()}
    state = optimizer.state().values()
    on_disk = {id(tensor) for tensor in state if plan.way.state_on_disk and offload.lies_on_disk(tensor)}
    held: dict[str, Iterable[torch.Tensor]] = {
        "base weights": [t for t in (*model.parameters(), *model.buffers()) if id(t) not in trained],
        "adapter": parameters.values(),
        "optimizer": [tensor for tensor in state if id(tensor) not in on_disk],
        memory.ELSEWHERE: [tensor for tensor in state if id(tensor) in on_disk],
    }
    _, peak = memory.peak_bytes_of(work, held, device)
    return plan, [*_bytes(plan, peak, device), *_times(plan, seconds[-1])]


def _bytes(plan: Plan, peak: int, device: torch.device) -> list[Check]:
    def check(name: str, expected: int, measured: int) -> Check:
        return Check(name=name, planned=expected, measured=measured, bound=True, unit="bytes")

    tensors = check("tensors at the peak", plan.peak_bytes, peak)
    if plan.reserved_bytes is None:
        return [tensors, check("the process", plan.peak_rss_bytes, memory.peak_rss_bytes())]
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.max_memory_reserved(device)
    context = total - free - torch.cuda.memory_reserved(device)  # other processes' included
    return [
        tensors,
        check("reserved by torch's allocator", plan.reserved_bytes, reserved),
        check("context and workspaces", planned.CONTEXT_BYTES, context),
    ]


def _times(plan: Plan, seconds: float) -> list[Check]:
    if plan.seconds_per_step is None:
        return []
    return [Check(name="a step", planned=plan.seconds_per_step, measured=seconds, bound=False, unit="seconds")]
