"""What TimestepNorm's forward pass saves for its backward pass."""

from dataclasses import dataclass

from torch import Tensor

from .state import NormState


@dataclass(frozen=True)
class SavedForward:
    """Arguments and results of a forward pass that its backward pass reads."""

    x: Tensor
    weight: Tensor
    state: NormState  # before x
    padding_mask: Tensor | None
    step_mean: Tensor  # running mean of each step, minus the carried one, (B, L, G)
    step_rstd: Tensor  # 1 / std of each step, (B, L, G)
