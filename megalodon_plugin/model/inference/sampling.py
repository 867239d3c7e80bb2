"""The choice of the next token from its logits."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn from softmax(logits / temperature).

    temperature: 0 takes the likeliest token, whatever the others say.
    top_k: only the k likeliest tokens are drawn.
    top_p: only the likeliest tokens that together reach this probability are drawn (nucleus sampling, arXiv
        1904.09751), at least one; of those that `top_k` leaves.

    Raises:
        ValueError: a number is out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"`temperature` must be finite and not be negative, but is {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"`top_k` must be at least 1, but is {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` must lie in (0, 1], but is {self.top_p}")

    def draw(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """(B, vocabulary) -> (B,) int64"""
        if self.temperature == 0:
            return logits.argmax(-1)
        # From the largest logit on, so that a tiny temperature does not overflow.
        logits = (logits - logits.amax(-1, keepdim=True)) / self.temperature
        if self.top_k is None and self.top_p is None:
            return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)
        kept = min(self.top_k or logits.shape[-1], logits.shape[-1])
        values, tokens = logits.topk(kept)  # descending
        probabilities = values.softmax(-1)
        if self.top_p is not None:
            before = probabilities.cumsum(-1) - probabilities
            # The first token stays: what comes before it is 0, up to rounding.
            before[:, 0] = 0
            probabilities = probabilities.masked_fill(before >= self.top_p, 0)
        place = torch.multinomial(probabilities, 1, generator=generator)
        return tokens.gather(1, place).squeeze(1)
