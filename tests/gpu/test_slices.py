"""A slice's summaries on a CUDA GPU, by kernel, against float64; and slices that together are the whole row."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from megalodon_plugin.ops import cema
from megalodon_plugin.ops.cema import CemaParameters, cema_fold, cema_summary, cema_summary_grad
from megalodon_plugin.ops.dispatch import use_kernels
from megalodon_plugin.ops.timestep_norm import norm_summary

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])


@pytest.fixture(autouse=True)
def kernels_required() -> Iterator[None]:
    with use_kernels("require"):
        yield


def parameters(dim: int, order: int = 16, rotate: bool = False) -> CemaParameters:
    """Of channels that decay at once and of some that live for thousands of steps."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((dim, order, 1), (dim, order, 1), (dim, 1, 1), (dim, order, 2), (dim, 1))
    alpha, delta, theta, gamma, omega = (torch.randn(*shape, generator=generator).cuda() for shape in shapes)
    delta[::2] -= 8
    return CemaParameters(alpha, delta, theta, gamma, omega, rotate)


def in_double(p: CemaParameters) -> CemaParameters:
    alpha, delta, theta, gamma, omega = (t.double() for t in p[:5])
    return CemaParameters(alpha, delta, theta, gamma, omega, p.rotate_input)


def random(*shape: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda").to(dtype)


def error(value: Tensor, exact: Tensor) -> float:
    return ((value.double() - exact).norm() / exact.norm()).item()


@DTYPES
@pytest.mark.parametrize("summarise", [cema_summary, cema_summary_grad])
@pytest.mark.parametrize(
    ("batch", "length", "dim"),
    [(1, 32, 16), (3, 544, 72), (2, 4096, 256), (1, 65536, 64)],  # the last is cut into segments
)
def test_cema_summary(batch: int, length: int, dim: int, summarise, dtype: torch.dtype) -> None:
    p = parameters(dim, rotate=batch == 2)
    x = random(batch, length, dim, dtype=dtype)
    assert error(summarise(x, p), summarise(x.double(), in_double(p))) < (2e-5 if dtype == torch.bfloat16 else 2e-6)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("rank", [0, 2, 7])
def test_cema_fold(rank: int, reverse: bool) -> None:
    p = parameters(72)
    summaries = random(8, 3, 72, 16, 2, dtype=torch.float32)
    exact = cema_fold(summaries.double(), in_double(p), 4096, rank, reverse)
    torch.testing.assert_close(cema_fold(summaries, p, 4096, rank, reverse).double(), exact, rtol=1e-6, atol=1e-6)


@DTYPES
@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize(("batch", "length", "dim", "groups"), [(1, 1, 64, 4), (3, 1000, 272, 2), (1, 32768, 1024, 32)])
def test_norm_summary(batch: int, length: int, dim: int, groups: int, offset: float, dtype: torch.dtype) -> None:
    x = (random(batch, length, dim, dtype=torch.float32) + offset).to(dtype)
    _, mean, var = norm_summary(x, groups, torch.float32)
    _, exact_mean, exact_var = norm_summary(x.double(), groups, torch.float64)
    torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(var.double(), exact_var, rtol=1e-5, atol=1e-7)


@DTYPES
def test_slices_together_are_the_whole_row(dtype: torch.dtype) -> None:
    slices, length, dim = 4, 2048, 128
    p = parameters(dim)
    x, dy = (random(2, slices * length, dim, dtype=dtype, seed=seed) for seed in (1, 2))
    exact = [t.double().requires_grad_() for t in (x, *p[:5])]
    whole, _ = cema(*exact)
    expected = [whole.detach(), *torch.autograd.grad(whole, exact, dy.double())]
    xs, dys = x.chunk(slices, 1), dy.chunk(slices, 1)
    summaries = torch.stack([cema_summary(part, p) for part in xs])
    grads = torch.stack([cema_summary_grad(part, p) for part in dys])
    outputs, dxs, totals = [], [], [torch.zeros_like(t) for t in p[:5]]
    for rank in range(slices):
        own = [t.clone().requires_grad_() for t in (xs[rank], *p[:5])]
        y, h_last = cema(*own, h0=cema_fold(summaries, p, length, rank), return_state=True)
        outputs.append(y.detach())
        dh_last = cema_fold(grads, p, length, rank, reverse=True)
        dx, *parts = torch.autograd.grad((y, h_last), own, (dys[rank], dh_last))
        dxs.append(dx)
        totals = [total + part for total, part in zip(totals, parts, strict=True)]
    found = [torch.cat(outputs, 1), torch.cat(dxs, 1), *totals]
    names = ("y", "x", "alpha", "delta", "theta", "gamma", "omega")
    for name, value, truth in zip(names, found, expected, strict=True):
        # Rounding the result to bfloat16 costs 1.7e-3; everything else is float32 sums.
        limit = 2.6e-3 if dtype == torch.bfloat16 and name in ("y", "x") else 1e-4
        assert error(value, truth) < limit, name
