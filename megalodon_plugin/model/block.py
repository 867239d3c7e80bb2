"""One layer: the attention block, then the feed-forward network with the residual from the layer's input."""

from typing import overload

from torch import Tensor, nn

from .attention import MegalodonAttention
from .config import MegalodonConfig
from .feed_forward import FeedForward
from .state import LayerPast, LayerState


class MegalodonBlock(nn.Module):
    """x (B, L, D) -> (B, L, D): rows from their start, or a piece of each row's text after an earlier one."""

    def __init__(self, cfg: MegalodonConfig, layer_id: int):
        super().__init__()
        self.attention = MegalodonAttention(cfg, layer_id)
        self.feed_forward = FeedForward(cfg, layer_id)

    def init_weights(self) -> None:
        self.attention.init_weights()
        self.feed_forward.init_weights()

    @overload
    def forward(self, x: Tensor, past: None = None) -> Tensor: ...

    @overload
    def forward(self, x: Tensor, past: LayerPast) -> tuple[Tensor, LayerState]: ...

    def forward(self, x: Tensor, past: LayerPast | None = None) -> Tensor | tuple[Tensor, LayerState]:
        """The output for rows from their start; for a piece after `past` the output and the state after it.

        One method for both, as in `MegalodonAttention`: FSDP, activation checkpointing and torch.compile wrap the call.
        """
        if past is None:
            return self.feed_forward(self.attention(x), x)
        y, state = self.attention(x, past)
        return self.feed_forward(y, x), state
