"""How far the ops stray from the exact result: in low precision, far from zero, over long rows, at the parameters'
ends; and how much memory CEMA takes."""

import sys

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from megalodon_plugin.ops import NormState, cema, chunk_attention, timestep_norm

B, L, D, G, N, H, E, W, C = 2, 150, 12, 3, 16, 2, 8, 6, 32
COEFFICIENT_SHAPES = {"alpha": (D, N, 1), "delta": (D, N, 1), "theta": (D, 1, 1), "gamma": (D, N, 2), "omega": (D, 1)}


def random(seed, **shapes):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def run_cema(x, alpha, delta, theta, gamma, omega, h0):
    return cema(x, alpha, delta, theta, gamma, omega, h0=h0, return_state=True)


def run_timestep_norm(x, weight, bias, mean, var):
    y, state = timestep_norm(x, weight, bias, G, state=NormState(torch.tensor([7, 0]), mean, var))
    return y, state.mean, state.var


def run_chunk_attention(q, k, v):
    return (chunk_attention(q, k, v, C),)


# Per op: how to run it, its arguments, and which of them are activations.
CASES = {
    "cema": (run_cema, random(1, x=(B, L, D), **COEFFICIENT_SHAPES, h0=(B, D, N, 2)), ("x",)),
    "timestep_norm": (
        run_timestep_norm,
        {**random(2, x=(B, L, D), weight=(D,), bias=(D,), mean=(B, G)), "var": torch.full((B, G), 0.7)},
        ("x",),
    ),
    "chunk_attention": (
        run_chunk_attention,
        random(3, q=(B, L, H, E), k=(B, L, H, E), v=(B, L, H, W)),
        ("q", "k", "v"),
    ),
}


def output_weights(outputs):
    """What values_and_gradients multiplies the outputs by."""
    generator = torch.Generator().manual_seed(9)
    return [torch.randn(out.shape, generator=generator).bfloat16().to(out.dtype) for out in outputs]


