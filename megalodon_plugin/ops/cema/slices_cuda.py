"""CEMA's summaries of a slice on a GPU: the launches of `cema_pass` without an output, and of `cema_fold`."""

import torch
from torch import Tensor

from megalodon_plugin import kernels

from ..launching import packed, parameter_struct, stream_of
from .cuda import Call
from .tiles import PASS_BLOCKS, Plan, make_plan

_Fold = parameter_struct(
    "_Fold",
    pointers="summaries state alpha delta theta",
    int64="first_gap gap",
    int32="nearest direction slices batch dim order conjugate_power conjugate_result",
)


def summary(plan: Plan, x: Tensor, parameters: tuple[Tensor, ...], rotate_input: bool, reverse: bool) -> Tensor:
    """The state (B, D, N, 2) that x (B, L, D) leaves, L whole blocks; `reverse`: the gradient that it is of dy."""
    x = packed(x)
    call = Call(plan, x, parameters, rotate_input)
    assert call.rest == 0
    call.prepare()
    left = call.summaries(x, reverse)
    segments, tile = call.division.segments, PASS_BLOCKS * plan.block
    gap = call.division.segment_tiles * tile
    # The walk meets a tile that is not full first or last.
    whole = call.tiles * tile if reverse else call.length
    last = whole - (segments - 1) * gap
    return _fold(left, parameters, (last, gap), (segments - 1, -1, segments), conjugate=(False, reverse))


def fold(summaries: Tensor, parameters: tuple[Tensor, ...], length: int, rank: int, reverse: bool) -> Tensor:
    """As `cema_slice.cema_fold`, whose arguments these are."""
    order = (rank + 1, 1, summaries.shape[0] - 1 - rank) if reverse else (rank - 1, -1, rank)
    return _fold(summaries.contiguous(), parameters, (length, length), order, conjugate=(reverse, False))


def _fold(summaries, parameters, gaps: tuple[int, int], order: tuple[int, int, int], conjugate: tuple[bool, bool]):
    alpha, delta, theta = (p.contiguous() for p in parameters[:3])
    state = torch.empty(summaries.shape[1:], dtype=torch.float32, device=summaries.device)
    batch, dim, orders = state.shape[:3]
    addresses = (t.data_ptr() for t in (summaries, state, alpha, delta, theta))
    params = _Fold(*addresses, *gaps, *order, batch, dim, orders, *map(int, conjugate))
    plan = make_plan(1, orders, torch.bfloat16)
    assert plan is not None
    kernel = kernels.load("cema/fold.cu", "cema_fold", plan.defines(8, True), summaries.device)
    kernel.launch((-(-dim * orders // 256), batch, 1), 256, params, stream_of(summaries.device), 0)
    return state
