"""Seeded inputs of CEMA and TimestepNorm, and the outputs and gradients of an implementation on them."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megalodon_plugin.model.cema import CEMA
from megalodon_plugin.ops import NormState, cema, timestep_norm

COEFFICIENTS = ("alpha", "delta", "theta", "gamma", "omega")
DECAYS = ("init", "slow", "extreme")
Call = Callable[..., dict[str, Tensor]]


class Problem(NamedTuple):
    """One call of an op: all that its outputs and gradients depend on."""

    op: str
    arguments: dict[str, Tensor]
    """Those that get a gradient, by name: "x" (B, L, D) in the activations' dtype, the rest in float32."""
    options: dict[str, Any]
    """Those that get none."""
    weights: dict[str, Tensor]
    """Gradients of the outputs by name: "y" in the activations' dtype, states in float32."""

    @property
    def dtype(self) -> torch.dtype:
        """The activations' dtype."""
        return self.arguments["x"].dtype

    def with_options(self, **options: Any) -> "Problem":
        """The same inputs under other options of the op."""
        return self._replace(options=self.options | options)


def call_cema(x: Tensor, alpha, delta, theta, gamma, omega, h0=None, *, cema_input: str = "released"):
    """`ops.cema` with named outputs, y and the last hidden state h."""
    y, h = cema(x, alpha, delta, theta, gamma, omega, h0, return_state=True, cema_input=cema_input)
    assert h is not None
    return {"y": y, "h": h}


def call_timestep_norm(
    x: Tensor, weight, bias, mean=None, var=None, *, groups: int, count=None, padding_mask=None, eps: float = 1e-5
):
    """`ops.timestep_norm` with named outputs: y, and mean and var of the last state."""
    state = None if mean is None else NormState(count, mean, var)
    y, last = timestep_norm(x, weight, bias, groups, eps, state, padding_mask)
    return {"y": y, "mean": last.mean, "var": last.var}


CALLS: dict[str, Call] = {"cema": call_cema, "timestep_norm": call_timestep_norm}


def solve(problem: Problem, dtype: torch.dtype | None = None, call: Call | None = None) -> dict[str, Tensor]:
    """Outputs under their names, and the gradient of every argument, "d" before its name.

    Args:
        dtype: compute everything in this dtype (float64 gives the truth); None leaves each tensor its own.
        call: the implementation, by default the op. It may return fewer outputs than the problem weights.
    """
    leaves = {
        name: value.detach().to(dtype or value.dtype).requires_grad_(True) for name, value in problem.arguments.items()
    }
    outputs = (call or CALLS[problem.op])(**leaves, **problem.options)
    outputs = {name: outputs[name] for name in problem.weights if name in outputs}
    weights = [problem.weights[name].to(value.dtype) for name, value in outputs.items()]
    gradients = torch.autograd.grad(list(outputs.values()), list(leaves.values()), weights)
    found = {name: value.detach() for name, value in outputs.items()}
    return found | {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}


def cema_parameters(dim: int, order: int, seed: int, decays: str = "init") -> dict[str, Tensor]:
    """alpha, delta, theta, gamma, omega on the CPU.

    Args:
        decays: "init" as the model starts; "slow": 1 - |q| from about 1e-7 to 3e-2, evenly in the logarithm, and
            slow rotations among the fast ones; "extreme": alpha, delta and theta also where their sigmoids saturate,
            so that |q| reaches 0 and 1.

    Raises:
        ValueError: `decays` is none of these.
    """
    if decays not in DECAYS:
        raise ValueError(f"`decays` must be one of {DECAYS}, but is {decays!r}")
    module = CEMA(dim, order, "released", seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.random.default_generator.manual_seed(seed)
        module.init_weights()
    values = {name: getattr(module, name).detach() for name in COEFFICIENTS}
    # The model starts with real gammas; training does not keep them so.
    values["gamma"][..., 1] = torch.randn(dim, order, generator=generator) / 2
    if decays == "slow":
        spread = torch.linspace(math.log(2e-7), math.log(6e-2), dim * order)
        values["delta"] = torch.logit(spread[torch.randperm(dim * order, generator=generator)].exp()).view(
            dim, order, 1
        )
    elif decays == "extreme":
        ends = torch.tensor([-40.0, -15.0, -3.0, 0.0, 3.0, 15.0, 40.0])
        for name in ("alpha", "delta", "theta"):
            values[name] = ends[torch.randint(len(ends), values[name].shape, generator=generator)]
    return values


def cema_problem(
    shape: tuple[int, int, int],
    order: int,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
    decays: str = "init",
    state: bool = True,
) -> Problem:
    """A problem of shape (B, L, D).

    Args:
        decays: see `cema_parameters`.
        state: a hidden state comes in, and the one that leaves is weighted.
    """
    batch, _, dim = shape
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(size, generator=generator, device=device).to(dtype)

    arguments = {"x": normal(*shape, dtype=dtype)}
    arguments |= {name: value.to(device) for name, value in cema_parameters(dim, order, seed, decays).items()}
    weights = {"y": normal(*shape, dtype=dtype)}
    if state:
        arguments["h0"] = normal(batch, dim, order, 2)
        weights["h"] = normal(batch, dim, order, 2)
    return Problem("cema", arguments, {"cema_input": "released"}, weights)


def timestep_norm_problem(
    shape: tuple[int, int, int],
    groups: int,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
    mean: float = 0.0,
    state: bool = True,
) -> Problem:
    """A problem of shape (B, L, D).

    Args:
        mean: of x, whose standard deviation is 1.
        state: statistics come in, those of row 0 from count 0, and those that leave are weighted.
    """
    batch, _, dim = shape
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(size, generator=generator, device=device).to(dtype)

    arguments = {
        "x": (normal(*shape) + mean).to(dtype),
        "weight": normal(dim) / 4,
        "bias": normal(dim),
    }
    options: dict[str, Any] = {"groups": groups}
    weights = {"y": normal(*shape, dtype=dtype)}
    if state:
        arguments["mean"] = mean + normal(batch, groups) / 4
        arguments["var"] = 0.5 + torch.rand(batch, groups, generator=generator, device=device)
        options["count"] = torch.arange(batch, device=device) * 37
        weights |= {"mean": normal(batch, groups), "var": normal(batch, groups)}
    return Problem("timestep_norm", arguments, options, weights)


def padded(problem: Problem) -> Problem:
    """A problem of TimestepNorm in which some steps are padding and hold NaN; in the last row of several all are."""
    x = problem.arguments["x"]
    batch, length, _ = x.shape
    mask = torch.rand(batch, length, generator=torch.Generator(x.device).manual_seed(batch), device=x.device) < 0.3
    mask[:, : length // 8] = True  # padding on the left
    if batch > 1:
        mask[-1] = True
    arguments = problem.arguments | {"x": x.masked_fill(mask.unsqueeze(-1), float("nan"))}
    return problem._replace(arguments=arguments).with_options(padding_mask=mask)
