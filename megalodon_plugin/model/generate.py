"""Sampling through the streaming path: constant memory however long the text grows."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .model import Megalodon


@torch.no_grad()
def generate(
    model: Megalodon,
    prompt: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    prefill_tokens: int | None = None,
    n_tokens: int | None = None,
) -> Iterator[Tensor]:
    """Yield the next token of each row, (B,) int64, again and again.

    Args:
        model: in eval mode.
        prompt: (B, L) int64, L >= 1.
        max_new_tokens: how many to yield.
        temperature: logits are divided by it; 0 takes the likeliest token.
        generator: source of the random numbers.
        prefill_tokens: the prompt is read in pieces of this length, one chunk by default.
        n_tokens: only tokens below it are drawn (a tokenizer may have fewer than the model), all by default.

    Raises:
        ValueError: the prompt is empty, the model is in training mode, or a number is out of range.
    """
    if model.training:
        raise ValueError("the model must be in eval mode to generate; call `model.eval()`")
    if prompt.ndim != 2 or prompt.shape[1] < 1:
        raise ValueError(f"`prompt` must have shape (B, L) with L >= 1, but has {tuple(prompt.shape)}")
    if max_new_tokens < 0:
        raise ValueError(f"`max_new_tokens` must not be negative, but is {max_new_tokens}")
    for name, number in (("prefill_tokens", prefill_tokens), ("n_tokens", n_tokens)):
        if number is not None and number < 1:
            raise ValueError(f"`{name}` must be at least 1, but is {number}")
    if temperature < 0:
        raise ValueError(f"`temperature` must not be negative, but is {temperature}")
    state = None
    for piece in prompt.split(prefill_tokens or model.cfg.chunk_size, 1):
        logits, state = model(piece, state=state, return_state=True)
    for left in range(max_new_tokens, 0, -1):
        token = _sample(logits[:, -1, :n_tokens], temperature, generator)
        yield token
        if left > 1:
            logits, state = model(token.unsqueeze(1), state=state, return_state=True)


def _sample(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """(B, vocabulary) -> (B,)"""
    if temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator).squeeze(1)
