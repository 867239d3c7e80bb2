"""Input checks that the ops share: each error names the argument, the rule and the value."""

import torch
from torch import Tensor

ACTIVATION_DTYPES = (torch.bfloat16, torch.float32, torch.float64)
PARAMETER_DTYPES = (torch.float32, torch.float64)


def check_activation(name: str, x: Tensor, ndim: int) -> None:
    """Raise ValueError unless `x` has `ndim` dimensions, at least one timestep and a supported dtype."""
    if x.ndim != ndim:
        raise ValueError(f"`{name}` must have {ndim} dimensions, but has shape {tuple(x.shape)}")
    if x.shape[1] < 1:
        raise ValueError(f"`{name}` must hold at least one timestep (dimension 1), but has shape {tuple(x.shape)}")
    if x.dtype == torch.float16:
        raise ValueError(
            f"`{name}` must not be float16: running statistics and slowly decaying states leave its range; use bfloat16"
        )
    if x.dtype not in ACTIVATION_DTYPES:
        raise ValueError(f"`{name}` must be bfloat16, float32 or float64, but is {x.dtype}")


def check_parameter(name: str, p: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless `p` has the given shape and is float32 or float64."""
    if tuple(p.shape) != shape:
        raise ValueError(f"`{name}` must have shape {shape}, but has {tuple(p.shape)}")
    if p.dtype not in PARAMETER_DTYPES:
        raise ValueError(f"`{name}` must be float32 (float64 in a float64 model), but is {p.dtype}")


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 as soon as one of the tensors is float64, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def without_autocast(x: Tensor) -> torch.autocast:
    """Inside an op the dtypes are chosen by hand, so autocast must not round its matrix products to bfloat16."""
    return torch.autocast(x.device.type, enabled=False)
