"""Presets have the published sizes; the configuration refuses what no model can be built from, by name and value."""

import dataclasses
import re

import pytest
import torch

from megalodon_plugin.model import PRESETS, Megalodon, MegalodonConfig

from support.small_model import SIZES

PARAMETERS = {
    "released_200M": 220_627_968,
    "released_1.3B": 1_342_832_640,
    "released_1.3B_pg19": 1_327_628_288,
    "released_7.1B": 7_117_381_632,
    "released_7.3B": 7_385_817_088,
    "paper_7B": 7_385_817_088,
}
# chunk_size, rope_theta, norm_groups, n_heads, cema_input: what the number of parameters does not show.
OPTIONS = {
    "released_200M": (2048, 10000.0, 32, 1, "released"),
    "released_1.3B": (2048, 10000.0, 64, 2, "released"),
    "released_1.3B_pg19": (2048, 10000.0, 64, 2, "released"),
    "released_7.1B": (2048, 10000.0, 64, 4, "released"),
    "released_7.3B": (2048, 10000.0, 64, 4, "released"),
    "paper_7B": (4096, 100000.0, 64, 4, "paper"),
}


def config(**changes):
    return MegalodonConfig(**{**SIZES, **changes})


@pytest.mark.parametrize("name", PARAMETERS)
def test_presets_have_the_published_number_of_parameters(name):
    with torch.device("meta"):
        model = Megalodon(PRESETS[name])
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", OPTIONS)
def test_presets_have_the_published_options(name):
    cfg = PRESETS[name]
    assert (cfg.chunk_size, cfg.rope_theta, cfg.norm_groups, cfg.n_heads, cfg.cema_input) == OPTIONS[name]
    assert (cfg.cema_ndim, cfg.norm_eps, cfg.init_mode, cfg.vocab_size) == (16, 1e-5, "he", 32000)
    assert (cfg.tie_embedding, cfg.scale_embedding) == (name == "released_1.3B_pg19",) * 2


def test_there_are_no_other_presets_than_these_and_debug():
    assert set(PRESETS) == {*PARAMETERS, "debug"}


RULES = [
    *[(name, value, "must be at least 1") for name in SIZES if name != "cema_ndim" for value in (0, -1)],
    ("cema_ndim", 0, "must lie between 1 and 32"),
    ("cema_ndim", 33, "must lie between 1 and 32"),
    ("z_dim", 9, "must be divisible by `n_heads` = 2"),
    ("value_dim", 21, "must be divisible by `n_heads` = 2"),
    ("z_dim", 6, "must give heads of an even size (RoPE turns pairs; a head has 3)"),
    ("dim", 13, "must be divisible by `norm_groups` = 3"),
    ("norm_eps", 0.0, "must be positive"),
    ("norm_eps", -1e-5, "must be positive"),
    ("norm_eps", float("nan"), "must be positive"),
    ("rope_theta", 1.0, "must be above 1"),
    ("init_mode", "kaiming", "must be one of ('he', 'bert', 'xavier')"),
    ("cema_input", "rotated", "must be one of ('released', 'paper')"),
    *[
        (name, value, "must lie in [0, 1)")
        for name in ("dropout", "hidden_dropout", "attention_dropout")
        for value in (-0.1, 1.0)
    ],
    ("output_size", 0, "must be at least 1"),
]


@pytest.mark.parametrize(("name", "value", "rule"), RULES)
def test_rules(name, value, rule):
    with pytest.raises(ValueError, match=re.escape(f"`{name}` {rule}, but is {value!r}")):
        config(**{name: value})


def test_a_tied_output_has_the_vocabulary_for_size():
    message = "`output_size` must equal `vocab_size` = 31 when `tie_embedding` is set, but is 11"
    with pytest.raises(ValueError, match=re.escape(message)):
        config(tie_embedding=True, output_size=11)
    assert config(tie_embedding=True, output_size=31).n_outputs == 31


WRONG_TYPES = [
    *[(name, value, "int") for name in SIZES for value in ("8", 8.0, True, None)],
    *[
        (name, value, "float")
        for name in ("norm_eps", "rope_theta", "dropout", "hidden_dropout", "attention_dropout")
        for value in ("0.1", False, None)
    ],
    *[
        (name, value, "bool")
        for name in ("norm_affine", "swiglu", "rescale_ffn", "scale_embedding", "tie_embedding")
        for value in (1, 0, "true", None)
    ],
    *[(name, value, "str") for name in ("init_mode", "cema_input") for value in (1, None)],
    *[("output_size", value, "int or None") for value in ("11", 11.0, True)],
]


@pytest.mark.parametrize(("name", "value", "kind"), WRONG_TYPES)
def test_wrong_types(name, value, kind):
    with pytest.raises(ValueError, match=re.escape(f"`{name}` must be of type {kind}, but is {value!r}")):
        config(**{name: value})


@pytest.mark.parametrize(("name", "value"), [("rope_theta", 500000), ("norm_eps", 1), ("dropout", 0)])
def test_an_int_is_taken_for_a_float(name, value):
    taken = getattr(config(**{name: value}), name)
    assert type(taken) is float
    assert taken == value


def test_the_model_checks_a_configuration_that_was_changed_after_it_was_made():
    cfg = config()
    cfg.z_dim = 9
    with pytest.raises(ValueError, match="`z_dim` must be divisible"):
        Megalodon(cfg)


def test_replacing_an_option_checks_it():
    with pytest.raises(ValueError, match="`n_heads` must be at least 1, but is 0"):
        dataclasses.replace(PRESETS["debug"], n_heads=0)


def test_derived_sizes():
    cfg = config()
    assert (cfg.n_outputs, cfg.qk_head_dim, cfg.value_head_dim) == (31, 4, 10)
    assert config(output_size=11).n_outputs == 11
