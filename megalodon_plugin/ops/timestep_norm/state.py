"""Running statistics of TimestepNorm, and how those of consecutive parts of a text join."""

from typing import NamedTuple

import torch
from torch import Tensor


class NormState(NamedTuple):
    """Running statistics of a TimestepNorm. `count` (B,) int64 timesteps, `mean` and `var` (B, G) float32.

    They are float64 in a float64 model. At count 0 mean and var do not matter.
    """

    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which nothing here needs
    mean: Tensor
    var: Tensor


def empty_norm_state(batch: int, num_groups: int, dtype: torch.dtype, device: torch.device) -> NormState:
    """The state before the first step: count 0."""
    zeros = torch.zeros(batch, num_groups, dtype=dtype, device=device)
    return NormState(torch.zeros(batch, dtype=torch.int64, device=device), zeros, zeros.clone())


def merge_norm_states(first: NormState, second: NormState) -> NormState:
    """Statistics of two consecutive parts of time, from those of each.

    n = n1 + n2,  mean = mean1 + (n2/n) d,  var = (n1/n) var1 + (n2/n) var2 + (n1/n) (n2/n) d^2,  d = mean2 - mean1.
    """
    count = first.count + second.count
    share = (second.count.to(first.mean.dtype) / count.clamp(min=1)).unsqueeze(-1)  # n2/n, (B, 1)
    # At count 0 mean and var may hold anything, also NaN, so they are masked and not only weighted by 0.
    mean1, var1 = (torch.where(first.count.unsqueeze(-1) > 0, s, 0) for s in (first.mean, first.var))
    mean2, var2 = (torch.where(second.count.unsqueeze(-1) > 0, s, 0) for s in (second.mean, second.var))
    d = torch.where((first.count > 0).unsqueeze(-1), mean2 - mean1, mean2)
    return NormState(count, mean1 + share * d, (1 - share) * var1 + share * var2 + share * (1 - share) * d * d)
