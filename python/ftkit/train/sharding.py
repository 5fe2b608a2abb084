"""Full finetuning whose weights, gradients and optimizer states several processes share out, by torch's FSDP2.

Each process has some rows of every weight, and of its gradient and state. A layer's weights are gathered for its part
of the forward and of the backward pass, and its gradients are added up and dealt out right after; the embedding, the
last norm and the head are there from the forward pass until the end of the backward pass, since losses use the head
after the model, a chunk of rows at a time. An optimizer step needs no gathering but for matrices that move as a whole
(`optim/_shared_out.py`).

Every gathering is for all processes. So each makes as many passes as the one with most batches; those of a spare batch
count for nothing.

What is frozen isn't shared out: blocks of a mapped file are in the system's memory once for all processes of a machine
as it is, and adapters are small.

Source: Zhao et al., PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel, 2023, arXiv 2304.11277.
"""

import importlib
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed, nn

from ftkit.config import RunConfig
from ftkit.errors import InputError
from ftkit.nn.batch import RaggedBatch
from ftkit.nn.decoder import Decoder
from ftkit.nn.linear import DenseWeight
from ftkit.objectives import LossParts
from ftkit.train.processes import launched

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_NUMBERS = itertools.count()


def shares(config: RunConfig) -> int:
    """Into how many parts a run's weights are shared out, 1 where they are not.

    Raises InputError for one that cannot be.
    """
    full = config.method.name == "full"
    if config.training.shard is True and not full:
        raise InputError(
            f"training.shard: expected the method full, got {config.method.name}",
            "adapters are small, and frozen weights are read from one file",
        )
    return launched() if full and config.training.shard is not False else 1


def shard(model: Decoder, adapter_id: int, mesh: "DeviceMesh") -> None:
    """Leaves this process with its rows of every trained weight. The base model is gone where it is what is trained."""
    from torch.distributed.fsdp import fully_shard

    shared = model.attached[adapter_id].edits_base
    gone: dict[int, DenseWeight] = {}
    for unit in (*model.layers, model):
        if shared:
            _forget(unit, gone)
        frozen = {parameter for parameter in unit.parameters() if not parameter.requires_grad}
        made = fully_shard(unit, mesh=mesh, reshard_after_forward=unit is not model, ignored_params=frozen)
        made.set_gradient_divide_factor(1.0)
        made.set_force_sum_reduction_for_comms(True)  # gloo has no other sum with a factor
        # one process may have nothing that trains an untied head
        made.set_reduce_scatter_unused_params(True, recurse=False)


def _forget(unit: nn.Module, gone: dict[int, DenseWeight]) -> None:
    """Leaves of the base's matrices their shapes; tied ones stay one."""
    for layer in unit.modules():
        weight = getattr(layer, "weight", None)
        if isinstance(weight, DenseWeight) and weight.tensor.device.type != "meta":
            like = torch.empty(weight.shape, dtype=weight.tensor.dtype, device="meta")
            layer.weight = gone.setdefault(id(weight), DenseWeight(like))


def everybody(device: torch.device, size: int) -> "DeviceMesh":
    """All processes of the run."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device.type, (size,))


@contextmanager
def pretended(size: int) -> Iterator["DeviceMesh"]:
    """A group of so many processes of which this is the first and the others are not there, to plan with."""
    from torch.distributed.device_mesh import DeviceMesh

    importlib.import_module("torch.testing._internal.distributed.fake_pg")  # torch knows such groups from then on
    alone = not distributed.is_initialized()
    if alone:
        distributed.init_process_group("fake", rank=0, world_size=size)
    group: Any = distributed.group.WORLD if alone else distributed.new_group(backend="fake")
    try:
        # torch keeps what it knows of a mesh for all that are equal, and this one's group will be gone
        yield DeviceMesh.from_group(group, "cpu", mesh_dim_names=(f"planned {next(_NUMBERS)}",))
    finally:
        distributed.destroy_process_group(None if alone else group)


def settled(loss: Callable[[RaggedBatch], LossParts], model: Decoder) -> Callable[[RaggedBatch], LossParts]:
    """The loss; where no backward pass follows that would do it, the weights are dealt out again."""

    def found(batch: RaggedBatch) -> LossParts:
        parts = loss(batch)
        if not torch.is_grad_enabled():
            model.reshard()  # type: ignore[operator]
        return parts

    return found
