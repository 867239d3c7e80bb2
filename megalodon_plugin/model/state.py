"""What a Megalodon carries from one piece of a text to the next: a pytree of tensors of fixed size."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from megalodon_plugin.files import read_tensors, write_tensors
from megalodon_plugin.ops import NormState
from megalodon_plugin.ops.timestep_norm import empty_norm_state

from .config import MegalodonConfig


class LayerState(NamedTuple):
    """State of one layer.

    norm: statistics of its TimestepNorm.
    h: CEMA's hidden state, (B, D, N, 2), float32 (float64 in a float64 model).
    k, v: rotated keys (B, C, H, Z/H) and values (B, C, H, V/H) of the unfinished chunk, in the activations' dtype.
        Entries from position mod C on are 0. Or of 0 entries: see `MegalodonState.without_caches`.
    """

    norm: NormState
    h: Tensor
    k: Tensor
    v: Tensor


class LayerPast(NamedTuple):
    """What a layer reads a piece of a text after. The calls that take one return the `LayerState` after the piece too.

    state: of the layer; None where every row starts a text.
    position: timesteps that each row has read, (B,) int64.
    in_place: for a piece of one timestep: write its key and value into the state's caches and copy nothing.
    """

    state: LayerState | None
    position: Tensor
    in_place: bool = False


class MegalodonState(NamedTuple):
    """State of a model after a piece of text: one `LayerState` a layer, the final norm's statistics, and the number of
    timesteps read by each row, (B,) int64. Rows may be at different places.
    """

    layers: tuple[LayerState, ...]
    norm: NormState
    position: Tensor

    def map(self, function: Any) -> "MegalodonState":
        """The state with `function` applied to every tensor."""
        return pytree.tree_map(function, self)

    def detach(self) -> "MegalodonState":
        """Cut the graph: gradients stop here (truncated backpropagation)."""
        return self.map(torch.Tensor.detach)

    def to(self, device: torch.device | str) -> "MegalodonState":
        """Move to another device. The dtypes stay: they are part of the state's meaning."""
        return self.map(lambda t: t.to(device))

    def select(self, rows: Tensor | list[int]) -> "MegalodonState":
        """The state of some rows, in that order; a row may be named more than once."""
        index = torch.as_tensor(rows, device=self.position.device)
        return self.map(lambda t: t.index_select(0, index))

    def without_caches(self) -> "MegalodonState":
        """The state of a text that is read in whole chunks: caches of 0 entries, for no chunk is ever unfinished.

        A model takes it with pieces of a multiple of `chunk_size`, at positions that are such multiples. The caches of
        this state must be unused.
        """
        layers = tuple(layer._replace(k=layer.k[:, :0].clone(), v=layer.v[:, :0].clone()) for layer in self.layers)
        return self._replace(layers=layers)

    def with_unused_zeroed(self) -> "MegalodonState":
        """The state with 0 in the unused entries of the caches, where steps in place leave those of older chunks."""

        def zero_unused(cache: Tensor) -> Tensor:
            entries = torch.arange(cache.shape[1], device=cache.device)
            unused = entries >= (self.position % cache.shape[1]).unsqueeze(1)  # (B, C)
            return cache.masked_fill(unused[..., None, None], 0)

        layers = tuple(layer._replace(k=zero_unused(layer.k), v=zero_unused(layer.v)) for layer in self.layers)
        return self._replace(layers=layers)

    @staticmethod
    def joined(states: "Sequence[MegalodonState]") -> "MegalodonState":
        """One state of the rows of all, in order; they may be at different positions."""
        return pytree.tree_map(lambda *tensors: torch.cat(tensors), *states)

    def save(self, path: str | Path) -> None:
        """Write to a safetensors file; no half-written file is left under `path`."""
        write_tensors(self.named(), path)

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> "MegalodonState":
        """Read what `save` wrote.

        Raises:
            ValueError: the file holds something else.
        """
        return cls.from_named(read_tensors(path, device)[0], str(path))

    @classmethod
    def from_named(cls, tensors: Mapping[str, Tensor], origin: str) -> "MegalodonState":
        """The state of which `named` gave the tensors; others are ignored. ValueError where one is missing."""
        try:
            numbers = [int(name.split(".")[1]) for name in tensors if re.match(r"layers\.\d+\.", name)]
            layers = tuple(
                LayerState(
                    NormState(*(tensors[f"layers.{i}.norm.{field}"] for field in NormState._fields)),
                    *(tensors[f"layers.{i}.{field}"] for field in LayerState._fields[1:]),
                )
                for i in range(1 + max(numbers, default=0))
            )
            norm = NormState(*(tensors[f"norm.{field}"] for field in NormState._fields))
            return cls(layers, norm, tensors["position"])
        except KeyError as error:
            raise ValueError(f"{origin} does not hold the state of a Megalodon: {error} is missing") from error

    def named(self) -> dict[str, Tensor]:
        """Every tensor by a name of its own."""
        named = {"position": self.position}
        named |= {f"norm.{field}": value for field, value in self.norm._asdict().items()}
        for i, layer in enumerate(self.layers):
            named |= {f"layers.{i}.norm.{field}": value for field, value in layer.norm._asdict().items()}
            named |= {f"layers.{i}.{field}": getattr(layer, field) for field in LayerState._fields[1:]}
        return named


def empty_layer_state(
    cfg: MegalodonConfig, batch: int, dtype: torch.dtype, state_dtype: torch.dtype, device: torch.device
) -> LayerState:
    """State of a layer before the first timestep."""
    return LayerState(
        empty_norm_state(batch, cfg.norm_groups, state_dtype, device),
        torch.zeros(batch, cfg.dim, cfg.cema_ndim, 2, dtype=state_dtype, device=device),
        torch.zeros(batch, cfg.chunk_size, cfg.n_heads, cfg.qk_head_dim, dtype=dtype, device=device),
        torch.zeros(batch, cfg.chunk_size, cfg.n_heads, cfg.value_head_dim, dtype=dtype, device=device),
    )


def check_state(state: MegalodonState, cfg: MegalodonConfig, batch: int, length: int | None = None) -> None:
    """Raise ValueError unless the state belongs to a model of this configuration and to this many rows.

    `length`: of the piece that is read next; without it the state must have its caches.
    """
    if len(state.layers) != cfg.n_layers:
        raise ValueError(f"the state must have `n_layers` = {cfg.n_layers} layers, but has {len(state.layers)}")
    entries = cfg.chunk_size
    if length is not None and state.layers[0].k.shape[1] == 0:
        if length % cfg.chunk_size:
            raise ValueError(
                f"pieces after a state without caches must be multiples of `chunk_size` = {cfg.chunk_size}, but one "
                f"has {length} timesteps"
            )
        entries = 0
    shapes = {
        "h": (batch, cfg.dim, cfg.cema_ndim, 2),
        "k": (batch, entries, cfg.n_heads, cfg.qk_head_dim),
        "v": (batch, entries, cfg.n_heads, cfg.value_head_dim),
    }
    for i, layer in enumerate(state.layers):
        for name, shape in shapes.items():
            found = tuple(getattr(layer, name).shape)
            if found != shape:
                raise ValueError(f"the state's `layers[{i}].{name}` must have shape {shape}, but has {found}")
    if tuple(state.position.shape) != (batch,):
        raise ValueError(f"the state's `position` must have shape ({batch},), but has {tuple(state.position.shape)}")
