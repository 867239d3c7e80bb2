"""`model.json`: what a reader of a job's checkpoints must know of the model."""

import dataclasses
from pathlib import Path

from megalodon_plugin.files import write_json
from megalodon_plugin.model import MegalodonConfig

from .json_file import config_from, read_json

NAME = "model.json"


def write_content(path: Path, config: MegalodonConfig, tokenizer: str | None) -> None:
    """Write the model's configuration and its tokenizer's name, whole or not at all."""
    write_json({"model": dataclasses.asdict(config), "tokenizer": tokenizer}, path, indent=2)


def read_content(checkpoint: Path) -> tuple[MegalodonConfig, str | None]:
    """Configuration and tokenizer of a `step-N` folder, from the `model.json` in it or in the nearest folder above it.

    Raises:
        ValueError: there is no such file, or it is broken.
    """
    checkpoint = checkpoint.resolve()
    for folder in [checkpoint, *list(checkpoint.parents)[:4]]:
        path = folder / NAME
        if path.is_file():
            content = read_json(path, "model")
            return config_from(content["model"], path), content.get("tokenizer")
    raise ValueError(f"`{NAME}`, which training writes, must lie in a folder above {checkpoint}, but does not")
