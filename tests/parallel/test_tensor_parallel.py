"""Tensor parallelism: ranks together compute what one process does, and exchange what the plan says and no more."""

import contextlib
import copy
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel
from torch.nn import functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from megalodon_plugin.model import Megalodon, MegalodonConfig
from megalodon_plugin.parallel.tensor_plan import LAYER_PLAN, apply_tensor_parallel

from support.ranks import run_on_ranks
from support.small_model import SIZES_OF_FOUR_RANKS

RICH: dict[str, Any] = {"swiglu": True, "rescale_ffn": True, "tie_embedding": True, "scale_embedding": True}
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rich": RICH,
    "plain, paper's CEMA": {"cema_input": "paper"},
    "rich, paper's CEMA": RICH | {"cema_input": "paper"},
    "no affine norms": {"norm_affine": False},
}
BATCH, LENGTH = 2, 21


def make_model(dtype: torch.dtype = torch.float64, **options: Any) -> Megalodon:
    """A model none of whose parameters is at a special value; the same on every rank."""
    torch.manual_seed(0)
    model = Megalodon(MegalodonConfig(**SIZES_OF_FOUR_RANKS | options))
    model.init_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.to(dtype)


def make_batch(vocab_size: int = SIZES_OF_FOUR_RANKS["vocab_size"]) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(vocab_size, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    return tokens[:, :-1], tokens[:, 1:]


def train_once(model: nn.Module, on_parts_of_logits: bool = False) -> tuple[Tensor, Tensor]:
    """Logits and loss; gradients are left in the model's parameters."""
    tokens, labels = make_batch()
    with loss_parallel() if on_parts_of_logits else contextlib.nullcontext():
        logits = model(tokens)
        assert isinstance(logits, DTensor) == on_parts_of_logits
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / labels.numel()
        loss.backward()
    return full(logits), full(loss)


def full(x: Tensor) -> Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach()


def gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return full(parameter.grad)


def difference(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    assert actual.shape == expected.shape
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def differences(model: nn.Module, results: tuple[Tensor, Tensor], alone: nn.Module) -> dict[str, float]:
    """How far logits, loss and gradients, by name, lie from those of the model that trains alone."""
    expected = train_once(alone)
    found = {name: difference(*pair) for name, *pair in zip(("logits", "loss"), results, expected, strict=True)}
    theirs = dict(alone.named_parameters())
    ours = dict(model.named_parameters())
    assert ours.keys() == theirs.keys()
    return found | {name: difference(gradient(p), gradient(theirs[name])) for name, p in ours.items()}


def tp_mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))


def train_models_on_ranks() -> dict[tuple[str, bool], dict[str, float]]:
    found = {}
    for name, options in MODELS.items():
        for on_parts_of_logits in (True, False):
            alone = make_model(**options)
            model = copy.deepcopy(alone)
            apply_tensor_parallel(model, tp_mesh(), on_parts_of_logits)
            assert all(isinstance(p, DTensor) for p in model.parameters())
            assert (model.output.weight is model.tok_embeddings.weight) == model.cfg.tie_embedding
            results = train_once(model, on_parts_of_logits)
            found[name, on_parts_of_logits] = differences(model, results, alone)
    return found


@pytest.fixture(scope="module")
def trained() -> list[dict[tuple[str, bool], dict[str, float]]]:
    return run_on_ranks(2, train_models_on_ranks)


@pytest.mark.parametrize("on_parts_of_logits", [True, False], ids=["loss_parallel", "whole_logits"])
@pytest.mark.parametrize("name", MODELS)
def test_two_ranks_compute_what_one_process_does(trained: Any, name: str, on_parts_of_logits: bool) -> None:
    for of_rank in trained:
        found = of_rank[name, on_parts_of_logits]
        assert {name: value for name, value in found.items() if not value < 1e-12} == {}
        assert len(found) > 20


