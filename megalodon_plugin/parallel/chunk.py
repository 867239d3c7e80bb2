"""Chunk parallelism: every rank holds one slice of time of every row, in whole chunks; the ranks stand in order.

Attention stays inside chunks, so it is local. TimestepNorm and CEMA need what all earlier slices leave. Each rank makes
a small summary of its own slice, one all-gather brings all of them to everyone, and each folds those before it, in a
fixed order. Nobody waits for a chain: the paper's own scheme hands the state from rank to rank (arXiv 2404.08801,
section 3.4).

| | summary, float32 | backward |
|---|---|---|
| TimestepNorm | mean and variance, 2 B G numbers | gradient of the statistics before each slice, 2 B G |
| CEMA | hidden state, 2 B D N | gradient of the state before each slice from its own output, 2 B D N |

What a rank computes depends on its number inside ops alone. So all ranks compile the same graph, with the same
exchanges in the same order. In a graph of its own, the first rank, say, would leave out an exchange whose result it
does not need, and the others would wait for it for ever.

CEMA's exchange runs while the block computes its values, which do not need CEMA. TimestepNorm's cannot hide, for
everything in the block needs its output.
"""

# mypy: disable-error-code="override"
# (torch types `backward` as a function of any number of gradients.)

import torch
from torch import Tensor, nn

from megalodon_plugin.model.cema import CEMA
from megalodon_plugin.model.norm import TimestepNorm
from megalodon_plugin.ops import NormState
from megalodon_plugin.ops.cema import CemaParameters, cema_fold, cema_summary, cema_summary_grad
from megalodon_plugin.ops.library import define_op
from megalodon_plugin.ops.timestep_norm import norm_fold, norm_fold_grad

from .collectives import Ranks, start_gather, wait


def apply_chunk_parallel(model: nn.Module, ranks: Ranks) -> None:
    """Make every TimestepNorm and CEMA of the model take its prefix from the ranks before this one."""
    for module in model.modules():
        if isinstance(module, TimestepNorm):
            module.prefix = RanksNormPrefix(ranks)
        elif isinstance(module, CEMA):
            module.prefix = RanksCemaPrefix(ranks)


def _gather_impl(summary: Tensor, size: int, name: str) -> Tensor:
    # A copy that nobody else knows: a compiled graph may put other numbers into `summary` before it has been sent.
    return start_gather(summary.unsqueeze(0).clone(), Ranks(size, 0, name))


# An op of its own, so that activation checkpointing can keep these small results and not every other gather's.
gather_summaries = define_op("gather_summaries", _gather_impl)


@torch.library.register_fake("megalodon::gather_summaries")
def _(summary, size, name):
    return summary.new_empty(size, *summary.shape)


class RanksNormPrefix:
    """`NormPrefix` over ranks: the statistics of all slices before this rank's."""

    def __init__(self, ranks: Ranks):
        self.ranks = ranks

    def __call__(self, summary: NormState) -> NormState:
        ranks = self.ranks
        own = torch.stack([summary.mean, summary.var])
        mean, var = _NormExchange.apply(own, ranks.size, ranks.rank, ranks.name).unbind(0)
        return NormState(summary.count * ranks.rank, mean, var)


class _NormExchange(torch.autograd.Function):
    """(2, B, G) mean and variance of every rank's slice -> those of everything before this rank's slice."""

    @staticmethod
    def forward(ctx, summary: Tensor, size: int, rank: int, name: str) -> Tensor:
        summaries = wait(gather_summaries(summary, size, name))  # (P, 2, B, G)
        ctx.size, ctx.rank, ctx.name = size, rank, name
        ctx.save_for_backward(summaries)
        return norm_fold(summaries, rank)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (summaries,) = ctx.saved_tensors
        grads = wait(gather_summaries(grad, ctx.size, ctx.name))  # (P, 2, B, G): of every rank's prefix
        return norm_fold_grad(summaries, grads, ctx.rank), None, None, None


class RanksCemaPrefix:
    """`CemaPrefix` over ranks."""

    def __init__(self, ranks: Ranks):
        self.ranks = ranks

    def start(self, x: Tensor, parameters: CemaParameters) -> Tensor:
        with torch.no_grad():
            return gather_summaries(cema_summary(x, parameters), self.ranks.size, self.ranks.name)

    def before(self, pending: Tensor, parameters: CemaParameters, length: int) -> Tensor:
        with torch.no_grad():
            return cema_fold(wait(pending), parameters, length, self.ranks.rank)

    def after(self, y: Tensor, h_last: Tensor, parameters: CemaParameters) -> Tensor:
        ranks = self.ranks
        return _CemaAfter.apply(y, h_last, ranks.size, ranks.rank, ranks.name, *parameters)


class _CemaAfter(torch.autograd.Function):
    """y, and backward the gradient that the later slices have for the state this slice leaves."""

    @staticmethod
    def forward(ctx, y, h_last, size, rank, name, alpha, delta, theta, gamma, omega, rotate_input):
        ctx.size, ctx.rank, ctx.name, ctx.rotate_input = size, rank, name, rotate_input
        ctx.save_for_backward(alpha, delta, theta, gamma, omega)
        return y.view_as(y)

    @staticmethod
    def backward(ctx, dy: Tensor):
        alpha, delta, theta, gamma, omega = ctx.saved_tensors
        parameters = CemaParameters(alpha, delta, theta, gamma, omega, ctx.rotate_input)
        gathered = wait(gather_summaries(cema_summary_grad(dy, parameters), ctx.size, ctx.name))
        dh_last = cema_fold(gathered, parameters, dy.shape[1], ctx.rank, reverse=True)
        return dy, dh_last, *[None] * 9
