"""The CEMA kernels, run thread by thread on a CPU, against the definition in float64."""

import pytest
import torch
from torch import Tensor

from megalodon_plugin import kernels
from megalodon_plugin.ops.cema import CemaParameters, cema_definition, cuda
from megalodon_plugin.ops.cema.tiles import choose_tiles, divide_pass

from support import emulator


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "load", emulator.emulated_load)
    monkeypatch.setattr(cuda, "multiprocessors", lambda device: 2)


def make_inputs(batch: int, length: int, dim: int, order: int, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "x": randn(batch, length, dim).to(dtype),
        "alpha": randn(dim, order, 1),
        "delta": randn(dim, order, 1) - 2,
        "theta": randn(dim, 1, 1),
        "gamma": randn(dim, order, 2),
        "omega": randn(dim, 1),
        "h0": randn(batch, dim, order, 2),
        "dy": randn(batch, length, dim).to(dtype),
        "dh": randn(batch, dim, order, 2),
    }


def truth(inputs: dict[str, Tensor], with_states: bool, cema_input: str) -> list[Tensor]:
    """y, h and the gradients of x, the five parameters and h0, in float64 from the same, already rounded, numbers."""
    names = ["x", "alpha", "delta", "theta", "gamma", "omega", "h0"]
    leaves = [inputs[name].double().requires_grad_() for name in names]
    h0 = leaves[-1] if with_states else None
    y, h = cema_definition(*leaves[:6], h0=h0, return_state=True, cema_input=cema_input)
    assert h is not None
    loss = (y * inputs["dy"].double()).sum()
    if with_states:
        loss = loss + (h * inputs["dh"].double()).sum()
    wanted = leaves if with_states else leaves[:6]
    grads = torch.autograd.grad(loss, wanted)
    return [y.detach(), h.detach(), *grads]


def run(inputs: dict[str, Tensor], with_states: bool, cema_input: str) -> list[Tensor]:
    x, h0 = inputs["x"], inputs["h0"] if with_states else None
    tensors = (inputs[name] for name in ("alpha", "delta", "theta", "gamma", "omega"))
    parameters = CemaParameters(*tensors, cema_input == "paper")
    tiles = choose_tiles(x.shape[1], parameters.alpha.shape[1], x.dtype)
    assert tiles is not None
    y, h, kept = cuda.forward(tiles, x, parameters, h0)
    dh = inputs["dh"] if with_states else None
    *grads, dh0 = cuda.backward(tiles, inputs["dy"], dh, x, parameters, h0, kept)
    return [y, h, *grads, *([dh0] if with_states else [])]


def error(value: Tensor, expected: Tensor) -> float:
    return ((value.double() - expected).norm() / expected.norm()).item()


def check(inputs: dict[str, Tensor], with_states: bool = True, cema_input: str = "released") -> None:
    expected = truth(inputs, with_states, cema_input)
    names = ["y", "h", "dx", "dalpha", "ddelta", "dtheta", "dgamma", "domega", "dh0"]
    for name, value, exact in zip(names, run(inputs, with_states, cema_input), expected, strict=False):
        if inputs["x"].dtype == torch.bfloat16:
            # What rounding the exact result would cost, half as much again; states and parameters are float32 sums.
            limit = 1.5 * error(exact.to(torch.bfloat16), exact) if name in ("y", "dx") else 1e-4
        else:
            limit = 3e-6
        assert error(value, exact) <= limit, name


@pytest.mark.parametrize("length", [1, 15, 33, 512, 1100])
def test_bfloat16_matches_the_definition(length: int) -> None:
    check(make_inputs(2, length, 16, 16, torch.bfloat16, length))


@pytest.mark.parametrize("length", [20, 300])
def test_short_rows_take_short_blocks(length: int) -> None:
    tiles = choose_tiles(length - 100 if length > 256 else length, 16, torch.bfloat16)
    assert tiles is not None
    assert tiles.block == 16
    check(make_inputs(2, 200, 16, 5, torch.bfloat16, length), with_states=False)


def test_float32_keeps_float32_accuracy() -> None:
    check(make_inputs(1, 600, 8, 16, torch.float32), cema_input="paper")


def test_more_than_16_orders() -> None:
    check(make_inputs(1, 300, 8, 20, torch.bfloat16))


def test_a_dimension_that_no_vector_divides() -> None:
    check(make_inputs(1, 70, 21, 3, torch.bfloat16))


def test_segments_give_the_numbers_of_one_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(1, 25 * 512, 8, 16, torch.bfloat16)
    inputs["delta"] -= 8  # a state that lives across segments, also across one in the middle
    one = run(inputs, True, "released")
    monkeypatch.setattr(cuda, "multiprocessors", lambda device: 8)
    assert divide_pass(1, 25, 1, 8).segments == 3
    many = run(inputs, True, "released")
    for a, b in zip(one, many, strict=True):
        # bfloat16 results may be rounded to the other side here and there.
        assert error(a, b.double()) < (5e-4 if a.dtype == torch.bfloat16 else 1e-5)


def test_a_division_covers_every_row_and_tile() -> None:
    for batch in (1, 3, 8):
        for n_tiles in (1, 7, 64):
            for channel_groups in (1, 64, 256):
                d = divide_pass(batch, n_tiles, channel_groups, 132)
                assert d.segments * d.segment_tiles >= n_tiles > (d.segments - 1) * d.segment_tiles
                assert 1 <= d.rows <= batch
