"""The few collectives that the plugin issues itself, as traceable ops.

They are PyTorch's functional collectives: a call starts the exchange and returns at once, `wait` gives the tensor when
it has arrived. torch.compile sees both, and a mode that looks at dispatched ops can count them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

_functional = torch.ops._c10d_functional


@dataclass(frozen=True)
class Ranks:
    """The ranks of one dimension of the mesh, as the ops name them."""

    size: int
    rank: int
    name: str

    @classmethod
    def of(cls, group: ProcessGroup) -> "Ranks":
        return cls(group.size(), group.rank(), group.group_name)


def start_gather(x: Tensor, ranks: Ranks) -> Tensor:
    """Start to collect x (n, ...) of every rank, in their order: (P * n, ...). To be read after `wait`."""
    return _functional.all_gather_into_tensor(x.contiguous(), ranks.size, ranks.name)


def start_reduce_scatter(x: Tensor, ranks: Ranks) -> Tensor:
    """Start to add x (P * n, ...) up over the ranks and to hand each its part (n, ...). To be read after `wait`."""
    return _functional.reduce_scatter_tensor(x.contiguous(), "sum", ranks.size, ranks.name)


def start_all_reduce(x: Tensor, ranks: Ranks) -> Tensor:
    """Start to add x up over the ranks. To be read after `wait`."""
    return _functional.all_reduce(x.contiguous(), "sum", ranks.name)


def wait(x: Tensor) -> Tensor:
    """x, the result of a collective, once it has arrived. Waiting twice does no harm."""
    return _functional.wait_tensor(x)
