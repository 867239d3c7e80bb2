"""Functions on tensors: CEMA, TimestepNorm and attention inside chunks. No module, no rank, no host."""

from .cema.op import cema
from .chunk_attention.op import chunk_attention
from .timestep_norm.op import NormState, timestep_norm

__all__ = ["NormState", "cema", "chunk_attention", "timestep_norm"]
