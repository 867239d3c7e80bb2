"""What ranks exchange under tensor parallelism, on local tensors and with gradients.

Between blocks each of P ranks holds its D/P features of every position. A map that mixes all features takes gathered
ones and gives its own part (column-wise), or takes its own part and gives partial sums over the ranks, which are added
up and spread over the features again (row-wise). Each exchange is the other's gradient.

| | forward | backward |
|---|---|---|
| `gather_features` | all-gather | reduce-scatter |
| `scatter_features` | reduce-scatter | all-gather |
| `sum_gradient` | | all-reduce |
| `gather_vocabulary` | all-gather | |
"""

# mypy: disable-error-code="override"
# (torch types `backward` as a function of any number of gradients.)

import torch
from torch import Tensor
from torch.nn import functional as F

from .collectives import Ranks, start_all_reduce, start_gather, start_reduce_scatter, wait


def gather_features(x: Tensor, ranks: Ranks) -> Tensor:
    """x (B, L, D/P) of every rank -> (B, L, D) on each. The gradients are partial sums over the ranks."""
    return _GatherFeatures.apply(x, ranks)


def scatter_features(x: Tensor, ranks: Ranks) -> Tensor:
    """Partial sums (B, L, D) of every rank, added up -> each rank's own features (B, L, D/P). P must divide D."""
    return _ScatterFeatures.apply(x, ranks)


def sum_gradient(parameter: Tensor, ranks: Ranks) -> Tensor:
    """The parameter as it is, any shape; its gradient is added up over the ranks, each of which finds a part of it."""
    return _SumGradient.apply(parameter, ranks)


def vocabulary_rows(size: int, ranks: Ranks) -> tuple[int, int]:
    """First row and row after the last of this rank's part of `size` rows, cut as DTensor cuts them."""
    rows = -(-size // ranks.size)
    return min(ranks.rank * rows, size), min((ranks.rank + 1) * rows, size)


def gather_vocabulary(logits: Tensor, ranks: Ranks, size: int) -> Tensor:
    """Logits (B, L, rows of this rank) of every rank -> (B, L, size) on each; P need not divide `size`.

    All ranks go on to compute the same from the result, so its gradient is whole on each and nothing is added up.
    """
    return _GatherVocabulary.apply(logits, ranks, size)


def _gather(x: Tensor, ranks: Ranks) -> Tensor:
    parts = wait(start_gather(x.unsqueeze(0), ranks))  # (P, B, L, D/P)
    return parts.movedim(0, -2).flatten(-2)  # (B, L, D)


def _scatter(x: Tensor, ranks: Ranks) -> Tensor:
    parts = x.unflatten(-1, (ranks.size, -1)).movedim(-2, 0)  # (P, B, L, D/P)
    return wait(start_reduce_scatter(parts, ranks)).squeeze(0)


class _GatherFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return _gather(x, ranks)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _scatter(grad, ctx.ranks), None


class _ScatterFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return _scatter(x, ranks)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _gather(grad, ctx.ranks), None


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, parameter: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return wait(start_all_reduce(grad, ctx.ranks)), None


class _GatherVocabulary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, ranks: Ranks, size: int) -> Tensor:
        ctx.rows = vocabulary_rows(size, ranks)
        most = -(-size // ranks.size)
        # Only the last ranks hold fewer rows, so what fills them up lies behind all the others.
        return _gather(F.pad(logits, (0, most - logits.shape[-1])), ranks)[..., :size]

    @staticmethod
    def backward(ctx, grad: Tensor):
        first, end = ctx.rows
        return grad[..., first:end], None, None
