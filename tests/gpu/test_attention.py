"""The kernels of chunk attention against the float64 definition, on a Hopper GPU."""

import pytest
import torch

from megalodon_plugin.ops import chunk_attention
from megalodon_plugin.ops.chunk_attention import chunk_attention_definition, dense, hopper
from megalodon_plugin.ops.dispatch import use_kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
    ),
]


def inputs(batch: int, length: int, heads: int, qk_width: int, v_width: int, scale: float) -> list[torch.Tensor]:
    """q, k, v and the output's gradient; scores of a query with itself are about scale^2."""
    generator = torch.Generator("cuda").manual_seed(length)
    qk, wide = (batch, length, heads, qk_width), (batch, length, heads, v_width)
    drawn = [torch.randn(shape, generator=generator, device="cuda") for shape in (qk, qk, wide, wide)]
    drawn[:2] = [torch.nn.functional.rms_norm(t, t.shape[-1:]) * scale / qk_width**0.5 for t in drawn[:2]]
    drawn[1] = drawn[1] + drawn[0] / 2  # so that scores are large on the diagonal
    return [t.bfloat16() for t in drawn]


def output_and_gradients(op, q, k, v, dout, chunk_size: int) -> list[torch.Tensor]:
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out = op(*leaves, chunk_size)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def error(value: torch.Tensor, truth: torch.Tensor) -> float:
    return ((value.double() - truth).norm() / truth.norm()).item()


CASES = {
    "short last chunk for the kernel": (2, 256 * 2 + 128, 2, 256, 512, 256, 3.0),
    "short last chunk for the dense path": (2, 256 * 2 + 100, 2, 256, 512, 256, 3.0),
    "value width that is no power of two": (1, 512, 1, 128, 384, 256, 2.0),
    "narrow heads": (1, 256, 3, 64, 128, 128, 2.0),
    "row shorter than a chunk": (3, 384, 1, 256, 256, 4096, 2.0),
    "model's own widths": (1, 2048, 1, 256, 2048, 2048, 1.0),
    "scores that outgrow the first keys'": (1, 1024, 2, 256, 256, 512, 14.0),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_kernels_agree_with_float64_as_well_as_the_dense_path_does(case, monkeypatch) -> None:
    *shape, chunk_size, scale = case
    launched = []
    forward = hopper.forward
    monkeypatch.setattr(hopper, "forward", lambda *a: launched.append(1) or forward(*a))
    drawn = inputs(*shape, scale)
    truth = output_and_gradients(chunk_attention_definition, *(t.double() for t in drawn), chunk_size)
    with use_kernels("off"):
        dense = output_and_gradients(chunk_attention, *drawn, chunk_size)
    assert not launched
    with use_kernels("require"):
        fast = output_and_gradients(chunk_attention, *drawn, chunk_size)
    assert launched
    for name, found, other, true in zip(["out", "dq", "dk", "dv"], fast, dense, truth, strict=True):
        assert error(found, true) < max(1.5 * error(other, true), 4e-3), name


def test_groups_of_matrices_give_the_same_bits_as_all_at_once(monkeypatch) -> None:
    drawn = inputs(2, 1024, 2, 256, 512, 2.0)
    with use_kernels("require"):
        whole = output_and_gradients(chunk_attention, *drawn, 256)
        monkeypatch.setattr(hopper, "WEIGHTS_AT_ONCE", 3 * 256 * 256)
        parts = output_and_gradients(chunk_attention, *drawn, 256)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_two_runs_agree_in_every_bit() -> None:
    drawn = inputs(1, 2048, 2, 256, 2048, 2.0)
    with use_kernels("require"):
        first, second = (output_and_gradients(chunk_attention, *drawn, 1024) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_float32_takes_the_dense_path(monkeypatch) -> None:
    monkeypatch.setattr(hopper, "forward", None)
    seen = []
    forward = dense.forward
    monkeypatch.setattr(dense, "forward", lambda *a: seen.append(1) or forward(*a))
    q, k, v, _ = (t.float() for t in inputs(1, 256, 1, 64, 128, 1.0))
    chunk_attention(q, k, v, 128)
    assert seen
