"""TimestepNorm: group normalisation by statistics that run over time (arXiv 2404.08801, section 3.2).

Carried per batch row: count n (timesteps), mean and var of each of G groups of D/G contiguous features. A step with
group mean mu and population variance s2 of its features:

    n <- n + 1,  c = 1/n,  d = mu - mean,  var <- (1-c) var + c s2 + c (1-c) d^2,  mean <- mean + c d
    y = (x - mean) / sqrt(var + eps) * (weight + 1) + bias          with statistics that include the step

A masked step gives y = 0 and leaves the state.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import dispatch
from ..checks import check_activation, check_parameter, compute_dtype, without_autocast
from ..library import define_gradient, define_op
from . import cuda
from .saved import SavedForward
from .state import NormState, empty_norm_state
from .tiles import takes


def timestep_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float = 1e-5,
    state: NormState | None = None,
    padding_mask: Tensor | None = None,
) -> tuple[Tensor, NormState]:
    """Normalise each timestep by the running statistics up to and including it; equation at the head of this module.

    Args:
        x: (B, L, D), bfloat16, float32 or float64, any strides.
        weight, bias: (D,), float32 (float64 in a float64 model). The gain is weight + 1.
        num_groups: G, divides D.
        eps: added to the variance.
        state: statistics of the timesteps before x; None starts at count 0.
        padding_mask: (B, L) bool, True at padding.

    Returns:
        y (B, L, D) in x's dtype and the state after the last step. Gradients flow into and out of mean and var.

    Raises:
        ValueError: a shape or dtype breaks a rule above.
    """
    _check(x, weight, bias, num_groups, state, padding_mask)
    if state is None:
        state = empty_norm_state(x.shape[0], num_groups, weight.dtype, x.device)
    y, count, mean, var, _, _ = _norm_op(x, weight, bias, *state, padding_mask, num_groups, eps)
    return y, NormState(count, mean, var)


def timestep_norm_definition(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float = 1e-5,
    state: NormState | None = None,
    padding_mask: Tensor | None = None,
) -> tuple[Tensor, NormState]:
    """`timestep_norm` as its equation reads: a loop over time. The contract of every fast path."""
    _check(x, weight, bias, num_groups, state, padding_mask)
    dtype = compute_dtype(x, weight)
    batch, length, dim = x.shape
    if state is None:
        state = empty_norm_state(batch, num_groups, weight.dtype, x.device)
    started = (state.count > 0).unsqueeze(-1)
    count = state.count
    mean, var = (torch.where(started, s.to(dtype), 0) for s in (state.mean, state.var))
    gain, shift = weight.to(dtype) + 1, bias.to(dtype)
    outputs = []
    for t in range(length):
        valid = x.new_ones(batch, dtype=torch.bool) if padding_mask is None else ~padding_mask[:, t]
        x_t = torch.where(valid.unsqueeze(-1), x[:, t].to(dtype), 0).view(batch, num_groups, -1)  # (B, G, D/G)
        count = count + valid
        c = (1 / count.clamp(min=1).to(dtype)).unsqueeze(-1)  # (B, 1)
        group_var, group_mean = torch.var_mean(x_t, -1, correction=0)
        d = group_mean - mean
        keep = valid.unsqueeze(-1)
        var = torch.where(keep, (1 - c) * var + c * group_var + c * (1 - c) * d * d, var)
        mean = torch.where(keep, mean + c * d, mean)
        y_t = (x_t - mean.unsqueeze(-1)) * torch.rsqrt(var + eps).unsqueeze(-1)
        outputs.append((y_t.view(batch, dim) * gain + shift) * keep)
    untouched = (count == state.count).unsqueeze(-1)  # a row of padding only
    last_mean = torch.where(untouched, state.mean, mean.to(weight.dtype))
    last_var = torch.where(untouched, state.var, var.to(weight.dtype))
    return torch.stack(outputs, 1).to(x.dtype), NormState(count, last_mean, last_var)


def _check(x, weight, bias, num_groups, state, padding_mask) -> None:
    check_activation("x", x, 3)
    batch, length, dim = x.shape
    if num_groups < 1 or dim % num_groups:
        raise ValueError(f"`num_groups` must divide the dimension {dim} of x, but is {num_groups}")
    check_parameter("weight", weight, (dim,))
    check_parameter("bias", bias, (dim,))
    if state is not None:
        if state.count.shape != (batch,) or state.count.dtype != torch.int64:
            raise ValueError(
                f"`state.count` must be int64 of shape ({batch},), but is {state.count.dtype} of "
                f"{tuple(state.count.shape)}"
            )
        check_parameter("state.mean", state.mean, (batch, num_groups))
        check_parameter("state.var", state.var, (batch, num_groups))
    if padding_mask is not None and (padding_mask.shape != (batch, length) or padding_mask.dtype != torch.bool):
        raise ValueError(
            f"`padding_mask` must be bool of shape ({batch}, {length}), but is {padding_mask.dtype} of "
            f"{tuple(padding_mask.shape)}"
        )


class _Running(NamedTuple):
    """Sums behind the running statistics, float64. Everything is measured from `pivot`, a mean close to the data's, so
    that E[m^2] - E[m]^2 does not cancel when the data lies far from 0.
    """

    pivot: Tensor  # (B, 1, G)
    group_mean: Tensor  # mu - pivot of each step, 0 where masked, (B, L, G)
    steps: Tensor  # n after each step, at least 1, (B, L, 1)
    before: Tensor  # n before the first step, (B, 1, 1)
    mean: Tensor  # mean - pivot after each step, (B, L, G)
    var: Tensor  # var after each step, (B, L, G)


def _group_moments(xg: Tensor) -> tuple[Tensor, Tensor]:
    """Population variance and mean over the last dimension.

    On a CPU `var_mean` walks a number at a time. Float32 takes two vectorised passes there; the second measures what
    the first one's mean is off by, so that data far from 0 costs no accuracy.
    """
    if xg.device.type != "cpu" or xg.dtype != torch.float32:
        return torch.var_mean(xg, -1, correction=0)
    rough = xg.mean(-1)
    centred = xg - rough.unsqueeze(-1)
    rest = centred.mean(-1)
    return (centred.square_().mean(-1) - rest * rest).clamp_(min=0), rough + rest


def _running_statistics(x: Tensor, state: NormState, mask: Tensor | None, groups: int) -> tuple[_Running, Tensor]:
    """The statistics after each step, and the count after the last one."""
    count, mean, var = state
    dtype = compute_dtype(x, mean)
    group_var, group_mean = (t.double() for t in _group_moments(x.unflatten(2, (groups, -1)).to(dtype)))
    started = (count > 0).view(-1, 1, 1)
    if mask is None:
        steps = torch.arange(1, x.shape[1] + 1, device=x.device).view(1, -1, 1) + count.view(-1, 1, 1)
        first = group_mean[:, :1]
    else:
        valid = ~mask.unsqueeze(-1)
        steps = valid.cumsum(1) + count.view(-1, 1, 1)
        group_var = torch.where(valid, group_var, 0)
        group_mean = torch.where(valid, group_mean, 0)  # also keeps NaN in the padding out of the sums
        first = group_mean.gather(1, valid.int().argmax(1, keepdim=True).expand(-1, -1, groups))
    pivot = torch.where(started, mean.double().unsqueeze(1), first)
    group_mean = group_mean - pivot
    if mask is not None:
        group_mean = torch.where(valid, group_mean, 0)
    before = count.view(-1, 1, 1).double()
    var0 = torch.where(started, var.double().unsqueeze(1), 0)
    n = steps.clamp(min=1).double()
    running_mean = group_mean.cumsum(1) / n  # a carried mean adds nothing: it is the pivot
    second = (before * var0 + (group_var + group_mean * group_mean).cumsum(1)) / n
    running_var = (second - running_mean * running_mean).clamp(min=0)
    return _Running(pivot, group_mean, n, before, running_mean, running_var), steps[:, -1, 0]


def _forward_impl(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    count: Tensor,
    mean: Tensor,
    var: Tensor,
    padding_mask: Tensor | None,
    num_groups: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, the state after (count, mean, var), and for the backward pass the running mean of each step, minus the carried
    one, and its 1/std, both (B, L, G).
    """
    state = NormState(count, mean, var)
    if x.is_cuda and takes(x, weight, num_groups):
        arguments = (x, weight, bias, state, padding_mask, num_groups, eps)
        found = dispatch.kernel_or_none("timestep_norm", x, lambda: cuda.forward(*arguments))
        if found is not None:
            return found
    return _torch_forward(x, weight, bias, state, padding_mask, num_groups, eps)


