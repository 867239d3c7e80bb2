"""Folders of the authors' release: two JSON files, and consolidated.pth or its model-parallel shards."""

import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalodon_plugin.files import write_json
from megalodon_plugin.model import MegalodonConfig

from ..json_file import config_from, read_json
from .authors_names import from_authors, to_authors

_OPTIONS = {
    "num_layers": "n_layers",
    "model_dim": "dim",
    "z_dim": "z_dim",
    "value_dim": "value_dim",
    "num_heads": "n_heads",
    "ffn_hidden_dim": "ffn_dim",
    "cema_ndim": "cema_ndim",
    "chunk_size": "chunk_size",
    "norm_num_groups": "norm_groups",
    "norm_affine": "norm_affine",
    "norm_eps": "norm_eps",
    "rope_base": "rope_theta",
    "swiglu": "swiglu",
    "rescale_nffn": "rescale_ffn",
    "scale_emb": "scale_embedding",
    "share_emb": "tie_embedding",
    "vocab_size": "vocab_size",
    "output_size": "output_size",
    "init_mode": "init_mode",
    "dropout": "dropout",
    "hidden_dropout": "hidden_dropout",
    "attention_dropout": "attention_dropout",
}
"""Their option -> ours."""

# The axis along which model-parallel shards are cut, by the end of the authors' name; None: the same in every shard.
_AXES: tuple[tuple[str, int | None], ...] = (
    (r"mega\.(wv|wz|wr|wh1)\.(weight|bias)", 0),
    (r"nffn\.(fc1|fc3)\.weight", 0),
    (r"cema\.(alpha|delta|theta|gamma|omega)", 0),
    (r"(timenorm|final_norm)\.(weight|bias|prior_mean|prior_logv)", 0),
    (r"(embed|mega\.wh2|nffn\.fc2|output\.output)\.weight", 1),
    (r"mega\.(gamma|beta)", 1),
    (r"(timenorm|final_norm)\.prior_count|rmsnorm\.weight|nffn\.norm\.(weight|bias)|nffn\.alpha|rope\.freqs", None),
)


def is_one(folder: Path) -> bool:
    """Whether the folder holds consolidated files of theirs."""
    return any(folder.glob("consolidated*.pth"))


def read(folder: Path) -> tuple[MegalodonConfig, str | None, dict[str, Tensor]]:
    """Configuration, tokenizer and native tensors.

    Raises:
        ValueError: a file is missing, broken, or a pickle of something else than tensors; shards do not fit together.
    """
    content = read_json(folder / "config.json", "model")
    theirs = content["model"]
    options = {ours: theirs[name] for name, ours in _OPTIONS.items() if name in theirs}
    options["rope_theta"] = 10000.0 if options.get("rope_theta") is None else options["rope_theta"]
    options["output_size"] = None if options.get("output_size", -1) == -1 else options["output_size"]
    config = config_from(options, folder / "config.json")
    shards = [_load(path) for path in _shard_files(folder)]
    tensors = from_authors(shards[0] if len(shards) == 1 else consolidate(shards))
    tokenizer = content.get("tokenizer")
    return config, tokenizer if isinstance(tokenizer, str) else None, tensors


def write(
    folder: Path, config: MegalodonConfig, tokenizer: str | None, tensors: Mapping[str, Tensor], shards: int
) -> None:
    """Write config.json, consolidate_config.json and as many shards.

    Raises:
        ValueError: their code cannot express the model, or a size does not divide by the shards.
    """
    check_expressible(config, shards)
    theirs = {name: getattr(config, ours) for name, ours in _OPTIONS.items()}
    theirs["output_size"] = -1 if config.output_size is None else config.output_size
    dtype = next(iter(tensors.values())).dtype
    state_dict = to_authors(tensors) | _buffers(config)
    names = ["consolidated.pth"] if shards == 1 else [f"consolidated.{i:02d}.pth" for i in range(shards)]
    for name, shard in zip(names, split(state_dict, shards), strict=True):
        torch.save(shard, folder / name)
    kind = {"model_parallel_size": shards, "dtype": str(dtype).removeprefix("torch.")}
    write_json(kind, folder / "consolidate_config.json", indent=2)
    content = {"tokenizer": tokenizer, "model": theirs}
    write_json(content, folder / "config.json", indent=2)


