"""TimestepNorm's kernels, run on the CPU by the emulator, through the code that launches them on a GPU."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from megalodon_plugin import kernels
from megalodon_plugin.ops import NormState
from megalodon_plugin.ops.timestep_norm import cuda, timestep_norm, timestep_norm_definition
from megalodon_plugin.ops.timestep_norm.saved import SavedForward

from support import emulator

EPS = 1e-5


class Case(NamedTuple):
    batch: int = 2
    length: int = 150
    dim: int = 64
    groups: int = 2
    dtype: torch.dtype = torch.float32
    blocks: int = 1
    carried: bool = True
    padded: bool = False
    level: float = 0.0  # mean of x


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """The launch code finds the emulator, and no plan of another test."""

    def start(blocks: int, schedule: int = 0) -> None:
        cuda._launch_of.cache_clear()
        cuda._parameters_kernel.cache_clear()
        monkeypatch.setattr(cuda, "_blocks", lambda sequences, tiles, capacity: min(blocks, tiles))
        monkeypatch.setattr(cuda, "multiprocessors", lambda device: 2)
        monkeypatch.setattr(kernels, "load", emulator.emulated_load)
        monkeypatch.setattr(emulator, "SCHEDULE", schedule)

    yield start
    cuda._launch_of.cache_clear()
    cuda._parameters_kernel.cache_clear()


def inputs(case: Case) -> dict[str, Tensor | None]:
    torch.manual_seed(0)
    batch, length, dim, groups = case[:4]
    mask = None
    if case.padded:
        mask = torch.rand(batch, length) < 0.3
        mask[:, 0] = True
        mask[0, -1] = True
        mask[-1] = batch > 1  # a row of padding only
    x = (torch.randn(batch, length, dim) * torch.linspace(0.5, 2, length).view(1, -1, 1) + case.level).to(case.dtype)
    return {
        "x": x if mask is None else x.masked_fill(mask.unsqueeze(-1), float("nan")),
        "weight": torch.randn(dim) * 0.3,
        "bias": torch.randn(dim),
        "count": torch.full((batch,), 5 if case.carried else 0) + torch.arange(batch) * int(case.carried),
        "mean": torch.randn(batch, groups) + case.level if case.carried else torch.full((batch, groups), torch.nan),
        "var": torch.rand(batch, groups) + 0.5 if case.carried else torch.full((batch, groups), torch.nan),
        "mask": mask,
        "dy": torch.randn(batch, length, dim).to(case.dtype),
        "dmean": torch.randn(batch, groups) * 3,
        "dvar": torch.randn(batch, groups) * 3,
    }


def by_kernels(given: dict, groups: int) -> dict[str, Tensor]:
    """y, the state, and every gradient."""
    x, weight, mask = given["x"], given["weight"], given["mask"]
    state = NormState(given["count"], given["mean"], given["var"])
    y, count, mean, var, step_mean, step_rstd = cuda.forward(x, weight, given["bias"], state, mask, groups, EPS)
    saved = SavedForward(x, weight, state, mask, step_mean, step_rstd)
    dx, dweight, dbias, dmean, dvar = cuda.backward(given["dy"], given["dmean"], given["dvar"], saved)
    return {
        "y": y,
        "count": count,
        "mean": mean,
        "var": var,
        "dx": dx,
        "dweight": dweight,
        "dbias": dbias,
        "dmean": dmean,
        "dvar": dvar,
    }


def by_torch(function, given: dict, groups: int, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The same from `function`, with every tensor in `dtype` (None: as given)."""
    leaf = {
        k: (given[k].to(dtype) if dtype else given[k]).clone().requires_grad_()
        for k in ("x", "weight", "bias", "mean", "var")
    }
    state = NormState(given["count"], leaf["mean"], leaf["var"])
    y, last = function(leaf["x"], leaf["weight"], leaf["bias"], groups, EPS, state, given["mask"])
    pairs = [(y, given["dy"]), (last.mean, given["dmean"]), (last.var, given["dvar"])]
    torch.autograd.backward([a for a, _ in pairs], [g.to(a.dtype) for a, g in pairs])
    found = {"y": y, "count": last.count, "mean": last.mean, "var": last.var} | {
        f"d{k}": t.grad for k, t in leaf.items()
    }
    return {name: t.detach() for name, t in found.items()}


def error(got: Tensor, expected: Tensor) -> float:
    """Largest difference, as a share of the largest number."""
    assert got.shape == expected.shape
    same_nan = got.isnan() == expected.isnan()
    assert same_nan.all(), f"{(~same_nan).sum()} of {got.numel()} are NaN on one side only"
    difference = (got.double() - expected.double()).nan_to_num()
    return float(difference.abs().max() / expected.double().nan_to_num().abs().max().clamp(min=1e-30))


