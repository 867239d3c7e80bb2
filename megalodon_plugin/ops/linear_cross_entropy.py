"""Output layer and cross-entropy in one, for rows whose logits would not fit into memory at once.

    loss = sum_t (log sum_v exp(z_tv) - z_t,label(t)),   z = x W^T

The gradients are made in the forward pass, while a part of the logits is there: with p = softmax(z), dz = p - onehot,
dx = dz W, dW = dz^T x. So no logits are kept and no product is made twice.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .checks import compute_dtype, without_autocast

IGNORED = -100
"""The label that counts for nothing, PyTorch's default."""


def linear_cross_entropy(
    x: Tensor, weight: Tensor, labels: Tensor, rows_at_once: int = 4096, compiled: bool = False
) -> Tensor:
    """Sum of the cross-entropies of softmax(x W^T); equation at the head of this module.

    Args:
        x: (..., D), bfloat16, float32 or float64.
        weight: (V, D). It is read in x's dtype; its gradient is summed in float32 (float64) and has its own dtype.
        labels: (...) int64, IGNORED where a row does not count.
        rows_at_once: rows whose logits exist at a time.
        compiled: fuse what is done to the logits by torch.compile.

    Returns:
        A scalar, float32 (float64 for a float64 x). Sums of several calls differ by rounding alone from one call's.

    Raises:
        ValueError: a shape does not fit.
    """
    if labels.shape != x.shape[:-1]:
        raise ValueError(
            f"`labels` must have x's shape {tuple(x.shape[:-1])} before its last, not {tuple(labels.shape)}"
        )
    if weight.ndim != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"`weight` must have shape (V, {x.shape[-1]}), but has {tuple(weight.shape)}")
    if rows_at_once < 1:
        raise ValueError(f"`rows_at_once` must be at least 1, but is {rows_at_once}")
    return _LinearCrossEntropy.apply(x, weight, labels, rows_at_once, compiled)


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    logits = logits.to(compute_dtype(logits))
    return torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED)


def _loss_and_gradient(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The sum over (rows, V) and its gradient in the logits' dtype."""
    wide = logits.to(compute_dtype(logits))
    counts = (labels != IGNORED).unsqueeze(1)
    label = labels.clamp_min(0).unsqueeze(1)
    log_sum = wide.logsumexp(1, keepdim=True)
    loss = ((log_sum - wide.gather(1, label)) * counts).sum()
    is_label = torch.arange(logits.shape[1], device=logits.device) == label
    return loss, (((wide - log_sum).exp() - is_label.to(wide.dtype)) * counts).to(logits.dtype)


@cache
def _fused(function: Callable, compiled: bool) -> Callable:
    return torch.compile(function) if compiled else function


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a^T b, of bfloat16 without rounding the product before the sum."""
    if a.dtype == total.dtype:
        total.addmm_(a.t(), b)
    elif a.is_cuda:
        torch.addmm(total, a.t(), b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.t().to(total.dtype), b.to(total.dtype))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, rows_at_once: int, compiled: bool) -> Tensor:
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        rows, flat_labels, matrix = x.flatten(0, -2), labels.flatten(), weight.to(x.dtype)
        dx = torch.empty_like(rows) if wants_x else None
        dweight = torch.zeros(weight.shape, dtype=compute_dtype(x), device=x.device) if wants_weight else None
        loss = torch.zeros((), dtype=compute_dtype(x), device=x.device)
        with without_autocast(x):
            for start in range(0, len(rows), rows_at_once):
                part = slice(start, start + rows_at_once)
                logits = rows[part] @ matrix.t()
                if not (wants_x or wants_weight):
                    loss += _fused(_loss, compiled)(logits, flat_labels[part])
                    continue
                added, dlogits = _fused(_loss_and_gradient, compiled)(logits, flat_labels[part])
                loss += added
                if dx is not None:
                    torch.mm(dlogits, matrix, out=dx[part])
                if dweight is not None:
                    _add_product(dweight, dlogits, rows[part])
        ctx.shape, ctx.dtype = x.shape, weight.dtype
        ctx.gradients = dx, dweight
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        dx, dweight = ctx.gradients
        del ctx.gradients  # a second backward pass would scale them twice; this makes it an error
        # Both belong to this node alone and are used once, so they are scaled where they are.
        if dx is not None:
            dx = dx.mul_(dloss).view(ctx.shape)
        if dweight is not None:
            dweight = dweight.mul_(dloss).to(ctx.dtype)
        return dx, dweight, None, None, None
