"""What a rank is given to share with others: a model, or what a pipeline leaves of it there."""

from torch import nn

from megalodon_plugin.model import MegalodonConfig
from megalodon_plugin.model.norm import TimestepNorm
from megalodon_plugin.model.output import OutputLayer


class ModelPart(nn.Module):
    """A Megalodon of which the parts that lie on other ranks are None and `layers` are this rank's own.

    It names types and is never constructed: a Protocol could not be an `nn.Module`, which the host and torch ask for.
    """

    cfg: MegalodonConfig
    tok_embeddings: nn.Embedding | None
    layers: nn.ModuleDict
    norm: TimestepNorm | None
    output: OutputLayer | None
