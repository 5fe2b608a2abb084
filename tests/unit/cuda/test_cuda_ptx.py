"""The PTX that NVRTC emits, executed: it does what the emulator does, and mutants of the assembly are killed."""

import pytest
import torch
from tests.unit.cuda.emulated import Emulated, Interpreted, Kit, needs_nvrtc
from tests.unit.cuda.test_cuda_mutants import TRIALS

from ftkit.cuda import source
from ftkit.cuda.on_cpu import build
from ftkit.cuda.source import Variant
from ftkit.errors import FtkitError

pytestmark = [pytest.mark.unit, needs_nvrtc]

# Every function of ptx.cuh once: x holds 288 numbers, y 32 · 32.
WRAPPERS = """
#include "numbers.cuh"
extern "C" __global__ void __launch_bounds__(32) wrappers(const float* __restrict__ x, int* __restrict__ y, int n) {
  __align__(16) __shared__ float first[128], second[128];
  const int t = threadIdx.x;
  int* out = y + 32 * t;
  copy16_async(first + 4 * t, x + 4 * t, t % 3 != 0);
  copy_commit();
  copy16_async(second + 4 * t, x + 128 + 4 * t, t % 5 != 0);
  copy_commit();
  copy_wait<1>();
  const uint4 early = load16(first + 4 * t);
  copy_wait<0>();
  const uint4 late = load16(second + 4 * t);
  __syncwarp();
  store16(out, early);
  store16(out + 4, late);
  const uint2 pair = load8(x + 2 * t);
  out[8] = pair.x;
  out[9] = pair.y;
  const float a = x[t], b = x[t + 32];
  out[10] = bf16_bits(a);
  out[11] = half_bits(a);
  out[12] = __float_as_uint(half_value((uint16_t)(__float_as_uint(a) >> 17)));
  out[13] = pack_bf16(a, b);
  float d[4] = {a, b, x[t + 64], x[t + 96]};
  uint32_t left[4];
  for (int i = 0; i < 4; i++) left[i] = pack_bf16(x[t + 32 * i + 128], x[t + 32 * i + 144]);
  mma_bf16(d, left, pack_bf16(a, b), pack_bf16(b + 1.0f, a));
  for (int i = 0; i < 4; i++) out[14 + i] = __float_as_uint(d[i]);
  out[18] = permute_bytes(left[0], left[1], 0x7350 ^ (t & 15) << 8);
  uint32_t matrices[4];
  ldmatrix_x4(matrices, first + 4 * t);
  for (int i = 0; i < 4; i++) out[19 + i] = matrices[i];
  ldmatrix_x4_transposed(matrices, second + 4 * t);
  for (int i = 0; i < 4; i++) out[23 + i] = matrices[i];
  for (int i = 27; i < 32; i++) out[i] = n;
}
"""
MUTANTS = [
    ("copies that are not wanted", '"r"(wanted ? 16 : 0)', '"r"(16)'),
    ("half a copy", '"r"(wanted ? 16 : 0)', '"r"(wanted ? 8 : 0)'),
    ("one group more in flight", '"n"(GROUPS)', '"n"(GROUPS + 1)'),
    ("no commit", "cp.async.commit_group;", ""),
    ("A's registers swapped", '"r"(a[1]), "r"(a[2])', '"r"(a[2]), "r"(a[1])'),
    ("B's registers swapped", '"r"(b0), "r"(b1)', '"r"(b1), "r"(b0)'),
    ("B's first register twice", "{%8,%9}", "{%8,%8}"),
    ("C forgotten", "{%8,%9}, {%0,%1,%2,%3};", "{%8,%9}, {%0,%0,%2,%3};"),
    ("D's registers swapped", '"+f"(d[0]), "+f"(d[1])', '"+f"(d[1]), "+f"(d[0])'),
    ("half precision for bf16", "f32.bf16.bf16.f32", "f32.f16.f16.f32"),
    ("bytes of one word", '"r"(low), "r"(high), "r"(chosen)', '"r"(low), "r"(low), "r"(chosen)'),
    ("words of bytes swapped", '"r"(low), "r"(high), "r"(chosen)', '"r"(high), "r"(low), "r"(chosen)'),
    ("matrices as they lie", "x4.trans.shared", "x4.shared"),
    ("matrices turned", "x4.shared", "x4.trans.shared"),
    ("matrices' registers swapped", '"=r"(result[0]), "=r"(result[1])', '"=r"(result[1]), "=r"(result[0])'),
    ("bf16 toward zero", "cvt.rn.bf16x2.f32", "cvt.rz.bf16x2.f32"),
    ("half toward zero", "cvt.rn.f16.f32", "cvt.rz.f16.f32"),
    ("halves of a pair swapped", '"f"(high), "f"(low)', '"f"(low), "f"(high)'),
]  # fmt: skip


def wrappers(kit: Kit, seed: int = 0) -> torch.Tensor:
    """What the wrappers give of random numbers, ties of their roundings among them."""
    x = torch.randn(288, generator=torch.Generator().manual_seed(seed))
    x[::3] = (x[::3].view(torch.int32) & ~0xFFFF | 0x8000).view(torch.float32)
    x[1::9] = x[1::9].half().float() * (1 + 2.0**-11)
    y = torch.zeros(32 * 32, dtype=torch.int32)
    kit.launcher()(Variant("wrappers", changed=(("wrappers.cu", WRAPPERS),)), "wrappers", (1,), [x, y, 7])
    return y.view(32, 32)


class Changed(Interpreted):
    """The wrappers' kernel keeps its own text."""

    def __init__(self, *changed: tuple[str, str]) -> None:
        super().__init__((("wrappers.cu", WRAPPERS), *changed))


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    variant = Variant("wrappers", changed=(("wrappers.cu", WRAPPERS),))
    return wrappers(Emulated({variant: build([variant])[0]}))


def test_the_assembly_does_what_its_twin_does(expected: torch.Tensor) -> None:
    assert torch.equal(wrappers(Changed()), expected)


@pytest.mark.parametrize(("what", "old", "new"), MUTANTS, ids=[what for what, _, _ in MUTANTS])
def test_mutants_of_the_assembly_are_killed(expected: torch.Tensor, what: str, old: str, new: str) -> None:
    text = source.headers()["ptx.cuh"]
    assert old in text, what
    try:
        found = wrappers(Changed(("ptx.cuh", text.replace(old, new, 1))))
    except FtkitError as error:
        if "NVRTC refused" in str(error):  # a mutant must be a program
            raise
        print(f"{what}: {str(error).splitlines()[0]}")
    else:
        assert not torch.equal(found, expected), f"{what}: survives"


@pytest.mark.parametrize("name", TRIALS)
def test_kernels_pass_as_ptx(name: str) -> None:
    for trial in TRIALS[name]:
        trial(Interpreted(), 0)
