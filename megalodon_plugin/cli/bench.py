"""`megalodon bench`: measurements on the GPUs of this machine.

`bench ops` checks every implementation against float64 and refuses to time what is wrong, measures the rates of a copy
and of a matrix product in the same run, times the shapes, and writes ops.json and ops.png. `bench plot` draws ops.png
again from ops.json. `bench generate` reads prompts and decodes; `bench train` runs whole training steps, beside those
of the host's Llama; `bench parallel` does so under layouts of several GPUs.
"""

import argparse
from pathlib import Path

from megalodon_plugin.bench.ops import OPS
from megalodon_plugin.bench.sizes import SIZES
from megalodon_plugin.planning.links import Links

from .options import options_of


def add_bench(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to those of the console."""
    bench = commands.add_parser("bench", help="measure ops, training steps, layouts and generation")
    bench.set_defaults(run=run_bench)
    benches = bench.add_subparsers(dest="bench", required=True)
    ops = benches.add_parser(
        "ops",
        help="check and time CEMA and TimestepNorm",
        description="Check CEMA and TimestepNorm against float64, then time them beside implementations in plain "
        "torch. Needs a CUDA GPU. Writes ops.json and ops.png.",
    )
    ops.add_argument("--only", choices=OPS, help="only this op")
    ops.add_argument("--quick", action="store_true", help="only the kernels, fewer lengths, shorter measurements")
    ops.add_argument(
        "--shapes",
        type=parse_shape,
        nargs="+",
        metavar="BxLxD",
        help="only these shapes, without the sweep over lengths",
    )
    ops.add_argument("--layer", action="store_true", help="also a whole layer of the paper's 7B model")
    ops.add_argument("--profile", action="store_true", help="also print the time of each GPU kernel")
    ops.add_argument(
        "--accuracy-only", action="store_true", help="check accuracy and write accuracy.json, without timing"
    )
    ops.add_argument("--golden", type=Path, help="also check against the golden vectors in this folder")
    _add_results(ops)
    _add_generate(benches)
    _add_train(benches)
    _add_parallel(benches)
    plot = benches.add_parser("plot", help="draw ops.png from ops.json")
    plot.add_argument("folder", type=Path, help="the folder that holds ops.json")


def _add_generate(benches: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to those of `megalodon bench`."""
    parser = benches.add_parser(
        "generate",
        help="measure reading of long prompts and decoding",
        description="Measure tokens per second and memory while prompts are read and while tokens are decoded after "
        "them. Writes generate.json and generate.png.",
    )
    parser.add_argument("--flavor", default="released_200M", help="the preset to measure (default released_200M)")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[8192, 65536, 524288, 1048576], help="tokens of the prompts"
    )
    parser.add_argument(
        "--batches",
        type=int,
        nargs="+",
        default=[1, 8, 64],
        help="rows that are decoded together, for each measurement",
    )
    parser.add_argument("--steps", type=int, default=256, help="tokens to decode in each row (default 256)")
    parser.add_argument("--against", choices=["llama"], help="also measure torchtitan's Llama of the same size")
    _add_results(parser)


