"""One layer: the attention block, then the feed-forward network with the residual from the layer's input."""

from torch import Tensor, nn

from .attention import MegalodonAttention
from .config import MegalodonConfig
from .feed_forward import FeedForward
from .state import LayerState


class MegalodonBlock(nn.Module):
    """x (B, L, D) -> (B, L, D); with a state, a piece of a text and what it leaves."""

    def __init__(self, cfg: MegalodonConfig, layer_id: int):
        super().__init__()
        self.attention = MegalodonAttention(cfg, layer_id)
        self.feed_forward = FeedForward(cfg, layer_id)

    def init_weights(self) -> None:
        self.attention.init_weights()
        self.feed_forward.init_weights()

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        position: Tensor | None = None,
        return_state: bool = False,
        in_place: bool = False,
    ) -> Tensor | tuple[Tensor, LayerState]:
        """Whole rows without a state: the output alone. With `return_state`: the output and the state after it.

        `in_place`: see `MegalodonAttention.forward`.
        """
        attended = self.attention(x, state, position, return_state, in_place)
        if not return_state:
            return self.feed_forward(attended, x)
        y, new_state = attended
        return self.feed_forward(y, x), new_state
