"""State dicts of the released code: there and back without a changed bit, and what is refused."""

import re

import pytest
import torch

from megalodon_plugin.checkpoint import from_authors, to_authors
from megalodon_plugin.model import Megalodon, MegalodonConfig

from support.small_model import SIZES

VARIANTS = {
    "plain": {},
    "eleven_layers": {"n_layers": 11},
    "swiglu": {"swiglu": True},
    "rescale": {"rescale_ffn": True},
    "tied": {"tie_embedding": True},
    "no_affine": {"norm_affine": False},
    "everything": {"swiglu": True, "rescale_ffn": True, "tie_embedding": True, "norm_affine": False},
    "other_output_size": {"output_size": 11},
}
VARIANT = pytest.mark.parametrize("variant", VARIANTS)


def random_model(seed=0, **changes):
    """Every parameter is random, so that no two tensors hold the same numbers by their initialisation."""
    cfg = MegalodonConfig(**{**SIZES, **changes})
    model = Megalodon(cfg)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return cfg, model


def released_shapes(cfg):
    """Names and shapes of the released code's parameters, as its description has them."""
    D, Z, V, F, N = cfg.dim, cfg.z_dim, cfg.value_dim, cfg.ffn_dim, cfg.cema_ndim
    shapes = {"embed.weight": (cfg.vocab_size, D), "output.output.weight": (cfg.n_outputs, D)}
    shapes |= {"output.final_norm.weight": (D,), "output.final_norm.bias": (D,)}
    layer = {"mega.gamma": (2, Z), "mega.beta": (2, Z), "mega.timenorm.weight": (D,), "mega.timenorm.bias": (D,)}
    layer |= {"mega.cema.alpha": (D, N, 1), "mega.cema.delta": (D, N, 1), "mega.cema.theta": (D, 1, 1)}
    layer |= {"mega.cema.gamma": (D, N, 2), "mega.cema.omega": (D, 1)}
    layer |= {"mega.wv.weight": (V, D), "mega.wv.bias": (V,), "mega.wz.weight": (Z, D), "mega.wz.bias": (Z,)}
    layer |= {"mega.wr.weight": (V, D), "mega.wr.bias": (V,), "mega.wh1.weight": (D, D), "mega.wh1.bias": (D,)}
    layer |= {"mega.wh2.weight": (D, V), "nffn.fc1.weight": (F, D), "nffn.fc2.weight": (D, F)}
    if cfg.norm_affine:
        layer |= {"mega.rmsnorm.weight": (D,), "nffn.norm.weight": (D,), "nffn.norm.bias": (D,)}
    if cfg.swiglu:
        layer["nffn.fc3.weight"] = (F, D)
    if cfg.rescale_ffn:
        layer["nffn.alpha"] = (D,)
    return shapes | {f"layers.{i}.{name}": shape for i in range(cfg.n_layers) for name, shape in layer.items()}


def released_buffers(cfg):
    buffers = {"rope.freqs": torch.zeros(cfg.chunk_size, 2)}
    for norm in ["output.final_norm", *(f"layers.{i}.mega.timenorm" for i in range(cfg.n_layers))]:
        buffers[f"{norm}.prior_count"] = torch.zeros((), dtype=torch.int64)
        buffers |= {f"{norm}.{name}": torch.zeros(cfg.norm_groups) for name in ("prior_mean", "prior_logv")}
    return buffers


@VARIANT
def test_names_and_shapes_are_the_released_ones(variant):
    cfg, model = random_model(**VARIANTS[variant])
    theirs = to_authors(model.state_dict())
    assert {name: tuple(value.shape) for name, value in theirs.items()} == released_shapes(cfg)


@VARIANT
def test_there_and_back_is_bit_exact(variant):
    cfg, model = random_model(**VARIANTS[variant])
    ours = model.state_dict()
    back = from_authors({**released_buffers(cfg), **to_authors(ours)}, cfg)
    assert back.keys() == ours.keys()
    for name, value in ours.items():
        assert back[name].dtype == value.dtype
        assert torch.equal(back[name], value), name


