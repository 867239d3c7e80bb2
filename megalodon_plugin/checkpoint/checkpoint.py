"""A checkpoint in any format: found out, read, checked and written."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megalodon_plugin.files import whole_folder
from megalodon_plugin.model import Megalodon, MegalodonConfig

from .formats.authors import check_expressible, is_authors, read_authors, write_authors
from .formats.authors_names import check_state_dict
from .formats.dcp import is_dcp, read_dcp, tensor_names, write_dcp
from .formats.safetensors import from_stored, read_config, read_safetensors, to_stored, write_config, write_safetensors
from .model_json import NAME, config_from, read_model_json, write_content

FORMATS = ("dcp", "safetensors", "authors")
MAX_SHARD_BYTES = 5e9
BYTE_TOKENIZER = "byte"
_TOKENIZER_PATTERNS = ("tokenizer.json", "*.tiktoken", "*.model")


@dataclass(frozen=True)
class Checkpoint:
    """A model's configuration and weights.

    tokenizer: "byte", or a file or folder; None where the source does not tell.
    tensors: by native names, on the CPU; a tied output weight under both of its names.
    format: one of `FORMATS`.
    """

    config: MegalodonConfig
    tokenizer: str | None
    tensors: dict[str, Tensor]
    format: str


def format_of(folder: Path) -> str:
    """One of `FORMATS`.

    Raises:
        ValueError: the folder is missing, half-written or of no known format.
    """
    if not folder.is_dir():
        raise ValueError(f"the checkpoint must be a `step-N` folder or one of weights, but {folder} is none")
    if is_dcp(folder):
        return "dcp"
    if is_authors(folder):
        return "authors"
    if any(folder.glob("*.safetensors")):
        return "safetensors"
    raise ValueError(
        f"the checkpoint {folder} must be complete and in the host's format, in safetensors or in the authors' format, "
        "but has no .metadata, no *.safetensors and no consolidated*.pth"
    )


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint of any format and check it; only tensors are loaded.

    Raises:
        ValueError: the folder is missing, half-written or of no known format; holds code; does not fit its
            configuration; or a weight is not finite.
    """
    kind = format_of(folder)
    if kind == "authors":
        config, tokenizer, tensors = read_authors(folder)
    elif kind == "safetensors":
        config, tokenizer = _safetensors_config(folder)
        tensors = from_stored(read_safetensors(folder), config.tie_embedding)
    else:
        config, tokenizer = _config_above(folder)
        tensors = _read_model_of(folder, config)
    try:
        check_state_dict(tensors, config)
    except ValueError as error:
        raise ValueError(f"the checkpoint {folder} is one of another configuration: {error}") from error
    if config.tie_embedding:
        if not torch.equal(tensors["tok_embeddings.weight"], tensors["output.weight"]):
            raise ValueError(f"`output.weight` must be the embedding with `tie_embedding`, but is not in {folder}")
        tensors["output.weight"] = tensors["tok_embeddings.weight"]
    for name, value in tensors.items():
        if not bool(value.isfinite().all()):
            raise ValueError(f"weights must be finite, but `{name}` in {folder} holds NaN or infinity")
    return Checkpoint(config, _tokenizer_in(folder, tokenizer), tensors, kind)


def write_checkpoint(
    folder: Path, checkpoint: Checkpoint, kind: str, shards: int = 1, max_shard_bytes: float = MAX_SHARD_BYTES
) -> None:
    """Write a checkpoint, whole or not at all. Its own `format` does not matter.

    Args:
        folder: must not exist.
        kind: one of `FORMATS`.
        shards: model-parallel shards of the authors' format.
        max_shard_bytes: size of a safetensors file.

    Raises:
        ValueError: the folder exists, or the format cannot hold this model.
    """
    check_target(folder, checkpoint.config, kind, shards)
    config, tensors, tokenizer = checkpoint.config, checkpoint.tensors, checkpoint.tokenizer
    with whole_folder(folder) as unfinished:
        if kind != "dcp":
            tokenizer = _copy_tokenizer(tokenizer, unfinished)
        elif tokenizer not in (None, BYTE_TOKENIZER):
            tokenizer = str(Path(tokenizer).resolve())  # type: ignore[arg-type]
        if kind == "authors":
            write_authors(unfinished, config, tokenizer, tensors, shards)
        elif kind == "safetensors":
            dtype = tensors["tok_embeddings.weight"].dtype
            write_config(unfinished, config, tokenizer, dtype)
            write_safetensors(unfinished, to_stored(tensors, config.tie_embedding), max_shard_bytes)
        else:
            write_dcp(unfinished, tensors)
            write_content(unfinished / NAME, config, tokenizer)


def check_target(folder: Path, config: MegalodonConfig, kind: str, shards: int = 1) -> None:
    """Raise ValueError where `write_checkpoint` would; cheap."""
    if folder.exists():
        raise ValueError(f"the target must not exist yet, but {folder} does")
    if kind not in FORMATS:
        raise ValueError(f"the format must be one of {FORMATS}, but is {kind!r}")
    if kind == "authors":
        check_expressible(config, shards)
    elif shards != 1:
        raise ValueError(f"`--shards` must be 1 except in the authors' format, but is {shards}")


def _safetensors_config(folder: Path) -> tuple[MegalodonConfig, str | None]:
    # The host's last save in safetensors writes no config.json, but its job a model.json.
    return read_config(folder) if (folder / "config.json").is_file() else _config_above(folder)


def _config_above(folder: Path) -> tuple[MegalodonConfig, str | None]:
    content = read_model_json(folder)
    return config_from(content["model"], folder / NAME), content.get("tokenizer")


def _read_model_of(folder: Path, config: MegalodonConfig) -> dict[str, Tensor]:
    with torch.device("meta"):
        expected = Megalodon(config).state_dict().keys()
    layers = {
        name for name in tensor_names(folder) if name.startswith(("layers.", "tok_embeddings.", "norm.", "output."))
    }
    return read_dcp(folder, set(expected) | layers)


def _tokenizer_in(folder: Path, named: str | None) -> str | None:
    """The named tokenizer, relative to the folder where it lies there; without a name the one in the folder."""
    if named is None:
        return str(folder) if any(list(folder.glob(pattern)) for pattern in _TOKENIZER_PATTERNS) else None
    inside = folder / named
    return str(inside) if named != BYTE_TOKENIZER and inside.exists() else named


def _copy_tokenizer(tokenizer: str | None, folder: Path) -> str | None:
    """Copy tokenizer files into the folder; the name there."""
    if tokenizer in (None, BYTE_TOKENIZER):
        return tokenizer
    path = Path(tokenizer)  # type: ignore[arg-type]
    if path.is_file():
        shutil.copyfile(path, folder / path.name)
        return path.name
    if path.is_dir():
        for pattern in (*_TOKENIZER_PATTERNS, "tokenizer_config.json", "special_tokens_map.json"):
            for file in path.glob(pattern):
                shutil.copyfile(file, folder / file.name)
        return None  # found by looking
    return tokenizer


def size_of(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """(parameters, bytes) of a state dict, a shared tensor once."""
    own = {value.data_ptr(): value for value in tensors.values()}.values()
    return sum(value.numel() for value in own), sum(value.nbytes for value in own)
