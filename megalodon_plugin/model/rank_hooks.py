"""Where ranks come in. The model sees none; `parallel` puts its own callables in these places."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from megalodon_plugin.ops import NormState
from megalodon_plugin.ops.cema import CemaParameters

Read = Callable[[Tensor], Tensor]
"""What a module computes with, from its parameter: under tensor parallelism this rank's part."""

NormPrefix = Callable[[NormState], NormState]
"""From the statistics of this rank's slice of time those of everything before it."""


def whole(parameter: Tensor) -> Tensor:
    """The parameter as it is, the default of `Read`."""
    return parameter


class CemaPrefix(Protocol):
    """From this rank's slice of time the hidden state of everything before it.

    The exchange is started before and waited for after work that needs no result of CEMA.
    """

    def start(self, x: Tensor, parameters: CemaParameters) -> Tensor:
        """Start to exchange what the slices x (B, L, D) leave."""
        ...

    def before(self, pending: Tensor, parameters: CemaParameters, length: int) -> Tensor:
        """The hidden state before the slice, (B, D, N, 2), from what `start` returned. No gradient flows through it."""
        ...

    def after(self, y: Tensor, h_last: Tensor, parameters: CemaParameters) -> Tensor:
        """y as it is; its backward pass hands h_last the gradient that comes from the slices after this one."""
        ...
