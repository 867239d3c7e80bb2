"""Training writes `model.json` into its dump folder, for whoever reads the checkpoints."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from torchtitan.tools.logging import logger

from megalodon_plugin.checkpoint.model_json import NAME, write_content


def write_model_json(job_config: Any, model_args: Any) -> None:
    """Write the model's configuration and its tokenizer's name; log what has changed since."""
    path = Path(job_config.job.dump_folder) / NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file():
        old, new = json.loads(path.read_text())["model"], dataclasses.asdict(model_args.config)
        changes = [f"`{k}` {old.get(k)!r} -> {v!r}" for k, v in new.items() if old.get(k) != v]
        if changes:
            logger.warning(f"The model's options differ from those in {path}, which is replaced: {', '.join(changes)}")
    write_content(path, model_args.config, job_config.model.hf_assets_path)
