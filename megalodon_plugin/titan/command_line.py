"""The host's command line: read the job that it describes, or train it."""

import sys
from typing import Any

import torchtitan.train
from torchtitan.config import ConfigManager

from .host_patches import no_warning_of_tokenizer_names
from .trainer import MegalodonTrainer


def read_job(arguments: list[str] | None = None) -> Any:
    """The job's configuration from the host's command line (by default this process's), TOML file included."""
    with no_warning_of_tokenizer_names():
        return ConfigManager().parse_args(sys.argv[1:] if arguments is None else arguments)


def train() -> None:
    """Train as this process's command line says, with the plugin's Trainer."""
    with no_warning_of_tokenizer_names():  # the host reads the command line itself
        torchtitan.train.main(MegalodonTrainer)
