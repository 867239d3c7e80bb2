"""`megalodon plan`: its options, and what it prints."""

import argparse
from pathlib import Path

from megalodon_plugin.planning.links import Links

from .options import options_of


def add_plan(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to those of the console."""
    plan = commands.add_parser(
        "plan",
        help="choose a layout of GPUs for a TOML file",
        description="Estimate memory and communication of every layout that the job may take, without a GPU, and "
        "recommend one. Further options are torchtitan's, such as --training.local_batch_size 2.",
    )
    plan.add_argument("config", type=Path, help="the TOML file")
    plan.add_argument("--gpus", type=int, required=True, help="number of GPUs of the whole job")
    plan.add_argument("--memory", type=float, default=80, metavar="GIB", help="memory of a GPU, in GiB (default 80)")
    plan.add_argument("--gpus-per-node", type=int, default=8, help="GPUs joined by NVLink (default 8)")
    plan.add_argument("--seq-len", type=int, help="tokens per row, instead of the file's")
    plan.add_argument("--rows", type=int, default=12, help="layouts to print (default 12)")
    plan.add_argument("--json", type=Path, metavar="FILE", help="write all layouts and every exchange to this file")
    speeds = plan.add_argument_group("speeds that the estimate of time rests on, of one GPU")
    default = Links()
    speeds.add_argument(
        "--node-gb-s",
        type=float,
        default=default.node_gb_s,
        help="GB/s each way inside a node (default 450: NVLink 4 of an H100, as published)",
    )
    speeds.add_argument(
        "--network-gb-s",
        type=float,
        default=default.network_gb_s,
        help="GB/s each way between nodes (default 50: 400 Gb/s a GPU, as published)",
    )
    speeds.add_argument(
        "--latency-us",
        type=float,
        default=default.latency_us,
        help="latency in µs of a message between two ranks; between P ranks log2(P) times that (default 10, assumed)",
    )
    speeds.add_argument(
        "--tflops", type=float, default=400.0, help="TFLOP/s that a GPU reaches in the model (default 400, assumed)"
    )
    plan.set_defaults(run=run_plan, takes_host_options=True, error_status=2)  # 1 says that no layout fits


def run_plan(options: argparse.Namespace) -> int:
    """Print the plan; the exit status: 0, or 1 if no layout fits.

    Raises:
        ValueError: an option is wrong, or no layout is allowed.
    """
    from megalodon_plugin.files import write_text
    from megalodon_plugin.planning.candidates import PlanOptions, candidates
    from megalodon_plugin.planning.job import load_job
    from megalodon_plugin.planning.report import advice, as_json, reasons, report

    plan, overrides = options_of(PlanOptions, options), options.host_options
    plan.validate()
    job = load_job(plan.config, plan.seq_len, overrides)
    found, refused = candidates(job, plan)
    if not found:
        raise ValueError(f"`--gpus` must allow at least one layout, but {plan.gpus} allows none:\n{reasons(refused)}")
    if plan.json is not None:
        write_text(as_json(job, found, refused, plan), plan.json)
    print(report(job, found, refused, plan, overrides))
    if any(c.fits(plan.memory) for c in found):
        return 0
    print(advice(job, found, plan))
    return 1
