"""Records what a piece of torch code allocates and frees, on real tensors or on fake ones.

Every operation that torch dispatches passes through the recorder, which notes a storage when an operation returns it
for the first time, and again when its last reference goes. On fake tensors (`FakeTensorMode`) the same code leaves
the same trace, byte for byte, without memory behind it.

What an operation allocates and frees inside itself (a kernel's scratch space) is below the dispatcher and not seen.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ftkit import _core
from ftkit.kernels import _training, block_matmul, coded_matmul
from ftkit.nn.shards import local
from ftkit.plan.budget import Gpu
from ftkit.plan.speed import Work

PRODUCTS = {
    getattr(torch.ops.ftkit, f"{room.__name__.rpartition('.')[2]}{way}")
    for room in (block_matmul, coded_matmul)
    for way in ("", "_transposed")
}
"""Matrix products of the core: x [rows, k] to [rows, n]."""
LOW_RANKS: dict[Any, Callable[..., int]] = {
    _training.lora_forward: lambda x, a, b, *_: _low_ranks(x, a, b),
    _training.lora_backward: lambda x, a, b, *_: _low_ranks(x, a, b, back=True),
    _training.low_rank_forward: lambda _, x, a, b, *__: _frozen(x, a, b) + _low_ranks(x, a, b),
    _training.low_rank_backward: lambda _, x, a, b, *__: _frozen(x, a, b) + _low_ranks(x, a, b, back=True),
}
"""Low-rank matrices beside the core's layers, perhaps with those, to their floating-point operations."""
MATRICES = {torch.ops.aten.mm: 0, torch.ops.aten.bmm: 0, torch.ops.aten.addmm: 1, torch.ops.aten.baddbmm: 1}
"""torch's products, to the place of the first factor. Formulas are here since torch's counter of operations imports
triton: 120 MiB in every process that trains."""
ATTENTION = {_training.attention_forward: 4, _training.attention_backward: 10}
"""Attention of the core, to operations for each number of q and each token of its sequence."""

_RESIZING = {"fsdp", "c10d"}
"""Operations before which torch's FSDP2 gives memory of weights back, or takes it again, past the dispatcher."""

CATEGORIES = ("base weights", "adapter", "gradients", "optimizer", "activations", "loss", "data", "other")


@dataclass(frozen=True, kw_only=True)
class Peak:
    """The moment of a trace at which most bytes are in use."""

    bytes: int
    by_category: dict[str, int]
    left_bytes: int


