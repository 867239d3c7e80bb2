"""TimestepNorm on a CUDA device: the memory and the launches of kernels/timestep_norm/{forward,backward,parameters}.cu.

The equations stand in op.py, how the work is divided among thread blocks at the head of common.cuh.
"""

import ctypes
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megalodon_plugin import kernels

from ..launching import address, contiguous, multiprocessors, parameter_struct, stream_of
from .saved import SavedForward
from .state import NormState
from .tiles import VARIANTS, choose_tiles

__all__ = ["VARIANTS", "backward", "forward"]

TIME_LAST = False
"""Whether step_mean and step_rstd (B, L, G) lie in memory as (B, G, L), in which a warp writes neighbouring numbers."""

_Forward = parameter_struct(
    "_Forward",
    pointers="x y weight bias count mean var mask steps last_count last_mean last_var step_mean step_rstd totals flags",
    int64="length",
    int32="step_stride group_stride groups blocks",
    double="eps",
)
_Backward = parameter_struct(
    "_Backward",
    pointers="dy x dx weight dmean_last dvar_last count mean mask steps step_mean step_rstd dmean dvar partial "
    "totals flags",
    int64="batch length",
    int32="step_stride group_stride groups blocks",
)
_Parameters = parameter_struct("_Parameters", pointers="partial dweight dbias", int64="parts dim")