def train_sharded_on_ranks() -> dict[str, Any]:
    """2 x 2 ranks, FSDP over tensor parallelism, from the meta device on; the model alone gets the same weights."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
    cfg = MegalodonConfig(**SIZES_OF_FOUR_RANKS | RICH | {"tie_embedding": False})
    with torch.device("meta"):
        model = Megalodon(cfg)
    apply_tensor_parallel(model, mesh["tp"], loss_parallel=True)
    for module in (*model.layers.values(), model):
        fully_shard(module, mesh=mesh["fsdp"])
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(2.0)  # the two see the same batch
    model.to_empty(device="cpu").double()
    torch.manual_seed(0)  # as the host does, on every rank
    model.init_weights(buffer_device=torch.device("cpu"))
    weights = {name: full(p) for name, p in model.named_parameters()}
    alone = Megalodon(cfg).double()
    alone.load_state_dict(weights)
    return {"weights": weights, "differences": differences(model, train_once(model, True), alone)}


def test_sharded_over_tensor_parallel_ranks() -> None:
    """Initialisation on two dimensions of ranks, and training that equals one process's."""
    results = run_on_ranks(4, train_sharded_on_ranks)
    expected = Megalodon(MegalodonConfig(**SIZES_OF_FOUR_RANKS)).double()
    expected.init_weights()
    theta = "layers.1.attention.cema.theta"
    for of_rank in results:
        assert {name: value for name, value in of_rank["differences"].items() if not value < 1e-12} == {}
        weights = of_rank["weights"]
        assert torch.equal(weights[theta], expected.get_parameter(theta))
        for name, weight in weights.items():
            assert torch.equal(weight, results[0]["weights"][name]), f"{name}: the same on every rank"
            if weight.ndim == 2 and "qk" not in name:
                assert weight.unique().numel() == weight.numel(), f"{name}: no rank draws what another does"


def compile_on_ranks() -> dict[str, Any]:
    model = make_model(**RICH)
    apply_tensor_parallel(model, tp_mesh(), loss_parallel=True)
    expected = [*train_once(model, True), *(gradient(p) for p in model.parameters())]
    model.zero_grad()
    for layer in model.layers.values():
        layer.compile(backend="aot_eager", fullgraph=True)
    compiled = [*train_once(model, True), *(gradient(p) for p in model.parameters())]
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return {"graphs": graphs, "differences": list(map(difference, compiled, expected))}


def test_layers_compile_into_one_graph() -> None:
    for of_rank in run_on_ranks(2, compile_on_ranks):
        assert max(of_rank["differences"]) < 1e-12
        assert of_rank["graphs"] == 1, "one for all layers"


def float8_on_ranks() -> dict[str, tuple[float, float]]:
    """Name -> error of float8 on these ranks, and of float8 on one process, against float32."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    from torchao.float8.float8_linear import Float8Linear

    sizes = {"dim": 64, "z_dim": 64, "value_dim": 128, "ffn_dim": 96}  # each rank's parts are multiples of 16
    exact = make_model(torch.float32, **sizes, swiglu=True)
    alone = convert_to_float8_training(
        copy.deepcopy(exact),
        config=Float8LinearConfig(emulate=True),
        module_filter_fn=lambda module, name: name != "output",
    )
    model = copy.deepcopy(alone)
    apply_tensor_parallel(model, tp_mesh(), loss_parallel=True)
    converted = [module for module in model.modules() if isinstance(module, Float8Linear)]
    assert len(converted) == 8 * exact.cfg.n_layers
    logits = [train_once(exact)[0], train_once(alone)[0], train_once(model, True)[0]]
    tensors = {"logits": logits} | {
        name: [gradient(m.get_parameter(name)) for m in (exact, alone, model)] for name, _ in exact.named_parameters()
    }
    return {
        name: (((ours - truth).norm() / truth.norm()).item(), ((one - truth).norm() / truth.norm()).item())
        for name, (truth, one, ours) in tensors.items()
    }


def test_float8_on_two_ranks_errs_as_on_one() -> None:
    """Scales are those of each rank's part, so the two need not agree closer than float8 itself does with float32."""
    for of_rank in run_on_ranks(2, float8_on_ranks):
        assert 1e-3 < of_rank["logits"][1] < 0.2, "float8 is in use"
        assert {name: errors for name, errors in of_rank.items() if not errors[0] < 2 * errors[1] + 1e-5} == {}


