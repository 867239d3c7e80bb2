"""The JSON files of a checkpoint's folder, in any format."""

import json
from pathlib import Path
from typing import Any

from megalodon_plugin.model import MegalodonConfig


def read_json(path: Path, *keys: str) -> dict[str, Any]:
    """The JSON object of a file.

    Raises:
        ValueError: the file holds something else, or lacks one of the keys.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} must hold JSON, but: {error}") from error
    for key in keys:
        if not isinstance(content, dict) or key not in content:
            raise ValueError(f"{path} must be a JSON object with the key `{key}`, but is not")
    return content


def config_from(options: dict[str, Any], path: Path) -> MegalodonConfig:
    """The configuration of the options that the file `path` holds.

    Raises:
        ValueError: they are not a Megalodon's; the message names the file.
    """
    try:
        return MegalodonConfig(**options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} must hold the options of a Megalodon, but: {error}") from error
