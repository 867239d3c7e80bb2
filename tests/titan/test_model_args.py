"""The model's arguments: flavors, overrides, errors that name key, rule and value, and the count of operations."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from megalodon_plugin.model import PRESETS, Megalodon
from megalodon_plugin.model import attention as attention_module
from megalodon_plugin.ops import dispatch
from megalodon_plugin.ops.chunk_attention import chunk_attention_definition
from megalodon_plugin.titan import job_rules
from megalodon_plugin.titan.model_args import MODEL_OPTIONS, Flavors, MegalodonModelArgs

from support.tiny_job import SECTIONS, read_job, write_job

# A value for every option, each different from the debug flavor's.
EVERY_OPTION: dict[str, Any] = {
    "vocab_size": 300,
    "dim": 48,
    "n_layers": 3,
    "n_heads": 4,
    "z_dim": 24,
    "value_dim": 72,
    "ffn_dim": 80,
    "cema_ndim": 8,
    "chunk_size": 20,
    "norm_groups": 6,
    "norm_eps": 1e-4,
    "norm_affine": False,
    "rope_theta": 50000.0,
    "swiglu": True,
    "rescale_ffn": True,
    "scale_embedding": True,
    "tie_embedding": True,
    "output_size": 300,
    "init_mode": "bert",
    "cema_input": "paper",
    "dropout": 0.1,
    "hidden_dropout": 0.2,
    "attention_dropout": 0.3,
}


# The host's parser also warns of the wrong types that these tests put into TOML.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:tyro.*")


def args_of(folder: Path, *options: str, own_trainer: bool = False, **sections: dict[str, Any]) -> MegalodonModelArgs:
    job_config = read_job(write_job(folder, **sections), *options)
    if own_trainer:
        job_rules.use_own_trainer(job_config)
    args = Flavors()[job_config.model.flavor]
    args.update_from_config(job_config)
    return args


def test_a_flavor_is_fresh_at_each_look() -> None:
    flavors = Flavors()
    first = flavors["debug"]
    first.dim = 7
    assert flavors["debug"].dim == PRESETS["debug"].dim == 128
    assert list(flavors) == list(PRESETS) and len(flavors) == len(PRESETS)
    for name, preset in PRESETS.items():
        assert flavors[name].config == preset


def test_unknown_flavor() -> None:
    with pytest.raises(ValueError, match=r"`model\.flavor` must be one of debug, released_200M, .*, but is 'huge'"):
        Flavors()["huge"]


def test_every_option_overrides_its_flavor(tmp_path: Path) -> None:
    assert set(EVERY_OPTION) == set(MODEL_OPTIONS)
    flavor = dataclasses.asdict(PRESETS["debug"])
    assert [name for name, value in EVERY_OPTION.items() if value == flavor[name]] == []
    args = args_of(tmp_path, megalodon=EVERY_OPTION)
    assert dataclasses.asdict(args.config) == EVERY_OPTION


def test_options_that_are_not_given_stay_the_flavors(tmp_path: Path) -> None:
    none = dict.fromkeys(SECTIONS["megalodon"])
    args = args_of(tmp_path, model={"flavor": "released_200M"}, megalodon=none)
    assert args.config == dataclasses.replace(PRESETS["released_200M"], vocab_size=258)


def test_the_mode_of_the_kernels(tmp_path: Path) -> None:
    with dispatch.use_kernels("auto"):
        args_of(tmp_path, megalodon={"kernels": "off"})
        assert dispatch.kernels_mode() == "off"
        args_of(tmp_path)  # says nothing of them
        assert dispatch.kernels_mode() == "off"
        args_of(tmp_path, "--megalodon.kernels", "require")
        assert dispatch.kernels_mode() == "require"


def test_the_tokenizer_decides_the_vocabulary_unless_the_job_does(tmp_path: Path) -> None:
    assert args_of(tmp_path).vocab_size == 258
    assert args_of(tmp_path, megalodon={"vocab_size": 320}).vocab_size == 320
    assert args_of(tmp_path, megalodon={"vocab_size": 258}).vocab_size == 258


def test_command_line_beats_the_file(tmp_path: Path) -> None:
    args = args_of(
        tmp_path, "--megalodon.chunk_size", "64", "--megalodon.swiglu", "True", "--megalodon.init_mode", "xavier"
    )
    assert (args.chunk_size, args.swiglu, args.init_mode) == (64, True, "xavier")
    assert args.dim == SECTIONS["megalodon"]["dim"]


@pytest.mark.parametrize(
    ("section", "options", "message"),
    [
        ("megalodon", {"vocab_size": 200}, r"`megalodon\.vocab_size` must be at least the tokenizer's 258 .* is 200"),
        ("megalodon", {"chunk_size": "thirty"}, r"\[megalodon\] `chunk_size` must be of type int, but is 'thirty'"),
        ("megalodon", {"swiglu": "yes"}, r"\[megalodon\] `swiglu` must be of type bool, but is 'yes'"),
        ("megalodon", {"dropout": "0.1"}, r"\[megalodon\] `dropout` must be of type float, but is '0\.1'"),
        ("megalodon", {"dim": 32.0}, r"\[megalodon\] `dim` must be of type int, but is 32\.0"),
        ("megalodon", {"z_dim": 15}, r"\[megalodon\] `z_dim` must be divisible by `n_heads` = 2, but is 15"),
        ("megalodon", {"z_dim": 14}, r"\[megalodon\] `z_dim` must give heads of an even size .* 7\), but is 14"),
        ("megalodon", {"dim": 30}, r"\[megalodon\] `dim` must be divisible by `norm_groups` = 4, but is 30"),
        ("megalodon", {"cema_ndim": 33}, r"\[megalodon\] `cema_ndim` must lie between 1 and 32, but is 33"),
        ("megalodon", {"dropout": 1.0}, r"\[megalodon\] `dropout` must lie in \[0, 1\), but is 1\.0"),
        ("megalodon", {"kernels": "on"}, r"`megalodon\.kernels` must be one of auto, require, off, but is 'on'"),
        ("megalodon", {"weight_decay_on": "norms"}, r"`megalodon\.weight_decay_on` must be one of .* is 'norms'"),
        ("training", {"dtype": "bfloat16"}, r"`training\.dtype` must be float32, but is 'bfloat16'"),
        ("training", {"dtype": "float16"}, r"`training\.dtype` must be float32, but is 'float16'"),
        (
            "training",
            {"mixed_precision_param": "float16"},
            r"`training\.mixed_precision_param` must be bfloat16 or float32 .*, but is 'float16'",
        ),
    ],
)
def test_errors_name_key_rule_and_value(tmp_path: Path, section: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        args_of(tmp_path, **{section: options})


def test_unknown_option_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Invalid field names in .*: \{'chunksize'\}"):
        args_of(tmp_path, megalodon={"chunksize": 16})


@pytest.mark.parametrize("key", ["pipeline_parallel_degree", "context_parallel_degree"])
def test_stock_entry_is_sent_to_the_own_one(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match=rf"`parallelism\.{key}` must be 1 .* but is 2.*megalodon_plugin\.cli\.train"):
        args_of(tmp_path, parallelism={key: 2})


@pytest.mark.parametrize(
    ("parallelism", "more", "message"),
    [
        (
            {"context_parallel_degree": 2},
            {},
            r"`training\.seq_len` must be a multiple of `megalodon\.chunk_size` x "
            r"`parallelism\.context_parallel_degree` = 16 x 2 = 32, .* is 48; what would work: `training.seq_len` = 32 "
            r"or 64, or `parallelism\.context_parallel_degree` = 1 or 3",
        ),
        (
            {"context_parallel_degree": 3},
            {"validation": {"enable": True, "seq_len": 64}},
            r"`validation\.seq_len` must be a multiple of .* = 16 x 3 = 48, .* is 64",
        ),
        (
            {"context_parallel_load_balancer": "ptrr"},
            {},
            r"`parallelism\.context_parallel_load_balancer` must .* 'ptrr'",
        ),
        ({"tensor_parallel_degree": 4}, {}, r"`parallelism\.tensor_parallel_degree` must .*`n_heads` = 2.* is 4"),
        ({"expert_parallel_degree": 2}, {}, r"`parallelism\.expert_parallel_degree` must be 1, but is 2"),
        (
            {"enable_async_tensor_parallel": True},
            {},
            r"`parallelism\.enable_async_tensor_parallel` must be false, but is true",
        ),
        (
            {"tensor_parallel_degree": 2},
            {"model": {"converters": ["quantize.linear.float8"]}},
            r"`megalodon\.z_dim` must be a multiple of 32 for float8 on `parallelism\.tensor_parallel_degree` = 2 ranks"
            r", .* but is 16",
        ),
    ],
)
def test_own_entry_refuses_what_the_model_cannot_take(
    tmp_path: Path, parallelism: dict[str, Any], more: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        args_of(tmp_path, own_trainer=True, parallelism=parallelism, **more)


@pytest.mark.parametrize(
    "parallelism",
    [
        {"context_parallel_degree": 3},
        {"tensor_parallel_degree": 2},
        {"data_parallel_replicate_degree": 2},
        {"context_parallel_degree": 3, "tensor_parallel_degree": 2, "pipeline_parallel_degree": 2},
    ],
    ids=str,
)
def test_own_entry_takes_every_layout(tmp_path: Path, parallelism: dict[str, int]) -> None:
    assert args_of(tmp_path, own_trainer=True, parallelism=parallelism).n_layers == 2


def test_offloading_needs_a_gpu(tmp_path: Path) -> None:
    from megalodon_plugin.titan.trainer import MegalodonTrainer

    job_config = read_job(write_job(tmp_path, training={"enable_cpu_offload": True}))
    with pytest.raises(ValueError, match=r"`training\.enable_cpu_offload` must be false .* but is true"):
        MegalodonTrainer(job_config)


@pytest.mark.parametrize("listed", [[], ["layers.0"], ["output"]], ids=str)
def test_float8_leaves_the_output_layer_out(tmp_path: Path, listed: list[str]) -> None:
    sections = {"model": {"converters": ["quantize.linear.float8"]}}
    job_config = read_job(write_job(tmp_path, **sections))
    job_config.quantize.linear.float8.filter_fqns = listed
    Flavors()["debug"].update_from_config(job_config)
    assert job_config.quantize.linear.float8.filter_fqns == [*listed, *([] if "output" in listed else ["output"])]


def test_own_entry_takes_a_pipeline_unless_weights_are_tied(tmp_path: Path) -> None:
    two_stages = {"pipeline_parallel_degree": 2}
    assert args_of(tmp_path, own_trainer=True, parallelism=two_stages).n_layers == 2
    with pytest.raises(ValueError, match=r"`megalodon\.tie_embedding` must be false .* = 2"):
        args_of(tmp_path, own_trainer=True, parallelism=two_stages, megalodon={"tie_embedding": True})


def test_load_balancer_of_context_parallelism_is_off(tmp_path: Path) -> None:
    job_config = read_job(write_job(tmp_path))
    assert job_config.parallelism.context_parallel_load_balancer == "headtail"
    Flavors()["debug"].update_from_config(job_config)
    assert job_config.parallelism.context_parallel_load_balancer is None


def counted_flops(model: Megalodon, length: int) -> int:
    """Operations that the flop counter sees in a forward and backward pass over one row."""
    generator = torch.Generator().manual_seed(0)
    tokens, labels = torch.randint(0, model.cfg.vocab_size, (2, 1, length), generator=generator)
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten()).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("length", [32, 48, 39, 16, 5], ids=lambda length: f"L{length}")
@pytest.mark.parametrize("swiglu", [False, True], ids=["silu", "swiglu"])
def test_flops_are_those_of_a_real_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int, swiglu: bool
) -> None:
    args = args_of(tmp_path, megalodon={"swiglu": swiglu})
    model = Megalodon(args)
    model.init_weights()
    n_parameters, per_token = args.get_nparams_and_flops(model, length)
    assert n_parameters == sum(p.numel() for p in set(model.parameters()))
    # Per token it is rounded to a whole number.
    assert abs(per_token * length - counted_flops(model, length)) <= length / 2

    # The definition's products are plain ones over whole squares of scores: of c * c pairs where the count has
    # c (c + 1) / 2, each 2 (E + F) operations in each head, three times for forward and backward.
    monkeypatch.setattr(attention_module, "chunk_attention", chunk_attention_definition)
    chunks = [min(args.chunk_size, length - start) for start in range(0, length, args.chunk_size)]
    unseen_pairs = sum(c * c - c * (c + 1) // 2 for c in chunks)
    heads = args.n_heads * args.n_layers
    surplus = 3 * heads * unseen_pairs * 2 * (args.qk_head_dim + args.value_head_dim)
    assert surplus > 0
    assert abs(per_token * length + surplus - counted_flops(model, length)) <= length / 2


def test_tied_weights_count_once_as_parameters_and_still_multiply(tmp_path: Path) -> None:
    counts = []
    for tied in (False, True):
        args = args_of(tmp_path, megalodon={"tie_embedding": tied})
        with torch.device("meta"):
            counts.append(args.get_nparams_and_flops(Megalodon(args), 48))
    assert counts[0][0] - counts[1][0] == 258 * 32
    assert counts[0][1] == counts[1][1]


@pytest.mark.parametrize(
    ("flavor", "options", "gflop"),
    [
        ("paper_7B", {"n_layers": 4}, 6.57),
        ("released_1.3B", {}, 8.32),
        ("released_200M", {}, 1.29),
    ],
)
def test_flops_of_the_published_sizes(flavor: str, options: dict[str, int], gflop: float) -> None:
    args = MegalodonModelArgs(**dataclasses.asdict(PRESETS[flavor]) | options)
    with torch.device("meta"):
        model = Megalodon(args)
    _, per_token = args.get_nparams_and_flops(model, 4096)
    assert per_token / 1e9 == pytest.approx(gflop, rel=0.01)