def check(case: Case) -> None:
    given = inputs(case)
    got = by_kernels(given, case.groups)
    exact = by_torch(timestep_norm_definition, given, case.groups, torch.float64)
    plain = by_torch(timestep_norm, given, case.groups, None)
    report = []
    for name, expected in exact.items():
        mine, its = error(got[name], expected), error(plain[name], expected)
        # The mean of a step is kept in float32 for the backward pass, so dmean has its rounding.
        floor = 2.0**-8 if got[name].dtype == torch.bfloat16 else 1e-6 + abs(case.level) * 2.0**-24
        if not mine <= max(2 * its, floor):
            report.append(f"{name}: {mine:.2e}, PyTorch code {its:.2e}")
    assert not report, "; ".join(report)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("blocks", [1, 2, 3])
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_outputs_state_and_gradients(on_the_cpu, dtype, blocks, padded) -> None:
    on_the_cpu(blocks, schedule=blocks - 1)
    check(Case(dtype=dtype, length=331, dim=128, blocks=blocks, padded=padded, carried=not padded))


@pytest.mark.parametrize(
    "case",
    [
        Case(length=1),
        Case(length=1, carried=False, padded=True),
        Case(length=127, carried=False),
        Case(length=65, padded=True),
        Case(level=1000.0, length=300),
        Case(level=1000.0, length=300, carried=False, padded=True, blocks=2),
        Case(batch=3, dim=7, groups=1, length=67, dtype=torch.bfloat16, blocks=2),
        Case(dim=99, groups=3, length=53, blocks=2, padded=True),
        Case(batch=1, dim=6, groups=6, length=300, blocks=2),
        Case(batch=1, dim=1100, groups=1, length=19, blocks=3, padded=True),
    ],
    ids=lambda c: f"B{c.batch}-L{c.length}-D{c.dim}-G{c.groups}-K{c.blocks}",
)
def test_shapes_and_levels(on_the_cpu, case) -> None:
    on_the_cpu(case.blocks, schedule=1)
    check(case)


def test_blocks_do_not_change_a_bit(on_the_cpu) -> None:
    """Only dweight and dbias are added in another order: their float64 sums are rounded once for each block."""
    given = inputs(Case(length=331, dim=128, padded=True))
    results = []
    for blocks, schedule in ((1, 0), (3, 0), (3, 1), (3, 7)):
        on_the_cpu(blocks, schedule)
        results.append(by_kernels(given, 2))
    for other in results[1:]:
        for name in set(other) - {"dweight", "dbias"}:
            assert torch.equal(other[name].nan_to_num(), results[0][name].nan_to_num()), name
    for other in results[2:]:
        assert torch.equal(other["dweight"], results[1]["dweight"]) and torch.equal(other["dbias"], results[1]["dbias"])


def test_saved_statistics_with_time_last(on_the_cpu, monkeypatch) -> None:
    on_the_cpu(2)
    given = inputs(Case(dim=128))
    expected = by_kernels(given, 2)
    monkeypatch.setattr(cuda, "TIME_LAST", True)
    got = by_kernels(given, 2)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_number_of_blocks_fits_the_gpu() -> None:
    for sequences, tiles, capacity in ((512, 64, 528), (64, 512, 528), (600, 64, 528), (1, 10**6, 528), (3, 1, 528)):
        blocks = cuda._blocks(sequences, tiles, capacity)
        assert blocks == 1 or (sequences * blocks <= capacity and blocks <= tiles)


def test_count_beyond_31_bits(on_the_cpu) -> None:
    on_the_cpu(2)
    given = inputs(Case())
    given["count"] = given["count"] + 2**33
    state = NormState(given["count"], given["mean"], given["var"])
    y, count, mean, *_ = cuda.forward(given["x"], given["weight"], given["bias"], state, given["mask"], 2, EPS)
    assert count.tolist() == [2**33 + 155, 2**33 + 156]
    exact = by_torch(timestep_norm_definition, given, 2, torch.float64)
    assert error(y, exact["y"]) < 1e-6 and error(mean, exact["mean"]) < 1e-6


def test_strided_and_misaligned(on_the_cpu) -> None:
    on_the_cpu(2)
    given = inputs(Case())
    expected = by_kernels(given, 2)
    wide = torch.empty(2, 150, 96)
    wide[..., 13:77] = given["x"]
    shifted = torch.empty(2 * 150 * 64 + 1)[1:].view(2, 150, 64).copy_(given["dy"])
    assert shifted.data_ptr() % 16
    got = by_kernels(given | {"x": wide[..., 13:77], "dy": shifted}, 2)
    for name in expected:
        assert error(got[name], expected[name]) < 1e-6, name


def test_no_gradient_of_the_state_and_an_expanded_one_of_y(on_the_cpu) -> None:
    on_the_cpu(1)
    given = inputs(Case()) | {"dy": torch.ones(1, 1, 1).expand(2, 150, 64), "dmean": None, "dvar": None}
    got = by_kernels(given, 2)
    expected = by_torch(
        timestep_norm_definition, given | {"dmean": torch.zeros(2, 2), "dvar": torch.zeros(2, 2)}, 2, torch.float64
    )
    for name in ("dx", "dmean", "dvar", "dbias"):
        assert error(got[name], expected[name]) < 2e-6, name


def test_no_rows(on_the_cpu) -> None:
    on_the_cpu(1)
    given = {k: t if t is None or k in ("weight", "bias") else t[:0] for k, t in inputs(Case()).items()}
    got = by_kernels(given, 2)
    assert got["y"].shape == (0, 150, 64) and not got["dweight"].any()
