"""`megalodon train`: torchrun on the plugin's own entry, `megalodon_plugin.cli.train`."""

import argparse
import os
import sys
from pathlib import Path


def add_train(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to those of the console."""
    train = commands.add_parser(
        "train",
        help="train from a TOML file (starts torchrun)",
        description="Train from a TOML file. Further options are torchtitan's, such as --training.steps 100.",
    )
    train.add_argument("config", type=Path, help="the TOML file")
    train.add_argument("--nproc", type=int, default=1, help="processes on this machine, one per device (default 1)")
    train.set_defaults(run=run_train, takes_host_options=True)


def run_train(options: argparse.Namespace) -> None:
    """Replace this process by torchrun."""
    command = training_command(options.config, options.nproc, options.host_options)
    os.execv(command[0], command)


def training_command(config: Path, nproc: int, options: list[str]) -> list[str]:
    """The command line that trains.

    Raises:
        ValueError: the file does not exist, or the number of processes is not positive.
    """
    if not config.is_file():
        raise ValueError(f"the first argument must be a configuration file, but {str(config)!r} is not a file")
    if nproc < 1:
        raise ValueError(f"`--nproc` must be at least 1, but is {nproc}")
    torchrun = ["--standalone", "--nproc_per_node", str(nproc)]
    if nproc > 1:
        # As torchtitan's own script does: every rank logs, one or those that LOG_RANK names are shown.
        torchrun += ["--local-ranks-filter", os.environ.get("LOG_RANK", "0"), "--role", "rank", "--tee", "3"]
    job = ["-m", "megalodon_plugin.cli.train", "--job.config_file", str(config)]
    return [sys.executable, "-m", "torch.distributed.run", *torchrun, *job, *options]