@VARIANT
def test_a_loaded_model_is_the_same_model(variant):
    cfg, model = random_model(**VARIANTS[variant])
    _, other = random_model(seed=1, **VARIANTS[variant])
    other.load_state_dict(from_authors(to_authors(model.state_dict()), cfg), strict=True)
    tokens = torch.arange(11).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(other(tokens), model(tokens))


def test_no_tensor_is_copied():
    _, model = random_model()
    ours = model.state_dict()
    theirs = to_authors(ours)
    assert {value.data_ptr() for value in theirs.values()} == {value.data_ptr() for value in ours.values()}


def test_any_dtype_passes_through():
    cfg, model = random_model()
    theirs = {name: value.bfloat16() for name, value in to_authors(model.state_dict()).items()}
    assert {value.dtype for value in from_authors(theirs, cfg).values()} == {torch.bfloat16}


def test_a_tied_output_weight_may_be_absent():
    cfg, model = random_model(tie_embedding=True)
    theirs = to_authors(model.state_dict())
    del theirs["output.output.weight"]
    back = from_authors(theirs, cfg)
    assert back["output.weight"] is back["tok_embeddings.weight"]
    Megalodon(cfg).load_state_dict(back, strict=True)


def test_an_untied_output_weight_may_not_be_absent():
    cfg, model = random_model()
    theirs = to_authors(model.state_dict())
    del theirs["output.output.weight"]
    with pytest.raises(ValueError, match=re.escape("missing output.weight; unknown nothing")):
        from_authors(theirs, cfg)


@pytest.mark.parametrize("convert", [from_authors, to_authors])
def test_an_empty_state_dict_is_refused(convert):
    with pytest.raises(ValueError, match="the state dict must hold parameters, but is empty"):
        convert({})


@pytest.mark.parametrize(
    "name", ["layers.0.mega.cema.phi", "embed.bias", "tok_embeddings.weight", "model.embed.weight"]
)
def test_a_name_that_the_released_code_does_not_have_is_refused(name):
    _, model = random_model()
    theirs = {**to_authors(model.state_dict()), name: torch.zeros(1)}
    message = f"the state dict has a name that the released code does not have: `{name}`"
    with pytest.raises(ValueError, match=re.escape(message)):
        from_authors(theirs)


@pytest.mark.parametrize("name", ["layers.0.attention.cema.phi", "embed.weight"])
def test_a_name_that_is_not_ours_is_refused(name):
    _, model = random_model()
    ours = {**model.state_dict(), name: torch.zeros(1)}
    with pytest.raises(ValueError, match=re.escape(f"a name that Megalodon does not have: `{name}`")):
        to_authors(ours)


def test_missing_and_unknown_parameters_are_named():
    cfg, _ = random_model(n_layers=3)
    _, model = random_model(swiglu=True)
    with pytest.raises(ValueError, match="does not fit the configuration") as error:
        from_authors(to_authors(model.state_dict()), cfg)
    missing, unknown = str(error.value).split("; unknown ")
    assert "missing layers.2.attention.cema.alpha, layers.2.attention.cema.delta" in missing
    assert re.search(r" and \d+ more$", missing)
    assert unknown == "layers.0.feed_forward.fc3.weight, layers.1.feed_forward.fc3.weight"


def test_a_wrong_shape_is_named_with_the_right_one():
    cfg, model = random_model()
    theirs = to_authors(model.state_dict())
    theirs["layers.1.mega.wz.weight"] = torch.zeros(10, 12)
    message = "`layers.1.attention.wz.weight` must have shape (8, 12) by the configuration, but has (10, 12)"
    with pytest.raises(ValueError, match=re.escape(message)):
        from_authors(theirs, cfg)


@pytest.mark.parametrize("norm", ["output.final_norm", "layers.1.mega.timenorm"])
def test_statistics_that_do_not_start_empty_are_refused(norm):
    cfg, model = random_model()
    theirs = {**to_authors(model.state_dict()), **released_buffers(cfg)}
    theirs[f"{norm}.prior_count"] = torch.tensor(3)
    message = f"`{norm}.prior_count` must be 0 (statistics that start empty), but is 3"
    with pytest.raises(ValueError, match=re.escape(message)):
        from_authors(theirs, cfg)
