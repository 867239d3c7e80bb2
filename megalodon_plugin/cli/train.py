"""The plugin's own entry to torchtitan, one process a device:

    python -m torch.distributed.run --nproc_per_node N -m megalodon_plugin.cli.train --job.config_file CONFIG.toml

The same options as `-m torchtitan.train`. It also runs on machines without a GPU and carries what needs a Trainer of
the plugin's.
"""

from megalodon_plugin.titan import command_line


def main() -> None:
    """Train as the TOML file and the command line say."""
    command_line.train()


if __name__ == "__main__":
    main()
