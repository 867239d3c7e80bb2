"""The console command `megalodon`."""

import argparse
import os
import sys
from pathlib import Path

from .bench import add_bench, run_bench
from .options import add_convert, add_evaluate, add_generate
from .plan import add_plan, run_plan


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and call the command."""
    parser = argparse.ArgumentParser(prog="megalodon", description="Train and use Megalodon models under torchtitan.")
    commands = parser.add_subparsers(dest="command", required=True)

    train = commands.add_parser(
        "train",
        help="train from a TOML file (starts torchrun)",
        description="Train from a TOML file. Further options are torchtitan's, such as --training.steps 100.",
    )
    train.add_argument("config", type=Path, help="the TOML file")
    train.add_argument("--nproc", type=int, default=1, help="processes on this machine, one a device (default 1)")

    add_generate(commands)
    add_evaluate(commands)
    add_convert(commands)

    plot = commands.add_parser("plot", help="draw the losses of a run")
    plot.add_argument("run", type=Path, help="the job's dump folder")

    add_bench(commands)
    add_plan(commands)

    known, rest = parser.parse_known_args(arguments)
    if known.command not in ("train", "plan") and rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        if known.command == "train":
            start_training(known.config, known.nproc, rest)
        elif known.command == "generate":
            from .generate import run_generate

            run_generate(known)
        elif known.command == "evaluate":
            from .evaluate import run_evaluate

            run_evaluate(known)
        elif known.command == "convert":
            from .convert import run_convert

            run_convert(known)
        elif known.command == "bench":
            if status := run_bench(known):
                sys.exit(status)
        elif known.command == "plan":
            sys.exit(run_plan(known, rest))
        else:
            from .plot import plot_run

            print(plot_run(known.run))
    except ValueError as error:
        if known.command == "plan":  # whose status 1 says that no layout fits
            parser.exit(2, f"megalodon plan: {error}\n")
        sys.exit(f"megalodon {known.command}: {error}")


def start_training(config: Path, nproc: int, options: list[str]) -> None:
    """Replace this process by torchrun on the plugin's entry."""
    command = training_command(config, nproc, options)
    os.execv(command[0], command)


def training_command(config: Path, nproc: int, options: list[str]) -> list[str]:
    """The command line that trains.

    Raises:
        ValueError: the file does not exist, or the number of processes is not positive.
    """
    if not config.is_file():
        raise ValueError(f"the configuration file must come first and exist, but {str(config)!r} is no file")
    if nproc < 1:
        raise ValueError(f"`--nproc` must be at least 1, but is {nproc}")
    torchrun = ["--standalone", "--nproc_per_node", str(nproc)]
    if nproc > 1:
        # As torchtitan's own script does: every rank logs, one or those that LOG_RANK names are shown.
        torchrun += ["--local-ranks-filter", os.environ.get("LOG_RANK", "0"), "--role", "rank", "--tee", "3"]
    job = ["-m", "megalodon_plugin.cli.train", "--job.config_file", str(config)]
    return [sys.executable, "-m", "torch.distributed.run", *torchrun, *job, *options]


if __name__ == "__main__":
    main()