@pytest.fixture
def four_ranks():
    """A mesh of four ranks of which only this one exists: what it sends goes nowhere."""
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    yield init_device_mesh("cpu", (4,), mesh_dim_names=("tp",))
    dist.destroy_process_group()


class Exchanges(TorchDispatchMode):
    """Counts collectives by their name, and the number of elements and type of what each rank puts in."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[str, int, torch.dtype]] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, name = func._schema.name.split("::")
        if "c10d" in namespace and name != "wait_tensor":
            self.counts[name, args[0].numel(), args[0].dtype] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("norm_affine", [True, False])
def test_a_block_exchanges_what_the_plan_says(four_ranks: DeviceMesh, norm_affine: bool) -> None:
    model = make_model(torch.float32, **RICH, norm_affine=norm_affine)
    apply_tensor_parallel(model, four_ranks, loss_parallel=True)
    block = model.layers["0"]
    for module in block.modules():
        if isinstance(module, nn.Linear):
            module.bfloat16()  # as under mixed precision: matrices and activations, not norms and CEMA
    whole = BATCH * LENGTH * SIZES_OF_FOUR_RANKS["dim"]
    x = torch.randn(BATCH, LENGTH, SIZES_OF_FOUR_RANKS["dim"] // 4, dtype=torch.bfloat16, requires_grad=True)
    with Exchanges() as forward:
        y = block(x)
    with Exchanges() as backward:
        y.sum().backward()
    assert y.shape == x.shape and y.dtype == x.dtype
    gather = ("all_gather_into_tensor", whole // 4, torch.bfloat16)
    reduce_scatter = ("reduce_scatter_tensor", whole, torch.bfloat16)
    all_reduce = ("all_reduce", SIZES_OF_FOUR_RANKS["dim"], torch.float32)
    assert forward.counts == Counter({gather: 3, reduce_scatter: 2})
    assert backward.counts == Counter({gather: 2, reduce_scatter: 3} | ({all_reduce: 3} if norm_affine else {}))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_what_the_ends_of_the_model_exchange(four_ranks: DeviceMesh, tied: bool) -> None:
    model = make_model(torch.float32, tie_embedding=tied, n_layers=1)
    apply_tensor_parallel(model, four_ranks, loss_parallel=True)
    with Exchanges() as embedding:
        x = model.tok_embeddings(make_batch()[0])
    assert x.shape == (BATCH, LENGTH, SIZES_OF_FOUR_RANKS["dim"] // 4)
    whole = BATCH * LENGTH * SIZES_OF_FOUR_RANKS["dim"]
    assert embedding.counts == (Counter({("reduce_scatter_tensor", whole, torch.float32): 1}) if tied else Counter())
    with Exchanges() as output:
        model.output(x)
    assert output.counts == Counter({("all_gather_into_tensor", whole // 4, torch.float32): 1})


def test_pipeline_stages_without_ends(four_ranks: DeviceMesh) -> None:
    x = torch.randn(BATCH, LENGTH, SIZES_OF_FOUR_RANKS["dim"] // 4)
    middle, last = make_model(torch.float32), make_model(torch.float32)
    middle.tok_embeddings = middle.norm = middle.output = last.tok_embeddings = None  # type: ignore[assignment]
    del middle.layers["0"], last.layers["0"]
    for stage in (middle, last):
        apply_tensor_parallel(stage, four_ranks, loss_parallel=False)
    assert middle(x).shape == x.shape
    assert last(x).shape == (BATCH, LENGTH, SIZES_OF_FOUR_RANKS["vocab_size"])


def test_the_plan_names_modules_of_a_layer() -> None:
    layer = make_model(**RICH).layers["0"]
    assert LAYER_PLAN.keys() <= dict(layer.named_modules()).keys()
