"""A row of time cut into slices, each of which knows only the others' summaries, equals the whole row."""

import pytest
import torch

from megalodon_plugin.ops import NormState, cema, timestep_norm
from megalodon_plugin.ops.cema import CemaParameters, cema_fold, cema_summary, cema_summary_grad
from megalodon_plugin.ops.timestep_norm import merge_norm_states, norm_fold, norm_fold_grad, norm_summary

BATCH, DIM, ORDER, GROUPS = 2, 6, 3, 2


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def cema_parameters(rotate: bool = False) -> CemaParameters:
    """Some channels decay so slowly that every slice feels all earlier ones."""
    torch.manual_seed(1)
    alpha, delta = random(DIM, ORDER, 1), random(DIM, ORDER, 1)
    delta[::2] -= 6
    tensors = (alpha, delta, random(DIM, 1, 1), random(DIM, ORDER, 2), random(DIM, 1))
    return CemaParameters(*tensors, rotate)


@pytest.mark.parametrize("slices", [1, 2, 3, 4])
@pytest.mark.parametrize("length", [1, 7, 64, 100])  # fewer steps than a block, whole blocks, blocks and a rest
@pytest.mark.parametrize("cema_input", ["released", "paper"])
def test_cema_on_slices_equals_the_whole(slices: int, length: int, cema_input: str) -> None:
    parameters = cema_parameters(cema_input == "paper")
    x, dy = random(2, BATCH, slices * length, DIM).unbind(0)
    leaves = [t.clone().requires_grad_() for t in (x, *parameters[:5])]
    whole, _ = cema(*leaves, cema_input=cema_input)
    expected = torch.autograd.grad(whole, leaves, dy)

    xs, dys = x.chunk(slices, 1), dy.chunk(slices, 1)
    summaries = torch.stack([cema_summary(part, parameters) for part in xs])
    grads = torch.stack([cema_summary_grad(part, parameters) for part in dys])
    outputs, dxs, totals = [], [], [torch.zeros_like(p) for p in parameters[:5]]
    for rank, (x_part, dy_part) in enumerate(zip(xs, dys, strict=True)):
        h0 = cema_fold(summaries, parameters, length, rank)
        dh_last = cema_fold(grads, parameters, length, rank, reverse=True)
        own = [t.clone().requires_grad_() for t in (x_part, *parameters[:5])]
        y, h_last = cema(*own, h0=h0, return_state=True, cema_input=cema_input)
        outputs.append(y.detach())
        dx, *parts = torch.autograd.grad((y, h_last), own, (dy_part, dh_last))
        dxs.append(dx)
        totals = [total + part for total, part in zip(totals, parts, strict=True)]
    torch.testing.assert_close(torch.cat(outputs, 1), whole.detach(), rtol=1e-12, atol=1e-12)
    for name, found, right in zip(("x", *CemaParameters._fields), [torch.cat(dxs, 1), *totals], expected, strict=False):
        torch.testing.assert_close(found, right, rtol=1e-11, atol=1e-11 * right.abs().max().item(), msg=name)


def test_cema_summaries_are_the_state_and_its_gradient() -> None:
    parameters = cema_parameters()
    x, dy = random(2, BATCH, 70, DIM).unbind(0)
    h0 = torch.zeros(BATCH, DIM, ORDER, 2, dtype=torch.float64, requires_grad=True)
    y, h_last = cema(x, *parameters[:5], h0=h0, return_state=True)
    torch.testing.assert_close(cema_summary(x, parameters), h_last.detach(), rtol=1e-12, atol=1e-12)
    (expected,) = torch.autograd.grad(y, h0, dy)
    torch.testing.assert_close(cema_summary_grad(dy, parameters), expected, rtol=1e-12, atol=1e-12)


def test_summaries_of_low_precision_activations_are_float32() -> None:
    parameters = CemaParameters(*(p.float() for p in cema_parameters()[:5]), False)
    x = random(BATCH, 70, DIM).bfloat16()
    _, expected = cema(x.double(), *(p.double() for p in parameters[:5]), return_state=True)
    found = cema_summary(x, parameters)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_norm_summary_is_the_state_after_the_slice(offset: float) -> None:
    x = random(BATCH, 37, DIM) + offset
    zeros = torch.zeros(DIM, dtype=torch.float64)
    _, expected = timestep_norm(x, zeros, zeros, GROUPS)
    found = norm_summary(x, GROUPS, torch.float64)
    for name, a, b in zip(NormState._fields, found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=name)


def test_norm_summaries_merge_to_the_state_of_the_whole() -> None:
    x = random(BATCH, 60, DIM).cumsum(1)
    zeros = torch.zeros(DIM, dtype=torch.float64)
    _, expected = timestep_norm(x, zeros, zeros, GROUPS)
    merged = norm_summary(x[:, :20], GROUPS, torch.float64)
    for start in (20, 40):
        merged = merge_norm_states(merged, norm_summary(x[:, start : start + 20], GROUPS, torch.float64))
    for a, b in zip(merged, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_fold_of_norm_summaries_and_its_gradient(rank: int) -> None:
    slices = random(4, BATCH, 20, DIM).cumsum(0)
    summaries = torch.stack([torch.stack(norm_summary(part, GROUPS, torch.float64)[1:]) for part in slices])
    folded = norm_fold(summaries, rank)
    if rank:
        before = norm_summary(slices[:rank].transpose(0, 1).flatten(1, 2), GROUPS, torch.float64)
        torch.testing.assert_close(folded, torch.stack(before[1:]), rtol=1e-12, atol=1e-12)
    # The gradient of slice 1 from those of all prefixes, against autograd through every fold as its equation reads.
    leaf, grads = summaries.clone().requires_grad_(), random(*summaries.shape)
    prefixes = []
    for n in range(1, 4):
        mean = leaf[:n, 0].mean(0)
        prefixes.append(torch.stack([mean, (leaf[:n, 1] + (leaf[:n, 0] - mean) ** 2).mean(0)]))
    (expected,) = torch.autograd.grad(torch.stack(prefixes), leaf, grads[1:])
    torch.testing.assert_close(norm_fold_grad(summaries, grads, rank), expected[rank], rtol=1e-12, atol=1e-12)


def test_norm_summary_gradient() -> None:
    x = random(BATCH, 9, DIM).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: norm_summary(t, GROUPS, torch.float64)[1:], (x,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slice_ops_pass_opcheck(dtype: torch.dtype) -> None:
    ops = torch.ops.megalodon
    parameters = tuple(p.float() for p in cema_parameters()[:5])
    x = random(BATCH, 70, DIM).to(dtype)
    summaries = random(3, BATCH, DIM, ORDER, 2).float()
    for reverse in (False, True):
        torch.library.opcheck(ops.cema_summary.default, (x, *parameters, False, reverse))
        torch.library.opcheck(ops.cema_fold.default, (summaries, *parameters[:4], False, 70, 1, reverse))
    statistics = random(2, 3, 2, BATCH, GROUPS).float().abs()
    for rank in (0, 1, 2):
        torch.library.opcheck(ops.norm_fold.default, (statistics[0], rank))
        torch.library.opcheck(ops.norm_fold_grad.default, (*statistics, rank))
    torch.library.opcheck(ops.norm_summary.default, (x.requires_grad_(), GROUPS, torch.float32))
