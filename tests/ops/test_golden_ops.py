"""TimestepNorm and CEMA against the authors' numbers: outputs, states and every gradient, in float64 and float32."""

import pytest
import torch

from megalodon_plugin.ops import NormState, cema, timestep_norm
from megalodon_plugin.ops.cema import cema_definition
from megalodon_plugin.ops.timestep_norm import timestep_norm_definition

from support.golden_cases import F64_TOLERANCE, assert_close, case_names, group, leaf, load

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
COEFFICIENTS = ("alpha", "delta", "theta", "gamma", "omega")


def objective(out, tensors):
    """The case's objective: the sum over its outputs of output times given weight."""
    return sum((out[key] * weight.to(out[key].dtype)).sum() for key, weight in group(tensors, "gout.").items())


def gradients(inputs):
    return {key: value.grad for key, value in inputs.items()}


@DTYPES
@pytest.mark.parametrize("op", [timestep_norm, timestep_norm_definition], ids=["op", "definition"])
@pytest.mark.parametrize("name", case_names("timestep_norm"))
def test_timestep_norm(name, op, dtype):
    info, tensors = load(name)
    tolerance = F64_TOLERANCE if dtype == torch.float64 else 1e-3 if info["x_mean"] else 1e-5
    inputs = {key: leaf(value, dtype) for key, value in group(tensors, "param.").items()}
    inputs["x"] = leaf(tensors["in.x"], dtype)
    state = None
    if info["prior_count"]:  # the authors' learnable prior is a carried state that all rows share
        prior = (inputs["prior_mean"], inputs["prior_logv"].exp())
        count = torch.full((info["B"],), info["prior_count"])
        state = NormState(count, *(value.expand(info["B"], -1) for value in prior))
    elif info["carry"]:
        inputs |= {key: leaf(tensors[f"in.{key}"], dtype) for key in ("prev_mean", "prev_var")}
        state = NormState(tensors["in.prev_count"], inputs["prev_mean"], inputs["prev_var"])

    mask = tensors.get("in.padding_mask")
    y, last = op(
        inputs["x"], inputs["weight"], inputs["bias"], info["groups"], eps=info["eps"], state=state, padding_mask=mask
    )
    out = {"y": y, "mean": last.mean, "var": last.var}
    assert {value.dtype for value in out.values()} == {dtype}
    assert torch.equal(last.count, tensors["out.count"])
    assert_close(out, group(tensors, "f64.out."), tolerance, name)
    if mask is not None:
        assert torch.equal(y[mask], torch.zeros_like(y[mask]))

    objective(out, tensors).backward()
    assert_close(gradients(inputs), group(tensors, "f64.grad."), tolerance, f"{name} gradients")


@DTYPES
@pytest.mark.parametrize("op", [cema, cema_definition], ids=["op", "definition"])
@pytest.mark.parametrize("name", case_names("cema"))
def test_cema(name, op, dtype):
    info, tensors = load(name)
    tolerance, gradient_tolerance = {"slow": (1e-3, 3e-3)}.get(info["regime"], (1e-5, 3e-5))
    if dtype == torch.float64:
        tolerance = gradient_tolerance = F64_TOLERANCE
    inputs = {key: leaf(value, dtype) for key, value in group(tensors, "param.").items()}
    inputs["x"] = leaf(tensors["in.x"], dtype)  # (B, D, L), as the authors have it
    if info["incoming_hx"]:
        inputs["hx"] = leaf(tensors["in.hx"], dtype)

    coefficients = (inputs[key] for key in COEFFICIENTS)
    last = info["compute_last_state"]
    y, h = op(inputs["x"].transpose(1, 2), *coefficients, h0=inputs.get("hx"), return_state=last)
    assert (h is not None) == last
    out = {"y": y.transpose(1, 2), **({"h": h} if last else {})}
    assert {value.dtype for value in out.values()} == {dtype}
    expected = {key: value for key, value in group(tensors, "f64.out.").items() if key in ("y", "h")}
    assert set(out) == set(expected)
    assert_close(out, expected, tolerance, name)

    objective(out, tensors).backward()
    assert_close(gradients(inputs), group(tensors, "f64.grad."), gradient_tolerance, f"{name} gradients")
