"""Which parameters may be lowered to bfloat16 and which stay float32."""

import torch
from torch import nn

from .attention import QueryKey
from .cema import CEMA
from .norm import LayerNorm, RMSNorm, TimestepNorm

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""What matrices may be, by the names that options take."""

# Modules whose own parameters stay float32: CEMA, every norm, attention's gamma and beta.
FLOAT32_MODULES = (CEMA, TimestepNorm, RMSNorm, LayerNorm, QueryKey)


def float32_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Those that mixed precision must not cast."""
    return {p for m in model.modules() if isinstance(m, FLOAT32_MODULES) for p in m.parameters(recurse=False)}


def lower_matrices(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast every other parameter to `dtype`, in place: the precision of training under FSDP's mixed precision.

    Raises:
        ValueError: `dtype` is neither float32 nor bfloat16 (nor float64, for proofs).
    """
    if dtype not in (torch.float32, torch.float64, torch.bfloat16):
        raise ValueError(f"`dtype` must be float32 or bfloat16, but is {dtype}")
    kept = set() if dtype == torch.float64 else float32_parameters(model)
    for parameter in model.parameters():
        if parameter not in kept:
            parameter.data = parameter.data.to(dtype)
    return model


def matrix_names(model: nn.Module) -> set[str]:
    """Names of the parameters that `lower_matrices` casts, a tied output weight included."""
    kept = float32_parameters(model)
    return {name for name, value in model.named_parameters(remove_duplicate=False) if value not in kept}
