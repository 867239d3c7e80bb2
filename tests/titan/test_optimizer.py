"""Where weight decay falls."""

from pathlib import Path

import pytest
import torch

from megalodon_plugin.model import Megalodon
from megalodon_plugin.titan.model_args import Flavors
from megalodon_plugin.titan.optimizer import build_megalodon_optimizers
from megalodon_plugin.titan.parallelize import parallelize_megalodon

# isort: split
from torchtitan.distributed import ParallelDims

from support.tiny_job import read_job, write_job

LINEAR = {"attention.wz", "attention.wv", "attention.wr", "attention.wh1", "attention.wh2"} | {
    f"feed_forward.fc{n}" for n in (1, 2, 3)
}
MATRICES = {"tok_embeddings.weight", "output.weight"} | {
    f"layers.{layer}.{name}.weight" for layer in (0, 1) for name in LINEAR
}
LR, DECAY = 0.5, 0.25


def build(folder: Path, decay_on: str | None, implementation: str = "fused", tied: bool = False):
    """A model with every kind of parameter, all of them 2, and its optimizer."""
    options = {"weight_decay_on": decay_on, "swiglu": True, "rescale_ffn": True, "tie_embedding": tied}
    optimizer = {"lr": LR, "weight_decay": DECAY, "implementation": implementation}
    job_config = read_job(write_job(folder, megalodon=options, optimizer=optimizer))
    args = Flavors()["debug"]
    args.update_from_config(job_config)
    model = Megalodon(args)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(2.0)
    dims = ParallelDims(1, 1, 1, 1, 1, 1, 1, world_size=1)
    parallelize_megalodon(model, dims, job_config)
    return model, build_megalodon_optimizers([model], job_config.optimizer, dims)


def names_by_decay(model: Megalodon, optimizers) -> dict[float, set[str]]:
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    (optimizer,) = optimizers
    groups = [(group["weight_decay"], name_of[id(p)]) for group in optimizer.param_groups for p in group["params"]]
    assert len(groups) == len(name_of)
    return {decay: {name for d, name in groups if d == decay} for decay, _ in groups}


@pytest.mark.parametrize("decay_on", ["all", None])
def test_all_parameters_decay_in_one_group(tmp_path: Path, decay_on: str | None) -> None:
    model, optimizers = build(tmp_path, decay_on)
    names = {name for name, _ in model.named_parameters()}
    assert names > MATRICES
    assert names_by_decay(model, optimizers) == {DECAY: names}


def test_matrices_decay_and_nothing_else(tmp_path: Path) -> None:
    model, optimizers = build(tmp_path, "matrices")
    others = {name for name, _ in model.named_parameters()} - MATRICES
    kinds = ("cema.alpha", "norm.weight", "wz.bias", "qk.gamma", "feed_forward.alpha")
    assert all(any(kind in name for name in others) for kind in kinds)
    assert names_by_decay(model, optimizers) == {DECAY: MATRICES, 0.0: others}


def test_a_shared_matrix_decays_once(tmp_path: Path) -> None:
    model, optimizers = build(tmp_path, "matrices", tied=True)
    assert names_by_decay(model, optimizers)[DECAY] == MATRICES - {"output.weight"}


@pytest.mark.parametrize("implementation", ["fused", "foreach", "for-loop"])
@pytest.mark.parametrize("decay_on", ["all", "matrices"])
def test_a_step_without_gradient_shrinks_exactly_those(tmp_path: Path, decay_on: str, implementation: str) -> None:
    model, optimizers = build(tmp_path, decay_on, implementation)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizers.step()
    shrunk = 2.0 * (1 - LR * DECAY)
    for name, parameter in model.named_parameters():
        expected = shrunk if decay_on == "all" or name in MATRICES else 2.0
        torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, expected), rtol=0, atol=0, msg=name)
