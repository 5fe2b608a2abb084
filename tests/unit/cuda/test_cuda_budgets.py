"""Machine code for every architecture keeps to `budgets.toml`; no GPU is needed for it."""

import tomllib

import pytest
import torch
from bench import _kernels, _sass
from tests.unit.cuda.emulated import DEAREST, VARIANTS, Emulated, coded_matrix, needs_nvrtc

from ftkit.cuda import launches, source
from ftkit.cuda.compiler import compile_variant
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


@pytest.mark.parametrize("name", ["nf4_gemv", "nf4_decode", "nf4_lora_forward", "nf4_lora_dx"])
def test_memory_is_used_as_budgeted(kit: Emulated, name: str) -> None:
    coded = coded_matrix("nf4", 128, 512)
    rows = {"nf4_gemv": 4, "nf4_decode": 16}.get(name, 128)
    traffic: list[Traffic] = []
    launch = kit.launcher(1, traffic)
    if name == "nf4_lora_dx":
        launches.matmul_transposed(launch, torch.ones(rows, 128, dtype=torch.bfloat16), coded)
    else:
        launches.matmul(launch, torch.ones(rows, 512, dtype=torch.bfloat16), coded)
    budget = BUDGETS[name]
    for limit, kinds in (("conflicts", ("load shared", "store shared")), ("sectors", ("load global", "store global"))):
        found = [one for one in traffic if one.kind in kinds and not one.where.startswith("scales.cuh")]
        worst = max(found, key=lambda one: one.taken / one.least)
        assert worst.taken <= budget[limit] * worst.least, worst


@needs_nvdisasm
def test_the_page_of_the_kernels_is_what_is_compiled() -> None:
    page = _kernels.DOCUMENT.read_text(encoding="utf-8")
    assert page == _kernels.document(), "docs/kernels.md is not up to date: just kernels"


def test_what_cannot_be_compiled_says_why() -> None:
    one = variant("swiglu", VALUE="float")
    with pytest.raises(InputError, match="expected a GPU of sm_80 or newer, got sm_75"):
        compile_variant(one, "sm_75")
    with pytest.raises(InputError, match=r"expected one of the compiler's architectures .*, got sm_999"):
        compile_variant(one, "sm_999")
    broken = Variant("swiglu", one.macros, changed=(("swiglu.cu", one.text.replace("expf", "expo")),))
    with pytest.raises(FtkitError, match=r"swiglu.cu: NVRTC refused it for sm_80(.|\n)*expo"):
        compile_variant(broken, "sm_80")
