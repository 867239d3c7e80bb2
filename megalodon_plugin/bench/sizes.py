"""The models that benchmarks train and run, by name. Imports no torch, for the parser of the command line reads it."""

from dataclasses import dataclass
from typing import Any

VOCABULARY = 32000
"""Of all of them."""


@dataclass(frozen=True)
class LlamaSize:
    """What torchtitan's Llama is built with."""

    dim: int
    n_layers: int
    n_heads: int


@dataclass(frozen=True)
class Size:
    """A Megalodon, and torchtitan's Llama with about as many parameters."""

    preset: str
    """Of `model.PRESETS`, the TOML's `model.flavor`."""
    llama: LlamaSize
    n_layers: int | None = None
    """Layers of Megalodon in place of the preset's."""

    def options(self, model: str) -> dict[str, Any]:
        """Of "megalodon" the preset as "flavor" and the options of `[megalodon]`, of "llama" its sizes."""
        if model == "llama":
            return vars(self.llama).copy()
        return {"flavor": self.preset} | ({} if self.n_layers is None else {"n_layers": self.n_layers})


SIZES = {
    "7B": Size("paper_7B", LlamaSize(dim=4096, n_layers=32, n_heads=32)),
    "7B-width": Size("paper_7B", LlamaSize(dim=4096, n_layers=4, n_heads=32), n_layers=4),
    "1.3B": Size("released_1.3B", LlamaSize(dim=2048, n_layers=24, n_heads=16)),
    "200M": Size("released_200M", LlamaSize(dim=1024, n_layers=12, n_heads=8)),
    "debug": Size("debug", LlamaSize(dim=128, n_layers=4, n_heads=2)),
}
LLAMA_OF_PRESET = {size.preset: size.llama for size in SIZES.values() if size.n_layers is None}
"""Preset of Megalodon -> Llama of its size."""