def check_expressible(config: MegalodonConfig, shards: int) -> None:
    """Raise ValueError where the authors' code has no such model."""
    if config.cema_input != "released":
        raise ValueError(
            f'`cema_input` must be "released" in the authors\' format, whose code knows no other, but is '
            f"{config.cema_input!r}"
        )
    if shards < 1:
        raise ValueError(f"`--shards` must be at least 1, but is {shards}")
    for name in ("dim", "n_heads", "norm_groups", "ffn_dim", "value_dim", "z_dim"):
        if getattr(config, name) % shards:
            raise ValueError(f"`{name}` must be divisible by `--shards` = {shards}, but is {getattr(config, name)}")
    if config.rescale_ffn and shards > 1:
        raise ValueError(f"`--shards` must be 1 with `rescale_ffn`, as in the authors' code, but is {shards}")


def consolidate(shards: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """One state dict, in the authors' names, from those of all model-parallel ranks in order.

    Raises:
        ValueError: the shards hold other names, or differ where they must be the same.
    """
    whole: dict[str, Tensor] = {}
    for i, shard in enumerate(shards):
        if shard.keys() != shards[0].keys():
            name = sorted(shard.keys() ^ shards[0].keys())[0]
            raise ValueError(f"all shards must hold the same names, but `{name}` is not in both shard 0 and {i}")
    for name in shards[0]:
        parts, axis = [shard[name] for shard in shards], _axis(name)
        if axis is not None:
            whole[name] = torch.cat(parts, axis)
            continue
        if not all(torch.equal(part, parts[0]) for part in parts):
            raise ValueError(f"`{name}` must be the same in every shard, but is not")
        whole[name] = parts[0]
    return whole


def split(state_dict: Mapping[str, Tensor], shards: int) -> list[dict[str, Tensor]]:
    """The state dicts of that many model-parallel ranks, in the authors' names; see `check_expressible` for sizes."""
    parts: list[dict[str, Tensor]] = [{} for _ in range(shards)]
    for name, value in state_dict.items():
        axis = _axis(name)
        pieces = [value] * shards if axis is None else value.chunk(shards, axis)
        for part, piece in zip(parts, pieces, strict=True):
            part[name] = piece.contiguous().clone()  # a view would be saved with all of its storage
    return parts


def _axis(name: str) -> int | None:
    for pattern, axis in _AXES:
        if re.search(rf"(^|\.)({pattern})$", name):
            return axis
    raise ValueError(f"the state dict has a name that the released code does not have: `{name}`")


def _buffers(config: MegalodonConfig) -> dict[str, Tensor]:
    """Statistics that start empty. Their code computes `rope.freqs` itself."""
    norms = [f"layers.{i}.mega.timenorm" for i in range(config.n_layers)] + ["output.final_norm"]
    buffers: dict[str, Tensor] = {}
    for norm in norms:
        buffers[f"{norm}.prior_count"] = torch.zeros((), dtype=torch.int64)
        buffers |= {f"{norm}.prior_{kind}": torch.zeros(config.norm_groups) for kind in ("mean", "logv")}
    return buffers


def _shard_files(folder: Path) -> list[Path]:
    size = 1
    if (folder / "consolidate_config.json").is_file():
        size = read_json(folder / "consolidate_config.json", "model_parallel_size")["model_parallel_size"]
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"`model_parallel_size` must be a positive number, but is {size!r}")
    numbered = [folder / f"consolidated.{i:02d}.pth" for i in range(size)]
    paths = [folder / "consolidated.pth"] if size == 1 and (folder / "consolidated.pth").is_file() else numbered
    found = sorted(folder.glob("consolidated*.pth"))
    if sorted(paths) != found:
        raise ValueError(
            f"{folder} must hold the files of `model_parallel_size` = {size}, but holds "
            f"{', '.join(path.name for path in found)}"
        )
    return paths


def _load(path: Path) -> dict[str, Tensor]:
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} must be a whole file of tensors and nothing else, but: {reason}") from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} must hold tensors by name, but holds something else")
    return content
