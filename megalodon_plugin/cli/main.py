"""The console command `megalodon`."""

import argparse
import sys

from .bench import add_bench
from .convert import add_convert
from .evaluate import add_evaluate
from .generate import add_generate
from .plan import add_plan
from .plot import add_plot
from .torchrun import add_train

COMMANDS = (add_train, add_generate, add_evaluate, add_convert, add_plot, add_bench, add_plan)
"""Each adds its parser, whose default `run` carries the command out and returns the exit status (None is 0).

Two more defaults may be set: `takes_host_options`, then torchtitan's options are left to the command as
`options.host_options`; `error_status`, that of a wrong option or input."""


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and call the command."""
    parser = argparse.ArgumentParser(prog="megalodon", description="Train and use Megalodon models under torchtitan.")
    parser.set_defaults(takes_host_options=False, error_status=1)
    commands = parser.add_subparsers(dest="command", required=True)
    for add_command in COMMANDS:
        add_command(commands)
    options, rest = parser.parse_known_args(arguments)
    if rest and not options.takes_host_options:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.host_options = rest
    try:
        status = options.run(options)
    except ValueError as error:
        message = f"megalodon {options.command}: {error}"
        if options.error_status == 1:
            sys.exit(message)
        parser.exit(options.error_status, message + "\n")
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()
