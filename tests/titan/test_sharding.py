"""FSDP2 under mixed precision: the small parameters stay float32, in values and gradients, also in compiled layers."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from megalodon_plugin.model import Megalodon, MegalodonConfig

from support.ranks import run_on_ranks
from support.small_model import SIZES_OF_FOUR_RANKS

FLOAT32 = ("timestep_norm.", "cema.", "rms_norm.", "qk.", "feed_forward.norm.")
HOW = ("eager", "compiled", "tied")
BELOW_BFLOAT16 = 0.9 * 2.0**-8  # added to a bfloat16 number between 1 and 2, it is rounded away


def stays_float32(name: str) -> bool:
    return name.startswith("norm.") or any(part in name for part in FLOAT32)


def sharded_model(how: str) -> nn.Module:
    from megalodon_plugin.titan.fsdp import shard_model

    torch.manual_seed(0)
    model = Megalodon(MegalodonConfig(**SIZES_OF_FOUR_RANKS, rescale_ffn=True, tie_embedding=how == "tied"))
    model.init_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.rand_like(parameter).add_(1).bfloat16())  # between 1 and 2, on bfloat16's grid
    if how == "compiled":
        for layer in model.layers.values():
            layer.compile(fullgraph=True, backend="aot_eager")
    job = SimpleNamespace(
        training=SimpleNamespace(
            mixed_precision_param="bfloat16", mixed_precision_reduce="float32", enable_cpu_offload=False
        ),
        parallelism=SimpleNamespace(fsdp_reshard_after_forward="default"),
    )
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("fsdp",))
    shard_model(model, mesh, SimpleNamespace(pp_enabled=False), job)  # type: ignore[arg-type]
    return model


def logits_of(model: nn.Module) -> Tensor:
    tokens = torch.randint(31, (8, 40), generator=torch.Generator().manual_seed(2))
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # what a forward pass alone has gathered is gathered again
    return model(tokens).float()


def look(how: str) -> dict[str, dict[str, Any]]:
    """Of every parameter: whether a change too small for bfloat16 reaches the logits, and what its gradient is."""
    model = sharded_model(how)
    before = logits_of(model)
    before.square().mean().backward()
    found = {}
    for name, parameter in dict(model.named_parameters()).items():  # now they are sharded
        assert isinstance(parameter, DTensor) and isinstance(parameter.grad, DTensor)
        gradient = parameter.grad.full_tensor()
        with torch.no_grad():
            parameter.add_(BELOW_BFLOAT16)
            changed = not torch.equal(logits_of(model), before)
            parameter.sub_(BELOW_BFLOAT16)
        found[name] = {"changed": changed, "dtype": gradient.dtype, "gradient": gradient}
    return found


def look_at_all() -> dict[str, dict[str, dict[str, Any]]]:
    return {how: look(how) for how in HOW}


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, dict[str, Any]]]:
    return run_on_ranks(2, look_at_all)[0]


@pytest.mark.parametrize("how", HOW)
def test_values_of_small_parameters_are_not_rounded(found: Any, how: str) -> None:
    assert {"norm.weight", "layers.1.attention.cema.theta", "layers.0.attention.qk.beta"} <= found[how].keys()
    # Every matrix and its bias is rounded, so that the change is lost: the test can see rounding.
    assert {name: of["changed"] for name, of in found[how].items()} == {
        name: stays_float32(name) for name in found[how]
    }


@pytest.mark.parametrize("how", HOW)
def test_gradients_of_small_parameters_are_not_rounded(found: Any, how: str) -> None:
    assert all(of["dtype"] == torch.float32 for of in found[how].values())
    gradients = [of["gradient"].flatten() for name, of in found[how].items() if stays_float32(name)]
    values = torch.cat(gradients)
    on_the_grid = (values == values.bfloat16().float())[values != 0]
    assert on_the_grid.float().mean() < 0.2  # a sum of few numbers may lie on bfloat16's grid
