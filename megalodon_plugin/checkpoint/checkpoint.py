"""A checkpoint in any format: recognised, read, checked, lowered and written."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megalodon_plugin.files import whole_folder
from megalodon_plugin.model import MegalodonConfig

from .expected import check_state_dict, expected_tensors
from .formats import authors, dcp, safetensors
from .tokenizer_files import absolute, copy_tokenizer, tokenizer_of


class Format(Protocol):
    """What the modules of `formats` have in common; what they write differs in its options."""

    def is_one(self, folder: Path) -> bool:
        """Whether the folder is in this format."""

    def read(self, folder: Path) -> tuple[MegalodonConfig, str | None, dict[str, Tensor]]:
        """Configuration, tokenizer as the folder names it, and native tensors. ValueError where they are broken."""


_FORMATS: dict[str, Format] = {"dcp": dcp, "authors": authors, "safetensors": safetensors}
FORMATS = tuple(_FORMATS)
MAX_SHARD_BYTES = 5e9


@dataclass(frozen=True)
class Checkpoint:
    """A model's configuration and weights.

    tokenizer: "byte", or a file or folder; None where the folder neither names nor holds one.
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
        ValueError: the folder is missing, half-written or in no format of `FORMATS`.
    """
    if not folder.is_dir():
        raise ValueError(f"the checkpoint must be a `step-N` folder or one of weights, but {folder} is not a folder")
    for name, module in _FORMATS.items():
        if module.is_one(folder):
            return name
    raise ValueError(
        f"the checkpoint {folder} must be complete and in the format of torchtitan, safetensors or the authors, "
        "but has no .metadata, no *.safetensors and no consolidated*.pth"
    )


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint of any format and check it; only tensors are loaded.

    Raises:
        ValueError: the folder is missing, half-written or in no format of `FORMATS`; holds code; does not fit its
            configuration; or a weight is not finite.
    """
    kind = format_of(folder)
    config, tokenizer, tensors = _FORMATS[kind].read(folder)
    try:
        check_state_dict(tensors, config)
    except ValueError as error:
        raise ValueError(f"the checkpoint {folder} does not fit its own configuration: {error}") from error
    if config.tie_embedding:
        embedding = tensors["tok_embeddings.weight"]
        if not torch.equal(tensors.get("output.weight", embedding), embedding):
            raise ValueError(f"`output.weight` must be the embedding with `tie_embedding`, but is not in {folder}")
        tensors["output.weight"] = embedding
    for name, value in tensors.items():
        if not bool(value.isfinite().all()):
            raise ValueError(f"weights must be finite, but `{name}` in {folder} holds NaN or infinity")
    return Checkpoint(config, tokenizer_of(folder, tokenizer), tensors, kind)


def lowered(checkpoint: Checkpoint, dtype: torch.dtype) -> Checkpoint:
    """The checkpoint with its matrices in `dtype`, and a tied output weight still the embedding.

    CEMA, norms and attention's gamma and beta stay as they are: see `model.precision`.

    Raises:
        ValueError: `dtype` is neither float32 nor bfloat16.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"`dtype` must be float32 or bfloat16, but is {dtype}")
    expected = expected_tensors(checkpoint.config)
    tensors = {n: t.to(dtype) if expected[n].is_matrix else t for n, t in checkpoint.tensors.items()}
    if checkpoint.config.tie_embedding:
        tensors["output.weight"] = tensors["tok_embeddings.weight"]
    return dataclasses.replace(checkpoint, tensors=tensors)


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
    check_target(folder, kind, shards)
    config, tensors = checkpoint.config, checkpoint.tensors
    with whole_folder(folder) as unfinished:
        if kind == "dcp":
            dcp.write(unfinished, config, absolute(checkpoint.tokenizer), tensors)
            return
        tokenizer = copy_tokenizer(checkpoint.tokenizer, unfinished)
        if kind == "authors":
            authors.write(unfinished, config, tokenizer, tensors, shards)
        else:
            safetensors.write(unfinished, config, tokenizer, tensors, max_shard_bytes)


def check_target(folder: Path, kind: str, shards: int = 1) -> None:
    """Raise ValueError where `write_checkpoint` would, whatever the model."""
    if folder.exists():
        raise ValueError(f"`target` must not exist yet, but {folder} does")
    if kind not in FORMATS:
        raise ValueError(f"the format must be one of {FORMATS}, but is {kind!r}")
    if kind != "authors" and shards != 1:
        raise ValueError(f"`--shards` must be 1 except in the authors' format, but is {shards}")


def size_of(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """(parameters, bytes) of a state dict, a shared tensor once."""
    own = {value.data_ptr(): value for value in tensors.values()}.values()
    return sum(value.numel() for value in own), sum(value.nbytes for value in own)
