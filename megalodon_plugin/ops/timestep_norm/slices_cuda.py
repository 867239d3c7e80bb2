"""TimestepNorm's summary of a slice on a GPU: the launches of `kernels/timestep_norm/summary*.cu`."""

import torch
from torch import Tensor

from megalodon_plugin import kernels

from ..launching import multiprocessors, packed, parameter_struct, stream_of

_LANES, _ROWS, _FINISH_THREADS = 32, 8, 128
_BLOCKS_PER_PROCESSOR = 4  # of 256 threads, each with 4 loads of 16 bytes under way: 64 KB, more than the latency holds

_Summary = parameter_struct("_Summary", pointers="x partial", int64="x_row length segment", int32="batch dim")
_Finish = parameter_struct(
    "_Finish", pointers="partial mean var", int64="length segment", int32="batch dim groups segments"
)

VARIANTS = (
    ("timestep_norm/summary_finish.cu", "norm_summary_finish", ()),
    *(
        ("timestep_norm/summary.cu", "norm_summary", (("ACTIVATION_BYTES", item), ("VECTOR", vector)))
        for item in (2, 4)
        for vector in (1, 16 // item)
    ),
)
"""Source, name and macros of the kernels that the tests compile, all of them for Hopper."""


def takes(x: Tensor) -> bool:
    """Whether there is a kernel for this dtype."""
    return x.dtype in (torch.bfloat16, torch.float32) and x.numel() > 0


def summary(x: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Mean and variance (B, G), float32, of x (B, L, D) over time and the features of each group."""
    x = packed(x)
    batch, length, dim = x.shape
    item = x.element_size()
    vector = 16 // item
    if dim % vector or x.data_ptr() % 16 or x.stride(0) % vector:
        vector = 1
    channel_blocks = -(-dim // (_LANES * vector))
    wanted = -(-_BLOCKS_PER_PROCESSOR * multiprocessors(x.device) // (channel_blocks * batch))
    # A thread should have a few steps to walk.
    segments = max(1, min(wanted, length // (4 * _ROWS), 65535))
    segment = -(-length // segments)
    segments = -(-length // segment)
    partial = torch.empty(2, segments, batch, dim, dtype=torch.float64, device=x.device)
    mean = torch.empty(batch, num_groups, dtype=torch.float32, device=x.device)
    var = torch.empty_like(mean)
    stream = stream_of(x.device)
    kernel = kernels.load(
        "timestep_norm/summary.cu", "norm_summary", (("ACTIVATION_BYTES", item), ("VECTOR", vector)), x.device
    )
    params = _Summary(x.data_ptr(), partial.data_ptr(), x.stride(0), length, segment, batch, dim)
    shared = _ROWS * 2 * vector * _LANES * 4
    kernel.launch((channel_blocks, batch, segments), _LANES * _ROWS, params, stream, shared)
    kernel = kernels.load("timestep_norm/summary_finish.cu", "norm_summary_finish", (), x.device)
    addresses = (t.data_ptr() for t in (partial, mean, var))
    finish = _Finish(*addresses, length, segment, batch, dim, num_groups, segments)
    kernel.launch((num_groups, batch, 1), _FINISH_THREADS, finish, stream, _FINISH_THREADS * 8)
    return mean, var
