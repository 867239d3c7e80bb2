"""The host's optimizers, with the choice of where weight decay falls."""

from typing import Any, cast

from torch import nn
from torchtitan.components.optimizer import OptimizersContainer, build_optimizers

from .stage import MegalodonStage


def build_megalodon_optimizers(model_parts: list[nn.Module], optimizer_config: Any, parallel_dims: Any):
    """The host's optimizers; with `megalodon.weight_decay_on` = "matrices" in two groups, one of them without decay.

    `parallelize_megalodon` has left that option on each part, see `MegalodonStage`.

    Matrices are the weights of linear layers and the embedding. Norms, biases, attention gamma/beta and CEMA are not.
    """
    optimizers: OptimizersContainer = build_optimizers(model_parts, optimizer_config, parallel_dims)
    if all(cast(MegalodonStage, part).weight_decay_on == "all" for part in model_parts):
        return optimizers
    matrices = {
        id(module.weight)
        for part in model_parts
        for module in part.modules()
        if isinstance(module, nn.Linear | nn.Embedding)
    }
    for optimizer in optimizers:
        (group,) = optimizer.param_groups
        decayed = [p for p in group["params"] if id(p) in matrices]
        others = [p for p in group["params"] if id(p) not in matrices]
        groups = [{**group, "params": decayed}, {**group, "params": others, "weight_decay": 0.0}]
        optimizer.param_groups[:] = [g for g in groups if g["params"]]
    return optimizers
