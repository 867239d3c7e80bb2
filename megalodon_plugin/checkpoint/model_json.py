"""`model.json`: what a reader of a job's checkpoints must know of the model."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from megalodon_plugin.files import write_json
from megalodon_plugin.model import MegalodonConfig

NAME = "model.json"


def write_content(path: Path, config: MegalodonConfig, tokenizer: str | None) -> None:
    """Write the model's configuration and its tokenizer's name, whole or not at all."""
    write_json({"model": dataclasses.asdict(config), "tokenizer": tokenizer}, path, indent=2)


def read_model_json(checkpoint: Path) -> dict[str, Any]:
    """The content of the `model.json` that belongs to a `step-N` folder: in it or in the nearest folder above it.

    Raises:
        ValueError: there is none, or it is broken.
    """
    checkpoint = checkpoint.resolve()
    for folder in [checkpoint, *list(checkpoint.parents)[:4]]:
        if (folder / NAME).is_file():
            return read_json(folder / NAME, "model")
    raise ValueError(f"`{NAME}`, which training writes, must lie in a folder above {checkpoint}, but does not")


def read_json(path: Path, *keys: str) -> dict[str, Any]:
    """The JSON object of a file. ValueError unless it is one and has the keys."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} must hold JSON, but: {error}") from error
    for key in keys:
        if not isinstance(content, dict) or key not in content:
            raise ValueError(f"{path} must be a JSON object with the key `{key}`, but is not")
    return content


def config_from(options: dict[str, Any], path: Path) -> MegalodonConfig:
    """The configuration of a file's options. ValueError, with the file's name, where they are no Megalodon's."""
    try:
        return MegalodonConfig(**options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} must hold the options of a Megalodon, but: {error}") from error
