"""Rotary position embedding with the position inside the chunk, on interleaved pairs."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Rotary(nn.Module):
    """Turn pair j of a head by the angle position * theta^(-2j/E), E = head size (RoPE, arXiv 2104.09864).

    The table of cosines and sines, (C, E/2, 2), is a function of the configuration alone. So it is computed whenever
    the module is moved, materialised from the meta device or recast: a checkpoint need not hold it, `to_empty` cannot
    lose it, and `.double()` gets float64 accuracy where `.bfloat16()` keeps float32.
    """

    def __init__(self, head_dim: int, chunk_size: int, theta: float):
        super().__init__()
        self.head_dim, self.chunk_size, self.theta = head_dim, chunk_size, theta
        dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
        self.table: Tensor
        self.register_buffer("table", self._make_table(torch.get_default_device(), dtype), persistent=False)

    def _make_table(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        # Exponent, power and reciprocal are each rounded to float32, as in the authors' code; the angles keep float64
        # until the end. The power itself is taken in float64: machines differ in the last bit of a float32 one.
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=device) / self.head_dim
        frequencies = (1.0 / (self.theta ** exponents.double()).float()).double()
        positions = torch.arange(self.chunk_size, dtype=torch.float64, device=device)
        angles = torch.outer(positions, frequencies)
        return torch.stack([angles.cos(), angles.sin()], -1).to(dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Rotary":
        super()._apply(fn, recurse)
        dtype = torch.float64 if self.table.dtype == torch.float64 else torch.float32
        self.table = self._make_table(self.table.device, dtype)
        return self

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """x (B, L, H, E), positions inside the chunk (L,) or (B, L) -> (B, L, H, E) in x's dtype."""
        cos, sin = self.table[positions].unsqueeze(-3).unbind(-1)  # (L, 1, E/2) or (B, L, 1, E/2)
        even, odd = x.to(self.table.dtype).unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
        return turned.flatten(-2).to(x.dtype)
