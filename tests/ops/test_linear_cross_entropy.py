"""Output layer and cross-entropy in one, against both one after the other."""

import pytest
import torch
from torch.nn import functional as F

from megalodon_plugin.ops.linear_cross_entropy import IGNORED, linear_cross_entropy

ROWS, D, V = (2, 7), 5, 11


def problem(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*shape, D, generator=generator, dtype=torch.float64) for shape in (ROWS, (V,)))
    labels = torch.randint(V, ROWS, generator=generator)
    labels[0, 2] = labels[1, 6] = IGNORED
    return x.to(dtype).requires_grad_(), weight.requires_grad_(), labels


def apart(x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy((x @ weight.T).flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=IGNORED)


def gradients(loss: torch.Tensor, *leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(3 * loss, leaves)


@pytest.mark.parametrize("rows_at_once", [1, 4, 14, 100])
def test_loss_and_gradients_are_those_of_the_two_steps(rows_at_once: int) -> None:
    x, weight, labels = problem()
    truth = apart(x, weight, labels)
    loss = linear_cross_entropy(x, weight, labels, rows_at_once)
    torch.testing.assert_close(loss, truth)
    for found, true in zip(gradients(loss, x, weight), gradients(truth, x, weight), strict=True):
        torch.testing.assert_close(found, true)


def test_without_gradients_the_loss_is_the_same() -> None:
    x, weight, labels = problem()
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(x, weight, labels, 3), apart(x, weight, labels))


@pytest.mark.parametrize("of_weight", [False, True])
def test_one_of_the_gradients_alone(of_weight: bool) -> None:
    x, weight, labels = problem()
    leaf, other = (weight, x) if of_weight else (x, weight)
    other.requires_grad_(False)
    (found,) = gradients(linear_cross_entropy(x, weight, labels, 4), leaf)
    (true,) = gradients(apart(x, weight, labels), leaf)
    torch.testing.assert_close(found, true)


def test_bfloat16_rows_round_the_logits_alone() -> None:
    x, weight, labels = problem(torch.bfloat16)
    weight = weight.detach().bfloat16().float().requires_grad_()  # an exact bfloat16 in a float32 parameter
    loss = linear_cross_entropy(x, weight, labels, 4)
    assert loss.dtype == torch.float32
    dx, dweight = gradients(loss, x, weight)
    assert (dx.dtype, dweight.dtype) == (torch.bfloat16, torch.float32)
    exact_x, exact_weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    truth = apart(exact_x, exact_weight, labels)
    true_dx, true_dweight = gradients(truth, exact_x, exact_weight)
    assert abs(loss.item() - truth.item()) < 2**-8 * truth.item()
    assert (dx - true_dx).norm() < 2**-6 * true_dx.norm()
    assert (dweight - true_dweight).norm() < 2**-6 * true_dweight.norm()


def test_under_autocast_the_rows_decide_the_precision() -> None:
    x, weight, labels = problem()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(x, weight, labels, 4)
    torch.testing.assert_close(loss, apart(x, weight, labels))


def test_a_second_backward_pass_is_an_error() -> None:
    x, weight, labels = problem()
    loss = linear_cross_entropy(x, weight, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(AttributeError):
        loss.backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(3, dtype=torch.int64)}, r"`labels` must have x's shape \(2, 7\)"),
        ({"weight": torch.zeros(V, D + 1)}, r"`weight` must have shape \(V, 5\)"),
        ({"rows_at_once": 0}, "`rows_at_once` must be at least 1, but is 0"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict, message: str) -> None:
    x, weight, labels = problem()
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**({"x": x, "weight": weight, "labels": labels} | change))