def values_and_gradients(run, arguments, autocast=False):
    """Outputs by place and gradients by name; the objective weights every number of every output."""
    leaves = {name: value.detach().clone().requires_grad_(True) for name, value in arguments.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        outputs = run(**leaves)
    gradients = torch.autograd.grad(outputs, list(leaves.values()), output_weights(outputs))
    named = {str(i): out.detach() for i, out in enumerate(outputs)}
    return named | {f"d{name}": grad for name, grad in zip(leaves, gradients, strict=True)}


@pytest.mark.parametrize("name", CASES)
def test_autocast_rounds_nothing_inside_an_op(name):
    run, arguments, _ = CASES[name]
    plain, autocast = values_and_gradients(run, arguments), values_and_gradients(run, arguments, autocast=True)
    for key, value in plain.items():
        assert autocast[key].dtype == value.dtype
        assert torch.equal(autocast[key], value), key


def root_mean_square(t):
    return t.double().square().mean().sqrt().item()


def attention_from_rounded_output(q, k, v):
    """Exact gradients of q and k but for one rounding: the backward pass starts from the output that the forward pass
    returned in bfloat16, as flash attention's does."""
    out, log_sum = torch.ops.megalodon.chunk_attention(q, k, v, C)
    rounded = out.bfloat16().double()
    dq, dk, _ = torch.ops.megalodon.chunk_attention_backward(*output_weights([out]), q, k, v, rounded, log_sum, C)
    return {"dq": dq, "dk": dk}


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_activations_cost_little_more_than_rounding_the_result(name):
    """The arguments are rounded before both runs, so that all that is left is the op's own rounding. Rounding the exact
    result is the least that an op returning bfloat16 can do; what it returns in float32 has only float32's error."""
    run, arguments, activations = CASES[name]
    arguments = {k: v.bfloat16() if k in activations else v for k, v in arguments.items()}
    doubles = {k: v.double() for k, v in arguments.items()}
    exact = values_and_gradients(run, doubles)
    best = exact | (attention_from_rounded_output(**doubles) if name == "chunk_attention" else {})
    got = values_and_gradients(run, arguments)
    for key, want in exact.items():
        least = root_mean_square(best[key].to(got[key].dtype).double() - want)
        error = root_mean_square(got[key].double() - want)
        slack = 1e-6 * root_mean_square(want)  # sums of float32 numbers: some tens of its half-ulps of 6e-8
        assert error <= 1.5 * least + slack, f"{key}: {error:.3g}, where rounding alone gives {least:.3g}"


def running_norm(x, groups, eps=1e-5):
    """TimestepNorm without gain and bias, all steps at once: the running variance is the mean of the squares of all
    features so far less the square of their mean, taken about the first step so that nothing cancels in float64."""
    x = x.double().unflatten(2, (groups, -1))
    pivot = x[:, :1].mean(-1, keepdim=True)
    n = torch.arange(1, x.shape[1] + 1, dtype=torch.float64).view(1, -1, 1)
    mean = (x - pivot).mean(-1).cumsum(1) / n
    var = (x - pivot).square().mean(-1).cumsum(1) / n - mean.square()
    mean = mean + pivot.squeeze(-1)
    y = (x - mean.unsqueeze(-1)) * torch.rsqrt(var + eps).unsqueeze(-1)
    return y.flatten(2), mean[:, -1], var[:, -1]


@pytest.mark.parametrize(
    ("steps", "mean", "tolerance"),
    [
        # Half a last place of the mean is 2^-24 of it (at 1000: 6e-5); mean and x are rounded, and the deviation is 1.
        (3000, 1000.0, 4 * 1000 * 2**-24),
        (1_000_000, 0.0, 1e-6),
        (1_000_000, 10.0, 4 * 10 * 2**-24),
    ],
    ids=["far_from_zero", "a_million_steps", "a_million_steps_off_zero"],
)
def test_timestep_norm_in_float32(steps, mean, tolerance):
    x = random(4, x=(1, steps, 4))["x"] + mean
    y, state = timestep_norm(x, torch.zeros(4), torch.zeros(4), 2)
    want, last_mean, last_var = running_norm(x, 2)
    # A group of two equal numbers has a tiny deviation at first, by which its error is magnified.
    settled = want[:, 100:].abs().max()
    assert (y[:, 100:] - want[:, 100:]).abs().max() <= tolerance * settled
    assert state.count.tolist() == [steps]
    torch.testing.assert_close(state.mean.double(), last_mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(state.var.double(), last_var, rtol=1e-6, atol=0)


def test_timestep_norm_counts_on_from_a_long_past():
    """A state of 2^24 + 1 steps: float32 cannot count that far, so a count held there would stand still."""
    past = 2**24 + 1
    x = random(5, x=(1, 1000, 4))["x"]
    state = NormState(torch.tensor([past]), torch.full((1, 2), 0.5), torch.full((1, 2), 2.0))
    _, last = timestep_norm(x, torch.zeros(4), torch.zeros(4), 2, state=state)
    assert last.count.item() == past + 1000
    groups = x.double().unflatten(2, (2, -1))
    total = past + 1000
    mean = (past * 0.5 + groups.mean(-1).sum(1)) / total
    var = (past * (2.0 + 0.25) + groups.square().mean(-1).sum(1)) / total - mean.square()
    torch.testing.assert_close(last.mean.double(), mean, rtol=1e-7, atol=0)
    torch.testing.assert_close(last.var.double(), var, rtol=2e-7, atol=0)


@pytest.mark.parametrize("decay", [1e-4, 1e-5, 1e-6])
def test_cema_with_slow_decay_over_a_long_row(decay):
    """|q| = 1 - decay over 20,000 steps, as wide as half the memory of the slowest. The state's phase, n angle t, turns
    thousands of times; powers of q taken in float32 would lose it."""
    steps, dim = 20_000, 3
    inputs = random(6, x=(1, steps, dim), gamma=(dim, N, 2), omega=(dim, 1), theta=(dim, 1, 1), h0=(1, dim, N, 2))
    a = 0.5
    inputs["alpha"] = torch.zeros(dim, N, 1)
    inputs["delta"] = torch.logit(torch.full((dim, N, 1), decay / a, dtype=torch.float64)).float()
    order = ("x", "alpha", "delta", "theta", "gamma", "omega", "h0")
    inputs = {name: inputs[name] for name in order}
    got = values_and_gradients(run_cema, inputs)
    exact = values_and_gradients(run_cema, {name: value.double() for name, value in inputs.items()})
    errors = {key: root_mean_square(got[key] - want) / root_mean_square(want) for key, want in exact.items()}
    assert all(error <= 2e-5 for error in errors.values()), errors


@pytest.mark.parametrize("cema_input", ["released", "paper"])
@pytest.mark.parametrize("alpha", [-40.0, -30.0, 30.0, 40.0])
@pytest.mark.parametrize("delta", [-40.0, -30.0, 30.0, 40.0])
def test_cema_at_saturated_parameters_is_finite(delta, alpha, cema_input):
    """Both ends of |q| = 1 - sigmoid(alpha) sigmoid(delta): 1 - 1e-26, which is 1 in float64, and 0 (at 40 exactly)."""
    inputs = random(7, x=(B, L, D), **COEFFICIENT_SHAPES, h0=(B, D, N, 2))
    inputs |= {"alpha": torch.full((D, N, 1), alpha), "delta": torch.full((D, N, 1), delta)}

    def run(x, h0, **coefficients):
        return cema(x, **coefficients, h0=h0, return_state=True, cema_input=cema_input)

    got = values_and_gradients(run, inputs)
    exact = values_and_gradients(run, {name: value.double() for name, value in inputs.items()})
    for key, value in got.items():
        assert value.isfinite().all(), key
        scale = exact[key].abs().max().item()
        assert (value - exact[key]).abs().max() <= 1e-4 * scale + 1e-30, key


class LargestTensor(TorchDispatchMode):
    """How many numbers the largest tensor holds that any operation makes, those inside CEMA's two ops included."""

    def __init__(self):
        super().__init__()
        self.numbers = 0
        module = sys.modules["megalodon_plugin.ops.cema.op"]  # the name in the package is that of the function
        ops = torch.ops.megalodon
        self.bodies = {
            ops.cema.default: module._forward_impl,
            ops.cema_backward.default: module._backward_impl,
        }

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in self.bodies:  # called as an op, its inside would be hidden from the mode
            with self:
                return self.bodies[function](*args, **(kwargs or {}))
        out = function(*args, **(kwargs or {}))
        for t in pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self.numbers = max(self.numbers, t.numel() * (2 if t.is_complex() else 1))
        return out


def test_cema_never_makes_a_tensor_of_every_hidden_state():
    """Forward and backward keep the states at the edges of blocks only; what a block needs does not grow with L."""
    dim = 8
    shapes = {"alpha": (dim, N, 1), "delta": (dim, N, 1), "theta": (dim, 1, 1), "gamma": (dim, N, 2), "omega": (dim, 1)}
    largest = {}
    for length in (4096, 8192):
        inputs = random(8, x=(1, length, dim), **shapes)
        leaves = [value.requires_grad_(True) for value in inputs.values()]
        with LargestTensor() as forward:
            y, _ = cema(*leaves)
        with LargestTensor() as backward:
            y.sum().backward()
        largest[length] = (forward.numbers, backward.numbers)
        assert min(largest[length]) >= length * dim  # the mode sees at least the op's result
        assert max(largest[length]) < length * dim * N / 4, largest
    assert all(twice <= 2 * once for once, twice in zip(*largest.values(), strict=True))


def off_by_one_number(t):
    """The same numbers in memory that is aligned to one number and no more, as a file mapped into memory gives it."""
    memory = torch.empty(t.numel() + 1, dtype=t.dtype)
    moved = memory[1:].view(t.shape).copy_(t)
    assert moved.data_ptr() % 16 and moved.is_contiguous()
    return moved


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cema_takes_memory_of_any_alignment(dtype):
    """A complex view of such memory crashes the process where complex numbers are read by aligned instructions."""
    arguments = {name: value.to(dtype) for name, value in CASES["cema"][1].items()}
    want = values_and_gradients(run_cema, arguments)
    moved = {name: off_by_one_number(value).requires_grad_(True) for name, value in arguments.items()}
    outputs = run_cema(**moved)
    gradients = torch.autograd.grad(outputs, list(moved.values()), output_weights(outputs))
    for got, expected in zip([*outputs, *gradients], want.values(), strict=True):
        assert torch.equal(got, expected)