def _torch_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    state: NormState,
    padding_mask: Tensor | None,
    num_groups: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    count, mean, var = state
    with without_autocast(x):
        dtype = compute_dtype(x, weight)
        running, last_count = _running_statistics(x, state, padding_mask, num_groups)
        step_mean = running.mean + running.pivot
        step_rstd = torch.rsqrt(running.var + eps)
        y = (x.unflatten(2, (num_groups, -1)).to(dtype) - step_mean.to(dtype).unsqueeze(-1)) * step_rstd.to(
            dtype
        ).unsqueeze(-1)
        y = torch.addcmul(bias.to(dtype), y.flatten(2), weight.to(dtype) + 1)
        if padding_mask is not None:
            y = y.masked_fill(padding_mask.unsqueeze(-1), 0)
        untouched = (last_count == count).unsqueeze(-1)  # a row of padding only
        last_mean = torch.where(untouched, mean, step_mean[:, -1].to(mean.dtype))
        last_var = torch.where(untouched, var, running.var[:, -1].to(var.dtype))
        return (
            y.to(x.dtype).contiguous(),
            last_count.clone(),
            last_mean,
            last_var,
            (step_mean - _base_of_means(state)).to(dtype),
            step_rstd.to(dtype),
        )


def _base_of_means(state: NormState) -> Tensor:
    """What the saved means of the steps are relative to, float64 (B, 1, G): the carried mean, if there is one.

    So they stay exact where the data lies far from 0, and with them the gradient of the carried state.
    """
    return torch.where((state.count > 0).view(-1, 1, 1), state.mean.double().unsqueeze(1), 0)


