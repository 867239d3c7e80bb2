"""CEMA on one of several consecutive slices of time: what the slice leaves, and what the slices before it add.

With the letters of `ops.cema` and a slice of L steps, whose own steps are counted from 0:

    summary        s  = sum_t p q^{L-1-t} x_t                        the hidden state after the slice, from an empty one
    before slice r h  = sum_{j<r} q^{(sum of L between j and r)} s_j     all slices alike: q^{L (r-1-j)}
    backward       e  = sum_t conj(g q^{t+1}) dy_t                   gradient of the state before the slice, from its y
                   gradient of the state after slice r = sum_{j>r} conj(q^{L (j-1-r)}) e_j

With the state before it and the gradient of the state after it, each slice's own `ops.cema` gives exactly its part of
every gradient: nothing else has to cross. (arXiv 2404.08801, section 3.4, has a chain of messages instead.)
"""

import torch
from torch import Tensor

from .. import dispatch
from ..checks import check_activation, compute_dtype, without_autocast
from ..library import define_op
from . import blocks, slices_cuda
from .blocks import CemaParameters
from .op import kernel_tiles


def cema_summary(x: Tensor, parameters: CemaParameters) -> Tensor:
    """The hidden state (B, D, N, 2) that a slice x (B, L, D) leaves from an empty one, in alpha's dtype.

    No gradient flows through it; see `cema_summary_grad`.
    """
    check_activation("x", x, 3)
    return _scan_op(x, *parameters, False)


def cema_summary_grad(dy: Tensor, parameters: CemaParameters) -> Tensor:
    """The gradient (B, D, N, 2) of the hidden state before a slice that its output's gradient dy (B, L, D) makes."""
    return _scan_op(dy, *parameters, True)


def cema_fold(summaries: Tensor, parameters: CemaParameters, length: int, rank: int, reverse: bool = False) -> Tensor:
    """Fold the summaries of all slices into the one state that slice `rank` needs.

    Args:
        summaries: (P, B, D, N, 2), in the slices' order: what `cema_summary` gave, with `reverse`
            `cema_summary_grad`.
        length: steps of a slice, the same for all.
        rank: the slice.
        reverse: False: the state before the slice. True: the gradient of the state after it.

    Returns:
        (B, D, N, 2), summed in a fixed order with powers of q made in float64.
    """
    alpha, delta, theta, gamma, _, rotate_input = parameters
    return _fold_op(summaries, alpha, delta, theta, gamma, rotate_input, length, rank, reverse)


def _scan_impl(
    x: Tensor,
    alpha: Tensor,
    delta: Tensor,
    theta: Tensor,
    gamma: Tensor,
    omega: Tensor,
    rotate_input: bool,
    reverse: bool,
) -> Tensor:
    tiles = kernel_tiles(x, alpha)
    parameters = CemaParameters(alpha, delta, theta, gamma, omega, rotate_input)
    if tiles is not None and x.numel() and x.shape[1] % tiles.block == 0:
        found = dispatch.kernel_or_none("cema", x, lambda: slices_cuda.summary(tiles, x, parameters, reverse))
        if found is not None:
            return found
    with without_autocast(x):
        return _torch_scan(x, parameters, reverse)


def _torch_scan(x: Tensor, parameters: CemaParameters, reverse: bool) -> Tensor:
    alpha, omega, c = parameters.alpha, parameters.omega, parameters.coefficients()
    whole, step = blocks.split(x.shape[1]), blocks.slice_state_grad if reverse else blocks.slice_state
    state = blocks.start_state(x, alpha, None)
    pieces = [(x[:, :whole], blocks.BLOCK), (x[:, whole:], x.shape[1] - whole)]
    for piece, block in reversed(pieces) if reverse else pieces:
        if piece.shape[1]:
            state = step(piece, state, blocks.make_tables(c, omega[:, 0], block, compute_dtype(x, alpha)))
    return blocks.to_state(state, alpha.dtype)


def _fold_impl(
    summaries: Tensor,
    alpha: Tensor,
    delta: Tensor,
    theta: Tensor,
    gamma: Tensor,
    rotate_input: bool,
    length: int,
    rank: int,
    reverse: bool,
) -> Tensor:
    if kernel_tiles(summaries, alpha) is not None:
        call = (summaries, (alpha, delta, theta), length, rank, reverse)
        found = dispatch.kernel_or_none("cema", summaries, lambda: slices_cuda.fold(*call))
        if found is not None:
            return found
    c = blocks.coefficients(alpha, delta, theta, gamma, rotate_input)
    log_q = c.log_q.conj_physical() if reverse else c.log_q
    others = range(rank + 1, summaries.shape[0]) if reverse else range(rank - 1, -1, -1)
    total = torch.zeros_like(summaries[0]) if not others else None
    for distance, other in enumerate(others):  # the nearest first, so that what has faded is added last
        state = torch.complex(*summaries[other].unbind(-1))  # (B, D, N)
        power = torch.exp(log_q * (length * distance)).to(state.dtype)  # (D, N)
        part = torch.view_as_real(power * state)
        total = part if total is None else total + part
    assert total is not None
    return total.contiguous()


_scan_op = define_op("cema_summary", _scan_impl)
_fold_op = define_op("cema_fold", _fold_impl)


@torch.library.register_fake("megalodon::cema_summary")
def _(x, alpha, delta, theta, gamma, omega, rotate_input, reverse):
    return alpha.new_empty(x.shape[0], x.shape[2], alpha.shape[1], 2)


@torch.library.register_fake("megalodon::cema_fold")
def _(summaries, alpha, delta, theta, gamma, rotate_input, length, rank, reverse):
    return summaries.new_empty(summaries.shape[1:])
