"""TimestepNorm on one of several consecutive slices of time: the statistics of the slice alone.

A running mean and variance after n steps are the mean and population variance of all n F numbers of the group, so a
slice's statistics need no walk over time; `merge_norm_states` joins those of two slices.
"""

import torch
from torch import Tensor

from .. import dispatch
from ..checks import check_activation, compute_dtype, without_autocast
from ..library import define_gradient, define_op
from . import slices_cuda
from .state import NormState


def norm_summary(x: Tensor, num_groups: int, dtype: torch.dtype) -> NormState:
    """The state that TimestepNorm leaves after x alone, from count 0; differentiable in mean and var.

    Args:
        x: (B, L, D), bfloat16, float32 or float64.
        num_groups: G, divides D.
        dtype: that of mean and var: float32, or float64 in a float64 model.
    """
    check_activation("x", x, 3)
    mean, var = _summary_op(x, num_groups, dtype)
    count = torch.full((x.shape[0],), x.shape[1], dtype=torch.int64, device=x.device)
    return NormState(count, mean, var)


def norm_fold(summaries: Tensor, rank: int) -> Tensor:
    """Mean and variance (2, B, G) of slices 0 .. rank - 1, from those of each, (P, 2, B, G); zeros for the first.

    The slices are equally long:  mean = average of mean_k,  var = average of var_k + (mean_k - mean)^2. No gradient
    flows through it; see `norm_fold_grad`.
    """
    return _fold_op(summaries, rank)


def norm_fold_grad(summaries: Tensor, grads: Tensor, rank: int) -> Tensor:
    """Gradient (2, B, G) of slice `rank`'s mean and variance from those of what came before each slice, (P, 2, B, G).

    Of the fold of n slices, with gradient (dm, dv):   dmean_k = (dm + 2 (mean_k - m) dv) / n,   dvar_k = dv / n.
    """
    return _fold_grad_op(summaries, grads, rank)


def _fold_impl(summaries: Tensor, rank: int) -> Tensor:
    if rank == 0:
        return torch.zeros_like(summaries[0])
    means, variances = summaries[:rank].double().unbind(1)
    mean = means.mean(0)
    return torch.stack([mean, (variances + (means - mean).square()).mean(0)]).to(summaries.dtype)


def _fold_grad_impl(summaries: Tensor, grads: Tensor, rank: int) -> Tensor:
    total = torch.zeros_like(grads[0], dtype=torch.float64)
    means = summaries[:, 0].double()
    for later in range(rank + 1, summaries.shape[0]):
        dmean, dvar = grads[later].double().unbind(0)
        centred = means[rank] - means[:later].mean(0)
        total = total + torch.stack([dmean + 2 * centred * dvar, dvar]) / later
    return total.to(grads.dtype)


def _forward_impl(x: Tensor, num_groups: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if x.is_cuda and dtype == torch.float32 and slices_cuda.takes(x):
        found = dispatch.kernel_or_none("timestep_norm", x, lambda: slices_cuda.summary(x, num_groups))
        if found is not None:
            return found
    with without_autocast(x):
        grouped = x.unflatten(2, (num_groups, -1)).to(compute_dtype(x))  # (B, L, G, F)
        # By steps first, then over time in float64: neither the length nor data far from 0 costs accuracy.
        step_var, step_mean = torch.var_mean(grouped, -1, correction=0)
        var_of_means, mean = torch.var_mean(step_mean.double(), 1, correction=0)
        return mean.to(dtype), (step_var.double().mean(1) + var_of_means).to(dtype)


_summary_op = define_op("norm_summary", _forward_impl)
_fold_op = define_op("norm_fold", _fold_impl)
_fold_grad_op = define_op("norm_fold_grad", _fold_grad_impl)


@torch.library.register_fake("megalodon::norm_summary")
def _(x, num_groups, dtype):
    return x.new_empty(x.shape[0], num_groups, dtype=dtype), x.new_empty(x.shape[0], num_groups, dtype=dtype)


@torch.library.register_fake("megalodon::norm_fold")
def _(summaries, rank):
    return summaries.new_empty(summaries.shape[1:])


@torch.library.register_fake("megalodon::norm_fold_grad")
def _(summaries, grads, rank):
    return grads.new_empty(grads.shape[1:])


def _save_for_backward(ctx, inputs, output) -> None:
    x, ctx.num_groups, _ = inputs
    ctx.save_for_backward(x, output[0])


def _backward(ctx, dmean: Tensor, dvar: Tensor):
    """dx = (dmean + 2 (x - mean) dvar) / (L F). No op of its own: a compiler joins it to what it is added to."""
    x, mean = ctx.saved_tensors
    dtype = compute_dtype(x)
    grouped = x.unflatten(2, (ctx.num_groups, -1)).to(dtype)  # (B, L, G, F)
    scale = 1 / (grouped.shape[1] * grouped.shape[3])
    dmean, dvar, mean = (t[:, None, :, None].to(dtype) for t in (dmean, dvar, mean))
    dx = dmean * scale + (grouped - mean) * (dvar * (2 * scale))
    return dx.flatten(2).to(x.dtype), None, None


define_gradient(_summary_op, _save_for_backward, _backward)
