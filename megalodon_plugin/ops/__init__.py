"""Functions on tensors: CEMA, TimestepNorm and attention inside chunks. No module, no rank, no host."""

from .cema import cema
from .chunk_attention import chunk_attention
from .timestep_norm import NormState, timestep_norm

__all__ = ["NormState", "cema", "chunk_attention", "timestep_norm"]
