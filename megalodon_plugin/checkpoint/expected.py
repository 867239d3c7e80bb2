"""Which tensors a configuration's model has, and whether a state dict holds these."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megalodon_plugin.model import Megalodon, MegalodonConfig
from megalodon_plugin.model.precision import matrix_names


class Expected(NamedTuple):
    """is_matrix: the tensor may be bfloat16; CEMA, norms and attention's gamma and beta stay float32."""

    shape: torch.Size
    is_matrix: bool


def expected_tensors(config: MegalodonConfig) -> Mapping[str, Expected]:
    """The tensors of a model's state dict by name, a tied output weight included."""
    return _expected(tuple((field.name, getattr(config, field.name)) for field in dataclasses.fields(MegalodonConfig)))


def check_state_dict(state_dict: Mapping[str, Tensor], config: MegalodonConfig) -> None:
    """Check names and shapes; a tied output weight may be missing.

    Raises:
        ValueError: they are not those of a model of `config`.
    """
    expected = dict(expected_tensors(config))
    if config.tie_embedding and "output.weight" not in state_dict:
        del expected["output.weight"]
    missing, unknown = sorted(expected.keys() - state_dict.keys()), sorted(state_dict.keys() - expected.keys())
    if missing or unknown:
        raise ValueError(
            f"the state dict does not fit the configuration: missing {_shorten(missing)}; unknown {_shorten(unknown)}"
        )
    for name, (shape, _) in expected.items():
        if state_dict[name].shape != shape:
            raise ValueError(
                f"`{name}` must have shape {tuple(shape)} by the configuration, but has "
                f"{tuple(state_dict[name].shape)} in the state dict"
            )


@functools.lru_cache(maxsize=1)  # one conversion asks twice, and a large model takes seconds to make
def _expected(options: tuple[tuple[str, Any], ...]) -> Mapping[str, Expected]:
    with torch.device("meta"):
        model = Megalodon(MegalodonConfig(**dict(options)))
    matrices = matrix_names(model)
    return {name: Expected(value.shape, name in matrices) for name, value in model.state_dict().items()}


def _shorten(names: list[str]) -> str:
    shown = ", ".join(names[:5]) or "nothing"
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")
