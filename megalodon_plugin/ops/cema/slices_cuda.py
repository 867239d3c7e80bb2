"""CEMA's summaries of a slice on a GPU: the launches of `cema_pass` without an output, and of `cema_fold`."""

import torch
from torch import Tensor

from megalodon_plugin import kernels

from ..launching import packed, parameter_struct, stream_of
from .blocks import CemaParameters
from .cuda import Call
from .tiles import PASS_BLOCKS, Tiles, choose_tiles

_Fold = parameter_struct(
    "_Fold",
    pointers="summaries state alpha delta theta",
    int64="first_gap gap",
    int32="nearest direction slices batch dim order conjugate_power conjugate_result",
)


def summary(tiles: Tiles, x: Tensor, parameters: CemaParameters, reverse: bool) -> Tensor:
    """The state (B, D, N, 2) that x (B, L, D) leaves, L whole blocks; `reverse`: the gradient that it is of dy."""
    x = packed(x)
    call = Call(tiles, x, parameters)
    assert call.rest == 0
    call.prepare()
    left = call.summaries(x, reverse)
    segments, tile = call.division.segments, PASS_BLOCKS * tiles.block
    gap = call.division.segment_tiles * tile
    # The walk meets a tile that is not full first or last.
    whole = call.n_tiles * tile if reverse else call.length
    last = whole - (segments - 1) * gap
    decay = (parameters.alpha, parameters.delta, parameters.theta)
    return _fold(left, decay, (last, gap), (segments - 1, -1, segments), conjugate=(False, reverse))


def fold(summaries: Tensor, decay: tuple[Tensor, Tensor, Tensor], length: int, rank: int, reverse: bool) -> Tensor:
    """As `slices.cema_fold`, whose arguments these are."""
    order = (rank + 1, 1, summaries.shape[0] - 1 - rank) if reverse else (rank - 1, -1, rank)
    return _fold(summaries.contiguous(), decay, (length, length), order, conjugate=(reverse, False))


def _fold(
    summaries: Tensor,
    decay: tuple[Tensor, Tensor, Tensor],
    gaps: tuple[int, int],
    order: tuple[int, int, int],
    conjugate: tuple[bool, bool],
) -> Tensor:
    """`decay` is alpha, delta and theta; the rest stands in the struct."""
    alpha, delta, theta = (p.contiguous() for p in decay)
    state = torch.empty(summaries.shape[1:], dtype=torch.float32, device=summaries.device)
    batch, dim, orders = state.shape[:3]
    addresses = (t.data_ptr() for t in (summaries, state, alpha, delta, theta))
    params = _Fold(*addresses, *gaps, *order, batch, dim, orders, *map(int, conjugate))
    tiles = choose_tiles(1, orders, torch.bfloat16)
    assert tiles is not None
    kernel = kernels.load("cema/fold.cu", "cema_fold", tiles.defines(8, True), summaries.device)
    kernel.launch((-(-dim * orders // 256), batch, 1), 256, params, stream_of(summaries.device), 0)
    return state
