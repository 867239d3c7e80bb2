"""Options that several commands share. What a command runs is imported when it runs, because it imports torch."""

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from megalodon_plugin.data.tokenizer import Tokenizer
    from megalodon_plugin.model import Megalodon
Options = TypeVar("Options", bound="DataclassInstance")


def options_of(kind: type[Options], parsed: argparse.Namespace) -> Options:
    """The dataclass `kind` from the parsed options with its fields' names."""
    return kind(**{field.name: getattr(parsed, field.name) for field in dataclasses.fields(kind)})


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Options of every command that runs a checkpoint."""
    parser.add_argument(
        "checkpoint", type=Path, help="a step-N folder of a run, or a folder of safetensors or of the authors' release"
    )
    parser.add_argument("--tokenizer", help='"byte", a tokenizer file or a folder; by default the checkpoint\'s')
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="dtype of the weight matrices (default bfloat16 on a GPU, else float32)",
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: the GPU if there is one)")


def load_model(options: argparse.Namespace) -> "tuple[Megalodon, Tokenizer]":
    """Model and tokenizer that the options of `add_model_options` name.

    Raises:
        ValueError: see `titan.load_model.load_checkpoint`; or the device does not exist.
    """
    import torch

    from megalodon_plugin.model.precision import DTYPES
    from megalodon_plugin.titan.load_model import load_checkpoint

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.split(":")[0] not in ("cpu", "cuda") or (device != "cpu" and not torch.cuda.is_available()):
        raise ValueError(f"`--device` must be cpu, or cuda where there is a GPU, but is {device!r}")
    dtype = options.dtype or ("float32" if device == "cpu" else "bfloat16")
    return load_checkpoint(options.checkpoint, device, DTYPES[dtype], options.tokenizer)
