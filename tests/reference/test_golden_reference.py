"""The oracle itself: it imports nothing of ours, and gives the authors' float64 numbers, states and gradients."""

import ast
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import reference
from support.golden_cases import F64_TOLERANCE, as_complex, as_pairs, assert_close, case_names, group, leaf, load

TRUTH = torch.float64
COEFFICIENTS = ("alpha", "delta", "theta", "gamma", "omega")


def test_the_oracle_imports_only_torch_and_math():
    sources = [path for path in Path(reference.__file__).parent.glob("*.py") if not path.name.startswith("test_")]
    assert len(sources) == 3
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name for alias in node.names} <= {"math", "torch"}, path.name
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 1 and node.module in ("model", "ops"), path.name


def leaves(tensors, prefix):
    return {name: leaf(value, TRUTH) for name, value in group(tensors, prefix).items() if value.is_floating_point()}


def gradients(inputs):
    return {name: value.grad for name, value in inputs.items()}


@pytest.mark.parametrize("name", case_names("timestep_norm"))
def test_timestep_norm(name):
    info, tensors = load(name)
    inputs = {**leaves(tensors, "param."), "x": leaf(tensors["in.x"], TRUTH)}
    state = None
    if info["prior_count"]:  # a learnable prior is a carried state that all rows share
        prior = (inputs["prior_mean"], inputs["prior_logv"].exp())
        state = (torch.full((info["B"],), info["prior_count"]), *(value.expand(info["B"], -1) for value in prior))
    elif info["carry"]:
        inputs |= {key: leaf(tensors[f"in.{key}"], TRUTH) for key in ("prev_mean", "prev_var")}
        state = (tensors["in.prev_count"], inputs["prev_mean"], inputs["prev_var"])
    x, weight, bias = (inputs[key] for key in ("x", "weight", "bias"))
    mask = tensors.get("in.padding_mask")
    y, (count, mean, var) = reference.timestep_norm(x, weight, bias, info["groups"], info["eps"], state, mask)
    out = {"y": y, "mean": mean, "var": var}
    assert torch.equal(count, tensors["out.count"])
    assert_close(out, group(tensors, "f64.out."), F64_TOLERANCE, name)
    sum((out[key] * weight).sum() for key, weight in group(tensors, "gout.").items()).backward()
    assert_close(gradients(inputs), group(tensors, "f64.grad."), F64_TOLERANCE, f"{name} gradients")


@pytest.mark.parametrize("name", case_names("cema"))
def test_cema(name):
    info, tensors = load(name)
    inputs = {**leaves(tensors, "param."), "x": leaf(tensors["in.x"], TRUTH)}
    h0 = None
    if info["incoming_hx"]:
        inputs["hx"] = leaf(tensors["in.hx"], TRUTH)
        h0 = as_complex(inputs["hx"])
    y, h = reference.cema(inputs["x"].transpose(1, 2), *(inputs[key] for key in COEFFICIENTS), h0=h0)
    out = {"y": y.transpose(1, 2), "h": as_pairs(h)}
    expected = {key: value for key, value in group(tensors, "f64.out.").items() if key in ("y", "h")}
    assert_close(out, expected, F64_TOLERANCE, name)
    sum((out[key] * weight).sum() for key, weight in group(tensors, "gout.").items()).backward()
    assert_close(gradients(inputs), group(tensors, "f64.grad."), F64_TOLERANCE, f"{name} gradients")


@pytest.mark.parametrize("name", case_names("mega_attention") + case_names("ffn"))
def test_blocks(name):
    info, tensors = load(name)
    inputs = {**leaves(tensors, "param."), **leaves(tensors, "in.")}
    if info["kind"] == "ffn":
        cfg = {**info, "rescale_nffn": info["rescale"] is not None}
        y = reference.feed_forward(inputs["x"], inputs["residual"], inputs, cfg)
    else:
        y = reference.attention_block(inputs["x"], inputs, {**info["config"], "rope_base": info["rope_base"]})
    assert_close({"y": y}, group(tensors, "f64.out."), F64_TOLERANCE, name)
    (y * tensors["gout.y"]).sum().backward()
    assert_close(gradients(inputs), group(tensors, "f64.grad."), F64_TOLERANCE, f"{name} gradients")


@pytest.mark.parametrize("name", case_names("model"))
def test_model(name):
    info, tensors = load(name)
    config = info["config"]
    for length in info["lengths"]:
        at = f"L{length['L']}."
        params = leaves(tensors, "param.")
        frequencies = reference.rope_frequencies(config["z_dim"] // config["num_heads"], config["rope_base"] or 10000.0)
        assert torch.equal(frequencies, params["rope.freqs"].detach())
        logits = reference.model(tensors[f"{at}tokens"], params, config)
        loss = F.cross_entropy(logits.flatten(0, 1), tensors[f"{at}targets"].flatten())
        expected = {key: tensors[f"{at}f64.{key}"] for key in ("logits", "loss")}
        assert_close({"logits": logits, "loss": loss}, expected, F64_TOLERANCE, f"{name} {at}")
        loss.backward()
        assert_close(gradients(params), group(tensors, f"{at}f64.grad."), F64_TOLERANCE, f"{name} {at} gradients")
        assert_close(gradients(params), group(tensors, f"{at}grad."), 1e-4, f"{name} {at} float32 gradients")


@pytest.mark.parametrize("name", case_names("streaming") + case_names("chunk_parallel"))
def test_one_pass_gives_what_pieces_and_ranks_gave(name):
    info, tensors = load(name)
    logits = reference.model(tensors["tokens"], leaves(tensors, "param."), info["config"])
    assert_close({"logits": logits}, {"logits": tensors["f64.logits"]}, F64_TOLERANCE, name)
