"""`megalodon bench train`: whole training steps of Megalodon, beside those of torchtitan's Llama in the same host.

Both are built, parallelised, checkpointed and compiled by the host as a user's run is, in bfloat16 (float32 on a CPU),
with selective activation checkpointing ("op"), each with its own list of what is saved, AdamW, and random tokens.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megalodon_plugin.files import write_json

from ..environment import device_name, environment
from ..sizes import SIZES
from .job import TrainingJob, free_port, run_job
from .profile import print_shares, shares
from .report import draw, table
from .results import JobRow, Profile, TrainResults, TrainRow
from .trainer import check_steps


@dataclass(frozen=True)
class TrainOptions:
    """What is trained."""

    out: Path
    """Folder of the results."""
    sizes: Sequence[str] = ("200M",)
    """Of `sizes.SIZES`."""
    lengths: Sequence[int] = (4096, 32768)
    """Tokens of a row."""
    tokens: int = 32768
    """Of a step; longer rows come one a step."""
    against: str | None = None
    """"llama": also the host's Llama of about as many parameters."""
    steps: int = 10
    """At most; the first three are not counted."""
    checkpointing: str = "selective"
    """"selective", "full" or "none"."""
    eager: bool = False
    """Without torch.compile."""
    profile: bool = False
    """Also where the time of a step on the GPU goes."""
    longest_step: float = 30.0
    """Seconds; slower steps are left out."""
    commit: str | None = None
    """In place of what git says."""

    def check(self) -> None:
        """Raise ValueError for what is out of range."""
        numbers = {"lengths": min(self.lengths), "tokens": self.tokens, "longest-step": self.longest_step}
        for name, value in numbers.items():
            if value < 1:
                raise ValueError(f"`--{name}` must be positive, but is {value}")
        check_steps(self.steps)


def run_bench_train(options: TrainOptions) -> None:
    """Measure, and write train.json, after each row, and train.png.

    Raises:
        ValueError: a number is out of range.
    """
    options.check()
    _set_up_single_process()
    on_gpu = torch.cuda.is_available()
    results: TrainResults = {
        **environment(device_name(torch.device("cuda" if on_gpu else "cpu")), options.commit),
        "dtype": "bfloat16" if on_gpu else "float32",
        "compiled": not options.eager,
        "rows": [],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    for size in options.sizes:
        for length in sorted(options.lengths):
            for model in ("megalodon", "llama") if options.against else ("megalodon",):
                row = _measure(options, size, model, length, results["rows"], on_gpu)
                results["rows"].append(row)
                print(table([row], header=len(results["rows"]) == 1), flush=True)
                write_json(results, options.out / "train.json")
    draw(results, options.out / "train.png")
    print(table(results["rows"], ratios=True))
    print(options.out / "train.json", options.out / "train.png")


def _measure(options: TrainOptions, size: str, model: str, length: int, rows: list[TrainRow], on_gpu: bool) -> TrainRow:
    batch = max(1, options.tokens // length)
    about: JobRow = {"model": model, "batch": batch, "length": length}
    before = [row for row in rows if (row["size"], row["model"]) == (size, model)]
    if before:
        last = before[-1]
        if "failed" in last:
            return {"size": size, **about, "failed": last["failed"]}
        # Attention's work at most grows as the square of the length.
        growth = (batch * length) / (last["batch"] * last["length"])
        growth *= length / last["length"] if model == "llama" else 1
        if last["seconds"] * growth > options.longest_step:
            return {"size": size, **about, "failed": f"a step might take more than {options.longest_step} s"}
    chosen = tuple(SIZES[size].options(model).items())
    job = TrainingJob(model, chosen, batch, length, options.checkpointing, not options.eager, on_gpu)
    profiles: list[Profile] = []
    with_profile = options.profile and on_gpu
    found = run_job(job, options.steps, (lambda trainer: profiles.append(shares(trainer))) if with_profile else None)
    row: TrainRow = {"size": size, **found}
    if profiles:
        print_shares(profiles[0])
        row["profile"] = profiles[0]
    return row


def _set_up_single_process() -> None:
    """Set what torchrun and the host's start script would."""
    logging.getLogger().setLevel(logging.WARNING)
    port = free_port()
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": port}.items():
        os.environ[name] = str(value)
    # The process is its own store, whatever started it.
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "False"}
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
