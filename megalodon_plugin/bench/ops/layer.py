"""One layer of a model, forward and backward, with the kernels and without."""

import dataclasses

import torch
from torch import Tensor, nn

from megalodon_plugin.model import PRESETS, MegalodonConfig
from megalodon_plugin.model.block import MegalodonBlock
from megalodon_plugin.ops.dispatch import use_kernels

from ..timing import MIB, measure, size
from .results import SpeedRow

SHAPES = ((8, 4096), (1, 32768))
"""(B, L)"""


def layer_config(dim: int | None = None) -> MegalodonConfig:
    """The paper's 7B; with `dim`, a small one for tests."""
    if dim is None:
        return PRESETS["paper_7B"]
    return dataclasses.replace(PRESETS["debug"], dim=dim, chunk_size=32)


def layer_flops(cfg: MegalodonConfig, length: int) -> float:
    """Floating-point operations a token of the matrix products of one layer's forward pass.

    Two for each weight of a linear layer; causal scores and their products with the values inside chunks, where a
    position sees (C + 1) / 2 on average.
    """
    with torch.device("meta"):
        block = MegalodonBlock(cfg, 0)
    weights = sum(part.weight.numel() for part in block.modules() if isinstance(part, nn.Linear))
    seen = (min(cfg.chunk_size, length) + 1) / 2
    return 2 * weights + 2 * seen * (cfg.z_dim + cfg.value_dim)


def measure_layer(
    cfg: MegalodonConfig,
    shape: tuple[int, int],
    impl: str,
    mode: str,
    device: torch.device,
    tflops: float,
    seconds: float = 1.0,
) -> SpeedRow:
    """A row with op "layer": x (B, L, D) in bfloat16 under autocast, gradients of x and of every parameter.

    The floor is the time of the layer's matrix products at `tflops`.

    Args:
        shape: (B, L).
        impl: the implementation's name in the row.
        mode: what the ops run as (`ops.dispatch.use_kernels`).
        tflops: rate of a large bfloat16 product.
    """
    batch, length = shape
    torch.manual_seed(0)
    with device:
        block = MegalodonBlock(cfg, 0)
        x = torch.randn(batch, length, cfg.dim, dtype=torch.bfloat16).requires_grad_(True)
        dy = torch.randn(batch, length, cfg.dim, dtype=torch.bfloat16)
    with torch.no_grad():
        block.init_weights()
    parameters = [parameter for parameter in block.parameters() if parameter.requires_grad]

    def function(x: Tensor, *_: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return block(x)

    with use_kernels(mode):
        found = measure(function, [([x, *parameters], dy)], device, seconds, graph_below_ms=0)
    floor = layer_flops(cfg, length) * batch * length / (tflops * 1e12) * 1e3
    return {
        "op": "layer",
        "impl": impl,
        "B": batch,
        "L": length,
        "D": cfg.dim,
        "dtype": "bfloat16",
        **found,
        "floor_fwd_ms": floor,
        "floor_fwd_bwd_ms": 3 * floor,
        "extra_share": found["extra_mib"] * MIB / size(x),
    }
