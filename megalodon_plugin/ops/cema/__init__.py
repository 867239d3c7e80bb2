"""CEMA: the op, its definition, its form on slices of time, and the code that runs them."""

from .blocks import CemaParameters
from .op import CEMA_INPUTS, cema, cema_definition, cema_flops, kept_states
from .slices import cema_fold, cema_summary, cema_summary_grad

__all__ = [
    "CEMA_INPUTS",
    "CemaParameters",
    "cema",
    "cema_definition",
    "cema_flops",
    "cema_fold",
    "cema_summary",
    "cema_summary_grad",
    "kept_states",
]
