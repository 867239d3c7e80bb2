"""Chunk parallelism: any number of ranks computes what one process does, and exchanges two small tensors a layer."""

import functools
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.nn import functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from megalodon_plugin.checkpoint import from_authors, to_authors
from megalodon_plugin.model import Megalodon, MegalodonConfig
from megalodon_plugin.parallel.chunk import apply_chunk_parallel
from megalodon_plugin.parallel.collectives import Ranks

from support.golden_cases import F64_TOLERANCE, PRESENT, assert_close, case_names, config_kwargs, group, load
from support.ranks import run_on_ranks
from support.small_model import SIZES

MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "paper's CEMA": {"cema_input": "paper", "swiglu": True, "rescale_ffn": True, "tie_embedding": True},
    "chunks of 5": {"chunk_size": 5, "norm_affine": False},
}
BATCH, CHUNKS = 2, 12  # 2, 3 and 4 ranks hold whole chunks


def make_model(dtype: torch.dtype = torch.float64, **options: Any) -> Megalodon:
    """The same on every rank. Half of CEMA's channels decay so slowly that every slice feels all earlier ones."""
    torch.manual_seed(0)
    model = Megalodon(MegalodonConfig(**SIZES | options))
    model.init_weights()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
            if name.endswith("delta"):
                parameter[::2] -= 6
    return model.to(dtype)


def make_batch(cfg: MegalodonConfig) -> tuple[Tensor, Tensor]:
    length = CHUNKS * cfg.chunk_size
    tokens = torch.randint(cfg.vocab_size, (BATCH, length + 1), generator=torch.Generator().manual_seed(1))
    return tokens[:, :-1], tokens[:, 1:]


def loss_and_logits(model: Megalodon, tokens: Tensor, labels: Tensor, total: int) -> tuple[Tensor, Tensor]:
    logits = model(tokens)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / total, logits


def gradients(model: Megalodon) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def train_alone(model: Megalodon) -> dict[str, Tensor]:
    tokens, labels = make_batch(model.cfg)
    loss, logits = loss_and_logits(model, tokens, labels, labels.numel())
    loss.backward()
    return {"loss": loss.detach(), "logits": logits.detach()} | gradients(model)


def train_slice(model: Megalodon) -> dict[str, Tensor]:
    """Loss and gradients summed over the ranks, and all ranks' logits one after the other."""
    size, rank = dist.get_world_size(), dist.get_rank()
    apply_chunk_parallel(model, Ranks.of(dist.group.WORLD))
    tokens, labels = (t.chunk(size, 1)[rank] for t in make_batch(model.cfg))
    loss, logits = loss_and_logits(model, tokens, labels, labels.numel() * size)
    loss.backward()
    found = {"loss": loss.detach()} | gradients(model)
    for value in found.values():
        dist.all_reduce(value)
    parts = [torch.empty_like(logits) for _ in range(size)]
    dist.all_gather(parts, logits.detach().contiguous())
    return found | {"logits": torch.cat(parts, 1)}


def train_transformed() -> dict[str, dict[str, Tensor]]:
    """Under full recomputation, and compiled into one graph a layer."""
    recomputed = make_model()
    for layer in recomputed.layers.values():
        inner = layer.forward
        layer.forward = lambda x, inner=inner: checkpoint(inner, x, use_reentrant=False)
    compiled = make_model()
    for layer in compiled.layers.values():
        layer.compile(fullgraph=True, backend="aot_eager_decomp_partition")
    return {"recomputed": train_slice(recomputed), "compiled": train_slice(compiled)}


def released_model(info: dict[str, Any], tensors: dict[str, Tensor], dtype: torch.dtype) -> Megalodon:
    cfg = MegalodonConfig(**config_kwargs(info["config"]))
    model = Megalodon(cfg)
    model.init_weights()
    model.load_state_dict(from_authors(group(tensors, "param."), cfg))
    return model.to(dtype)


def run_golden(name: str) -> dict[torch.dtype, dict[str, dict[str, Tensor]]]:
    """Both dtypes: this rank's logits and its own gradients, by the authors' names."""
    info, tensors = load(name)
    size, rank = dist.get_world_size(), dist.get_rank()
    found = {}
    for dtype in (torch.float64, torch.float32):
        model = released_model(info, tensors, dtype)
        apply_chunk_parallel(model, Ranks.of(dist.group.WORLD))
        tokens, targets = (tensors[key].chunk(size, 1)[rank] for key in ("tokens", "targets"))
        loss, logits = loss_and_logits(model, tokens, targets, targets.numel() * size)
        loss.backward()
        found[dtype] = {"logits": {"logits": logits.detach()}, "grad": to_authors(gradients(model))}
    return found


def golden_names(ranks: int) -> list[str]:
    names = case_names("chunk_parallel") if PRESENT else []
    return [name for name in names if load(name)[0]["ranks"] == ranks]


