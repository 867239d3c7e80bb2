"""What the adapter parallelizes: the model, or what the host's pipeline splitting leaves of it on one rank."""

from megalodon_plugin.parallel.model_part import ModelPart


class MegalodonStage(ModelPart):
    """A `ModelPart` with what the adapter sets on it."""

    logits_in_loss: bool

    weight_decay_on: str
    """`megalodon.weight_decay_on`, for the optimizers. The host gives their builder the model parts and `[optimizer]`
    alone; `parallelize_megalodon`, which runs just before, has both the parts and the job, and leaves the option
    here."""
