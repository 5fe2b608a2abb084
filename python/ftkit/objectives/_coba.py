"""CoBa: the tasks' shares from the slopes of their held-out losses.

With v_k(t) the loss of task k at step t over that at the first step, a_k(t) the slope of the line through the last
`history` of them, A(t) the slope of the line through max_k v_k, and K tasks:

    relative   R_k = softmax_k(K a_k / Σ_k |a_k|)              slower than the others: more
    absolute   C_k = softmax_k(−n a_k / Σ_t |a_k(t)|)          its own slope flattens or turns up: less; n slopes
    divergence D   = min(1, n · softmax_t(−τ n A(t) / Σ_t |A(t)|))     at the last step; falls when any task gets worse
    s = softmax_k(K (D R_k + (1 − D) C_k)),                    and at least 1 / (10 K)

C's n slopes are those of the last `history − warmup + 1` steps, D's all since the warmup. Before that the shares are
equal. Bounded by 1, as in the paper: else one step of fast convergence would make 1 − D negative and reward divergence.

Source: Gong et al., CoBa: Convergence Balancer for Multitask Finetuning of Large Language Models, 2024, arXiv
2410.06741.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def shares(losses: Sequence[Sequence[float]], tasks: int, warmup: int, history: int, tau: float) -> Tensor:
    """Held-out losses, a row of `tasks` numbers a step, to shares f64 [tasks] that add up to 1."""
    if len(losses) < warmup or tasks < 2:
        return torch.full((tasks,), 1 / max(tasks, 1), dtype=torch.float64)
    seen = torch.tensor(losses, dtype=torch.float64)
    seen = seen / seen[0]  # [steps, K]
    slopes = _slopes(seen, warmup, history)  # [n, K]
    whole = _slopes(seen.amax(1, keepdim=True), warmup, history)[:, 0]  # [n]
    relative = torch.softmax(tasks * _over(slopes[-1], slopes[-1].abs().sum()), 0)
    recent = slopes[-max(1, history - warmup + 1) :]
    absolute = torch.softmax(-len(recent) * _over(recent[-1], recent.abs().sum(0)), 0)
    steps = len(whole)
    divergence = steps * torch.softmax(-tau * steps * _over(whole, whole.abs().sum()), 0)[-1].clamp(max=1 / steps)
    found = torch.softmax(tasks * (divergence * relative + (1 - divergence) * absolute), 0)
    least = 1 / (10 * tasks)
    return found * (1 - least * tasks) + least if bool((found < least).any()) else found


def _over(value: Tensor, by: Tensor) -> Tensor:
    """The quotient; 0 where nothing moves."""
    return torch.where(by > 0, value / by.clamp(min=1e-300), torch.zeros_like(value))


def _slopes(seen: Tensor, warmup: int, history: int) -> Tensor:
    """The slopes [n, K] of least squares over the last `history` rows of seen [steps, K], after each from `warmup` on.

    With sums of v and of t v so far, each window's Σ (t − t̄)(v − v̄) is a difference, so long runs stay cheap.
    """
    steps = len(seen)
    time = torch.arange(steps, dtype=torch.float64).unsqueeze(1)
    centred = seen - seen.mean(0)  # the same slopes, and less is lost in the differences
    zero = centred.new_zeros(1, seen.shape[1])
    plain, moment = (torch.cat([zero, values.cumsum(0)]) for values in (centred, time * centred))
    end = torch.arange(warmup, steps + 1)
    begin = (end - history).clamp(min=0)
    count = (end - begin).double().unsqueeze(1)
    middle = (begin + end - 1).double().unsqueeze(1) / 2
    covariance = (moment[end] - moment[begin]) - middle * (plain[end] - plain[begin])
    return covariance / (count * (count.square() - 1) / 12)