def everything() -> dict[str, Any]:
    """All runs of one number of ranks: starting processes takes longer than the runs."""
    size = dist.get_world_size()
    found: dict[str, Any] = {name: train_slice(make_model(**options)) for name, options in MODELS.items()}
    found |= {name: run_golden(name) for name in golden_names(size)}
    if size == 2:
        found |= train_transformed()
    if size == 4:
        found["float32"] = train_slice(make_model(torch.float32))
    return found


@functools.cache
def on_ranks(ranks: int) -> list[dict[str, Any]]:
    return run_on_ranks(ranks, everything)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("ranks", [2, 3, 4], ids="{} ranks".format)
def test_ranks_compute_what_one_process_does(ranks: int, name: str) -> None:
    expected = train_alone(make_model(**MODELS[name]))
    for rank, found in enumerate(on_ranks(ranks)):
        assert found[name].keys() == expected.keys()
        assert_close(found[name], expected, 1e-12, f"rank {rank}")


def test_float32_differs_by_rounding_alone() -> None:
    """Each rank's statistics and states start from sums of float32 summaries, so the last bits differ."""
    alone, exact = train_alone(make_model(torch.float32)), train_alone(make_model())
    found = on_ranks(4)[0]["float32"]
    for name, value in exact.items():
        scale = value.abs().max()
        own_error = (alone[name].double() - value).abs().max() / scale
        assert (found[name].double() - value).abs().max() / scale < 4 * own_error + 1e-6, name


@pytest.mark.parametrize("how", ["recomputed", "compiled"])
def test_recomputation_and_compilation_change_nothing(how: str) -> None:
    expected = train_alone(make_model())
    for rank, found in enumerate(on_ranks(2)):
        assert_close(found[how], expected, 1e-12, f"rank {rank}")


@pytest.mark.parametrize("name", case_names("chunk_parallel"))
def test_the_authors_ranks(name: str) -> None:
    info, tensors = load(name)
    every = [found[name] for found in on_ranks(info["ranks"])]
    for dtype, tolerance in ((torch.float64, F64_TOLERANCE), (torch.float32, 1e-5)):
        logits = torch.cat([found[dtype]["logits"]["logits"] for found in every], 1)
        assert_close({"logits": logits}, {"logits": tensors["f64.logits"]}, tolerance, f"{name} {dtype}")
        for rank, found in enumerate(every):
            expected = group(tensors, f"rank{rank}.grad.")
            assert expected
            assert_close(found[dtype]["grad"], expected, 1e-4, f"{name} {dtype} rank {rank}")


class Exchanges(TorchDispatchMode):
    """Counts the gathers of summaries and their numbers, and any other collective."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if "gather_summaries" in name or ("_c10d_functional" in name and "wait" not in name):
            assert args[0].dtype == torch.float32
            self.found[name.split(".")[1], args[0].numel()] += 1
        return func(*args, **kwargs or {})


@pytest.fixture
def eight_ranks() -> Any:
    dist.init_process_group("fake", rank=3, world_size=8, store=FakeStore())
    yield Ranks.of(dist.group.WORLD)
    dist.destroy_process_group()


def test_a_block_exchanges_two_small_tensors_in_each_direction(eight_ranks: Ranks) -> None:
    model = make_model(torch.float32)
    apply_chunk_parallel(model, eight_ranks)
    block = model.layers["0"]
    x = torch.randn(BATCH, 16, model.cfg.dim, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        with Exchanges() as forward:
            y = block(x)
        with Exchanges() as backward:
            y.float().sum().backward()
    norm, cema = 2 * BATCH * model.cfg.norm_groups, 2 * BATCH * model.cfg.dim * model.cfg.cema_ndim
    assert forward.found == {("gather_summaries", norm): 1, ("gather_summaries", cema): 1}
    assert backward.found == forward.found


def compiled_ops(rank: int) -> list[list[str]]:
    """The ops of a compiled block's graphs, forward and backward, in order, on one of 4 ranks."""
    graphs: list[list[str]] = []

    def record(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return make_boxed_func(graph.forward)

    dist.init_process_group("fake", rank=rank, world_size=4, store=FakeStore())
    try:
        torch._dynamo.reset()
        model = make_model(torch.float32)
        apply_chunk_parallel(model, Ranks.of(dist.group.WORLD))
        block = model.layers["0"]
        block.compile(
            fullgraph=True, backend=aot_autograd(fw_compiler=record, partition_fn=min_cut_rematerialization_partition)
        )
        block(torch.randn(BATCH, 16, model.cfg.dim, requires_grad=True)).sum().backward()
    finally:
        dist.destroy_process_group()
    return graphs


def test_all_ranks_compile_the_same_graph() -> None:
    """One that leaves an exchange out, or makes two in another order, hangs all others."""
    first, *others = [compiled_ops(rank) for rank in range(4)]
    for ops in first:
        assert sum("gather_summaries" in op for op in ops) == 2
    assert len(first) == 2 and all(graphs == first for graphs in others)
