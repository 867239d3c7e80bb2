"""Rank hooks: the places where a model that is spread over several ranks (processes) differs from one that is not.

A hook is an attribute of a module, holding a callable that the module calls at one point of its forward pass. The model
itself knows no ranks: as it is built, every hook has a default that does nothing, and the model computes as one
process. The folder `parallel` replaces the defaults before training, and then alone exchanges what ranks need:

| hook, attribute of | called for | default | replaced by |
|---|---|---|---|
| `local_view` of modules with other parameters than matrices | each parameter | `identity` | `tensor_styles` |
| `prefix` of `TimestepNorm` | the statistics before this rank's slice | None: none before | `chunk.RanksNormPrefix` |
| `prefix` of `CEMA` | the hidden state before this rank's slice | None: none before | `chunk.RanksCemaPrefix` |

Tensor parallelism cuts parameters, chunk parallelism cuts each row's time axis into one slice a rank.
"""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from megalodon_plugin.ops import NormState
from megalodon_plugin.ops.cema import CemaParameters

LocalView = Callable[[Tensor], Tensor]
"""From a module's parameter the tensor to compute with: under tensor parallelism this rank's part of it."""

NormPrefix = Callable[[NormState], NormState]
"""From the statistics of this rank's slice those of everything before it."""


def identity(parameter: Tensor) -> Tensor:
    """The parameter as it is: the default `LocalView`."""
    return parameter


class CemaPrefix(Protocol):
    """From this rank's slice the hidden state of everything before it.

    `start` begins the exchange and `before` waits for it, so that work which needs no result of CEMA runs in between.
    """

    def start(self, x: Tensor, parameters: CemaParameters) -> Tensor:
        """Start to exchange the summaries of the slices x (B, L, D); the result is what `before` takes as `pending`."""
        ...

    def before(self, pending: Tensor, parameters: CemaParameters, length: int) -> Tensor:
        """The hidden state before the slice, (B, D, N, 2). No gradient flows through it."""
        ...

    def after(self, y: Tensor, h_last: Tensor, parameters: CemaParameters) -> Tensor:
        """y as it is; its backward pass gives h_last the gradient that comes from the slices after this one."""
        ...
