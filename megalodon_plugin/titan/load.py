"""Loads a model that training wrote, without a process group: for generation and evaluation."""

from pathlib import Path
from typing import Any

import torch

from megalodon_plugin.model import Megalodon, MegalodonConfig

from .checkpoint_guard import check_fits, is_complete, load_alone, saved_tensors
from .model_json import read_model_json
from .tokenizer import load_tokenizer


def load_checkpoint(checkpoint: Path, device: torch.device | str = "cpu") -> tuple[Megalodon, Any]:
    """The model, in eval mode, and the tokenizer of a `step-N` folder.

    `model.json` in the job's dump folder tells the configuration.

    Raises:
        ValueError: the folder is missing, half-written or of another configuration, or `model.json` is missing.
    """
    if not checkpoint.is_dir():
        raise ValueError(f"the checkpoint must be a `step-N` folder, but {checkpoint} is none")
    saved = saved_tensors(checkpoint) if is_complete(checkpoint) else None
    if saved is None:
        raise ValueError(f"the checkpoint {checkpoint} must be complete and in the host's format, but has no .metadata")
    content = read_model_json(checkpoint)
    with torch.device("meta"):
        model = Megalodon(MegalodonConfig(**content["model"]))
    check_fits(checkpoint, saved, [model])
    model.to_empty(device=device)
    model.init_weights()  # ties the weights; every value is overwritten
    state_dict = model.state_dict()
    load_alone(state_dict, checkpoint)
    model.load_state_dict(state_dict)
    return model.eval(), load_tokenizer(content["tokenizer"])
