"""The attention block and the feed-forward network against the authors' numbers: outputs and every gradient."""

import pytest
import torch

from megalodon_plugin.model import MegalodonConfig
from megalodon_plugin.model.attention import MegalodonAttention
from megalodon_plugin.model.feed_forward import FeedForward

from support.golden_cases import F64_TOLERANCE, assert_close, case_names, config_kwargs, group, leaf, load

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
OURS = {
    "timenorm.weight": "timestep_norm.weight",
    "timenorm.bias": "timestep_norm.bias",
    "rmsnorm.weight": "rms_norm.weight",
    "gamma": "qk.gamma",
    "beta": "qk.beta",
}


def fill(block, params, dtype):
    """Load the authors' values into a block whose parameters have these names and no others."""
    block = block.to(dtype)
    ours = dict(block.named_parameters())
    assert set(ours) == {OURS.get(name, name) for name in params}
    with torch.no_grad():
        for name, value in params.items():
            ours[OURS.get(name, name)].copy_(value)
    return block


def check(block, tensors, inputs, tolerance, gradient_tolerance, what):
    y = block(*inputs.values())
    assert y.dtype == inputs["x"].dtype
    assert_close({"y": y}, group(tensors, "f64.out."), tolerance, what)
    (y * tensors["gout.y"].to(y.dtype)).sum().backward()
    ours = dict(block.named_parameters()) | inputs
    theirs = group(tensors, "f64.grad.")
    assert {OURS.get(name, name) for name in theirs} == set(ours)
    gradients = {name: ours[OURS.get(name, name)].grad for name in theirs}
    assert_close(gradients, theirs, gradient_tolerance, f"{what} gradients")


@DTYPES
@pytest.mark.parametrize("name", case_names("mega_attention"))
def test_attention_block(name, dtype):
    info, tensors = load(name)
    sizes = info["config"]
    cfg = MegalodonConfig(
        vocab_size=2,
        dim=sizes["mdim"],
        n_layers=1,
        n_heads=sizes["num_heads"],
        z_dim=sizes["zdim"],
        value_dim=sizes["hdim"],
        ffn_dim=1,
        cema_ndim=sizes["ndim"],
        chunk_size=sizes["chunk_size"],
        norm_groups=sizes["norm_num_groups"],
        norm_eps=sizes.get("norm_eps", 1e-5),
        norm_affine=sizes["norm_affine"],
        rope_theta=float(info["rope_base"]),
    )
    block = fill(MegalodonAttention(cfg), group(tensors, "param."), dtype)
    tolerances = (F64_TOLERANCE, F64_TOLERANCE) if dtype == torch.float64 else (3e-6, 2e-5)
    check(block, tensors, {"x": leaf(tensors["in.x"], dtype)}, *tolerances, name)


@DTYPES
@pytest.mark.parametrize("layer_id", [0, 3])
@pytest.mark.parametrize("name", case_names("ffn"))
def test_feed_forward(name, layer_id, dtype):
    info, tensors = load(name)
    unused = {"vocab_size": 2, "n_heads": 1, "z_dim": 2, "value_dim": 1, "chunk_size": 1, "norm_groups": 1}
    cfg = MegalodonConfig(**config_kwargs(info, **unused, n_layers=4, rescale_ffn=info["rescale"] is not None))
    block = fill(FeedForward(cfg, layer_id), group(tensors, "param."), dtype)
    inputs = {key: leaf(tensors[f"in.{key}"], dtype) for key in ("x", "residual")}
    tolerances = (F64_TOLERANCE, F64_TOLERANCE) if dtype == torch.float64 else (2e-6, 3e-6)
    check(block, tensors, inputs, *tolerances, name)
