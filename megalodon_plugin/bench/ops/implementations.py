"""The implementations that are timed: the ops with and without kernels, and what plain torch offers instead."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megalodon_plugin.ops import cema, timestep_norm

CEMA_ORDER = 16
MOST_POWERS = 2**28
"""Powers of q, D * n * L numbers, that the FFT path makes at a time; it needs several tensors of that size."""
Function = Callable[..., Tensor]


class Implementation(NamedTuple):
    """A function (x, *parameters) -> y, and the mode that the ops run in during it (`ops.dispatch.use_kernels`)."""

    function: Function
    mode: str


def norm_groups(dim: int) -> int:
    """G of TimestepNorm at a width, as the presets have it: 32 features a group up to D = 1024, then 64."""
    return max(1, dim // (32 if dim <= 1024 else 64))


def implementation(op: str, impl: str, dim: int) -> Implementation:
    """The implementation of an op by its name: "cuda", "torch", "compiled", and "fft" for CEMA.

    Raises:
        ValueError: there is none of that name.
    """
    modes = {"cuda": "require", "torch": "off"}
    if op == "cema":
        if impl in modes:
            return Implementation(_cema, modes[impl])
        if impl in ("fft", "compiled"):
            return Implementation(cema_fft if impl == "fft" else _compiled(cema_fft), "off")
    elif op == "timestep_norm":
        if impl in modes:
            return Implementation(partial(_timestep_norm, groups=norm_groups(dim)), modes[impl])
        if impl == "compiled":
            return Implementation(_compiled(partial(timestep_norm_plain, groups=norm_groups(dim))), "off")
    raise ValueError(f"`impl` must be an implementation of {op}, but is {impl!r}")


def _compiled(function: Function) -> Function:
    torch._dynamo.reset()  # each shape is compiled separately, every time
    return torch.compile(function, dynamic=False)


def _cema(x: Tensor, alpha: Tensor, delta: Tensor, theta: Tensor, gamma: Tensor, omega: Tensor) -> Tensor:
    return cema(x, alpha, delta, theta, gamma, omega)[0]


def _timestep_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> Tensor:
    return timestep_norm(x, weight, bias, groups)[0]


def cema_fft(x: Tensor, alpha: Tensor, delta: Tensor, theta: Tensor, gamma: Tensor, omega: Tensor) -> Tensor:
    """CEMA as a convolution of every channel with k_l = Re sum_n p g q^l, by FFT, in float32.

    x (B, L, D) -> y (B, L, D), input coefficient as released. The direct way to write it in torch.
    """
    length, dim = x.shape[1:]
    order = alpha.shape[1]
    a, d = torch.sigmoid(alpha)[..., 0], torch.sigmoid(delta)[..., 0]  # (D, N)
    n = torch.arange(1, order + 1, dtype=alpha.dtype, device=x.device)
    angle = torch.sigmoid(theta)[..., 0] * (2 * math.pi / order) * n
    log_decay = torch.log1p(-a * d)
    p_g = (a * math.sqrt(1 / order)).unsqueeze(-1) * gamma  # (D, N, 2)
    steps = torch.arange(length, dtype=alpha.dtype, device=x.device)
    at_once = max(1, MOST_POWERS // (dim * length))
    if torch.compiler.is_compiling() or at_once >= order:  # the compiler never stores the powers
        kernel = _kernel(log_decay, angle, p_g, steps)
    else:
        kernel = torch.zeros(dim, length, dtype=alpha.dtype, device=x.device)
        for start in range(0, order, at_once):
            part = slice(start, start + at_once)
            made = checkpoint(_kernel, log_decay[:, part], angle[:, part], p_g[:, part], steps, use_reentrant=False)
            kernel = kernel + made
    size = 2 * length
    channels = x.to(alpha.dtype).transpose(1, 2)  # (B, D, L)
    spectrum = torch.fft.rfft(channels, n=size) * torch.fft.rfft(kernel, n=size)
    y = torch.fft.irfft(spectrum, n=size)[..., :length] + omega * channels
    return y.transpose(1, 2).to(x.dtype)


def _kernel(log_decay: Tensor, angle: Tensor, p_g: Tensor, steps: Tensor) -> Tensor:
    """Re sum_n p g q^l for every l, (D, n) -> (D, L)."""
    phase = angle.unsqueeze(-1) * steps
    turned = p_g[..., :1] * torch.cos(phase) - p_g[..., 1:] * torch.sin(phase)
    return (torch.exp(log_decay.unsqueeze(-1) * steps) * turned).sum(1)


def timestep_norm_plain(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float = 1e-5) -> Tensor:
    """TimestepNorm with cumulative sums in float32, relative to the first step's mean, as given to the compiler.

    x (B, L, D) -> y (B, L, D), from count 0.
    """
    grouped = x.to(weight.dtype).unflatten(2, (groups, -1))  # (B, L, G, D/G)
    variance, mean = torch.var_mean(grouped, -1, correction=0)
    pivot = mean[:, :1].detach()
    mean = mean - pivot
    n = torch.arange(1, x.shape[1] + 1, dtype=weight.dtype, device=x.device).view(1, -1, 1)
    running_mean = _sums_over_time(mean) / n
    running_var = (_sums_over_time(variance + mean * mean) / n - running_mean * running_mean).clamp(min=0)
    y = (grouped - (running_mean + pivot).unsqueeze(-1)) * torch.rsqrt(running_var + eps).unsqueeze(-1)
    return (y.flatten(2) * (weight + 1) + bias).to(x.dtype)


def _sums_over_time(x: Tensor) -> Tensor:
    """Cumulative sums of (B, L, G) over L, moved to the last dimension, where compilers make a better scan of it."""
    return x.transpose(1, 2).contiguous().cumsum(-1).transpose(1, 2)
