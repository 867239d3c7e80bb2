"""Models that are small, by what their sizes are good for, and how a test gets one."""

from typing import Any

import torch

from megalodon_plugin.model import Megalodon, MegalodonConfig

SIZES: dict[str, Any] = {
    "vocab_size": 31,
    "dim": 12,
    "n_layers": 2,
    "n_heads": 2,
    "z_dim": 8,
    "value_dim": 20,
    "ffn_dim": 14,
    "cema_ndim": 3,
    "chunk_size": 8,
    "norm_groups": 3,
}
"""Of a model in one process: every size is another number, and few are powers of two."""
SIZES_OF_FOUR_RANKS: dict[str, Any] = SIZES | {
    "dim": 16,
    "n_heads": 4,
    "z_dim": 16,
    "value_dim": 24,
    "ffn_dim": 20,
    "norm_groups": 4,
}
"""Of one that up to four ranks can share evenly, but for the vocabulary, which no degree divides."""


def small_model(seed: int = 5, **options: Any) -> Megalodon:
    """An initialised model of SIZES, or of `options` in their place, in training mode."""
    model = Megalodon(MegalodonConfig(**SIZES | options))
    torch.manual_seed(seed)
    model.init_weights(buffer_device=None)
    return model
