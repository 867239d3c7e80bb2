"""Files that a reader finds as they were or as they are now, and never half written."""

import json
from pathlib import Path
from typing import Any


def write_text(text: str, path: Path) -> None:
    """Write beside the file, then put it in its place."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(text)
    unfinished.replace(path)


def write_json(report: Any, path: Path, allow_nan: bool = True) -> None:
    """`write_text` of the report as JSON.

    Raises:
        ValueError: the report holds a NaN or an infinity without `allow_nan`. Nothing is written.
    """
    write_text(json.dumps(report, indent=1, allow_nan=allow_nan) + "\n", path)
