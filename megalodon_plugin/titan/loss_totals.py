"""Sums of losses over a step or a validation, and what they come to over all ranks of any layout."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchtitan.components.loss import IGNORE_INDEX


def count_labels(labels: Tensor) -> Tensor:
    """Number of the labels that count, ()."""
    return (labels != IGNORE_INDEX).sum()


class Losses(NamedTuple):
    """Mean cross-entropies a token: over all tokens, and of the rank where it is largest. NaN without tokens."""

    mean: float
    largest: float


class LossTotals:
    """This rank's sum of losses and number of the tokens behind them.

    A rank's tokens are those whose label counts, of its own rows and, under context parallelism, of its own slice of
    them. A pipeline rank without the last stage adds nothing. Tensor parallel ranks have the same tokens and losses.
    """

    def __init__(self, device: torch.device | str):
        self._device = device
        self.clear()

    def clear(self) -> None:
        """Start again from zero."""
        self._sums = torch.zeros(2, dtype=torch.float64, device=self._device)  # losses, tokens

    def add(self, loss_sum: Tensor, n_tokens: Tensor) -> None:
        """Add the sum of `n_tokens` losses, both () on any device; a DTensor must be whole on every rank."""
        if isinstance(loss_sum, DTensor):
            loss_sum = loss_sum.full_tensor()
        self._sums += torch.stack([value.detach().to(self._sums) for value in (loss_sum, n_tokens)])

    def over_ranks(self) -> Losses:
        """The losses of all ranks together. Every rank of the job must call it: one all-gather of 16 bytes a rank."""
        sums = self._sums.new_empty(dist.get_world_size() * 2)
        dist.all_gather_into_tensor(sums, self._sums)
        return combine(sums.view(-1, 2))


def combine(sums: Tensor) -> Losses:
    """What (sum of losses, number of tokens) of each rank, (ranks, 2) float64, come to.

    Tokens that several ranks count alike leave the mean as it is.
    """
    losses, tokens = sums.cpu().unbind(1)
    own = losses[tokens > 0] / tokens[tokens > 0]
    mean = losses.sum() / tokens.sum()
    return Losses(float(mean), float(own.max()) if len(own) else float("nan"))