def _add_train(benches: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to those of `megalodon bench`."""
    parser = benches.add_parser(
        "train",
        help="measure training steps",
        description="Measure tokens per second, memory and MFU of training steps in torchtitan. Writes train.json and "
        "train.png.",
    )
    parser.add_argument(
        "--sizes",
        choices=SIZES,
        nargs="+",
        default=["200M"],
        help="models (default 200M); 7B-width: 4 layers as wide as 7B's",
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 32768], help="tokens per row")
    parser.add_argument(
        "--tokens", type=int, default=32768, help="tokens per step (default 32768); a longer row is a step by itself"
    )
    parser.add_argument("--against", choices=["llama"], help="also measure torchtitan's Llama of the same size")
    parser.add_argument(
        "--steps", type=int, default=10, help="steps, of which the first 3 are not counted (default 10)"
    )
    parser.add_argument("--checkpointing", choices=["selective", "full", "none"], default="selective")
    parser.add_argument("--eager", action="store_true", help="run without torch.compile")
    parser.add_argument("--profile", action="store_true", help="also measure the time of a step by kind of GPU kernel")
    parser.add_argument(
        "--longest-step", type=float, default=30.0, help="skip jobs whose steps take more seconds (default 30)"
    )
    _add_results(parser)


def _add_parallel(benches: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to those of `megalodon bench`."""
    parser = benches.add_parser(
        "parallel",
        help="check, time and simulate layouts of several GPUs",
        description="Check every layout against one process, then time weak and strong scaling of training steps on "
        "the GPUs of this machine (without any, on its CPU), and simulate larger layouts. Writes parallel.json and "
        "parallel.png. The status is 1 if a check failed.",
    )
    what = parser.add_argument_group("what to measure")
    what.add_argument("--gpus", type=int, help="use at most this many (default all; without a GPU 2 processes)")
    what.add_argument(
        "--layouts", nargs="+", metavar="LAYOUT", help="such as 'cp 8' 'fsdp 2 x cp 4' (default: those of each degree)"
    )
    what.add_argument(
        "--sizes",
        choices=SIZES,
        nargs="+",
        default=["7B-width"],
        help="models (default 7B-width: 4 layers as wide as 7B's)",
    )
    what.add_argument("--against", choices=["llama"], help="also measure torchtitan's Llama of the same size")
    what.add_argument("--scaling", choices=["weak", "strong", "none"], nargs="+", default=["weak", "strong"])
    what.add_argument(
        "--tokens-per-gpu",
        type=int,
        nargs="+",
        default=[32768],
        help="weak scaling: tokens of a step per GPU (default 32768)",
    )
    what.add_argument(
        "--lengths", type=int, nargs="+", default=[32768, 131072, 1048576], help="strong scaling: tokens per row"
    )
    what.add_argument(
        "--tokens-per-step",
        type=int,
        default=262144,
        help="strong scaling: tokens per step; a longer row is a step by itself",
    )
    what.add_argument("--no-checks", action="store_true", help="skip the comparison of each layout with one process")
    how = parser.add_argument_group("how to measure it")
    how.add_argument(
        "--steps",
        type=int,
        default=15,
        help="at most this many steps, of which the first 3 are not counted (default 15)",
    )
    how.add_argument(
        "--seconds", type=float, default=20.0, help="stop after so many seconds and 3 counted steps (default 20)"
    )
    how.add_argument("--checkpointing", choices=["selective", "full", "none"], default="selective")
    how.add_argument("--eager", action="store_true", help="run without torch.compile")
    how.add_argument(
        "--longest-step", type=float, default=60.0, help="skip jobs whose steps take more seconds (default 60)"
    )
    how.add_argument("--timeout", type=float, default=600.0, help="stop a job after this many seconds (default 600)")
    simulation = parser.add_argument_group("simulation")
    simulation.add_argument(
        "--simulate",
        type=int,
        choices=[2, 8, 64, 256],
        nargs="+",
        help="also estimate steps on this many GPUs, 8 per node",
    )
    links = Links()
    simulation.add_argument(
        "--node-gb-s", type=float, default=links.node_gb_s, help="speed inside a node, GB/s (default 450)"
    )
    simulation.add_argument(
        "--network-gb-s", type=float, default=links.network_gb_s, help="speed between nodes, GB/s (default 50)"
    )
    simulation.add_argument(
        "--latency-us", type=float, default=links.latency_us, help="latency of a message, µs (default 10)"
    )
    _add_results(parser)


def _add_results(parser: argparse.ArgumentParser) -> None:
    """Options of every benchmark that writes results."""
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/bench"), help="folder for the results (default outputs/bench)"
    )
    parser.add_argument(
        "--commit", help="commit id to record in the results (default: what git says about this folder)"
    )


def parse_shape(text: str) -> tuple[int, int, int]:
    """ "8x4096x1024" -> (8, 4096, 1024).

    Raises:
        argparse.ArgumentTypeError: it is not three positive numbers.
    """
    numbers = [int(part) if part.isascii() and part.isdigit() else 0 for part in text.split("x")]
    if len(numbers) != 3 or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"a shape must be three positive numbers, as in 8x4096x1024, but is {text!r}")
    return numbers[0], numbers[1], numbers[2]


def run_bench(options: argparse.Namespace) -> int:
    """Run the command that was parsed; the exit status.

    Raises:
        ValueError: there is no CUDA GPU, or a folder lacks what it must hold.
        SystemExit: an implementation is wrong.
    """
    if options.bench == "generate":
        from megalodon_plugin.bench.generate import GenerateOptions, run_bench_generate

        run_bench_generate(options_of(GenerateOptions, options))
        return 0
    if options.bench == "train":
        from megalodon_plugin.bench.train.run import TrainOptions, run_bench_train

        run_bench_train(options_of(TrainOptions, options))
        return 0
    if options.bench == "parallel":
        from megalodon_plugin.bench.parallel.options import ParallelOptions
        from megalodon_plugin.bench.parallel.run import run_bench_parallel

        return run_bench_parallel(options_of(ParallelOptions, options))
    if options.bench == "plot":
        import json

        from megalodon_plugin.bench.ops.report import draw

        if not (options.folder / "ops.json").is_file():
            raise ValueError(f"`folder` must hold ops.json, but {options.folder} does not")
        draw(json.loads((options.folder / "ops.json").read_text()), options.folder / "ops.png")
        print(options.folder / "ops.png")
        return 0
    import torch

    if not torch.cuda.is_available():
        raise ValueError("this benchmark measures CUDA kernels and needs a CUDA GPU, but torch finds none")
    from megalodon_plugin.bench.ops.run import Bench, OpsOptions

    device = torch.device("cuda", torch.cuda.current_device())
    Bench(options_of(OpsOptions, options), device).run()
    return 0
