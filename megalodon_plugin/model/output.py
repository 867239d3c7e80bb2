"""The output layer, which can also end in the loss."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from megalodon_plugin.ops.linear_cross_entropy import linear_cross_entropy


class OutputLayer(nn.Linear):
    """features (..., D) -> logits (..., vocabulary); with labels (...), the sum of their cross-entropies.

    The second way makes the logits of `rows_at_once` positions at a time, see `ops.linear_cross_entropy`. It is a call
    of the module so that whatever gathers the weight (FSDP) does.
    """

    def __init__(self, dim: int, vocab_size: int):
        super().__init__(dim, vocab_size, bias=False)
        self.rows_at_once = 4096
        self.compile_loss = False

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Tensor:
        if labels is None:
            return F.linear(features, self.weight)
        return linear_cross_entropy(features, self.weight, labels, self.rows_at_once, self.compile_loss)


def attach_output_layer(features: Tensor, output: OutputLayer) -> Tensor:
    """The features, with the output layer as an attribute: the loss takes it by `attached_output_layer`."""
    # On the tensor, for nothing else reaches both: the stock entry builds the loss before the model and without it, and
    # calls it with the model's result and the labels alone. A tuple would be taken for several results by what wraps
    # the model, and a subclass of Tensor would be seen by every op of a compiled graph.
    features.output_layer = output  # type: ignore[attr-defined]
    return features


def attached_output_layer(features: Any) -> OutputLayer | None:
    """The output layer that `attach_output_layer` put on the features; None for logits, which carry none."""
    return getattr(features, "output_layer", None)
