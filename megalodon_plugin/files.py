"""The one writer of whole files: a reader finds a file or a folder as it was or as it is now, never half-written.

Everything is written under a temporary name in the same folder, brought to the disk and renamed. A write that fails
leaves nothing behind; one that is killed leaves the temporary name, which the next write replaces.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imported where they are used: the command line imports this module before it knows what to do
    import torch
    from matplotlib.figure import Figure
    from torch import Tensor

TEMPORARY = ".unfinished"
"""Ends the name of what is being written."""


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """The temporary path to write to; it becomes `path` when the block ends, and is deleted when the block fails."""
    path = Path(path)
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        yield temporary
        _to_disk(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """`whole_file` for a folder, which is there and empty when the block begins; `path` must not exist."""
    path = Path(path)
    temporary = path.with_name(path.name + TEMPORARY)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for entry in temporary.rglob("*"):
            _to_disk(entry)
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_text(text: str, path: str | Path) -> None:
    """Write a text in UTF-8."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(content: Any, path: str | Path, allow_nan: bool = True, indent: int = 1) -> None:
    """Write JSON.

    Raises:
        ValueError: the content holds a NaN or an infinity without `allow_nan`. Nothing is written.
    """
    write_text(json.dumps(content, indent=indent, allow_nan=allow_nan) + "\n", path)


def write_tensors(tensors: "Mapping[str, Tensor]", path: str | Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file."""
    from safetensors.torch import save_file

    with whole_file(path) as temporary:
        save_file({name: t.detach().contiguous() for name, t in tensors.items()}, temporary, metadata)


def read_tensors(path: str | Path, device: "torch.device | str" = "cpu") -> tuple[dict[str, "Tensor"], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        ValueError: the file is missing or is no whole safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise ValueError(f"the file must exist, but {path} does not")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            # Cloned, for the file's tensors lie wherever its header ends: aligned to a number's size and no more.
            names = file.keys()
            return {name: file.get_tensor(name).clone() for name in names}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} must be a whole safetensors file, but: {error}") from error


def new_figure(width: float, height: float, **options: Any) -> "Figure":
    """A matplotlib figure of that many inches which needs no display and no closing.

    Args:
        options: of `matplotlib.figure.Figure`, such as layout="constrained".
    """
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), **options)


def write_figure(figure: "Figure", path: str | Path, dpi: int = 110) -> None:
    """Write a figure as PNG."""
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=dpi, format="png")


def _to_disk(path: Path) -> None:
    """Wait until the content is on the disk, so that a rename never outlives what it names."""
    if not path.is_file():
        return
    with open(path, "rb") as file:
        os.fsync(file.fileno())
