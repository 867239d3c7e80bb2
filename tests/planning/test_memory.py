"""Estimates of memory and traffic against what torch does: parameters exactly, saved activations within 1%, and every
message.
"""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from megalodon_plugin.model import PRESETS, Megalodon, MegalodonConfig
from megalodon_plugin.parallel.chunk import apply_chunk_parallel
from megalodon_plugin.parallel.collectives import Ranks
from megalodon_plugin.parallel.layout import Layout
from megalodon_plugin.parallel.tensor_plan import apply_tensor_parallel
from megalodon_plugin.planning.links import Links
from megalodon_plugin.planning.memory import (
    Parameter,
    Stage,
    Work,
    loss_bytes,
    parameters_of,
    parameters_on,
    rank_memory,
    saved_by_layer,
    saved_by_layers,
)
from megalodon_plugin.planning.traffic import Exchange, exchanges_of_step

ROWS, LENGTH = 2, 256
SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "dim": 64,
    "n_layers": 2,
    "n_heads": 2,
    "z_dim": 32,
    "value_dim": 128,
    "ffn_dim": 96,
    "cema_ndim": 4,
    "chunk_size": 64,
    "norm_groups": 4,
}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "swiglu": {"swiglu": True, "rescale_ffn": True},
    "no_affine": {"norm_affine": False, "rescale_ffn": True},
}
WITHIN = 0.01
"""Not counted: gains, and states of a number or two a row."""


def make_model(**options: Any) -> Megalodon:
    model = Megalodon(MegalodonConfig(**SIZES | options))
    model.init_weights()
    return model


def meta_model(cfg: MegalodonConfig) -> Megalodon:
    with torch.device("meta"):
        return Megalodon(cfg)


@pytest.fixture
def four_ranks() -> Iterator[None]:
    """This process is the first of four ranks of which the others do not exist: what it sends goes nowhere."""
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    yield
    dist.destroy_process_group()


# Parameters, gradients, optimizer


