"""The ops in float64 against the oracle on fresh random inputs: outputs, states, and every gradient."""

import pytest
import torch

from megalodon_plugin.ops import NormState, cema, chunk_attention, timestep_norm
from megalodon_plugin.ops.cema import cema_definition
from megalodon_plugin.ops.chunk_attention import chunk_attention_definition
from megalodon_plugin.ops.timestep_norm import timestep_norm_definition

import reference
from support.golden_cases import F64_TOLERANCE, as_complex, as_pairs, assert_close

B, D, G, N, C = 2, 12, 3, 4, 16
EPS = 1e-3
COEFFICIENTS = ("alpha", "delta", "theta", "gamma", "omega")
LENGTHS = [1, 2, 7, C - 1, C, C + 1, 61]
LAYOUTS = ["contiguous", "time_major", "every_other"]
NORMS = pytest.mark.parametrize("op", [timestep_norm, timestep_norm_definition], ids=["op", "definition"])
CEMAS = pytest.mark.parametrize("op", [cema, cema_definition], ids=["op", "definition"])
ATTENTIONS = pytest.mark.parametrize("op", [chunk_attention, chunk_attention_definition], ids=["op", "definition"])


def random(seed, **shapes):
    """Seeded normal float64 leaves by name."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_(True)
        for name, shape in shapes.items()
    }


def lay_out(x, layout):
    """The values of x behind other strides; autograd leads back to x."""
    if layout == "time_major":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "every_other":
        return torch.stack([x, torch.full_like(x, 1e3)], dim=-1).flatten(-2)[..., ::2]
    return x


def agree(ours, theirs, inputs, what, seed=0):
    """Same outputs, and, for one random weighting of them, the same gradient of every input."""
    assert_close(ours, theirs, F64_TOLERANCE, what)
    generator = torch.Generator().manual_seed(seed + 99)
    weights = {key: torch.randn(value.shape, generator=generator, dtype=value.dtype) for key, value in theirs.items()}
    results = []
    for out in (ours, theirs):
        total = sum((out[key] * weights[key]).sum() for key in weights)
        grads = torch.autograd.grad(total, list(inputs.values()), allow_unused=True, retain_graph=True)
        grads = [torch.zeros_like(x) if grad is None else grad for x, grad in zip(inputs.values(), grads, strict=True)]
        results.append(dict(zip(inputs, grads, strict=True)))
    assert_close(*results, F64_TOLERANCE, f"{what} gradients")


def norm_inputs(L, carry, seed=1):
    shapes = {"x": (B, L, D), "weight": (D,), "bias": (D,)}
    inputs = random(seed, **shapes, **({"mean": (B, G), "log_var": (B, G)} if carry else {}))
    if not carry:
        return inputs, None
    return inputs, (torch.tensor([5, 0]), inputs["mean"], inputs["log_var"].exp())  # row 1's statistics do not matter


def run_norm(op, x, inputs, state, mask=None):
    state = None if state is None else NormState(*state)
    y, last = op(x, inputs["weight"], inputs["bias"], G, eps=EPS, state=state, padding_mask=mask)
    return {"y": y, "mean": last.mean, "var": last.var}, last.count


def reference_norm(inputs, state, mask=None):
    y, last = reference.timestep_norm(inputs["x"], inputs["weight"], inputs["bias"], G, EPS, state, mask)
    return {"y": y, "mean": last[1], "var": last[2]}, last[0]


@NORMS
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("carry", [False, True], ids=["start", "carry"])
@pytest.mark.parametrize("L", LENGTHS)
def test_timestep_norm(L, carry, layout, op):
    inputs, state = norm_inputs(L, carry)
    ours, count = run_norm(op, lay_out(inputs["x"], layout), inputs, state)
    theirs, reference_count = reference_norm(inputs, state)
    assert torch.equal(count, reference_count)
    agree(ours, theirs, inputs, f"L {L}")


def padding(where, L):
    """True = padding; the two rows differ, and the steps beside a masked one are valid ones."""
    mask = torch.zeros(B, L, dtype=torch.bool)
    if where == "head":
        mask[0, :3], mask[1, :1] = True, True
    elif where == "mid":
        mask[0, 4:7], mask[0, 8], mask[1, L - 2] = True, True, True
    elif where == "tail":
        mask[0, -5:], mask[1, -1:] = True, True
    elif where == "whole_row":
        mask[1] = True
    return mask


@NORMS
@pytest.mark.parametrize("carry", [False, True], ids=["start", "carry"])
@pytest.mark.parametrize("where", ["none", "head", "mid", "tail", "whole_row"])
def test_timestep_norm_with_padding(where, carry, op):
    L = 19
    inputs, state = norm_inputs(L, carry, seed=2)
    mask = padding(where, L)
    ours, count = run_norm(op, inputs["x"], inputs, state, mask)
    theirs, reference_count = reference_norm(inputs, state, mask)
    assert torch.equal(count, reference_count)
    assert torch.equal(ours["y"][mask], torch.zeros_like(ours["y"][mask]))
    if where == "whole_row" and not carry:  # a row that never saw a step has no statistics to compare
        ours, theirs = ({"y": out["y"], "mean": out["mean"][:1], "var": out["var"][:1]} for out in (ours, theirs))
    agree(ours, theirs, inputs, where)


@NORMS
def test_timestep_norm_never_reads_padding_nor_the_statistics_of_no_steps(op):
    """NaN in the padded steps, and in a state of count 0, reaches neither an output nor a gradient."""
    L = 19
    inputs, _ = norm_inputs(L, carry=False, seed=2)
    mask = padding("head", L) | padding("mid", L) | padding("tail", L)
    poison = torch.full((B, G), float("nan"), dtype=torch.float64)
    x = torch.where(mask.unsqueeze(-1), float("nan"), inputs["x"])
    ours, _ = run_norm(op, x, inputs, (torch.zeros(B, dtype=torch.int64), poison, poison), mask)
    agree(ours, reference_norm(inputs, None, mask)[0], inputs, "poisoned")


@NORMS
@pytest.mark.parametrize("where", ["none", "head"])
def test_timestep_norm_far_from_zero(where, op):
    """Data of mean 10000 and deviation 1: a difference of large sums would lose the variance, also after padding."""
    L = 19
    inputs, _ = norm_inputs(L, carry=False, seed=10)
    inputs["x"] = (inputs["x"].detach() + 1e4).requires_grad_(True)
    mask = padding(where, L)
    agree(run_norm(op, inputs["x"], inputs, None, mask)[0], reference_norm(inputs, None, mask)[0], inputs, where)


@NORMS
@pytest.mark.parametrize("split", [1, 9, 16, 18])
def test_timestep_norm_two_halves_are_one_pass(split, op):
    L = 19
    inputs, state = norm_inputs(L, carry=True, seed=3)
    mask = padding("mid", L)
    first, count = run_norm(op, inputs["x"][:, :split], inputs, state, mask[:, :split])
    halfway = (count, first["mean"], first["var"])
    second, count = run_norm(op, inputs["x"][:, split:], inputs, halfway, mask[:, split:])
    theirs, reference_count = reference_norm(inputs, state, mask)
    assert torch.equal(count, reference_count)
    agree({**second, "y": torch.cat([first["y"], second["y"]], dim=1)}, theirs, inputs, f"split {split}")


def cema_inputs(L, carry, order=N, seed=4):
    shapes = {"x": (B, L, D), "alpha": (D, order, 1), "delta": (D, order, 1), "theta": (D, 1, 1)}
    shapes |= {"gamma": (D, order, 2), "omega": (D, 1)}
    return random(seed, **shapes, **({"h0": (B, D, order, 2)} if carry else {}))


def reference_cema(inputs, cema_input):
    h0 = as_complex(inputs["h0"]) if "h0" in inputs else None
    y, h = reference.cema(inputs["x"], *(inputs[key] for key in COEFFICIENTS), h0=h0, cema_input=cema_input)
    return {"y": y, "h": as_pairs(h)}


@CEMAS
@pytest.mark.parametrize("cema_input", ["released", "paper"])
@pytest.mark.parametrize("carry", [False, True], ids=["start", "carry"])
@pytest.mark.parametrize("L", [*LENGTHS, 63, 64, 65, 127, 128, 129, 257])
def test_cema(L, carry, cema_input, op):
    inputs = cema_inputs(L, carry)
    coefficients = [inputs[key] for key in COEFFICIENTS]
    y, h = op(inputs["x"], *coefficients, h0=inputs.get("h0"), return_state=True, cema_input=cema_input)
    agree({"y": y, "h": h}, reference_cema(inputs, cema_input), inputs, f"L {L}")


@CEMAS
@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("order", [1, 3, 16])
def test_cema_strided_input_and_other_orders(order, layout, op):
    inputs = cema_inputs(67, carry=True, order=order, seed=5)
    coefficients = [inputs[key] for key in COEFFICIENTS]
    y, h = op(lay_out(inputs["x"], layout), *coefficients, h0=lay_out(inputs["h0"], layout), return_state=True)
    agree({"y": y, "h": h}, reference_cema(inputs, "released"), inputs, f"order {order}")


@CEMAS
@pytest.mark.parametrize("used", ["y", "h"])
@pytest.mark.parametrize("cema_input", ["released", "paper"])
def test_cema_when_only_one_output_is_used(cema_input, used, op):
    inputs = cema_inputs(70, carry=True, seed=6)
    coefficients = [inputs[key] for key in COEFFICIENTS]
    y, h = op(inputs["x"], *coefficients, h0=inputs["h0"], return_state=used == "h", cema_input=cema_input)
    assert (h is None) == (used == "y")
    agree({used: y if used == "y" else h}, {used: reference_cema(inputs, cema_input)[used]}, inputs, used)


@CEMAS
@pytest.mark.parametrize("cema_input", ["released", "paper"])
@pytest.mark.parametrize("split", [1, 64, 101])
def test_cema_two_halves_are_one_pass(split, cema_input, op):
    inputs = cema_inputs(131, carry=True, seed=7)
    coefficients = [inputs[key] for key in COEFFICIENTS]
    kwargs = {"return_state": True, "cema_input": cema_input}
    first, h = op(inputs["x"][:, :split], *coefficients, h0=inputs["h0"], **kwargs)
    second, h = op(inputs["x"][:, split:], *coefficients, h0=h, **kwargs)
    ours = {"y": torch.cat([first, second], dim=1), "h": h}
    agree(ours, reference_cema(inputs, cema_input), inputs, f"split {split}")


@ATTENTIONS
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("L", [*LENGTHS, 2 * C - 1, 2 * C, 2 * C + 1])
def test_chunk_attention(L, layout, op):
    H, E, W = 3, 6, 10
    inputs = random(8, q=(B, L, H, E), k=(B, L, H, E), v=(B, L, H, W))
    ours = op(*(lay_out(inputs[key], layout) for key in "qkv"), C)
    agree({"y": ours}, {"y": reference.chunk_attention(*inputs.values(), C)}, inputs, f"L {L}")


@ATTENTIONS
@pytest.mark.parametrize(("H", "C_"), [(1, 1), (1, 7), (2, 64)])
def test_chunk_attention_other_chunks(H, C_, op):
    inputs = random(9, q=(B, 23, H, 4), k=(B, 23, H, 4), v=(B, 23, H, 2))
    ours = op(*inputs.values(), C_)
    agree({"y": ours}, {"y": reference.chunk_attention(*inputs.values(), C_)}, inputs, f"chunk {C_}")
