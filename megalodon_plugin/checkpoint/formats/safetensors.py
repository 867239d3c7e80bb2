"""Folders of safetensors files with a config.json, as Hugging Face's libraries and torchtitan lay them out."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from megalodon_plugin.files import read_tensors, write_json, write_tensors
from megalodon_plugin.model import MegalodonConfig

from ..json_file import config_from, read_json
from ..model_json import read_content

PREFIX = "model."
"""Before every native name: the name of the model inside the class that a Hugging Face library loads."""
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
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


def is_one(folder: Path) -> bool:
    """Whether the folder holds a safetensors file."""
    return any(folder.glob("*.safetensors"))


def read(folder: Path) -> tuple[MegalodonConfig, str | None, dict[str, Tensor]]:
    """Configuration, tokenizer and native tensors.

    Raises:
        ValueError: it is another kind of model; a file is missing, broken, or lacks a tensor that the index puts there.
    """
    # The host's last save in safetensors writes no config.json, but its job a model.json.
    has_config = (folder / CONFIG).is_file()
    config, tokenizer = _read_config(folder / CONFIG) if has_config else read_content(folder)
    return config, tokenizer, from_stored(_read_tensors(folder), config.tie_embedding)


def write(
    folder: Path,
    config: MegalodonConfig,
    tokenizer: str | None,
    tensors: Mapping[str, Tensor],
    max_shard_bytes: float,
) -> None:
    """Write config.json, files of at most that many bytes (a larger tensor has one to itself), and last the index."""
    content = {
        "model_type": MODEL_TYPE,
        "architectures": ["MegalodonForCausalLM"],
        "torch_dtype": str(tensors["tok_embeddings.weight"].dtype).removeprefix("torch."),
        "tokenizer": tokenizer,
        **dataclasses.asdict(config),
    }
    write_json(content, folder / CONFIG, indent=2)
    _write_tensors(folder, to_stored(tensors, config.tie_embedding), max_shard_bytes)


def _read_config(path: Path) -> tuple[MegalodonConfig, str | None]:
    content = read_json(path, "model_type")
    if content["model_type"] != MODEL_TYPE:
        raise ValueError(f'`model_type` in {path} must be "{MODEL_TYPE}", but is {content["model_type"]!r}')
    fields = {field.name for field in dataclasses.fields(MegalodonConfig)}
    return config_from({k: v for k, v in content.items() if k in fields}, path), content.get("tokenizer")


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """By stored names."""
    weight_map: dict[str, str] | None = None
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX, "weight_map")["weight_map"]
        files = sorted(set(weight_map.values()))
    else:
        files = sorted(path.name for path in folder.glob("*.safetensors"))
    tensors: dict[str, Tensor] = {}
    for name in files:
        path = folder / name
        if not path.is_file() or path.parent != folder:
            raise ValueError(f"{folder} must hold every file that {INDEX} names, but lacks {name}")
        tensors |= read_tensors(path)[0]
    if weight_map is not None and (lost := sorted(weight_map.keys() - tensors.keys())):
        raise ValueError(f"{folder} must hold every tensor that {INDEX} names, but lacks {', '.join(lost[:5])}")
    return tensors


def _write_tensors(folder: Path, stored: Mapping[str, Tensor], max_shard_bytes: float) -> None:
    # Not `huggingface_hub.save_torch_state_dict`, which does the same for most state dicts: a single file gets neither
    # a number nor an index from it, and of tensors that share storage it drops some or fails.
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
    write_json({"metadata": {"total_size": total}, "weight_map": weight_map}, folder / INDEX, indent=2)
