"""What the adapter parallelizes: the model, or what the host's pipeline splitting leaves of it on one rank."""

from torch import nn

from megalodon_plugin.model import MegalodonConfig
from megalodon_plugin.model.norm import TimestepNorm
from megalodon_plugin.model.output import OutputLayer


class MegalodonStage(nn.Module):
    """A Megalodon of which the parts that lie on other ranks are None and `layers` are this rank's own.

    It names types and is never constructed: a Protocol could not be an `nn.Module`, which the host and torch ask for.
    """

    cfg: MegalodonConfig
    tok_embeddings: nn.Embedding | None
    layers: nn.ModuleDict
    norm: TimestepNorm | None
    output: OutputLayer | None
    logits_in_loss: bool

    weight_decay_on: str
    """`megalodon.weight_decay_on`, for the optimizers. The host gives their builder the model parts and `[optimizer]`
    alone; `parallelize_megalodon`, which runs just before, has both the parts and the job, and leaves the option
    here."""
