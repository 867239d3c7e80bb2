"""The Megalodon model in plain PyTorch: no host, no ranks."""

from .config import PRESETS, MegalodonConfig
from .inference.generate import generate
from .model import Megalodon
from .state import LayerState, MegalodonState

__all__ = ["PRESETS", "LayerState", "Megalodon", "MegalodonConfig", "MegalodonState", "generate"]
