"""Folders of safetensors files with a config.json, as Hugging Face's libraries and torchtitan lay them out."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalodon_plugin.files import read_tensors, write_json, write_tensors
from megalodon_plugin.model import MegalodonConfig

from ..model_json import config_from, read_json

PREFIX = "model."
"""Before every native name: the name of the model inside the class that a Hugging Face library loads."""
INDEX = "model.safetensors.index.json"
MODEL_TYPE = "megalodon"


def to_stored(state_dict: Mapping[str, Any], tied: bool) -> dict[str, Any]:
    """Names as stored; a tied output weight is left out."""
    return {PREFIX + name: value for name, value in state_dict.items() if not (tied and name == "output.weight")}


def from_stored(stored: Mapping[str, Any], tied: bool) -> dict[str, Any]:
    """Native names; a tied output weight is there again.

    Raises:
        ValueError: a name is no stored one.
    """
    for name in stored:
        if not name.startswith(PREFIX):
            raise ValueError(f"names of tensors must start with {PREFIX!r}, but one is {name!r}")
    native = {name.removeprefix(PREFIX): value for name, value in stored.items()}
    if tied and "tok_embeddings.weight" in native:
        native["output.weight"] = native["tok_embeddings.weight"]
    return native


def read_safetensors(folder: Path) -> dict[str, Tensor]:
    """The stored tensors of a folder, in memory.

    Raises:
        ValueError: a file is missing, broken, or lacks a tensor that the index puts there.
    """
    weight_map: dict[str, str] | None = None
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX, "weight_map")["weight_map"]
        files = sorted(set(weight_map.values()))
    else:
        files = sorted(path.name for path in folder.glob("*.safetensors"))
        if not files:
            raise ValueError(f"{folder} must hold *.safetensors files, but does not")
    tensors: dict[str, Tensor] = {}
    for name in files:
        path = folder / name
        if not path.is_file() or path.parent != folder:
            raise ValueError(f"{folder} must hold every file that {INDEX} names, but lacks {name}")
        tensors |= read_tensors(path)[0]
    if weight_map is not None and (lost := sorted(weight_map.keys() - tensors.keys())):
        raise ValueError(f"{folder} must hold every tensor that {INDEX} names, but lacks {', '.join(lost[:5])}")
    return tensors


def write_safetensors(folder: Path, stored: Mapping[str, Tensor], max_shard_bytes: float) -> None:
    """Write files of at most that many bytes (a larger tensor has one to itself), and last the index."""
    shards: list[dict[str, Tensor]] = [{}]
    held = 0
    for name, value in stored.items():
        if shards[-1] and held + value.nbytes > max_shard_bytes:
            shards.append({})
            held = 0
        shards[-1][name] = value
        held += value.nbytes
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        # The host reads the number of a shard from its name.
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(shard, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    total = sum(value.nbytes for value in stored.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(index, folder / INDEX, indent=2)


def read_config(folder: Path) -> tuple[MegalodonConfig, str | None]:
    """Configuration and tokenizer of a folder's config.json.

    Raises:
        ValueError: it is one of another kind of model.
    """
    path = folder / "config.json"
    content = read_json(path, "model_type")
    if content["model_type"] != MODEL_TYPE:
        raise ValueError(f'`model_type` in {path} must be "{MODEL_TYPE}", but is {content["model_type"]!r}')
    fields = {field.name for field in dataclasses.fields(MegalodonConfig)}
    return config_from({k: v for k, v in content.items() if k in fields}, path), content.get("tokenizer")


def write_config(folder: Path, config: MegalodonConfig, tokenizer: str | None, dtype: torch.dtype) -> None:
    """Write config.json."""
    content = {
        "model_type": MODEL_TYPE,
        "architectures": ["MegalodonForCausalLM"],
        "torch_dtype": str(dtype).removeprefix("torch."),
        "tokenizer": tokenizer,
        **dataclasses.asdict(config),
    }
    write_json(content, folder / "config.json", indent=2)
