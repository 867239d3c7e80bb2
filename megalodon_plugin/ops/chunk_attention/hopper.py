"""Chunk attention on a Hopper GPU: the launches of `kernels/chunk_attention/hopper.py`.

Chunks of a length that the kernels do not take, such as a short last one, go through `dense`.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megalodon_plugin.kernels import KernelUnavailable

from . import dense
from .runs import Run, runs
from .saved import SavedForward

BLOCK = 128
"""Chunks and values are cut into blocks of this many; so must be their sizes."""
QK_WIDTHS, V_BLOCK = (64, 128, 256), 128
WEIGHTS_AT_ONCE = 1 << 27
"""Weights, and gradients of scores, made at a time: 256 MiB of each in bfloat16, 15 waves of programs and more."""


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] == 9


def takes(q: Tensor, v: Tensor) -> bool:
    """Whether the kernels take these dtypes, widths and this GPU; which chunks they take says `takes_chunk`."""
    return (
        q.is_cuda
        and q.dtype == torch.bfloat16
        and q.shape[3] in QK_WIDTHS
        and v.shape[3] % V_BLOCK == 0
        and _is_hopper(q.device)
    )


def takes_chunk(chunk: int) -> bool:
    """Whether the kernels take chunks of this length."""
    return chunk % BLOCK == 0


@dataclass(frozen=True)
class Blocks:
    """Tile sizes, warps and pipeline stages of a kernel."""

    rows: int
    cols: int
    inner: int
    warps: int
    stages: int


# Chosen by measurement; kernels/JOURNAL.md has the table.
WEIGHTS = Blocks(128, 64, 256, 8, 3)
PRODUCT = Blocks(128, 256, 64, 8, 3)
PRODUCT_TRANSPOSED = Blocks(128, 256, 64, 8, 3)
GRADIENTS = Blocks(128, 128, 64, 4, 3)


def forward(q: Tensor, k: Tensor, v: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    """out (B, L, H, F) bfloat16 and log_sum (B, L, H) float32. All tensors contiguous.

    Raises:
        KernelUnavailable: there is no triton.
    """
    _kernels()
    out, log_sum = dense.empty_outputs(q, v)
    for run in runs(q.shape[1], chunk_size):
        forward_run = _forward_run if takes_chunk(run.chunk) else dense.forward_run
        forward_run(q, k, v, run, out, log_sum)
    return out, log_sum


def backward(dout: Tensor, saved: SavedForward, chunk_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv. All tensors contiguous.

    Raises:
        KernelUnavailable: there is no triton.
    """
    _kernels()
    grads = dense.empty_gradients(saved)
    for run in runs(dout.shape[1], chunk_size):
        backward_run = _backward_run if takes_chunk(run.chunk) else dense.backward_run
        backward_run(dout, saved, run, grads)
    return grads


def _forward_run(q: Tensor, k: Tensor, v: Tensor, run: Run, out: Tensor, log_sum: Tensor) -> None:
    inverse_sum = torch.empty_like(log_sum)
    with torch.cuda.device(q.device):
        for group in _groups(q, run):
            weights = _square_matrices(q, group)
            _weights(q, k, weights, inverse_sum, log_sum, group)
            _product(weights, v, out, group, False, inverse_sum)