class Recorder(TorchDispatchMode):
    """A context that records the storages born and gone inside it.

    Use `with recorder.category("activations"):` around a part of the code to say what it allocates; a storage is
    counted under the category it was born in unless `adopt` says otherwise later.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.work: Work = Counter()
        """What the operations so far compute and move."""
        self._events: list[tuple[int, int]] = []  # (storage, bytes, or -1 at its death)
        self._category: dict[int, int] = {}  # storage → category
        self._current = CATEGORIES.index("other")
        self._living: dict[int, int] = {}  # address of torch's storage object → storage
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._sizes: dict[int, int] = {}
        self._again: dict[int, int] = {}  # storage → what it is called since it got another size

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return (
            False  # skipping it would import the compiler, three seconds and 150 MB, for nothing that is compiled here
        )

    def __torch_dispatch__(
        self, func: torch._ops.OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace in _RESIZING:
            self._look_again()
        result = func(*args, **(kwargs or {}))
        if not getattr(func, "is_view", False):
            self.work[_work(func, args, kwargs or {}, result)] += 1
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":
                self._see(local(leaf))
        return result

    def adopt(self, tensors: Iterable[torch.Tensor | None], category: str) -> None:
        """Counts the tensors' storages under `category`, from their birth on; unseen ones are born now."""
        index = CATEGORIES.index(category)
        for tensor in tensors:
            if tensor is not None and tensor.device.type != "meta":
                self._category[self._see(tensor)] = index

    def elsewhere(self, tensors: Iterable[torch.Tensor]) -> None:
        """Counts storages that lie on disk: as nothing."""
        for tensor in tensors:
            self._see(tensor, 0)

    @contextmanager
    def category(self, name: str) -> Iterator[None]:
        """Storages born inside are counted under `name`, one of CATEGORIES."""
        before, self._current = self._current, CATEGORIES.index(name)
        try:
            yield
        finally:
            self._current = before

    def peak(self) -> Peak:
        """The peak of what was recorded so far, by the exact sizes of the storages."""
        total, shares, _, left = _core.replay(self._told(), len(CATEGORIES))
        by_category = {name: share for name, share in zip(CATEGORIES, shares, strict=True) if share}
        return Peak(bytes=total, by_category=by_category, left_bytes=left)

    def reserved(self, gpu: Gpu) -> int:
        """What torch's allocator reserves on a GPU for what was recorded so far; where it does not
        fit, what it would reserve on a larger one."""
        found = _core.replay_on_gpu(self._told(), gpu.bytes, gpu.expandable)
        # one that does not fit is told by how much
        return found if found is not None else _core.replay_on_gpu(self._told(), 1 << 50, gpu.expandable) or 1 << 50

    def _told(self) -> list[tuple[int, int, int]]:
        return [(storage, size, self._category[storage]) for storage, size in self._events]

    def _see(self, tensor: torch.Tensor, size: int | None = None) -> int:
        """The number of the tensor's storage, noting its birth (with that size) when it is new."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        known = self._living.get(address)
        if known is not None:
            return known
        number = len(self._category)
        self._living[address] = number
        self._category[number] = self._current
        self._events.append((number, storage.nbytes() if size is None else size))
        self._storages[number], self._sizes[number] = weakref.ref(storage), storage.nbytes()
        weakref.finalize(storage, self._forget, address, number)
        return number

    def _forget(self, address: int, number: int) -> None:
        if self._living.get(address) == number:
            del self._living[address]
        del self._storages[number]
        self._events.append((self._again.pop(number, number), -1))

    def _look_again(self) -> None:
        """Notes storages whose memory went or came back while they lived on."""
        for number, reference in list(self._storages.items()):  # some may go meanwhile
            storage = reference()
            if storage is None or (size := storage.nbytes()) == self._sizes[number]:
                continue
            self._events.append((self._again.get(number, number), -1))
            self._again[number] = again = len(self._category)
            self._category[again] = self._category[number]
            self._events.append((again, size))
            self._sizes[number] = size


def _work(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> tuple[str, int, int]:
    """An operation's kind, floating-point operations and bytes, as `Speeds.seconds` takes them."""
    packet = func.overloadpacket
    size = sum(leaf.nbytes for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor))
    if packet in PRODUCTS:
        return _kind(args[0], "blocks"), 2 * args[0].numel() * result.shape[1], size
    if packet in LOW_RANKS:
        x = next(arg for arg in args if isinstance(arg, torch.Tensor))
        return _kind(x, "blocks"), LOW_RANKS[packet](*args), size
    if packet in ATTENTION:
        tokens, lengths = args[0].shape[0], args[3]
        numbers = args[0].numel() // max(1, tokens)
        return "attention", ATTENTION[packet] * numbers * sum(length * length for length in lengths), size
    if packet in MATRICES:
        inner = args[MATRICES[packet]].shape[-1]
        return _kind(result, "float32"), 2 * result.numel() * inner, size
    if "_scaled_dot_product" in str(packet):
        back = "backward" in str(packet)  # whose first argument is the output's gradient
        q, k = args[back], args[back + 1]
        return "attention", (10 if back else 4) * q.numel() * k.shape[-2], size
    return "", 0, size


def _kind(factor: torch.Tensor, single: str) -> str:
    """Whose speed a product has."""
    return "bfloat16" if factor.dtype == torch.bfloat16 else single


def _frozen(x: Any, a: Any, b: Any) -> int:
    """Operations of products with the matrices beside low-rank ones."""
    operations: int = 2 * x.shape[0] * sum(one.shape[1] * other.shape[0] for one, other in zip(a, b, strict=True))
    return operations


def _low_ranks(x: Any, a: Any, b: Any, *, back: bool = False) -> int:
    """Operations of what low-rank matrices add to products with x, forward, or back with their gradients."""
    operations: int = 2 * x.shape[0] * sum(each.numel() for each in (*a, *b))
    return 2 * operations if back else operations
