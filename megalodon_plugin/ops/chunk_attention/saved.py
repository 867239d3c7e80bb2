"""What chunk attention's forward pass saves for its backward pass."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class SavedForward:
    """Arguments and results of a forward pass that its backward pass reads, all contiguous."""

    q: Tensor  # (B, L, H, E)
    k: Tensor
    v: Tensor  # (B, L, H, F)
    out: Tensor  # (B, L, H, F)
    log_sum: Tensor  # logarithm of each softmax's sum, (B, L, H)
