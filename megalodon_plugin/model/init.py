"""Initialisation of parameters, plain or sharded, by the authors' table (docs/deviations.md names what differs)."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def init_linear(linear: nn.Linear, mode: str) -> None:
    """Weight by `mode`: "he" normal of std 1/sqrt(3 fan_in), "bert" normal of std 0.02, "xavier" uniform. Bias 0."""
    if mode == "he":
        init_random(linear.weight, nn.init.normal_, std=1 / math.sqrt(3 * linear.in_features))
    elif mode == "bert":
        init_random(linear.weight, nn.init.normal_, std=0.02)
    else:
        init_random(linear.weight, nn.init.xavier_uniform_)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


def init_embedding(weight: Tensor, dim: int) -> None:
    """Truncated normal of std 1/sqrt(D), cut at three std; for the embedding and the output layer."""
    std = 1 / math.sqrt(dim)
    init_random(weight, nn.init.trunc_normal_, std=std, a=-3 * std, b=3 * std)


def init_random(parameter: Tensor, fill: Callable[..., Tensor], **options: float) -> None:
    """Fill a parameter, plain or sharded, by `fill(parameter, **options)`, one of nn.init's random functions.

    Ranks that hold parts of it must not draw equal numbers: heads of equal weights would stay equal for ever. DTensor
    sees to that on accelerators only. So on a CPU each rank draws the full parameter, and all take the first rank's.
    """
    if isinstance(parameter, DTensor) and parameter.device.type == "cpu":
        values = fill(torch.empty(parameter.shape, dtype=parameter.dtype), **options)
        copy_full(parameter, distribute_tensor(values, parameter.device_mesh).to_local())
    else:
        fill(parameter, **options)


def init_theta(theta: Tensor, layer_id: int) -> None:
    """logit(f), f a random permutation of exp(-j ln(D) / D), j = 1..D.

    The permutation comes from a generator of its own, seeded by the layer: ranks hold slices of one and the same
    permutation however many they are, and pipeline stages need not agree on anything.
    """
    dim = theta.shape[0]
    frequencies = torch.exp(torch.arange(1, dim + 1, dtype=torch.float64) * (-math.log(dim) / dim))
    order = torch.randperm(dim, generator=torch.Generator().manual_seed(layer_id))
    values = torch.logit(frequencies[order], eps=1e-12).view(dim, 1, 1)
    copy_full(theta, values)


def copy_full(parameter: Tensor, values: Tensor) -> None:
    """Copy values of the full shape, which all ranks know, into a parameter that may be sharded."""
    values = values.to(device=parameter.device, dtype=parameter.dtype)
    if isinstance(parameter, DTensor):
        values = distribute_tensor(values, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(values)
