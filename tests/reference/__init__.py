"""An independent oracle: Megalodon in float64, written for reading and never for speed.

It transcribes the equations of the paper and of the authors' released code, uses the released parameter names,
and imports nothing of the package that it judges. Every function is differentiable by autograd.
"""

from .model import attention_block, feed_forward, model
from .ops import apply_rope, cema, chunk_attention, rope_frequencies, timestep_norm

__all__ = [
    "apply_rope",
    "attention_block",
    "cema",
    "chunk_attention",
    "feed_forward",
    "model",
    "rope_frequencies",
    "timestep_norm",
]
