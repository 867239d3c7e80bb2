"""TimestepNorm: the op, its definition, its statistics on slices of time, and the code that runs them."""

from .op import timestep_norm, timestep_norm_definition
from .slices import norm_fold, norm_fold_grad, norm_summary
from .state import NormState, empty_norm_state, merge_norm_states

__all__ = [
    "NormState",
    "empty_norm_state",
    "merge_norm_states",
    "norm_fold",
    "norm_fold_grad",
    "norm_summary",
    "timestep_norm",
    "timestep_norm_definition",
]
