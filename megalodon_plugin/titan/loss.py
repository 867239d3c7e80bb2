"""The host's cross-entropy with a factor that can be set before the backward pass."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torchtitan.components.loss import build_cross_entropy_loss

from megalodon_plugin.model.output import attached_output_layer


class ScaledLoss:
    """Sum of the tokens' cross-entropies times `scale`.

    Under pipeline parallelism the schedule runs the backward pass inside, on whatever this returns; the host divides by
    the token count only afterwards, which leaves the gradients undivided (torchtitan #2972). So the plugin's Trainer
    scales by 1 / tokens of the step.

    `pred` are logits, or features whose output layer has yet to be applied: then both are done part by part, and the
    logits of a long row never exist at once.
    """

    def __init__(self, loss_fn: Any):
        self.loss_fn = loss_fn
        self.scale: Tensor | float = 1.0

    @contextmanager
    def scaled_by(self, scale: Tensor | float) -> Iterator[None]:
        """Scale what is computed inside, however it ends."""
        self.scale = scale
        try:
            yield
        finally:
            self.scale = 1.0

    def __call__(self, pred: Tensor, labels: Tensor) -> Tensor:
        output = attached_output_layer(pred)
        loss = self.loss_fn(pred, labels) if output is None else output(pred, labels)
        return loss if isinstance(self.scale, float) and self.scale == 1.0 else loss * self.scale


def build_loss(job_config: Any, **kwargs: Any) -> ScaledLoss:
    """`build_loss_fn` of the train spec."""
    return ScaledLoss(build_cross_entropy_loss(job_config, **kwargs))
