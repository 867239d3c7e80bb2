"""Folders of torch.distributed.checkpoint (DCP), the format in which torchtitan saves; without a process group."""

import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

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
        raise ValueError(f"the index names {module}.{name}, which no index of a checkpoint does: it may hold code")


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


def is_dcp(folder: Path) -> bool:
    """Whether the last file that saving writes is there."""
    return (folder / ".metadata").is_file()


def read_dcp(folder: Path, names: set[str]) -> dict[str, Tensor]:
    """The tensors of these names, in memory; nothing else of the folder is read.

    Raises:
        ValueError: the index is broken or holds code, or a file is missing or too short.
    """
    reader = TensorReader(folder)
    entries = reader.read_metadata().state_dict_metadata
    state_dict: dict[str, Tensor] = {}
    for name, entry in entries.items():
        if name in names and isinstance(entry, TensorStorageMetadata):
            state_dict[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
    try:
        with warnings.catch_warnings():
            # torch warns that it assumes what `no_dist` says.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
            dcp.load(dict(state_dict), storage_reader=reader, no_dist=True)
    except CheckpointException as error:  # no Exception: it holds those of all ranks
        reason = "; ".join(f"{type(cause).__name__} {cause}" for cause, _ in error.failures.values())
        raise ValueError(f"the checkpoint {folder} must be whole, but: {reason}") from error
    return state_dict


def tensor_names(folder: Path) -> set[str]:
    """Names of the tensors in the folder, those of the optimizer too."""
    entries = TensorReader(folder).read_metadata().state_dict_metadata
    return {name for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


def write_dcp(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write a folder that the host takes for `checkpoint.initial_load_path`: the model alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        dcp.save(tensors, checkpoint_id=folder, no_dist=True)
