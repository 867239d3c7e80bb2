"""Sampling through the streaming path: constant memory however long the text grows."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model import Megalodon
from .decode import Decoder
from .prefill import Prefilled, prefill
from .sampling import Sampling

ENDED = -1
"""What is yielded for a row after its stop token."""


@dataclass(frozen=True)
class Decoding:
    """How texts are continued.

    max_new_tokens: how many tokens each row gets at most.
    n_tokens: only tokens below it are drawn (a tokenizer may have fewer than the model), all by default.
    stop_tokens: they end a row.
    compile: see `Decoder`.

    Raises:
        ValueError: a number is out of range.
    """

    max_new_tokens: int
    sampling: Sampling
    n_tokens: int | None = None
    stop_tokens: Collection[int] = ()
    compile: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 0:
            raise ValueError(f"`max_new_tokens` must not be negative, but is {self.max_new_tokens}")
        if self.n_tokens is not None and self.n_tokens < 1:
            raise ValueError(f"`n_tokens` must be at least 1, but is {self.n_tokens}")


def generate(
    model: Megalodon,
    prompt: Tensor | Sequence[Tensor],
    max_new_tokens: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    prefill_tokens: int | None = None,
    n_tokens: int | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: Collection[int] = (),
) -> Iterator[Tensor]:
    """Yield the next token of each row, (B,) int64, again and again: `continue_from` after `prefill`.

    Args:
        model: in eval mode.
        prompt: (B, L) int64, L >= 1, or B tensors (L_b,) int64 of different lengths.
        max_new_tokens: how many to yield.
        temperature, top_k, top_p: see `Sampling`.
        generator: source of the random numbers.
        prefill_tokens: the prompt is read in pieces of this length; see `prefill`.
        n_tokens, stop_tokens: see `Decoding`.

    Raises:
        ValueError: the prompt is empty, the model is in training mode, or a number is out of range.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    decoding = Decoding(max_new_tokens, sampling, n_tokens, stop_tokens)
    prefilled = prefill(model, prompt, piece_tokens=prefill_tokens)
    yield from continue_from(model, prefilled, decoding, generator)


def continue_from(
    model: Megalodon, prefilled: Prefilled, decoding: Decoding, generator: torch.Generator | None = None
) -> Iterator[Tensor]:
    """Yield the next token of each row, (B,) int64, until every row has ended; -1 for a row that has.

    `prefilled` stays as it is.

    Raises:
        ValueError: the logits are not finite.
    """
    logits = prefilled.logits
    if not bool(logits.isfinite().all()):
        raise ValueError("the logits after the prompt must be finite, but are not: the weights may hold NaN")
    stops = torch.tensor(sorted(decoding.stop_tokens), dtype=torch.int64, device=logits.device)
    ended = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    decoder: Decoder | None = None
    for left in range(decoding.max_new_tokens, 0, -1):
        token = decoding.sampling.draw(logits[:, : decoding.n_tokens], generator)
        yield token.masked_fill(ended, ENDED)
        ended |= torch.isin(token, stops)
        if left == 1 or (len(stops) and bool(ended.all())):
            return
        if decoder is None:
            decoder = Decoder(model, prefilled.state.map(torch.clone), compile=decoding.compile)
        logits = decoder.step(token)
