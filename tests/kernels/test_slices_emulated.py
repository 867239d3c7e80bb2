"""The kernels of a slice's summaries, run thread by thread on a CPU, against the definitions in float64."""

import pytest
import torch

from megalodon_plugin import kernels
from megalodon_plugin.ops.cema import CemaParameters, cema_fold, cema_summary, cema_summary_grad, cuda, slices_cuda
from megalodon_plugin.ops.cema.tiles import choose_tiles, divide_pass
from megalodon_plugin.ops.timestep_norm import norm_summary
from megalodon_plugin.ops.timestep_norm import slices_cuda as norm_slices_cuda

from support import emulator

DIM, ORDER = 21, 5


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "load", emulator.emulated_load)
    for module in (cuda, norm_slices_cuda):
        monkeypatch.setattr(module, "multiprocessors", lambda device: 2)


def parameters(dim: int = DIM, order: int = ORDER) -> tuple[torch.Tensor, ...]:
    """Of channels that decay at once and of some that live for thousands of steps."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((dim, order, 1), (dim, order, 1), (dim, 1, 1), (dim, order, 2), (dim, 1))
    alpha, delta, *rest = (torch.randn(*shape, generator=generator) for shape in shapes)
    delta[::2] -= 6
    return alpha, delta, *rest


def exact(x: torch.Tensor, tensors: tuple[torch.Tensor, ...], rotate: bool, reverse: bool) -> torch.Tensor:
    full = CemaParameters(*(p.double() for p in tensors), rotate)
    return (cema_summary_grad if reverse else cema_summary)(x.double(), full)


def error(value: torch.Tensor, expected: torch.Tensor) -> float:
    return ((value.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("blocks", [1, 16, 37])  # in a tile there are 16
def test_summary(blocks: int, dtype: torch.dtype, reverse: bool) -> None:
    tensors = parameters()
    tiles = choose_tiles(blocks * 32, ORDER, dtype)
    assert tiles is not None
    x = torch.randn(2, blocks * tiles.block, DIM, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = slices_cuda.summary(tiles, x, CemaParameters(*tensors, True), reverse)
    assert error(found, exact(x, tensors, True, reverse)) < (1e-5 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("extra_blocks", [0, 2])  # the last tile is full or not
def test_summary_from_segments(monkeypatch: pytest.MonkeyPatch, reverse: bool, extra_blocks: int) -> None:
    monkeypatch.setattr(cuda, "multiprocessors", lambda device: 8)
    length = 25 * 512 + extra_blocks * 32
    tiles = choose_tiles(length, 16, torch.bfloat16)
    assert tiles is not None
    assert divide_pass(1, -(-length // 512), 1, 8).segments == 3
    tensors = parameters(8, 16)
    x = torch.randn(1, length, 8, generator=torch.Generator().manual_seed(2)).bfloat16()
    found = slices_cuda.summary(tiles, x, CemaParameters(*tensors, False), reverse)
    assert error(found, exact(x, tensors, False, reverse)) < 1e-5


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_fold(rank: int, reverse: bool) -> None:
    tensors = parameters()
    summaries = torch.randn(4, 2, DIM, ORDER, 2, generator=torch.Generator().manual_seed(3))
    full = CemaParameters(*(p.double() for p in tensors), False)
    expected = cema_fold(summaries.double(), full, 100, rank, reverse)
    found = slices_cuda.fold(summaries, tensors[:3], 100, rank, reverse)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize(
    ("length", "dim", "groups", "dtype"),
    [
        (1, 64, 4, torch.bfloat16),
        (100, 272, 2, torch.bfloat16),  # more channels than a thread block has
        (700, 32, 4, torch.bfloat16),  # several segments, of which the last is shorter
        (700, 32, 4, torch.float32),
        (50, 21, 3, torch.bfloat16),  # no vectors
        (50, 21, 3, torch.float32),
    ],
)
def test_norm_summary(length: int, dim: int, groups: int, dtype: torch.dtype, offset: float) -> None:
    generator = torch.Generator().manual_seed(length + dim)
    x = (torch.randn(2, length, dim, generator=generator) + offset).to(dtype)
    _, mean, var = norm_summary(x.double(), groups, torch.float64)
    found_mean, found_var = norm_slices_cuda.summary(x, groups)
    torch.testing.assert_close(found_mean.double(), mean, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found_var.double(), var, rtol=2e-6, atol=1e-7)


def test_norm_summary_of_rows_that_lie_apart() -> None:
    x = torch.randn(2, 40, 16, generator=torch.Generator().manual_seed(4)).bfloat16()[:, 3:33]
    _, mean, var = norm_summary(x.double(), 2, torch.float64)
    found_mean, found_var = norm_slices_cuda.summary(x, 2)
    torch.testing.assert_close(found_mean.double(), mean, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found_var.double(), var, rtol=2e-6, atol=1e-7)