def _backward_impl(
    dy: Tensor,
    dmean_last: Tensor | None,
    dvar_last: Tensor | None,
    x: Tensor,
    weight: Tensor,
    count: Tensor,
    mean: Tensor,
    var: Tensor,
    padding_mask: Tensor | None,
    step_mean: Tensor,
    step_rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dweight, dbias, dmean, dvar."""
    saved = SavedForward(x, weight, NormState(count, mean, var), padding_mask, step_mean, step_rstd)
    if x.is_cuda and takes(x, weight, step_mean.shape[2]):
        found = dispatch.kernel_or_none("timestep_norm", x, lambda: cuda.backward(dy, dmean_last, dvar_last, saved))
        if found is not None:
            return found
    return _torch_backward(dy, dmean_last, dvar_last, saved)


def _torch_backward(
    dy: Tensor, dmean_last: Tensor | None, dvar_last: Tensor | None, saved: SavedForward
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients in PyTorch.

    With r = 1/std of a step, s = dy * gain:  dm_t = -r sum s,  dv_t = -r^3/2 sum s (x - m_t) over the group's features;
    m_t and v_t are sums over the steps before t divided by n_t, so step u gets P_u = sum_{t>=u} (dm_t - 2 m_t dv_t)/n_t
    and R_u = sum_{t>=u} dv_t / n_t:  d mu_u = P_u + 2 mu_u R_u,  d s2_u = R_u,  and the same for the carried state,
    weighted by its count.
    """
    x, weight, padding_mask, step_rstd = saved.x, saved.weight, saved.padding_mask, saved.step_rstd
    count, mean, var = saved.state
    with without_autocast(x):
        dtype, groups = compute_dtype(x, weight), step_rstd.shape[2]
        step_mean = (saved.step_mean + _base_of_means(saved.state)).to(dtype)
        features = x.shape[2] // groups
        running, last_count = _running_statistics(x, saved.state, padding_mask, groups)
        xg = x.unflatten(2, (groups, -1)).to(dtype)  # (B, L, G, D/G)
        dy = dy.to(dtype)
        if padding_mask is not None:
            dy = dy.masked_fill(padding_mask.unsqueeze(-1), 0)
            xg = xg.masked_fill(padding_mask[..., None, None], 0)
        centred = xg - step_mean.unsqueeze(-1)
        normed = centred * step_rstd.unsqueeze(-1)
        dweight = (dy * normed.flatten(2)).sum((0, 1))
        dbias = dy.sum((0, 1))
        s = (dy * (weight.to(dtype) + 1)).unflatten(2, (groups, -1))
        rstd = step_rstd.double()
        dm = -rstd * s.sum(-1).double()  # (B, L, G)
        dv = -0.5 * rstd * rstd * (s * normed).sum(-1).double()
        # A row without a valid step hands its state through; everywhere else the state is that of the last step.
        untouched = (last_count == count).unsqueeze(-1)
        dmean0, dvar0 = torch.zeros_like(dm[:, 0]), torch.zeros_like(dv[:, 0])
        if dmean_last is not None:
            dm[:, -1] += torch.where(untouched, 0, dmean_last.double())
            dmean0 = torch.where(untouched, dmean_last.double(), dmean0)
        if dvar_last is not None:
            dv[:, -1] += torch.where(untouched, 0, dvar_last.double())
            dvar0 = torch.where(untouched, dvar_last.double(), dvar0)
        p = ((dm - 2 * running.mean * dv) / running.steps).flip(1).cumsum(1).flip(1)
        r = (dv / running.steps).flip(1).cumsum(1).flip(1)
        dmu = p + 2 * running.group_mean * r
        # s2 of a step and mu of a step: d mu / dx = 1/F, d s2 / dx = 2 (x - mu)/F.
        mu = (running.group_mean + running.pivot).to(dtype).unsqueeze(-1)
        dx = (
            s * step_rstd.unsqueeze(-1)
            + (dmu.to(dtype).unsqueeze(-1) + 2 * r.to(dtype).unsqueeze(-1) * (xg - mu)) / features
        )
        if padding_mask is not None:
            dx = dx.masked_fill(padding_mask[..., None, None], 0)
        weight_of_state = running.before[:, 0]
        dmean0 = dmean0 + torch.where(untouched, 0, weight_of_state * p[:, 0])
        dvar0 = dvar0 + torch.where(untouched, 0, weight_of_state * r[:, 0])
        return (
            dx.flatten(2).to(x.dtype).contiguous(),
            dweight.to(weight.dtype),
            dbias.to(weight.dtype),
            dmean0.to(mean.dtype),
            dvar0.to(var.dtype),
        )


_norm_op = define_op("timestep_norm", _forward_impl)
_norm_backward_op = define_op("timestep_norm_backward", _backward_impl)


@torch.library.register_fake("megalodon::timestep_norm")
def _(x, weight, bias, count, mean, var, padding_mask, num_groups, eps):
    steps = x.new_empty(x.shape[0], x.shape[1], num_groups, dtype=compute_dtype(x, weight))
    return (
        x.new_empty(x.shape),
        count.new_empty(count.shape),
        mean.new_empty(mean.shape),
        var.new_empty(var.shape),
        steps,
        torch.empty_like(steps),
    )


@torch.library.register_fake("megalodon::timestep_norm_backward")
def _(dy, dmean_last, dvar_last, x, weight, count, mean, var, padding_mask, step_mean, step_rstd):
    return x.new_empty(x.shape), *(t.new_empty(t.shape) for t in (weight, weight, mean, var))


def _save_for_backward(ctx, inputs, output) -> None:
    x, weight, _, count, mean, var, padding_mask, _, _ = inputs
    *_, step_mean, step_rstd = output
    ctx.mark_non_differentiable(output[1], step_mean, step_rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, count, mean, var, padding_mask, step_mean, step_rstd)


def _backward(ctx, dy, dcount, dmean_last, dvar_last, dstep_mean, dstep_rstd):
    x, *rest = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    dx, dweight, dbias, dmean, dvar = _norm_backward_op(dy, dmean_last, dvar_last, x, *rest)
    return dx, dweight, dbias, None, dmean, dvar, None, None, None


define_gradient(_norm_op, _save_for_backward, _backward)
