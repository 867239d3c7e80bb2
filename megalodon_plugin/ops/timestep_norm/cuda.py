"""TimestepNorm on a CUDA device: which kernel, which tiles, how many blocks, and the launch.

The kernels are kernels/timestep_norm/*.cu; the equations stand in timestep_norm.py, how they are shared out among
blocks at the head of kernels/timestep_norm/common.cuh. Every number that was chosen for speed stands in this file.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megalodon_plugin import kernels

from ..launching import address, contiguous, multiprocessors, parameter_struct, stream_of

TIME_LAST = False
"""Whether step_mean and step_rstd (B, L, G) lie in memory as (B, G, L), in which a warp writes neighbouring numbers."""

Defines = tuple[tuple[str, int], ...]

_KEPT_WORDS = {False: 32, True: 16}
"""Most registers in which a thread holds its part of one step, forward and backward; larger groups are read again."""


LARGEST_GROUP = 8192
"""Most features of a group: the backward pass keeps sums for each in shared memory."""


def takes(x: Tensor, weight: Tensor, num_groups: int) -> bool:
    """Whether there is a kernel for these dtypes and shapes."""
    return (
        x.dtype in (torch.bfloat16, torch.float32)
        and weight.dtype == torch.float32
        and x.shape[2] <= LARGEST_GROUP * num_groups
        and x.shape[1] < 2**30
    )


class Choice(NamedTuple):
    """How a kernel shares out the work; the names are those of kernels/timestep_norm/common.cuh."""

    vector: int
    lanes: int
    steps: int
    threads: int
    min_blocks: int
    keep: bool


def choose(features: int, activation_bytes: int, alignment: int, backward: bool) -> Choice:
    """The tiles for groups of `features`, with activations at multiples of `alignment` bytes."""
    vector = 16 // activation_bytes
    while features % vector or alignment % (vector * activation_bytes):
        vector //= 2
    vectors = features // vector
    lanes = min(32, 1 << (vectors - 1).bit_length())
    words = max(1, vector * activation_bytes // 4) * -(-vectors // lanes)  # registers of one step
    if words > _KEPT_WORDS[backward]:
        return Choice(vector, lanes, 1, 32, 1, False)
    # A tile and the next one, of x alone or of x and dy, are in registers: 64 bytes a thread and load in flight. Narrow
    # vectors need more addresses for the same bytes.
    steps = max(1, min(lanes, (8 if backward and vector * activation_bytes < 16 else 16) // words))
    min_blocks = 4 if words <= 8 else 2
    return Choice(vector, lanes, 1 << (steps.bit_length() - 1), 128, min_blocks, True)


def _defines(features: int, activation_bytes: int, masked: bool, choice: Choice) -> Defines:
    return (
        ("FEATURES", features),
        ("ACTIVATION_BYTES", activation_bytes),
        ("VECTOR", choice.vector),
        ("LANES", choice.lanes),
        ("STEPS", choice.steps),
        ("THREADS", choice.threads),
        ("MIN_BLOCKS", choice.min_blocks),
        ("KEEP", int(choice.keep)),
        ("MASKED", int(masked)),
    )


def _variants() -> tuple[tuple[str, str, Defines], ...]:
    found: list[tuple[str, str, Defines]] = [("timestep_norm/parameters.cu", "timestep_norm_parameters", ())]
    for features, activation_bytes, masked in (
        *((32, 2, False), (64, 2, False), (64, 2, True), (64, 4, False), (128, 2, False)),
        *((99, 4, True), (1024, 4, True), (4096, 2, True)),
    ):
        for name, backward in (("forward", False), ("backward", True)):
            choice = choose(features, activation_bytes, 16, backward)
            found.append(
                (
                    f"timestep_norm/{name}.cu",
                    f"timestep_norm_{name}",
                    _defines(features, activation_bytes, masked, choice),
                )
            )
    return tuple(found)


VARIANTS = _variants()
"""Kernels that the tests compile for every architecture: source, name, macros."""


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


class _Plan(NamedTuple):
    kernel: Any
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    blocks: int  # of one sequence (batch row and group)
    sums: int  # that the blocks of one sequence exchange, over all sequences; 0 where each has one block


def forward(
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
    """y, the state after (count, mean, var), and the running mean and 1/std of each step (B, L, G).

    x (B, L, D) bfloat16 or float32; weight, bias, mean, var float32; shapes as `timestep_norm` checks them.

    Raises:
        kernels.KernelUnavailable: the kernels do not run on this device.
    """
    x, mask = x.contiguous(), contiguous(padding_mask)
    weight, bias, count = weight.contiguous(), bias.contiguous(), count.contiguous()
    mean, var = mean.contiguous(), var.contiguous()
    batch, length, _ = x.shape
    y, last_count = torch.empty_like(x), torch.empty_like(count)
    last_mean, last_var = torch.empty_like(mean), torch.empty_like(var)
    step_mean = _steps_like(mean, batch, length, num_groups)
    step_rstd = torch.empty_like(step_mean)
    if x.numel() == 0:
        return y, last_count.copy_(count), last_mean.copy_(mean), last_var.copy_(var), step_mean, step_rstd
    plan = _plan(False, x.shape, num_groups, x.element_size(), _alignment(x), mask is not None, x.device)
    steps = _steps(mask)
    totals, flags = _exchange(plan, mean)
    params = _Forward(
        *(x.data_ptr(), y.data_ptr(), weight.data_ptr(), bias.data_ptr(), count.data_ptr(), mean.data_ptr()),
        *(var.data_ptr(), address(mask), address(steps)),
        *(last_count.data_ptr(), last_mean.data_ptr(), last_var.data_ptr()),
        *(step_mean.data_ptr(), step_rstd.data_ptr(), address(totals), address(flags)),
        *(length, *step_mean.stride()[1:], num_groups, plan.blocks, eps),
    )
    plan.kernel.launch(plan.grid, plan.threads, params, stream_of(x.device), plan.shared_bytes, plan.blocks > 1)
    return y, last_count, last_mean, last_var, step_mean, step_rstd


def backward(
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
    """dx, dweight, dbias, dmean, dvar; step_mean and step_rstd are those of `forward`.

    Raises:
        kernels.KernelUnavailable: the kernels do not run on this device.
    """
    x, dy, mask = x.contiguous(), dy.contiguous(), contiguous(padding_mask)
    weight, count, mean = weight.contiguous(), count.contiguous(), mean.contiguous()
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
    plan = _plan(True, x.shape, groups, x.element_size(), alignment, mask is not None, x.device)
    steps = _steps(mask)
    totals, flags = _exchange(plan, mean)
    parts = batch * plan.blocks
    partial = mean.new_empty(2 * parts * dim)
    params = _Backward(
        *(dy.data_ptr(), x.data_ptr(), dx.data_ptr(), weight.data_ptr(), address(dmean_last), address(dvar_last)),
        *(count.data_ptr(), mean.data_ptr(), address(mask), address(steps)),
        *(step_mean.data_ptr(), step_rstd.data_ptr(), dmean.data_ptr(), dvar.data_ptr(), partial.data_ptr()),
        *(address(totals), address(flags), batch, length, *step_mean.stride()[1:]),
        *(groups, plan.blocks),
    )
    stream = stream_of(x.device)
    plan.kernel.launch(plan.grid, plan.threads, params, stream, plan.shared_bytes, plan.blocks > 1)
    add = _Parameters(partial.data_ptr(), dweight.data_ptr(), dbias.data_ptr(), parts, dim)
    _parameters_kernel(x.device).launch((-(-dim // 32), 2, 1), 256, add, stream, 8 * 256)
    return dx, dweight, dbias, dmean, dvar


@functools.lru_cache(maxsize=1024)
def _plan(
    backward: bool,
    shape: torch.Size,
    groups: int,
    activation_bytes: int,
    alignment: int,
    masked: bool,
    device: torch.device,
) -> _Plan:
    batch, length, dim = shape
    features = dim // groups
    choice = choose(features, activation_bytes, alignment, backward)
    name = "backward" if backward else "forward"
    kernel = kernels.load(
        f"timestep_norm/{name}.cu",
        f"timestep_norm_{name}",
        _defines(features, activation_bytes, masked, choice),
        device,
    )
    warps = choice.threads // 32
    shared_bytes = 16 * (2 * warps + 1)  # two float64 sums for each warp, twice, and for the tiles before
    vectors = -(-features // (choice.vector * choice.lanes))  # of a lane
    shared_bytes += (1 if backward else 2) * 4 * vectors * choice.lanes * choice.vector  # gain; bias
    if backward:
        shared_bytes += 2 * 8 * choice.vector * vectors * choice.threads  # dweight and dbias of a thread, float64
    tiles = -(-length // (warps * (32 // choice.lanes) * choice.steps))
    capacity = kernel.blocks_per_multiprocessor(choice.threads, shared_bytes) * multiprocessors(device)
    blocks = _blocks(batch * groups, tiles, capacity)
    grid = (batch * groups * blocks, 1, 1)
    return _Plan(kernel, grid, choice.threads, shared_bytes, blocks, batch * groups * tiles if blocks > 1 else 0)


def _blocks(sequences: int, tiles: int, capacity: int) -> int:
    """Blocks of one sequence. They wait for each other, so no more than the GPU holds at once; each gets two tiles."""
    return max(1, min(capacity // sequences, tiles // 2))


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


def _exchange(plan: _Plan, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Where blocks leave their tiles' sums, and the words that say so: 0 at first."""
    if not plan.sums:
        return None, None
    sums = torch.empty(2 * plan.sums, dtype=torch.float64, device=like.device)
    return sums, torch.zeros(plan.sums, dtype=torch.int32, device=like.device)
