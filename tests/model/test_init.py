"""Initialisation: the authors' table, and a model that comes from the meta device.

A sample standard deviation of n normal numbers has a relative deviation of 1/sqrt(2n), a mean one of std/sqrt(n); the
tests allow five of them.
"""

import math

import pytest
import torch
from torch.nn import functional as F

from megalodon_plugin.model import Megalodon, MegalodonConfig
from megalodon_plugin.model.cema import CEMA
from megalodon_plugin.model.rotary import Rotary

SIZES = {
    "vocab_size": 300,
    "dim": 96,
    "n_layers": 2,
    "n_heads": 2,
    "z_dim": 48,
    "value_dim": 160,
    "ffn_dim": 120,
    "chunk_size": 8,
    "norm_groups": 4,
    "swiglu": True,
    "rescale_ffn": True,
}
# Standard deviation of a normal variable of deviation 1 that is cut at +-3.
CUT_AT_THREE = math.sqrt(1 - 6 * math.exp(-4.5) / math.sqrt(2 * math.pi) / math.erf(3 / math.sqrt(2)))


def initialised(seed=0, **changes):
    model = Megalodon(MegalodonConfig(**{**SIZES, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))  # what the initialisation forgets stays
    torch.manual_seed(seed)
    model.init_weights(buffer_device=None)
    return model


def assert_mean_and_std(values, std):
    n = values.numel()
    assert abs(values.mean().item()) <= 5 * std / math.sqrt(n)
    assert values.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * n))


def linears(model):
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "output":
            yield module


@pytest.mark.parametrize("mode", ["he", "bert", "xavier"])
def test_linear_layers(mode):
    model = initialised(init_mode=mode)
    found = list(linears(model))
    assert len(found) == 2 * 8  # wz, wv, wr, wh1, wh2, fc1, fc2, fc3
    for linear in found:
        fan_out, fan_in = linear.weight.shape
        glorot = math.sqrt(2 / (fan_in + fan_out))
        std = {"he": 1 / math.sqrt(3 * fan_in), "bert": 0.02, "xavier": glorot}[mode]
        assert_mean_and_std(linear.weight, std)
        largest = linear.weight.abs().max().item() / std
        if mode == "xavier":
            assert 0.99 * math.sqrt(3) < largest <= math.sqrt(3) * (1 + 1e-6)  # uniform
        else:
            assert largest > 3  # normal and not cut
        if linear.bias is not None:
            assert torch.equal(linear.bias, torch.zeros(fan_out))


@pytest.mark.parametrize("name", ["tok_embeddings", "output"])
def test_embedding_and_output(name):
    weight = getattr(initialised(), name).weight
    std = 1 / math.sqrt(SIZES["dim"])
    assert_mean_and_std(weight, std * CUT_AT_THREE)
    assert 2.9 * std < weight.abs().max().item() <= 3 * std


def test_embedding_and_output_are_drawn_apart_unless_tied():
    model = initialised()
    assert not torch.equal(model.tok_embeddings.weight, model.output.weight)
    tied = initialised(tie_embedding=True)
    assert tied.output.weight is tied.tok_embeddings.weight


def test_parameters_that_start_at_zero():
    zero = {name for name, p in initialised().named_parameters() if torch.equal(p, torch.zeros_like(p))}
    layer = {
        *(f"attention.qk.{n}" for n in ("gamma", "beta")),
        *(f"attention.timestep_norm.{n}" for n in ("weight", "bias")),
        "attention.rms_norm.weight",
        *(f"attention.{linear}.bias" for linear in ("wz", "wv", "wr", "wh1")),
        *(f"feed_forward.norm.{n}" for n in ("weight", "bias")),
    }
    assert zero == {"norm.weight", "norm.bias"} | {f"layers.{i}.{name}" for i in range(2) for name in layer}


@pytest.mark.parametrize("affine", [True, False])
def test_every_parameter_is_initialised(affine):
    assert all(p.isfinite().all() for p in initialised(norm_affine=affine).parameters())


def test_cema():
    for layer in initialised(dim=192).layers.values():
        cema = layer.attention.cema
        assert_mean_and_std(cema.alpha, 0.2)
        assert_mean_and_std(cema.delta, 0.2)
        assert_mean_and_std(cema.gamma[..., 0], 1.0)
        assert torch.equal(cema.gamma[..., 1], torch.zeros(192, 16))
        assert_mean_and_std(cema.omega, 0.25)  # the cut at four deviations changes it by less than 0.1 %
        assert cema.omega.abs().max() <= 1


