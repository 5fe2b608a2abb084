"""AdamW in 8 bits against bitsandbytes' AdamW8bit, on the CPU, and against AdamW in 32."""

from typing import Any

import bitsandbytes.functional
import bitsandbytes.optim.adamw
import pytest
import torch

from ftkit.config import Choice
from ftkit.kernels.blockwise_adamw import BLOCK, Blocks, dynamic_map, edges_of, write
from ftkit.optim import adamw8bit, build

pytestmark = pytest.mark.unit

PEER: Any = bitsandbytes
NAMES = ("adamw", "adamw8bit")
MAPS = {"mean": True, "square": False}


def empty(count: int, table: torch.Tensor) -> Blocks:
    codes = torch.zeros(count, dtype=torch.uint8)
    return Blocks(codes=codes, greatest=torch.zeros(-(-count // BLOCK)), map=table)


@pytest.mark.parametrize("signed", [True, False])
def test_the_maps_are_bitsandbytes_to_the_bit(signed: bool) -> None:
    assert torch.equal(dynamic_map(signed), PEER.functional.create_dynamic_map(signed=signed))


@pytest.mark.parametrize("count", [4096, 5003])
@pytest.mark.parametrize("signed", [True, False])
def test_codes_and_scales_are_bitsandbytes(signed: bool, count: int) -> None:
    values = torch.randn(count, generator=torch.Generator().manual_seed(count))
    values *= torch.logspace(-4, 0, count)
    values = values if signed else values.square()
    table = dynamic_map(signed)
    state = empty(count, table)
    write(state, values)
    # bitsandbytes' path for float64 compares all distances; that for float32 is a table of 2^16 steps, and coarse
    codes, greatest = torch.ops.bitsandbytes.quantize_blockwise(values.double(), table.clone(), BLOCK)
    assert torch.equal(state.greatest, greatest)
    ours, theirs = state.codes.int(), codes.int()
    shares = values / greatest.repeat_interleave(BLOCK)[:count]
    edge = edges_of(table)[torch.minimum(ours, theirs).clamp(max=254)]
    halfway = (shares - edge).abs() < 1e-6 * edge.abs()
    lifted = (theirs == 0) & (ours == 1) & (values > 0) & (not signed)
    assert bool(((ours == theirs) | halfway | lifted).all())
    assert float((ours == theirs).float().mean()) > 0.99


def test_a_block_of_zeros_stays_one_and_so_do_small_ones() -> None:
    table = dynamic_map(signed=False)
    values = torch.zeros(2 * BLOCK)
    values[BLOCK:] = 1e-41
    values[BLOCK] = 3e-39
    state = empty(2 * BLOCK, table)
    write(state, values)
    assert float(state.greatest[0]) == 0
    assert int(state.codes[:BLOCK].max()) == 0
    assert int(state.codes[BLOCK + 1 :].min()) > 0


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_an_update_is_bitsandbytes_where_the_state_is_the_same(weight_decay: float) -> None:
    start = torch.randn(67, 71, generator=torch.Generator().manual_seed(2))
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    options = {"learning_rate": 1e-2, "weight_decay": weight_decay}
    optimizer = build(Choice(name="adamw8bit", options=options), {"up_proj.weight": ours})
    oracle = PEER.optim.AdamW8bit([theirs], lr=1e-2, weight_decay=weight_decay)
    for step in range(12):
        factor = 1 - step / 20
        oracle.param_groups[0]["lr"] = 1e-2 * factor
        ours.grad = torch.randn(67, 71, generator=torch.Generator().manual_seed(step)) * 1e-3
        theirs.grad = ours.grad.clone()
        if step:
            held, state = oracle.state[theirs], optimizer.state()
            for number, kind in enumerate(MAPS, 1):  # theirs begins each step where ours stands
                held[f"state{number}"].copy_(state[f"{kind}/up_proj.weight"])
                held[f"absmax{number}"].copy_(state[f"{kind}_scale/up_proj.weight"])
            theirs.data.copy_(ours.detach())
        optimizer.step(factor)
        oracle.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)
        for number, kind in enumerate(MAPS, 1):
            scale = optimizer.state()[f"{kind}_scale/up_proj.weight"]
            torch.testing.assert_close(scale, oracle.state[theirs][f"absmax{number}"], rtol=1e-6, atol=0)


def test_stays_as_near_to_adamw_of_32_bits_as_bitsandbytes_does() -> None:
    goal = torch.randn(67, 71, generator=torch.Generator().manual_seed(8))
    weights = {name: torch.nn.Parameter(torch.zeros(67, 71)) for name in ("adamw", "adamw8bit", "theirs")}
    steps = [build(Choice(name=name, options={"learning_rate": 1e-2}), {"w": weights[name]}).step for name in NAMES]
    oracle = PEER.optim.AdamW8bit([weights["theirs"]], lr=1e-2, weight_decay=0.0)
    generator = torch.Generator().manual_seed(1)
    for _ in range(100):
        noise = 0.1 * torch.randn(goal.shape, generator=generator)
        for weight in weights.values():
            weight.grad = weight.detach() - goal + noise
        for step in steps:
            step(1.0)
        oracle.step()
    whole, ours, theirs = (weight.detach() for weight in weights.values())
    distance = float((ours - whole).norm() / whole.norm())
    assert distance < 0.05
    assert distance < 1.1 * float((theirs - whole).norm() / whole.norm())


def test_memory_is_a_quarter_and_small_tensors_are_whole() -> None:
    def held(name: str, count: int) -> int:
        state = build(Choice(name=name), {"norm.weight": torch.nn.Parameter(torch.zeros(count))}).state()
        return sum(value.nbytes for key, value in state.items() if key != "steps")

    assert held("adamw8bit", adamw8bit.LEAST - 1) == held("adamw", adamw8bit.LEAST - 1)
    assert held("adamw8bit", 1 << 16) == held("adamw", 1 << 16) // 4 + 2 * 4 * (1 << 16) // BLOCK


def test_a_gradient_that_ends_throws_no_weight_far() -> None:
    """A square rounded to zero under a mean that is not would be divided by ε alone."""
    weight = torch.nn.Parameter(torch.zeros(4096))
    optimizer = build(Choice(name="adamw8bit", options={"learning_rate": 1.0}), {"embed_tokens.weight": weight})
    weight.grad = torch.logspace(-8, 0, 4096)[torch.randperm(4096, generator=torch.Generator().manual_seed(0))]
    optimizer.step(1.0)
    weight.grad = torch.zeros(4096)
    for _ in range(5):
        before = weight.detach().clone()
        optimizer.step(1.0)
        assert float((weight.detach() - before).abs().max()) < 2
