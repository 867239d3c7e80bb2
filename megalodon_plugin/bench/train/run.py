"""`megalodon bench train`: whole training steps of Megalodon, beside those of torchtitan's Llama in the same host.

Both are built, parallelised, checkpointed and compiled by the host as a user's run is, in bfloat16 (float32 on a CPU),
with selective activation checkpointing ("op"), each with its own list of what is saved, AdamW, and random tokens.
"""

import argparse
import logging
import os
from typing import Any

import torch

from megalodon_plugin.files import write_json

from ..environment import device_name, environment
from ..sizes import SIZES
from .job import TrainingJob, free_port, run_job
from .profile import print_shares, shares
from .report import draw, table
from .trainer import check_steps


def run_bench_train(known: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        ValueError: a number is out of range.
    """
    for name in ("lengths", "tokens", "longest_step"):
        value = getattr(known, name)
        if min(value if isinstance(value, list) else [value]) < 1:
            raise ValueError(f"`--{name.replace('_', '-')}` must be positive, but is {value}")
    check_steps(known.steps)
    _one_process()
    on_gpu = torch.cuda.is_available()
    results: dict[str, Any] = {
        **environment(device_name(torch.device("cuda" if on_gpu else "cpu")), known.commit),
        "dtype": "bfloat16" if on_gpu else "float32",
        "compiled": not known.eager,
        "rows": [],
    }
    known.out.mkdir(parents=True, exist_ok=True)
    for size in known.sizes:
        for length in sorted(known.lengths):
            for model in ("megalodon", "llama") if known.against else ("megalodon",):
                row = _measure(known, size, model, length, results["rows"], on_gpu)
                results["rows"].append(row)
                print(table([row], header=len(results["rows"]) == 1), flush=True)
                write_json(results, known.out / "train.json")
    draw(results, known.out / "train.png")
    print(table(results["rows"], ratios=True))
    print(known.out / "train.json", known.out / "train.png")


def _measure(
    known: argparse.Namespace, size: str, model: str, length: int, rows: list[dict[str, Any]], on_gpu: bool
) -> dict[str, Any]:
    options = SIZES[size].options(model)
    batch = max(1, known.tokens // length)
    about = {"size": size, "model": model, "batch": batch, "length": length}
    before = [row for row in rows if (row["size"], row["model"]) == (size, model)]
    if before:
        last = before[-1]
        if "failed" in last:
            return about | {"failed": last["failed"]}
        # Attention's work at most grows as the square of the length.
        growth = (batch * length) / (last["batch"] * last["length"])
        growth *= length / last["length"] if model == "llama" else 1
        if last["seconds"] * growth > known.longest_step:
            return about | {"failed": f"a step might take more than {known.longest_step} s"}
    checkpointing = known.checkpointing
    job = TrainingJob(model, tuple(options.items()), batch, length, checkpointing, not known.eager, on_gpu)
    return about | run_job(job, known.steps, _profile if known.profile and on_gpu else None)


def _profile(trainer: Any) -> dict[str, Any]:
    found = shares(trainer)
    print_shares(found)
    return {"profile": found}


def _one_process() -> None:
    """What torchrun and the host's start script would set."""
    logging.getLogger().setLevel(logging.WARNING)
    port = free_port()
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": port}.items():
        os.environ[name] = str(value)
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
