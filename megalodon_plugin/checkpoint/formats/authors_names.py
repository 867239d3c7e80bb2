"""State dicts of the authors' released code (repository XuezheMax/megalodon), both ways."""

import re
from collections.abc import Mapping

from torch import Tensor

from megalodon_plugin.model import MegalodonConfig

from ..expected import check_state_dict

# Authors' name -> ours, for parameters; {i} is the layer.
_NAMES = {
    "embed.weight": "tok_embeddings.weight",
    "output.final_norm.weight": "norm.weight",
    "output.final_norm.bias": "norm.bias",
    "output.output.weight": "output.weight",
    **{f"layers.{{i}}.mega.{n}": f"layers.{{i}}.attention.qk.{n}" for n in ("gamma", "beta")},
    **{f"layers.{{i}}.mega.timenorm.{n}": f"layers.{{i}}.attention.timestep_norm.{n}" for n in ("weight", "bias")},
    **{
        f"layers.{{i}}.mega.cema.{n}": f"layers.{{i}}.attention.cema.{n}"
        for n in ("alpha", "delta", "theta", "gamma", "omega")
    },
    "layers.{i}.mega.rmsnorm.weight": "layers.{i}.attention.rms_norm.weight",
    **{
        f"layers.{{i}}.mega.{linear}.{n}": f"layers.{{i}}.attention.{linear}.{n}"
        for linear in ("wv", "wz", "wr", "wh1")
        for n in ("weight", "bias")
    },
    "layers.{i}.mega.wh2.weight": "layers.{i}.attention.wh2.weight",
    **{f"layers.{{i}}.nffn.norm.{n}": f"layers.{{i}}.feed_forward.norm.{n}" for n in ("weight", "bias")},
    **{f"layers.{{i}}.nffn.{n}.weight": f"layers.{{i}}.feed_forward.{n}.weight" for n in ("fc1", "fc2", "fc3")},
    "layers.{i}.nffn.alpha": "layers.{i}.feed_forward.alpha",
}
_OURS_TO_THEIRS = {ours: theirs for theirs, ours in _NAMES.items()}

# Buffers of theirs that hold nothing learned: the RoPE table and TimestepNorm's start, which training never changes.
_BUFFER = re.compile(r"^rope\.freqs$|\.(prior_count|prior_mean|prior_logv)$")


def from_authors(state_dict: Mapping[str, Tensor], config: MegalodonConfig | None = None) -> dict[str, Tensor]:
    """Our state dict from the released code's; the tensors are the same objects.

    Args:
        state_dict: a whole (not sharded) released state dict.
        config: checks names and shapes against a model of this configuration. A tied output weight may be there or not.

    Raises:
        ValueError: the state dict is empty, has a name that no Megalodon has, carries a prior other than the empty one,
            or does not fit `config`; the message gives names and both shapes.
    """
    if not state_dict:
        raise ValueError("the state dict must hold parameters, but is empty")
    native: dict[str, Tensor] = {}
    for name, value in state_dict.items():
        if _BUFFER.search(name):
            if name.endswith("prior_count") and int(value) != 0:
                raise ValueError(f"`{name}` must be 0 (statistics that start empty), but is {int(value)}")
            continue
        native[_rename(name, _NAMES, "the released code")] = value
    if config is not None:
        if config.tie_embedding and "tok_embeddings.weight" in native:
            native.setdefault("output.weight", native["tok_embeddings.weight"])
        check_state_dict(native, config)
    return native


def to_authors(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The released code's state dict from ours: its parameters, without its constant buffers.

    Their code makes the buffers (`rope.freqs`, `prior_*`) from its configuration: load with strict=False, or add them.

    Raises:
        ValueError: the state dict is empty or has a name that is not ours.
    """
    if not state_dict:
        raise ValueError("the state dict must hold parameters, but is empty")
    return {_rename(name, _OURS_TO_THEIRS, "Megalodon"): value for name, value in state_dict.items()}


def _rename(name: str, names: Mapping[str, str], owner: str) -> str:
    layer = re.match(r"^layers\.(\d+)\.", name)
    pattern = re.sub(r"^layers\.\d+\.", "layers.{i}.", name)
    if pattern not in names:
        raise ValueError(f"the state dict has a name that {owner} does not have: `{name}`")
    return names[pattern].replace("{i}", layer.group(1) if layer else "")
