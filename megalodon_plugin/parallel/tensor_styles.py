"""How tensor parallelism changes one module: its parameters, what it computes, what it exchanges.

Parameters become DTensors, which initialisation, optimizers, FSDP and checkpoints understand. The forward pass computes
with local tensors: CEMA and the norms are ops of our own, and every exchange stands where it is written.
"""

import functools
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn import functional as F

from megalodon_plugin.model.norm import TimestepNorm
from megalodon_plugin.model.rank_hooks import LocalView

from .collectives import Ranks
from .tensor_exchanges import gather_features, gather_vocabulary, scatter_features, sum_gradient, vocabulary_rows


@dataclass(frozen=True)
class Style:
    """How one module is changed; each of its children has its own style."""

    shard: int | None
    """The dimension along which its parameters are cut; None: every rank has all of them, and their gradients are
    summed."""
    gather_input: bool = False
    """It mixes all features, so they are gathered first."""
    scatter_output: bool = False
    """It computes partial sums over the ranks: the sums are scattered, each rank getting its features."""


class HasLocalView(Protocol):
    """A module with other parameters than matrices; see `model.rank_hooks`."""

    local_view: LocalView


def shard_module(module: nn.Module, style: Style, mesh: DeviceMesh, ranks: Ranks) -> None:
    """Cut the module's parameters and make it compute this rank's part, by `style`. `mesh` has 1 dimension, `ranks`."""
    placement = Replicate() if style.shard is None else Shard(style.shard)
    for name, parameter in list(module.named_parameters(recurse=False)):
        part = distribute_tensor(parameter, mesh, [placement])
        module.register_parameter(name, nn.Parameter(part, parameter.requires_grad))
    if isinstance(module, nn.Embedding) and style.shard == 0:
        module.__class__ = _embedding_of_rows(type(module), ranks)
    elif isinstance(module, nn.Linear | nn.Embedding):
        module.__class__ = cast(Any, _with_local_parameters(cast(Any, type(module))))
    else:
        summed = functools.partial(_local_with_summed_gradient, ranks=ranks)
        cast(HasLocalView, module).local_view = summed if style.shard is None else _local_part
    if isinstance(module, TimestepNorm):
        module.num_groups //= ranks.size
    if style.gather_input:
        module.register_forward_pre_hook(functools.partial(_gather_input, ranks=ranks))
    if style.scatter_output:
        module.register_forward_hook(functools.partial(_scatter_output, ranks=ranks))


def register_logits_hook(output: nn.Linear, mesh: DeviceMesh, ranks: Ranks, loss_parallel: bool) -> None:
    """Make the sharded output layer return a DTensor, Shard(-1), or without `loss_parallel` all logits."""
    if loss_parallel:
        output.register_forward_hook(functools.partial(_logits_as_dtensor, mesh=mesh))
    else:
        output.register_forward_hook(functools.partial(_all_logits, ranks=ranks))


def _local_part(parameter: Tensor) -> Tensor:
    """This rank's part of a parameter."""
    assert isinstance(parameter, DTensor)
    return parameter.to_local()


def _local_with_summed_gradient(parameter: Tensor, ranks: Ranks) -> Tensor:
    """A parameter that all ranks hold in full and use for different parts of the output."""
    return sum_gradient(_local_part(parameter), ranks)


def _gather_input(module: nn.Module, args: tuple[Any, ...], ranks: Ranks) -> tuple[Any, ...]:
    return gather_features(args[0], ranks), *args[1:]


def _scatter_output(module: nn.Module, args: tuple[Any, ...], output: Tensor, ranks: Ranks) -> Tensor:
    return scatter_features(output, ranks)


def _all_logits(module: nn.Linear, args: tuple[Any, ...], output: Tensor, ranks: Ranks) -> Tensor:
    return gather_vocabulary(output, ranks, module.out_features)


def _logits_as_dtensor(module: nn.Linear, args: tuple[Any, ...], output: Tensor, mesh: DeviceMesh) -> Tensor:
    batch, length, _ = output.shape
    size = module.out_features
    shape, stride = torch.Size((batch, length, size)), (length * size, size, 1)  # the ranks' parts may differ in size
    return DTensor.from_local(output, mesh, [Shard(2)], run_check=False, shape=shape, stride=stride)


class _LocalParameters:
    """Stands in for a module as the `self` of its class's forward, with this rank's parts as weight and bias."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.weight = _local_part(cast(Tensor, module.weight))
        bias = getattr(module, "bias", None)
        self.bias = None if bias is None else _local_part(bias)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


@functools.cache
def _with_local_parameters(base: type[nn.Module]) -> type[nn.Module]:
    """The class of layer that computes as `base`, nn.Linear or one of its subclasses, with local parameters.

    The parameters themselves stay DTensors, and the module stays an instance of `base`, by which others find it. In
    torchao's Float8Linear each rank then scales its own part of the weight, which needs no exchange.
    """

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return base.forward(_LocalParameters(self), x)

    return type(f"Local{base.__name__}", (base,), {"forward": forward})


def _embedding_of_rows(base: type[nn.Embedding], ranks: Ranks) -> type[nn.Embedding]:
    """The class of embedding that looks up tokens in this rank's rows and gives zeros for all others."""

    def forward(self: nn.Embedding, tokens: Tensor) -> Tensor:
        first, end = vocabulary_rows(self.num_embeddings, ranks)
        here = (tokens >= first) & (tokens < end)
        found = F.embedding(torch.where(here, tokens - first, 0), _local_part(self.weight))
        return torch.where(here.unsqueeze(-1), found, 0)

    return type(f"RowsOf{base.__name__}", (base,), {"forward": forward})
