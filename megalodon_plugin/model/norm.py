"""The model's three norms. All compute in float32 (float64 in a float64 model) and return their input's dtype."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megalodon_plugin.ops import NormState, timestep_norm
from megalodon_plugin.ops.timestep_norm import norm_summary

from .rank_hooks import LocalView, NormPrefix, identity


class TimestepNorm(nn.Module):
    """Group norm by statistics that run over time; see `ops.timestep_norm`. The gain is weight + 1."""

    def __init__(self, dim: int, num_groups: int, eps: float):
        super().__init__()
        self.num_groups, self.eps = num_groups, eps
        self.local_view: LocalView = identity
        self.prefix: NormPrefix | None = None
        self.weight = nn.Parameter(torch.zeros(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def init_weights(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(
        self, x: Tensor, state: NormState | None = None, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, NormState]:
        if self.prefix is not None:
            assert state is None and padding_mask is None
            state = self.prefix(norm_summary(x, self.num_groups, self.weight.dtype))
        weight, bias = self.local_view(self.weight), self.local_view(self.bias)
        return timestep_norm(x, weight, bias, self.num_groups, self.eps, state, padding_mask)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * (weight + 1); without a weight if not affine."""

    def __init__(self, dim: int, eps: float, affine: bool):
        super().__init__()
        self.dim, self.eps = dim, eps
        self.local_view: LocalView = identity
        self.weight = nn.Parameter(torch.zeros(dim)) if affine else None

    def init_weights(self) -> None:
        if self.weight is not None:
            nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        gain = None if self.weight is None else self.local_view(self.weight) + 1
        return F.rms_norm(at_least_float32(x), (self.dim,), gain, self.eps).to(x.dtype)


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) * (weight + 1) + bias; without weight and bias if not affine."""

    def __init__(self, dim: int, eps: float, affine: bool):
        super().__init__()
        self.dim, self.eps = dim, eps
        self.local_view: LocalView = identity
        self.weight = nn.Parameter(torch.zeros(dim)) if affine else None
        self.bias = nn.Parameter(torch.zeros(dim)) if affine else None

    def init_weights(self) -> None:
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        gain = None if self.weight is None else self.local_view(self.weight) + 1
        shift = None if self.bias is None else self.local_view(self.bias)
        return F.layer_norm(at_least_float32(x), (self.dim,), gain, shift, self.eps).to(x.dtype)


def at_least_float32(x: Tensor) -> Tensor:
    """x itself in float32 or float64, else as float32."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
