"""The options of `megalodon bench parallel`."""

import argparse
from pathlib import Path

from megalodon_plugin.planning.links import Links

from ..sizes import SIZES


def add_parallel(benches: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to those of `megalodon bench`."""
    parser = benches.add_parser(
        "parallel",
        help="check, time and simulate layouts of several GPUs",
        description="Check every layout against one process, then time weak and strong scaling of training steps on "
        "the GPUs of this machine (on gloo without any), and simulate larger layouts. Writes parallel.json and "
        "parallel.png. The status is 1 if a check failed.",
    )
    what = parser.add_argument_group("what is run")
    what.add_argument("--gpus", type=int, help="at most so many (default: all; 2 processes without a GPU)")
    what.add_argument("--layouts", nargs="+", metavar="LAYOUT", help="such as 'cp 8' 'fsdp 2 x cp 4' (default: a list)")
    what.add_argument("--sizes", choices=SIZES, nargs="+", default=["7B-width"], help="models; 7B-width has 4 layers")
    what.add_argument("--against", choices=["llama"], help="also torchtitan's Llama of equal size")
    what.add_argument("--scaling", choices=["weak", "strong", "none"], nargs="+", default=["weak", "strong"])
    what.add_argument(
        "--tokens-per-gpu", type=int, nargs="+", default=[32768], help="weak scaling: of a step, on each GPU (32768)"
    )
    what.add_argument(
        "--lengths", type=int, nargs="+", default=[32768, 131072, 1048576], help="strong scaling: tokens of a row"
    )
    what.add_argument(
        "--tokens-per-step", type=int, default=262144, help="strong scaling: of a step; longer rows come one a step"
    )
    what.add_argument("--no-checks", action="store_true", help="time layouts that were checked before")
    how = parser.add_argument_group("how")
    how.add_argument("--steps", type=int, default=15, help="steps at most; the first three are not counted (15)")
    how.add_argument("--seconds", type=float, default=20.0, help="no more steps after so long, but 3 counted ones (20)")
    how.add_argument("--checkpointing", choices=["selective", "full", "none"], default="selective")
    how.add_argument("--eager", action="store_true", help="without torch.compile")
    how.add_argument("--longest-step", type=float, default=60.0, help="give up what is slower, seconds (60)")
    how.add_argument("--timeout", type=float, default=600.0, help="end what takes longer, seconds (600)")
    simulation = parser.add_argument_group("simulation")
    simulation.add_argument(
        "--simulate", type=int, choices=[2, 8, 64, 256], nargs="+", help="numbers of GPUs, 8 a node"
    )
    links = Links()
    simulation.add_argument("--node-gb-s", type=float, default=links.node_gb_s, help="inside a node, GB/s (450)")
    simulation.add_argument("--network-gb-s", type=float, default=links.network_gb_s, help="between nodes, GB/s (50)")
    simulation.add_argument("--latency-us", type=float, default=links.latency_us, help="of a message, µs (10)")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench"), help="folder of the results (outputs/bench)")
    parser.add_argument("--commit", help="the commit to name in the results, where git cannot tell")
