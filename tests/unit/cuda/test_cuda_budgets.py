"""Machine code for every architecture keeps to `budgets.toml`; no GPU is needed for it."""

import tomllib
from collections.abc import Callable

import pytest
import torch
from bench import _kernels, _sass
from tests.unit.cuda.emulated import DEAREST, VARIANTS, Emulated, coded_matrix, needs_nvrtc

from ftkit.cuda import launches, lora, pages, source
from ftkit.cuda.compiler import compile_variant
from ftkit.cuda.launch import Launch
from ftkit.cuda.lora import Matrices, Segments
from ftkit.cuda.on_cpu import Traffic
from ftkit.cuda.source import Variant, variant
from ftkit.errors import FtkitError, InputError

pytestmark = [pytest.mark.unit, needs_nvrtc]

BUDGETS = tomllib.loads((source.FOLDER / "budgets.toml").read_text(encoding="utf-8"))
ARCHITECTURES = tuple(_sass.MULTIPROCESSORS)
needs_nvdisasm = pytest.mark.skipif(_sass.disassembler() is None, reason="needs nvdisasm (nvidia-cuda-nvdisasm)")


def test_every_kernel_has_a_budget() -> None:
    assert set(BUDGETS) == {name for one in source.names() for name in DEAREST[one].kernels()}
    assert all(set(budget["registers"]) == set(ARCHITECTURES) == set(budget["blocks"]) for budget in BUDGETS.values())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", source.names())
def test_registers_keep_to_their_budget(name: str, architecture: str) -> None:
    one = DEAREST[name]
    for kernel, use in _sass.compiled(one, architecture).use().items():
        assert (use.spill_bytes, use.stack_bytes) == (0, 0), kernel
        assert use.registers <= BUDGETS[kernel]["registers"][architecture], kernel
        blocks = _sass.blocks_that_fit(architecture, use, one.kernels()[kernel].threads)
        assert blocks >= BUDGETS[kernel]["blocks"][architecture], kernel


@needs_nvdisasm
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", [name for name, budget in BUDGETS.items() if "products" in budget])
def test_main_loops_keep_to_their_budget(name: str, architecture: str) -> None:
    source_of = next(one for one in DEAREST.values() if name in one.kernels())
    code, budget = _sass.examine(source_of, architecture)[name], BUDGETS[name]
    assert code.local == 0
    assert code.loop is not None
    assert code.loop.products == budget["products"]
    assert code.loop.issued <= budget["issued"] * code.loop.products
    assert code.loop.shared_clocks <= budget["shared_clocks"] * code.loop.products
    assert code.loop.ldmatrix <= 0.5 * code.loop.products


@pytest.mark.parametrize("one", VARIANTS, ids=lambda one: "-".join([one.name, *(value for _, value in one.macros)]))
def test_no_variant_spills(one: Variant) -> None:
    for name, use in _sass.compiled(one, "sm_90").use().items():
        assert (use.spill_bytes, use.stack_bytes) == (0, 0), name


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.bfloat16)


def low_rank(launch: Launch, tiles: bool) -> None:
    """Two adapters, of 32 rows or of one each."""
    rows = 32 if tiles else 1
    segments = Segments(ends=torch.tensor([0, rows, 2 * rows]).int(), adapters=torch.tensor([0, 1]).int())
    pool, ranks = torch.ones(2, 16 * 512), torch.tensor([16, 16]).int()
    matrices = Matrices(pool=pool, places=torch.tensor([0, 16 * 512]), ranks=ranks, width=16)
    low = lora.shrink(launch, ones(2 * rows, 512), matrices, torch.ones(2), segments, tiles)
    lora.expand(launch, low, matrices, segments, ones(2 * rows, 512), tiles)
    if tiles:
        lora.gradient(launch, low, ones(2 * rows, 512), ranks, segments)


def prompt(launch: Launch) -> None:
    places = torch.arange(128).int()
    ends = torch.tensor([0, 128]).int()
    batch = (ones(128, 1, 128), ones(8, 1, 2, 16, 1, 128), places[None, :8], ends, places)
    pages.paged_prefill(launch, *batch, 0, 1.0, None)


NF4, INT4 = coded_matrix("nf4", 128, 512), coded_matrix("int4_group", 128, 512)
# What is launched to see how a kernel uses memory.
RUNS: dict[str, Callable[[Launch], object]] = {
    "coded_gemv": lambda launch: launches.matmul(launch, ones(4, 512), NF4),
    "coded_decode": lambda launch: launches.matmul(launch, ones(16, 512), NF4),
    "coded_forward": lambda launch: launches.matmul(launch, ones(128, 512), NF4),
    "coded_dx": lambda launch: launches.matmul_transposed(launch, ones(128, 128), NF4),
    "int4_decode": lambda launch: launches.matmul(launch, ones(16, 512), INT4),
    "int4_forward": lambda launch: launches.matmul(launch, ones(128, 512), INT4),
    "int4_dx": lambda launch: launches.matmul_transposed(launch, ones(128, 128), INT4),
    "lora_bgmv_shrink": lambda launch: low_rank(launch, False),
    "lora_bgmv_expand": lambda launch: low_rank(launch, False),
    "lora_sgmv_shrink": lambda launch: low_rank(launch, True),
    "lora_sgmv_expand": lambda launch: low_rank(launch, True),
    "lora_gradient": lambda launch: low_rank(launch, True),
    "paged_prefill": prompt,
}


@pytest.mark.parametrize("name", RUNS)
def test_memory_is_used_as_budgeted(kit: Emulated, name: str) -> None:
    traffic: list[Traffic] = []
    launch = kit.launcher(1)
    counted = kit.launcher(1, traffic)
    RUNS[name](lambda *call: (counted if call[1] == name else launch)(*call))
    budget = BUDGETS[name]
    for limit, kinds in (("conflicts", ("load shared", "store shared")), ("sectors", ("load global", "store global"))):
        found = [one for one in traffic if one.kind in kinds and not one.where.startswith("scales.cuh")]
        ratios = [(one.taken / one.least, one) for one in found] or [(1.0, None)]
        worst = max(ratios, key=lambda one: one[0])
        assert worst[0] <= budget[limit], worst


@needs_nvdisasm
def test_the_page_of_the_kernels_is_what_is_compiled() -> None:
    page = _kernels.DOCUMENT.read_text(encoding="utf-8")
    assert page == _kernels.document(), "docs/kernels.md is not up to date: just kernels"
    assert _kernels.COUNTS.read_text(encoding="utf-8") == _kernels.counts_text(), "counts.toml is not up to date"


def test_what_cannot_be_compiled_says_why() -> None:
    one = variant("swiglu", VALUE="float")
    with pytest.raises(InputError, match="expected a GPU of sm_80 or newer, got sm_75"):
        compile_variant(one, "sm_75")
    with pytest.raises(InputError, match=r"expected one of the compiler's architectures .*, got sm_999"):
        compile_variant(one, "sm_999")
    broken = Variant("swiglu", one.macros, changed=(("swiglu.cu", one.text.replace("expf", "expo")),))
    with pytest.raises(FtkitError, match=r"swiglu.cu: NVRTC refused it for sm_80(.|\n)*expo"):
        compile_variant(broken, "sm_80")