def _backward_run(dout: Tensor, saved: SavedForward, run: Run, grads: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k = saved.q, saved.k
    dq, dk, dv = grads
    with torch.cuda.device(q.device):
        delta = _delta(saved.out, dout)
        for group in _groups(q, run):
            weights, dscores = _square_matrices(q, group), _square_matrices(q, group)
            _gradients(dout, saved, delta, weights, dscores, group)
            _product(weights, dout, dv, group, True)
            _product(dscores, k, dq, group, False)
            _product(dscores, q, dk, group, True)


@dataclass(frozen=True)
class Group:
    """`count` matrices of scores that are made together, from number `first` on; the rest are the kernels' numbers."""

    first: int
    count: int
    n_chunks: int
    n_heads: int
    length: int
    start: int
    chunk: int

    @property
    def numbers(self) -> tuple[int, ...]:
        return self.first, self.n_chunks, self.n_heads, self.length, self.start, self.chunk


def _groups(q: Tensor, run: Run) -> list[Group]:
    batch, length, n_heads, _ = q.shape
    n_matrices = batch * run.n_chunks * n_heads
    step = max(1, WEIGHTS_AT_ONCE // run.chunk**2)
    return [
        Group(first, min(step, n_matrices - first), run.n_chunks, n_heads, length, run.start, run.chunk)
        for first in range(0, n_matrices, step)
    ]


def _square_matrices(q: Tensor, group: Group) -> Tensor:
    return q.new_empty(group.count * group.chunk, group.chunk)


def _kernels() -> Any:
    """The module of the kernels, which needs triton."""
    try:
        from megalodon_plugin.kernels.chunk_attention import hopper
    except ImportError as error:
        raise KernelUnavailable(f"triton cannot be imported: {error}") from error
    return hopper


def _descriptor(t: Tensor, rows: int, cols: int) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    if t.ndim == 4:
        t = t.view(t.shape[0] * t.shape[1], -1)
    return TensorDescriptor(t, list(t.shape), list(t.stride()), [rows, cols])


def _weights(q: Tensor, k: Tensor, weights: Tensor, inverse_sum: Tensor, log_sum: Tensor, group: Group) -> None:
    b, width = WEIGHTS, q.shape[3]
    _kernels().attention_weights[(group.chunk // b.rows, group.count)](
        _descriptor(q, b.rows, width),
        _descriptor(k, b.cols, width),
        _descriptor(weights, b.rows, b.cols),
        inverse_sum,
        log_sum,
        *group.numbers,
        WIDTH=width,
        ROWS=b.rows,
        COLS=b.cols,
        num_warps=b.warps,
        num_stages=b.stages,
    )


def _product(a: Tensor, x: Tensor, y: Tensor, group: Group, transposed: bool, scale: Tensor | None = None) -> None:
    b, width = PRODUCT_TRANSPOSED if transposed else PRODUCT, x.shape[3]
    cols = b.cols if width % b.cols == 0 else min(width, V_BLOCK)
    blocks = group.chunk // b.rows
    grid = (width // cols, blocks, group.count) if cols < width else (group.count, blocks, 1)
    _kernels().causal_product[grid](
        _descriptor(a, *((b.inner, b.rows) if transposed else (b.rows, b.inner))),
        _descriptor(x, b.inner, cols),
        scale,
        _descriptor(y, b.rows, cols),
        *group.numbers,
        WIDTH=width,
        ROWS=b.rows,
        COLS=cols,
        INNER=b.inner,
        TRANSPOSED=transposed,
        num_warps=b.warps,
        num_stages=b.stages,
    )


def _delta(out: Tensor, dout: Tensor) -> Tensor:
    """Sums of out dout over each head's values, (B, L, H) float32."""
    delta = torch.empty(out.shape[:3], dtype=torch.float32, device=out.device)
    width, rows = out.shape[3], 4
    if width & (width - 1):  # Triton's blocks are powers of two
        return torch.sum(out.float() * dout.float(), 3, out=delta)
    grid = (-(-delta.numel() // rows),)
    _kernels().output_products[grid](out, dout, delta, delta.numel(), WIDTH=width, ROWS=rows, num_warps=4)
    return delta


def _gradients(
    dout: Tensor, saved: SavedForward, delta: Tensor, weights: Tensor, dscores: Tensor, group: Group
) -> None:
    q, k, v = saved.q, saved.k, saved.v
    b, qk_width, v_width = GRADIENTS, q.shape[3], v.shape[3]
    side, inner, blocks = b.rows, min(b.inner, qk_width), group.chunk // b.rows
    _kernels().score_gradients[(blocks * (blocks + 1) // 2, group.count)](
        _descriptor(q, side, inner),
        _descriptor(k, side, inner),
        _descriptor(v, side, b.inner),
        _descriptor(dout, side, b.inner),
        saved.log_sum,
        delta,
        _descriptor(weights, side, side),
        _descriptor(dscores, side, side),
        *group.numbers,
        QK_WIDTH=qk_width,
        V_WIDTH=v_width,
        SIDE=side,
        INNER=b.inner,
        QK_INNER=inner,
        num_warps=b.warps,
        num_stages=b.stages,
    )
