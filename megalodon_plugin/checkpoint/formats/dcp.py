"""Folders of torch.distributed.checkpoint (DCP), the format in which torchtitan saves; without a process group."""

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from megalodon_plugin.model import MegalodonConfig

from ..model_json import NAME, read_content, write_content

_OF_THE_MODEL = ("layers.", "tok_embeddings.", "norm.", "output.")
"""How the names of the model's tensors begin."""
_NO_GROUP = "torch.distributed is disabled, unavailable or uninitialized"

# What a DCP index is made of. It is a pickle, and a pickle may name any function of any module.
_INDEX_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
_INDEX_NAMES = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
}
_INDEX_CLASSES = {
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "Metadata",
    "MetadataIndex",
    "StorageMeta",
    "TensorProperties",
    "TensorStorageMetadata",
    "_MEM_FORMAT_ENCODING",
    "_StorageInfo",
}


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        own = module in _INDEX_MODULES and name in _INDEX_CLASSES
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if own or is_dtype or (module, name) in _INDEX_NAMES:
            return super().find_class(module, name)
        raise ValueError(f"the index names {module}.{name}, which is no part of a checkpoint: it may contain code")


class TensorReader(FileSystemReader):
    """Reads the index of a checkpoint without running what a pickle may hold."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / ".metadata"
        try:
            with open(path, "rb") as file:
                metadata = _IndexUnpickler(file).load()
        except (OSError, EOFError, AttributeError, IndexError, KeyError, ValueError, pickle.UnpicklingError) as error:
            raise ValueError(f"{path} must be the index of a checkpoint, but: {error}") from error
        if not isinstance(metadata, Metadata):
            raise ValueError(f"{path} must be the index of a checkpoint, but is a {type(metadata).__name__}")
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        assert metadata.storage_meta is not None
        metadata.storage_meta.load_id = self.load_id
        return metadata


def is_one(folder: Path) -> bool:
    """Whether the last file that saving writes is there."""
    return (folder / ".metadata").is_file()


def read(folder: Path) -> tuple[MegalodonConfig, str | None, dict[str, Tensor]]:
    """Configuration, tokenizer and the model's tensors; nothing else of the folder is read, such as an optimizer's.

    Raises:
        ValueError: the index is broken or holds code, a file is missing or too short, or there is no model.json.
    """
    config, tokenizer = read_content(folder)
    reader = TensorReader(folder)
    tensors: dict[str, Tensor] = {}
    for name, entry in reader.read_metadata().state_dict_metadata.items():
        if name.startswith(_OF_THE_MODEL) and isinstance(entry, TensorStorageMetadata):
            tensors[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
    try:
        with warnings.catch_warnings():
            # torch warns that it assumes what `no_dist` says.
            warnings.filterwarnings("ignore", message=_NO_GROUP)
            dcp.load(dict(tensors), storage_reader=reader, no_dist=True)
    except CheckpointException as error:  # no Exception: it holds those of all ranks
        reason = "; ".join(f"{type(cause).__name__} {cause}" for cause, _ in error.failures.values())
        raise ValueError(f"the checkpoint {folder} must be complete and readable, but: {reason}") from error
    return config, tokenizer, tensors


def write(folder: Path, config: MegalodonConfig, tokenizer: str | None, tensors: Mapping[str, Tensor]) -> None:
    """Write the model alone, which the host takes for `checkpoint.initial_load_path`, and its model.json."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=_NO_GROUP)
        dcp.save(dict(tensors), checkpoint_id=folder, no_dist=True)
    write_content(folder / NAME, config, tokenizer)
