"""The `cuda` backends of operations, the emulator in the place of a GPU: values and gradients of the references."""

import pytest
import torch
from tests.unit.cuda.emulated import Emulated, coded_matrix
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

from ftkit.cli import application
from ftkit.cuda import source
from ftkit.cuda.source import Variant
from ftkit.errors import InputError
from ftkit.kernels import _gpu, _gpu_trial, pinned
from ftkit.kernels.block_matmul import dequantize
from ftkit.kernels.coded_matmul import arguments, coded_dense, coded_matmul, coded_matmul_transposed
from ftkit.kernels.cross_entropy import cross_entropy
from ftkit.kernels.lora_linear import lora_linear
from ftkit.kernels.paged_attention import paged_attention
from ftkit.kernels.rms_norm import rms_norm
from ftkit.kernels.rope import rope
from ftkit.kernels.swiglu import swiglu
from ftkit.plugins import load

pytestmark = pytest.mark.unit


def leaves(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize(
    ("operation", "shapes", "rest"),
    [(rms_norm, ((2, 3, 72), (72,)), (1e-5,)), (swiglu, ((5, 33), (5, 33)), ())],
    ids=["rms_norm", "swiglu"],
)
def test_values_and_gradients_are_the_references(gpu: list[str], operation, shapes, rest) -> None:
    inputs = leaves(*shapes)
    y = operation(*inputs, *rest)
    assert gpu
    slope = torch.randn_like(y)
    torch.testing.assert_close(y, operation.reference(*inputs, *rest))
    expected = torch.autograd.grad(operation.reference(*inputs, *rest), inputs, slope)
    torch.testing.assert_close(torch.autograd.grad(y, inputs, slope), expected, rtol=1e-4, atol=1e-5)


def test_rope_and_its_gradient(gpu: list[str]) -> None:
    (x,) = leaves((7, 3, 64))
    angles = torch.randn(7, 32)
    y, expected = rope(x, angles.cos(), angles.sin()), rope.reference(x, angles.cos(), angles.sin())
    slope = torch.randn_like(y)
    assert torch.equal(y, expected)
    torch.testing.assert_close(torch.autograd.grad(y, x, slope), torch.autograd.grad(expected, x, slope))
    assert gpu == ["rope", "rope"]


def test_cross_entropy_with_its_gradient(gpu: list[str]) -> None:
    logits, targets = torch.randn(3, 97), torch.tensor([0, 96, 5])
    for found, expected in zip(
        cross_entropy(logits, targets, gradient=True), cross_entropy.reference(logits, targets, True), strict=True
    ):
        torch.testing.assert_close(found, expected)
    assert gpu == ["cross_entropy"]


@pytest.mark.parametrize("rows", [2, 9, 40])
@pytest.mark.parametrize("rank", [3, 16])
def test_lora_linear_over_nf4(gpu: list[str], rows: int, rank: int) -> None:
    """The whole way of a finetuned layer: forward by the kernel for so many rows, dx, and the factors' gradients."""
    weight = load("quant", "nf4").scheme().weight(torch.randn(72, 128) / 11, torch.bfloat16)
    inputs = leaves((rows, 128), (rank, 128), (72, rank), dtype=torch.bfloat16)
    x, a, b = inputs
    y = lora_linear(x, weight, a, b, 0.5)
    slope = torch.randn_like(y)
    found = torch.autograd.grad(y, inputs, slope)
    assert gpu == [{2: "coded_gemv", 9: "coded_decode", 40: "coded_forward"}[rows], "coded_dx"]
    wide = [one.detach().double().requires_grad_() for one in inputs]
    dense = weight.dense().double()
    exact = wide[0] @ dense.T + 0.5 * (wide[0] @ wide[1].T) @ wide[2].T
    for one, expected in zip((y, *found), (exact, *torch.autograd.grad(exact, wide, slope.double())), strict=True):
        assert ((one.double() - expected).norm() / expected.norm()) < 1e-2


def test_coded_products_and_blocks(gpu: list[str]) -> None:
    """Implementations on CUDA of operations that the core has on the CPU."""
    coded, x = coded_matrix("nf4", 40, 128), torch.randn(20, 128).bfloat16()
    assert torch.equal(_gpu.runs["coded_dense"](*arguments(coded)), coded_dense.reference(coded))
    found = _gpu.runs["coded_matmul"](x, False, *arguments(coded))
    torch.testing.assert_close(found, coded_matmul.reference(x, coded), rtol=0.02, atol=0.02)
    found = _gpu.runs["coded_matmul_transposed"](x[:, :40], x.dtype, *arguments(coded))
    torch.testing.assert_close(found, coded_matmul_transposed.reference(x[:, :40], coded), rtol=0.02, atol=0.02)
    blocks = torch.randint(100, (3, 40), dtype=torch.uint8)
    assert torch.equal(_gpu.runs["dequantize"]("q4_1", blocks), dequantize("q4_1", blocks))
    assert gpu == ["dequant_coded", "coded_forward", "coded_dx", "dequant_blocks"]
    with pinned("reference"):
        assert torch.equal(_gpu.runs["dequantize"]("q4_1", blocks), dequantize("q4_1", blocks))
    assert len(gpu) == 4


def test_the_trial_of_a_gpu_passes_and_finds_what_is_wrong(kit: Emulated) -> None:
    run = kit.launcher()
    for case in _gpu_trial.cases(run, "cpu", 128):
        assert _gpu_trial.difference(case) <= case.tolerance, case.name
    names = [case.name for case in _gpu_trial.cases(run, "cpu", 128)]
    assert {*names, "adamw_8bit"} == set(source.names())

    def zeros(variant: Variant, name: str, _: object, arguments: list[torch.Tensor]) -> None:
        for parameter, argument in zip(variant.kernels()[name].parameters, arguments, strict=True):
            if parameter.pointer and not parameter.constant:
                argument.zero_()

    assert all(not _gpu_trial.difference(case) <= case.tolerance for case in _gpu_trial.cases(zeros, "cpu", 128))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_doctor_without_a_gpu_says_so() -> None:
    result = CliRunner().invoke(application(), ["doctor", "--gpu"])
    assert isinstance(result.exception, InputError)
    assert result.exception.exit_code == 2
    assert "expected an NVIDIA GPU, got none" in str(result.exception)


def test_plans_see_what_kernels_allocate() -> None:
    with FakeTensorMode():
        x = torch.empty(5, 64, dtype=torch.bfloat16)
        y, scales = _gpu.rms_norm(x, x[0], 1e-5)
        assert (y.shape, y.dtype, scales.shape, scales.dtype) == (x.shape, x.dtype, (5,), torch.float32)
        losses, slope = _gpu.cross_entropy(x, torch.empty(5, dtype=torch.int64))
        assert (losses.shape, slope.shape) == ((5,), x.shape)
        assert _gpu.swiglu_backward(x, x, x)[1].shape == x.shape


class Seen(TorchDispatchMode):
    """The names of what was computed."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("pin", ["cuda", "reference"])
def test_a_plan_for_a_gpu_takes_its_kernels(pin: str) -> None:
    """On fake tensors of the CPU, forward and back, unless the environment says otherwise."""
    nf4 = load("quant", "nf4")
    with FakeTensorMode(), pinned(pin), _gpu.foreseen(), Seen() as seen:
        weight = nf4.scheme().empty((64, 128), torch.bfloat16)
        x, a, b = (
            torch.empty(shape, dtype=torch.bfloat16, requires_grad=True) for shape in ((40, 128), (8, 128), (64, 8))
        )
        lora_linear(x, weight, a, b, 1.0).sum().backward()
        assert x.grad is not None
    ours = {name for name in seen.names if "coded_lora" in name}
    assert ours == ({"ftkit.coded_lora.default", "ftkit.coded_lora_dx.default"} if pin == "cuda" else set())
    assert _gpu.device_type == "cuda"


def test_an_argument_that_kernels_do_not_take_is_the_references(gpu: list[str]) -> None:
    x, weight = torch.randn(3, 12), torch.randn(12)
    assert torch.equal(rms_norm(x, weight, 1e-5), rms_norm.reference(x, weight, 1e-5))
    x, weight = torch.randn(16, 3).T, torch.randn(16)
    assert torch.equal(rms_norm(x, weight, 1e-5), rms_norm.reference(x, weight, 1e-5))
    x, weight = torch.randn(25)[1:].view(3, 8), torch.randn(8)
    assert torch.equal(rms_norm(x, weight, 1e-5), rms_norm.reference(x, weight, 1e-5)), "not aligned"
    with pinned("reference"):
        swiglu(torch.ones(8), torch.ones(8))
    assert not gpu


def test_attention_of_few_and_of_many_tokens(gpu: list[str]) -> None:
    """Sequences with few new tokens by the kernel, a prompt by the reference."""
    pages, q = torch.randn(6, 1, 2, 4, 2, 64), torch.randn(11, 4, 64)
    table = torch.arange(6, dtype=torch.int32).view(2, 3)
    lengths, totals = (2, 9), (10, 9)
    positions = torch.tensor([8, 9, *range(9)], dtype=torch.int32)
    ends = torch.tensor([0, 2, 11], dtype=torch.int32)
    batch = (q, pages, table, ends, positions, lengths, totals)
    expected = paged_attention.reference(*batch, layer=0, scale=0.125)
    with torch.library._scoped_library("ftkit", "IMPL") as library:
        library.impl("paged_attention", _gpu.runs["paged_attention"], "CPU", allow_override=True)
        torch.testing.assert_close(paged_attention(*batch, layer=0, scale=0.125), expected)
    assert gpu == ["paged_attention"]
    with pinned("cpu"):
        torch.testing.assert_close(paged_attention(*batch, layer=0, scale=0.125), expected)
    assert gpu == ["paged_attention"], "the core's is back"
