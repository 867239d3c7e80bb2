"""Chunk parallelism with the CUDA kernels: two processes on one GPU, against one.

NCCL wants a GPU for each rank and gloo takes tensors of the CPU, so the summaries go by way of it.
"""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from megalodon_plugin.model import Megalodon, MegalodonConfig
from megalodon_plugin.ops.dispatch import use_kernels
from megalodon_plugin.parallel import chunk, collectives
from megalodon_plugin.parallel.collectives import Ranks, wait

from support.ranks import run_on_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "dim": 128,
    "n_layers": 2,
    "n_heads": 2,
    "z_dim": 64,
    "value_dim": 256,
    "ffn_dim": 192,
    "chunk_size": 128,
    "norm_groups": 4,
}
BATCH, LENGTH = 2, 512


def gather_on_the_cpu(summary: Tensor, ranks: Ranks) -> Tensor:
    return wait(collectives.start_gather(summary.cpu(), ranks)).cuda()


def train(low: bool, compiled: bool) -> dict[str, Tensor]:
    """Loss and gradients, summed over the ranks if there are any."""
    torch.manual_seed(0)
    model = Megalodon(MegalodonConfig(**SIZES))
    model.init_weights()
    with torch.no_grad():
        for layer in model.layers.values():
            layer.attention.cema.delta[::2] -= 6  # type: ignore[union-attr]  # channels that every slice feels
    model.cuda()
    tokens = torch.randint(64, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(1)).cuda()
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    if dist.is_initialized():
        chunk.start_gather = gather_on_the_cpu
        chunk.apply_chunk_parallel(model, Ranks.of(dist.group.WORLD))
        size, rank = dist.get_world_size(), dist.get_rank()
        inputs, labels = (t.chunk(size, 1)[rank] for t in (inputs, labels))
    if compiled:
        for layer in model.layers.values():
            layer.compile(fullgraph=True)
    with use_kernels("require"), torch.autocast("cuda", torch.bfloat16, enabled=low):
        logits = model(inputs)
        loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum") / (BATCH * LENGTH)
        loss.backward()
    found = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    found["loss"] = loss.detach().cpu()
    if dist.is_initialized():
        for value in found.values():
            dist.all_reduce(value)
    return found


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(("low", "tolerance"), [(False, 1e-4), (True, 5e-2)], ids=["float32", "bfloat16"])
def test_two_ranks_compute_what_one_does(low: bool, tolerance: float, compiled: bool) -> None:
    expected = train(low, compiled)
    (found, _) = run_on_ranks(2, train, low, compiled)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() / value.norm() < tolerance, name