@pytest.mark.parametrize(("preset", "count"), [("released_200M", 220_627_968), ("released_1.3B_pg19", 1_327_628_288)])
def test_parameters_and_moments_are_those_of_the_model(preset: str, count: int) -> None:
    cfg = PRESETS[preset]
    model = meta_model(cfg)
    memory = rank_memory(cfg, parameters_of(model), Work(1, 2048), Layout(), Stage(cfg.n_layers), True)
    assert memory.parameters == memory.gradients == 4 * sum(p.numel() for p in model.parameters()) == 4 * count
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    moments = [s[name] for s in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert memory.moments == sum(t.numel() * t.itemsize for t in moments)


@pytest.mark.parametrize("options", [*KINDS.values(), {"tie_embedding": True}], ids=[*KINDS, "tied"])
@pytest.mark.parametrize(("shards", "tp"), [(4, 1), (2, 2), (1, 2)])
def test_a_rank_holds_the_parts_that_the_host_gives_it(four_ranks: None, shards: int, tp: int, options: Any) -> None:
    from megalodon_plugin.titan.fsdp import shard_model

    cfg = MegalodonConfig(**SIZES | options)
    parameters = parameters_of(meta_model(cfg))
    model = meta_model(cfg)
    mesh = init_device_mesh("cpu", (4 // shards // tp, shards, tp), mesh_dim_names=("dp_replicate", "fsdp", "tp"))
    if tp > 1:
        apply_tensor_parallel(model, mesh["tp"], loss_parallel=True)
    job = SimpleNamespace(
        training=SimpleNamespace(
            mixed_precision_param="bfloat16", mixed_precision_reduce="float32", enable_cpu_offload=False
        ),
        parallelism=SimpleNamespace(fsdp_reshard_after_forward="default"),
    )
    shard_model(model, mesh["dp_replicate", "fsdp"], SimpleNamespace(pp_enabled=False), job)  # type: ignore[arg-type]
    for mine, parameter in zip(parameters, model.parameters(), strict=True):
        assert mine.numel(tp, shards) == parameter.to_local().numel(), mine  # type: ignore[attr-defined]
    found = rank_memory(
        cfg, parameters, Work(1, 64), Layout(4 // shards // tp, shards, 1, tp), Stage(cfg.n_layers), True
    )
    assert found.parameters == sum(4 * p.to_local().numel() for p in model.parameters())  # type: ignore[attr-defined]


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_the_float32_group_is_the_hosts(options: dict[str, Any]) -> None:
    from megalodon_plugin.model.precision import float32_parameters

    model = meta_model(MegalodonConfig(**SIZES | options))
    small = float32_parameters(model)
    for parameter, mine in zip(model.parameters(), parameters_of(model), strict=True):
        assert mine.is_small == (parameter in small), mine.name


def test_stages_share_all_parameters_out() -> None:
    parameters = parameters_of(meta_model(PRESETS["debug"]))
    stages = [Stage(1, True, False), Stage(2, False, False), Stage(1, False, True)]
    counts = [sum(p.numel() for p in parameters_on(parameters, stage)) for stage in stages]
    assert sum(counts) == sum(p.numel() for p in parameters)


# Activations


def tensors_of(kept: Any) -> list[Tensor]:
    """Tensors inside what selective checkpointing's caching mode stores."""
    leaves = (getattr(leaf, "val", leaf) for leaf in pytree.tree_leaves(kept))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def bytes_kept(model: Megalodon, mode: str, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes of all storages that the first layer's forward pass leaves for the backward pass, parameters excluded."""
    kept: list[Tensor] = []
    contexts = []

    def remember(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    create = torch.utils.checkpoint.create_selective_checkpoint_contexts

    def create_and_remember(*args: Any) -> Any:
        contexts.append(create(*args))
        return contexts[-1]

    monkeypatch.setattr(torch.utils.checkpoint, "create_selective_checkpoint_contexts", create_and_remember)
    block = checkpointed(model, mode)
    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        y = block(x)
    for caching, _ in contexts:
        kept += tensors_of(dict(caching.storage))
    own = [p.to_local() if hasattr(p, "to_local") else p for p in block.parameters()]
    parameters = {p.untyped_storage().data_ptr() for p in own}
    assert len(contexts) == (2 if mode == "op" else 0)  # attention, feed-forward network
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    assert y.requires_grad
    return sum(size for pointer, size in storages.items() if pointer not in parameters)


def checkpointed(model: Megalodon, mode: str) -> nn.Module:
    """The first layer as the host wraps it."""
    from torchtitan.config.job_config import ActivationCheckpoint

    from megalodon_plugin.titan.activation_checkpointing import checkpoint_activations

    if mode != "none":
        option = {"mode": "selective", "selective_ac_option": "op"} if mode == "op" else {"mode": mode}
        options = ActivationCheckpoint(**option)  # type: ignore[arg-type]
        job = SimpleNamespace(activation_checkpoint=options, job=SimpleNamespace(dump_folder=""))
        checkpoint_activations(model, job, compile_model=False)
    return model.layers["0"]


def low_matrices(model: nn.Module) -> None:
    """Matrices and activations in bfloat16, norms and CEMA in float32, as under mixed precision."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.bfloat16()


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("mode", ["none", "full", "op"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_a_layer_keeps(dtype: torch.dtype, mode: str, options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(**options)
    if dtype == torch.bfloat16:
        low_matrices(model)
    x = torch.randn(ROWS, LENGTH, SIZES["dim"], dtype=dtype, requires_grad=True)
    measured = bytes_kept(model, mode, x, monkeypatch)
    work = Work(ROWS, LENGTH, low_bytes=dtype.itemsize, gpu=False)
    found = saved_by_layer(model.cfg, work, Layout(), mode)
    assert found == pytest.approx(measured, rel=WITHIN)


@pytest.mark.parametrize("mode", ["none", "full", "op"])
@pytest.mark.parametrize("dimension", ["tp", "cp"])
def test_what_a_layer_keeps_on_one_of_several_ranks(
    four_ranks: None, dimension: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(swiglu=True, n_heads=4, chunk_size=32)
    width = SIZES["dim"]
    if dimension == "tp":
        apply_tensor_parallel(model, init_device_mesh("cpu", (4,), mesh_dim_names=("tp",)), loss_parallel=True)
        width //= 4
    else:
        apply_chunk_parallel(model, Ranks.of(dist.group.WORLD))  # type: ignore[arg-type]
    low_matrices(model)
    length = LENGTH if dimension == "tp" else LENGTH // 4
    x = torch.randn(ROWS, length, width, dtype=torch.bfloat16, requires_grad=True)
    measured = bytes_kept(model, mode, x, monkeypatch)
    layout = Layout(dp_shard=2, **{dimension: 4})  # type: ignore[arg-type]
    found = saved_by_layer(model.cfg, Work(ROWS, LENGTH, gpu=False), layout, mode)
    assert found == pytest.approx(measured, rel=WITHIN)


def test_layers_checkpointed_in_turn() -> None:
    cfg, layout = MegalodonConfig(**SIZES), Layout()
    full, none = (saved_by_layer(cfg, Work(1, 64), layout, mode) for mode in ("full", "none"))
    work = Work(1, 64, checkpointing="2")
    assert saved_by_layers(cfg, work, layout, 5) == 2 * full + 3 * none


def test_parts_of_the_logits() -> None:
    cfg = PRESETS["released_1.3B"]
    whole = loss_bytes(cfg, Work(1, 4096), Layout(dp_shard=2))
    assert whole == 4096 * 32000 * 2 * 2
    assert loss_bytes(cfg, Work(1, 4096), Layout(dp_shard=2, tp=2)) == whole / 2
    assert loss_bytes(cfg, Work(1, 4096, compiled_loss=False), Layout(dp_shard=2)) == 3 * whole
    assert loss_bytes(cfg, Work(1, 4096, loss_parallel=False), Layout(dp_shard=2, tp=2)) > whole
    in_parts = Work(1, 4096, loss_rows=1024)
    gradients = 2 * 4096 * cfg.dim + 4 * cfg.n_outputs * cfg.dim
    assert loss_bytes(cfg, in_parts, Layout(dp_shard=2)) == whole / 4 + gradients
    assert loss_bytes(cfg, in_parts, Layout(dp_shard=2, tp=2)) == whole / 2


# Exchanges


class Collectives(TorchDispatchMode):
    """Kind of every collective and the bytes of its part: of the input, or of what a rank keeps of a reduction."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.ranks = ranks
        self.found: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        kinds = {"all_gather_into_tensor": "all-gather", "gather_summaries": "all-gather"}
        kinds |= {"reduce_scatter_tensor": "reduce-scatter", "all_reduce": "all-reduce"}
        if name in kinds:
            size = args[0].numel() * args[0].itemsize
            self.found.append((kinds[name], size if kinds[name] == "all-gather" else size // self.ranks))
        return func(*args, **(kwargs or {}))


def expected(exchanges: list[Exchange], direction: str) -> list[tuple[str, int]]:
    return sorted((e.kind, e.part) for e in exchanges for _ in range(getattr(e, direction)))


@pytest.mark.parametrize("norm_affine", [True, False])
@pytest.mark.parametrize("dimension", ["tp", "cp"])
def test_what_a_block_exchanges(four_ranks: None, dimension: str, norm_affine: bool) -> None:
    model = make_model(norm_affine=norm_affine, n_heads=4, chunk_size=32)
    if dimension == "tp":
        apply_tensor_parallel(model, init_device_mesh("cpu", (4,), mesh_dim_names=("tp",)), loss_parallel=True)
    else:
        apply_chunk_parallel(model, Ranks.of(dist.group.WORLD))  # type: ignore[arg-type]
    low_matrices(model)
    layout = Layout(dp_shard=2, **{dimension: 4})  # type: ignore[arg-type]
    parameters = parameters_of(meta_model(model.cfg))
    exchanges = exchanges_of_step(model.cfg, parameters, Work(ROWS, LENGTH), layout, Stage(2, False, False), True)
    exchanges = [e for e in exchanges if e.dimension == dimension]
    x = torch.randn(ROWS, LENGTH // layout.cp, SIZES["dim"] // layout.tp, dtype=torch.bfloat16, requires_grad=True)
    with Collectives(4) as forward:
        y = model.layers["0"](x)
    with Collectives(4) as backward:
        y.float().sum().backward()
    assert sorted(forward.found) == expected(exchanges, "forward")
    assert sorted(backward.found) == expected(exchanges, "backward")


def messages(checkpointing: str, layout: Layout, **work: Any) -> dict[str, float]:
    cfg = PRESETS["paper_7B"]
    counted = Work(1, 32768, checkpointing=checkpointing, **work)
    parameters = [Parameter("layers.0.attention.wv.weight", (8192, 4096), 0, False)]
    found = exchanges_of_step(cfg, parameters, counted, layout, Stage(32, False, False), layout.pp == 1)
    return {f"{e.dimension} {e.what}": e.messages for e in found}


def test_checkpointing_repeats_what_it_does_not_keep() -> None:
    layout = Layout(dp_shard=2, cp=2, tp=2)
    counts = {mode: messages(mode, layout) for mode in ("none", "op", "full", "2")}
    for what in ("TimestepNorm's mean and variance", "CEMA's hidden state"):
        assert [counts[mode][f"cp {what}"] for mode in counts] == [64, 64, 96, 80]
    assert [counts[mode]["tp features of a layer"] for mode in counts] == [96, 192, 192, 144]
    assert [counts[mode]["tp partial sums of a layer"] for mode in counts] == [64, 64, 128, 96]
    assert counts["full"]["fsdp layer weights"] == 64
    assert counts["full"]["fsdp gradients of layer weights"] == 32


def test_a_pipeline_gathers_once_and_sends_every_microbatch() -> None:
    counts = messages("none", Layout(dp_shard=2, pp=2), microbatches=4, accumulation=3)
    assert counts == {
        "fsdp layer weights": 32 * 3,
        "fsdp gradients of layer weights": 32 * 3,
        "pp the residual stream": 2 * 4 * 3,
    }


@pytest.mark.parametrize(
    ("kind", "ranks", "stride", "seconds"),
    [
        ("all-gather", 8, 1, 7 / 400),  # inside a node
        ("all-gather", 16, 8, 15 / 50),  # one of every node: each through its own link
        ("all-gather", 16, 1, 15 / 400),  # two nodes whose eight links share the one crossing
        ("all-gather", 64, 1, 63 / 400),
        ("all-reduce", 2, 8, 2 / 50),
        ("send", 2, 4, 1 / 400),
        ("send", 4, 8, 1 / 50),
    ],
)
def test_time_of_a_message(kind: str, ranks: int, stride: int, seconds: float) -> None:
    exchange = Exchange("x", "x", kind, ranks, stride, 10**9, 1, 0, 1, 1)
    assert Links(8, 400, 50, 0).seconds(exchange) == pytest.approx(seconds)
    assert Links(8, 400, 50, 1).seconds(exchange) > seconds