@torch.no_grad()
def test_omega_is_cut_at_one():
    """Uncut, one number in 16,000 lies outside, so 200,000 would hold a dozen."""
    cema = CEMA(200_000, 1, "released", 0)
    torch.manual_seed(0)
    cema.init_weights()
    assert 0.95 < cema.omega.abs().max() <= 1


def test_theta_is_a_permutation_of_the_frequencies():
    dim = SIZES["dim"]
    want = torch.tensor([math.exp(-j * math.log(dim) / dim) for j in range(1, dim + 1)], dtype=torch.float64)
    seen = []
    for layer in initialised().layers.values():
        frequencies = torch.sigmoid(layer.attention.cema.theta.double()).flatten()
        torch.testing.assert_close(frequencies.sort(descending=True).values, want, rtol=1e-6, atol=0)
        assert not torch.equal(frequencies, frequencies.sort(descending=True).values)
        seen.append(frequencies)
    assert not torch.equal(*seen)


def test_theta_does_not_depend_on_the_global_seed():
    """Ranks that hold slices of one theta, with seeds of their own, must hold slices of one permutation."""
    first, second = initialised(seed=0), initialised(seed=1)
    assert not torch.equal(first.layers["0"].attention.cema.alpha, second.layers["0"].attention.cema.alpha)
    for i in ("0", "1"):
        thetas = (model.layers[i].attention.cema.theta for model in (first, second))
        assert torch.equal(*thetas)


def test_rescale_starts_smaller_in_every_layer():
    for i, layer in enumerate(initialised(n_layers=4).layers.values()):
        alpha = layer.feed_forward.alpha
        torch.testing.assert_close(alpha, torch.full_like(alpha, 0.1 / 2**i))


def test_one_seed_gives_one_model():
    first, second = initialised(seed=3), initialised(seed=3)
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))


def from_meta(**changes):
    with torch.device("meta"):
        model = Megalodon(MegalodonConfig(**{**SIZES, **changes}))
    assert all(t.device.type == "meta" for t in [*model.parameters(), *model.buffers()])
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    model.init_weights(buffer_device=torch.device("cpu"))
    return model


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_from_the_meta_device_is_the_same_model(tied):
    model, direct = from_meta(tie_embedding=tied), initialised(tie_embedding=tied)
    for (name, p), (_, q) in zip(model.named_parameters(), direct.named_parameters(), strict=True):
        assert torch.equal(p, q), name
    for (name, p), (_, q) in zip(model.named_buffers(), direct.named_buffers(), strict=True):
        assert torch.equal(p, q), name
    assert (model.output.weight is model.tok_embeddings.weight) == tied


def test_a_tied_weight_from_the_meta_device_learns_from_both_its_uses():
    model = from_meta(tie_embedding=True)
    tokens = torch.arange(10).unsqueeze(0)
    F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten() + 100).backward()
    used = model.tok_embeddings.weight.grad.abs().sum(-1) > 0
    assert used.all()  # rows that are no input have a gradient as outputs
    assert model.output.weight.grad is model.tok_embeddings.weight.grad


def test_rope_table():
    cfg = MegalodonConfig(**SIZES)
    head = cfg.z_dim // cfg.n_heads
    position = torch.arange(cfg.chunk_size, dtype=torch.float64).unsqueeze(1)
    angles = position * cfg.rope_theta ** (-torch.arange(0, head, 2, dtype=torch.float64) / head)
    want = torch.stack([angles.cos(), angles.sin()], -1)
    for layer in from_meta().layers.values():
        table = layer.attention.qk.rotary.table
        assert table.dtype == torch.float32
        torch.testing.assert_close(table.double(), want, rtol=0, atol=1e-6)


def test_buffer_device_is_where_the_rope_tables_go():
    model = initialised()
    model.init_weights(buffer_device=torch.device("meta"))
    tables = [module.table for module in model.modules() if isinstance(module, Rotary)]
    assert len(tables) == 2
    assert all(table.device.type == "meta" for table in tables)
    assert all(p.device.type == "cpu" for p in model.parameters())
