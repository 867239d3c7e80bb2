"""Checks a job's checkpoints before the host loads one.

The host takes the latest folder with complete metadata, but counts half-written ones among those it keeps, does not
check an explicit step, and reports another model's checkpoint deep inside the loading.
"""

import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torchtitan.tools.logging import logger

from .dataloader import TextLoader

_STEP = re.compile(r"^step-(\d+)$")
# What the host takes for a complete checkpoint: its own format, or safetensors. Both files are written last.
_COMPLETE = (".metadata", "model.safetensors.index.json")


def is_complete(folder: Path) -> bool:
    """Whether the last file that saving writes is there."""
    return any((folder / name).is_file() for name in _COMPLETE)


def remove_incomplete(checkpoint_folder: Path) -> list[Path]:
    """Delete the `step-N` folders that a killed run left half-written; nothing could ever be loaded from them."""
    if not checkpoint_folder.is_dir():
        return []
    steps = sorted(path for path in checkpoint_folder.iterdir() if path.is_dir() and _STEP.match(path.name))
    # Weights as safetensors may have been put there by hand: never deleted, though the host would not load them so.
    broken = [path for path in steps if not is_complete(path) and not any(path.glob("*.safetensors"))]
    for path in broken:
        logger.warning(f"Deleting the half-written checkpoint {path}")
        shutil.rmtree(path)
    if broken and not any(checkpoint_folder.iterdir()):
        checkpoint_folder.rmdir()  # where the folder exists, the host ignores `checkpoint.initial_load_path`
    return broken


def checkpoint_to_load(job_config: Any) -> Path | None:
    """The folder that the host will load for this job, None if it starts from new weights.

    Raises:
        ValueError: `checkpoint.load_step` names a step without a complete checkpoint, or the host would ignore
            `checkpoint.initial_load_path` and start from new weights.
    """
    checkpoint = job_config.checkpoint
    if not checkpoint.enable:
        return None
    folder = Path(job_config.job.dump_folder) / checkpoint.folder
    if not folder.exists():
        return Path(checkpoint.initial_load_path) if checkpoint.initial_load_path else None
    steps = {int(m.group(1)): path for path in folder.iterdir() if (m := _STEP.match(path.name)) and is_complete(path)}
    if checkpoint.load_step != -1:
        if checkpoint.load_step not in steps:
            raise ValueError(
                f"`checkpoint.load_step` must name a complete checkpoint in {folder} (there are "
                f"{sorted(steps) or 'none'}), but is {checkpoint.load_step}"
            )
        return steps[checkpoint.load_step]
    if not steps and checkpoint.initial_load_path:
        raise ValueError(
            f"with `checkpoint.initial_load_path`, {folder} must not exist or must hold a complete checkpoint, but it "
            "holds none: torchtitan would ignore the path and start from new weights. Remove the folder"
        )
    return steps[max(steps)] if steps else None


def loads_model_only(job_config: Any, checkpoint: Path) -> bool:
    """Whether the host takes just the model from the folder that `checkpoint_to_load` names."""
    own_folder = Path(job_config.job.dump_folder) / job_config.checkpoint.folder
    if checkpoint.parent == own_folder:
        return checkpoint.name == "step-0"  # a seed checkpoint
    return job_config.checkpoint.initial_load_model_only


def saved_tensors(checkpoint: Path) -> dict[str, torch.Size] | None:
    """Names and shapes of the tensors in a checkpoint of the host's format; None for another format."""
    if not (checkpoint / ".metadata").is_file():
        return None
    entries = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    return {name: entry.size for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


def check_fits(checkpoint: Path, saved: Mapping[str, torch.Size], model_parts: list[torch.nn.Module]) -> None:
    """Raise ValueError, with both shapes, when the checkpoint belongs to another configuration of the model."""
    for part in model_parts:
        for name, parameter in part.named_parameters():
            name = name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")
            if name not in saved:
                raise ValueError(
                    f"the checkpoint {checkpoint} is of another model configuration: it lacks `{name}` of shape "
                    f"{tuple(parameter.shape)}"
                )
            if saved[name] != parameter.shape:
                raise ValueError(
                    f"the checkpoint {checkpoint} is of another model configuration: `{name}` has shape "
                    f"{tuple(saved[name])} there, but {tuple(parameter.shape)} in this model"
                )
    layers = [int(m.group(1)) for name in saved if (m := re.match(r"layers\.(\d+)\.", name))]
    n_layers = getattr(getattr(model_parts[0], "cfg", None), "n_layers", None)  # the host's models have no such field
    if layers and n_layers is not None and max(layers) + 1 != n_layers:
        raise ValueError(
            f"the checkpoint {checkpoint} is of another model configuration: it has {max(layers) + 1} layers, but "
            f"`n_layers` is {n_layers}"
        )


def check_data(checkpoint: Path, saved: Mapping[str, torch.Size], dataloader: Any) -> None:
    """Raise ValueError when the checkpoint's place in the data is one in other data.

    The loader checks that itself when it is loaded; but other data may have other lanes, and the host would report
    missing names first.
    """
    if "dataloader.fingerprint" not in saved or not isinstance(dataloader, TextLoader):
        return
    wanted = {"dataloader": {"fingerprint": torch.zeros((), dtype=torch.int64)}}
    load_alone(wanted, checkpoint)
    dataloader.check_fingerprint(wanted["dataloader"]["fingerprint"])


def check_same_shapes(checkpoint: Path, saved: Mapping[str, torch.Size], carried: Mapping[str, torch.Tensor]) -> None:
    """Raise ValueError unless the checkpoint holds the states that this job's rows continue from (`carried`)."""
    for name, tensor in carried.items():
        found = saved.get(f"train_state.{name}")
        if found != tensor.shape:
            there = "nothing" if found is None else f"the shape {tuple(found)}"
            raise ValueError(
                f"the checkpoint {checkpoint} must hold the state that the rows of `megalodon.carry_state` continue "
                f"from, `{name}` of shape {tuple(tensor.shape)}, but has {there}: `megalodon.chunk_size` or "
                "`training.mixed_precision_param` have changed. Set them back, or start the data from their beginning "
                'with `checkpoint.exclude_from_loading` = ["dataloader"]'
            )


def load_alone(state_dict: dict[str, Any], checkpoint: Path) -> None:
    """Fill the tensors of `state_dict` from a checkpoint, in this process alone."""
    with warnings.catch_warnings():
        # torch warns that it assumes what `no_dist` says.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        dcp.load(state_dict, checkpoint_id=checkpoint, no_dist=True)
