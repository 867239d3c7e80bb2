"""`model.json` in a job's dump folder: what a reader of its checkpoints must know of the model."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from torchtitan.tools.logging import logger

NAME = "model.json"


def write_model_json(job_config: Any, model_args: Any) -> None:
    """Write the model's configuration and its tokenizer's name, whole or not at all; tell what has changed since."""
    path = Path(job_config.job.dump_folder) / NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"model": dataclasses.asdict(model_args.config), "tokenizer": job_config.model.hf_assets_path}
    if path.is_file():
        old = json.loads(path.read_text())["model"]
        changes = [f"`{k}` {old.get(k)!r} -> {v!r}" for k, v in content["model"].items() if old.get(k) != v]
        if changes:
            logger.warning(f"The model's options differ from those that {path} had: {', '.join(changes)}")
    unfinished = path.with_name(NAME + ".unfinished")
    unfinished.write_text(json.dumps(content, indent=2) + "\n")
    unfinished.replace(path)


def read_model_json(checkpoint: Path) -> dict[str, Any]:
    """The content of the `model.json` that belongs to a `step-N` folder: in the nearest folder above it.

    Raises:
        ValueError: there is none.
    """
    folders = list(checkpoint.resolve().parents)[:4]
    for folder in folders:
        if (folder / NAME).is_file():
            return json.loads((folder / NAME).read_text())
    raise ValueError(f"`{NAME}`, which training writes, must lie in a folder above {checkpoint}, but does not")