class _Launch(NamedTuple):
    """A kernel with its grid for activations of one shape."""

    kernel: Any
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    blocks: int  # of one sequence (batch row and group)
    sums: int  # that the blocks of one sequence exchange, over all sequences; 0 where each has one block

    def start(self, params: ctypes.Structure, stream: int) -> None:
        # Blocks of one sequence wait for each other, so all of them must be resident.
        cooperative = self.blocks > 1
        self.kernel.launch(self.grid, self.threads, params, stream, self.shared_bytes, cooperative)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    state: NormState,
    padding_mask: Tensor | None,
    num_groups: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, the state (count, mean, var) after x, and the running mean and 1/std of each step (B, L, G).

    x (B, L, D) bfloat16 or float32; weight, bias, mean, var float32; shapes as `timestep_norm` checks them.

    Raises:
        kernels.KernelUnavailable: the kernels do not run on this device.
    """
    x, mask = x.contiguous(), contiguous(padding_mask)
    weight, bias = weight.contiguous(), bias.contiguous()
    count, mean, var = (t.contiguous() for t in state)
    batch, length, _ = x.shape
    y, last_count = torch.empty_like(x), torch.empty_like(count)
    last_mean, last_var = torch.empty_like(mean), torch.empty_like(var)
    step_mean = _steps_like(mean, batch, length, num_groups)
    step_rstd = torch.empty_like(step_mean)
    if x.numel() == 0:
        return y, last_count.copy_(count), last_mean.copy_(mean), last_var.copy_(var), step_mean, step_rstd
    launch = _launch_of(False, x.shape, num_groups, x.element_size(), _alignment(x), mask is not None, x.device)
    steps = _steps(mask)
    totals, flags = _exchange(launch, mean)
    params = _Forward(
        *(x.data_ptr(), y.data_ptr(), weight.data_ptr(), bias.data_ptr(), count.data_ptr(), mean.data_ptr()),
        *(var.data_ptr(), address(mask), address(steps)),
        *(last_count.data_ptr(), last_mean.data_ptr(), last_var.data_ptr()),
        *(step_mean.data_ptr(), step_rstd.data_ptr(), address(totals), address(flags)),
        *(length, *step_mean.stride()[1:], num_groups, launch.blocks, eps),
    )
    launch.start(params, stream_of(x.device))
    return y, last_count, last_mean, last_var, step_mean, step_rstd


def backward(
    dy: Tensor, dmean_last: Tensor | None, dvar_last: Tensor | None, saved: SavedForward
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dweight, dbias, dmean, dvar.

    Raises:
        kernels.KernelUnavailable: the kernels do not run on this device.
    """
    x, dy, mask = saved.x.contiguous(), dy.contiguous(), contiguous(saved.padding_mask)
    weight = saved.weight.contiguous()
    count, mean, var = (t.contiguous() for t in saved.state)
    step_mean, step_rstd = saved.step_mean, saved.step_rstd
    if not (_known_strides(step_mean) and step_rstd.stride() == step_mean.stride()):
        step_mean, step_rstd = step_mean.contiguous(), step_rstd.contiguous()
    dmean_last, dvar_last = contiguous(dmean_last), contiguous(dvar_last)
    batch, length, dim = x.shape
    groups = step_mean.shape[2]
    dx, dmean, dvar = torch.empty_like(x), torch.empty_like(mean), torch.empty_like(var)
    dweight, dbias = torch.empty_like(weight), torch.empty_like(weight)
    if x.numel() == 0:
        return dx, dweight.zero_(), dbias.zero_(), dmean, dvar
    alignment = min(_alignment(x), _alignment(dy))
    launch = _launch_of(True, x.shape, groups, x.element_size(), alignment, mask is not None, x.device)
    steps = _steps(mask)
    totals, flags = _exchange(launch, mean)
    parts = batch * launch.blocks
    partial = mean.new_empty(2 * parts * dim)
    params = _Backward(
        *(dy.data_ptr(), x.data_ptr(), dx.data_ptr(), weight.data_ptr(), address(dmean_last), address(dvar_last)),
        *(count.data_ptr(), mean.data_ptr(), address(mask), address(steps)),
        *(step_mean.data_ptr(), step_rstd.data_ptr(), dmean.data_ptr(), dvar.data_ptr(), partial.data_ptr()),
        *(address(totals), address(flags), batch, length, *step_mean.stride()[1:]),
        *(groups, launch.blocks),
    )
    stream = stream_of(x.device)
    launch.start(params, stream)
    add = _Parameters(partial.data_ptr(), dweight.data_ptr(), dbias.data_ptr(), parts, dim)
    _parameters_kernel(x.device).launch((-(-dim // 32), 2, 1), 256, add, stream, 8 * 256)
    return dx, dweight, dbias, dmean, dvar


@functools.lru_cache(maxsize=1024)
def _launch_of(
    backward: bool,
    shape: torch.Size,
    groups: int,
    activation_bytes: int,
    alignment: int,
    masked: bool,
    device: torch.device,
) -> _Launch:
    batch, length, dim = shape
    features = dim // groups
    tiles = choose_tiles(features, activation_bytes, alignment, backward)
    name = "backward" if backward else "forward"
    kernel = kernels.load(
        f"timestep_norm/{name}.cu",
        f"timestep_norm_{name}",
        tiles.defines(features, activation_bytes, masked),
        device,
    )
    warps = tiles.threads // 32
    shared_bytes = 16 * (2 * warps + 1)  # two float64 sums for each warp, twice, and for the tiles before
    vectors = -(-features // (tiles.vector * tiles.lanes))  # of a lane
    shared_bytes += (1 if backward else 2) * 4 * vectors * tiles.lanes * tiles.vector  # gain; bias
    if backward:
        shared_bytes += 2 * 8 * tiles.vector * vectors * tiles.threads  # dweight and dbias of a thread, float64
    n_tiles = -(-length // (warps * (32 // tiles.lanes) * tiles.steps))
    capacity = kernel.blocks_per_multiprocessor(tiles.threads, shared_bytes) * multiprocessors(device)
    blocks = _blocks(batch * groups, n_tiles, capacity)
    grid = (batch * groups * blocks, 1, 1)
    return _Launch(kernel, grid, tiles.threads, shared_bytes, blocks, batch * groups * n_tiles if blocks > 1 else 0)


def _blocks(sequences: int, n_tiles: int, capacity: int) -> int:
    """Blocks of one sequence. They wait for each other, so no more than the GPU holds at once; each gets two tiles."""
    return max(1, min(capacity // sequences, n_tiles // 2))


@functools.cache
def _parameters_kernel(device: torch.device) -> Any:
    return kernels.load("timestep_norm/parameters.cu", "timestep_norm_parameters", (), device)


def _steps_like(mean: Tensor, batch: int, length: int, groups: int) -> Tensor:
    if TIME_LAST:
        return mean.new_empty(batch, groups, length).transpose(1, 2)
    return mean.new_empty(batch, length, groups)


def _known_strides(step_mean: Tensor) -> bool:
    return step_mean.is_contiguous() or step_mean.transpose(1, 2).is_contiguous()


def _alignment(x: Tensor) -> int:
    pointer = x.data_ptr()
    return min(16, pointer & -pointer)


def _steps(mask: Tensor | None) -> Tensor | None:
    """Unmasked steps up to and including each, (B, L) int32."""
    return None if mask is None else mask.logical_not().cumsum(1, dtype=torch.int32)


def _exchange(launch: _Launch, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Where blocks leave their tiles' sums, and the words that say so: 0 at first."""
    if not launch.sums:
        return None, None
    sums = torch.empty(2 * launch.sums, dtype=torch.float64, device=like.device)
    return sums, torch.zeros(launch.sums, dtype=torch.int32, device=like.device)
