"""Lion against bitsandbytes' own, on the CPU."""

from typing import Any

import pytest
import torch
from bitsandbytes.optim.lion import Lion

from ftkit.config import Choice
from ftkit.optim import build

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_equal_to_bitsandbytes_lion(weight_decay: float) -> None:
    start = torch.randn(67, 71, generator=torch.Generator().manual_seed(2))
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    options = {"learning_rate": 1e-2, "beta1": 0.8, "beta2": 0.97, "weight_decay": weight_decay}
    optimizer = build(Choice(name="lion", options=options), {"up_proj.weight": ours})
    peer: Any = Lion
    oracle = peer([theirs], lr=1e-2, betas=(0.8, 0.97), weight_decay=weight_decay)
    for step in range(20):
        factor = 1 - step / 20
        oracle.param_groups[0]["lr"] = 1e-2 * factor
        ours.grad = torch.randn(67, 71, generator=torch.Generator().manual_seed(step))
        theirs.grad = ours.grad.clone()
        optimizer.step(factor)
        oracle.step()
    # a sign may differ where mean and gradient cancel to rounding, nowhere else
    same = (ours - theirs).abs() < 1e-6
    assert float(same.float().mean()) > 0.9995
    torch.testing.assert_close(
        optimizer.state()["mean/up_proj.weight"], oracle.state[theirs]["state1"], rtol=1e-5, atol=1e-7
    )
