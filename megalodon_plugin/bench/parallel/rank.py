"""One rank of `megalodon bench parallel`: trains one job after the other and writes its results.

    python -m torch.distributed.run ... -m megalodon_plugin.bench.parallel.rank TASKS FOLDER

TASKS is a JSON file, a list of `Task`s. The result of task N, from 0, on rank R is FOLDER/N.R.json.
"""

import dataclasses
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megalodon_plugin.files import write_text
from megalodon_plugin.parallel.layout import Layout
from megalodon_plugin.planning.traffic import Exchange

from ..train.job import TrainingJob, free_port, run_job
from ..train.trainer import TimedTrainer
from .exchanges import ExchangeCounter, differences, exchanges_by_formula, summed
from .results import RankRow
from .trace import trace_step


@dataclass(frozen=True)
class Task:
    """A job and what to measure besides its time."""

    job: TrainingJob
    steps: int
    count: bool = False
    """Messages and bytes of one more step, which must not be compiled."""
    trace: bool = False
    """The share of communication in one more step."""
    most_seconds: float = sys.float_info.max  # infinity is no number of JSON
    """Seconds of counted steps after which no more are made."""
    longest_step: float = sys.float_info.max
    """Seconds; a job whose steps take longer is given up."""

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> "Task":
        job = dict(found["job"])
        for field in ("options", "host_options"):
            job[field] = tuple((name, value) for name, value in job[field])
        job["layout"] = Layout(**job["layout"])
        return cls(**(found | {"job": TrainingJob(**job)}))


def run_task(task: Task) -> RankRow:
    """What `run_job` returns, with "losses_and_norms", "exchanges", "differences" or "communication" as asked for."""
    found: RankRow = {}

    def look(trainer: TimedTrainer) -> None:
        nonlocal found
        found["losses_and_norms"] = trainer.losses_and_norms
        if task.job.text is not None:
            found["records"] = trainer.records
        if task.count:
            found |= _count(trainer, _by_formula(trainer, task.job.layout))
        if task.trace:
            by_formula = _by_formula(trainer, task.job.layout) if task.job.model == "megalodon" else []
            found["communication"] = trace_step(trainer, by_formula)

    logging.getLogger().setLevel(logging.WARNING)
    if task.job.fake_ranks:
        ranks = str(task.job.layout.gpus)
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": ranks, "NGPU": ranks}
    row: RankRow = {**run_job(task.job, task.steps, look, task.most_seconds, task.longest_step)}
    if "failed" not in row:
        row |= found
    if torch.cuda.is_available():
        row["device"] = torch.cuda.get_device_name()
    return row


def _by_formula(trainer: TimedTrainer, layout: Layout) -> list[Exchange]:
    stage = trainer.parallel_dims.get_mesh("pp").get_local_rank() if layout.pp > 1 else 0
    return exchanges_by_formula(trainer.job_config, layout, stage)


def _count(trainer: TimedTrainer, by_formula: list[Exchange]) -> RankRow:
    batches = trainer.batch_generator(trainer.dataloader)
    with ExchangeCounter() as exchanges:
        trainer.train_step(batches)
    found, planned = exchanges.found, summed(by_formula)
    return {"exchanges": found, "planned": planned, "differences": differences(found, planned)}


def run_all(tasks: Sequence[Task], folder: Path) -> None:
    """Run the tasks as the rank that the environment names, with results in the folder. The first that fails ends the
    process.
    """
    rank = os.environ["RANK"]
    # The store that torchrun offers still holds the addresses that an earlier task's ranks left there.
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_ADDR": "127.0.0.1"}
    for number, task in enumerate(tasks):
        port = folder / f"{number}.port"
        if rank == "0":
            write_text(str(free_port()), port)
        while not port.is_file():
            time.sleep(0.01)
        os.environ["MASTER_PORT"] = port.read_text()
        row = run_task(task)
        write_text(json.dumps(row), folder / f"{number}.{rank}.json")
        if "failed" in row:
            # The other ranks wait for this one, as long as a collective may take, unless it is seen to fail.
            os._exit(1)


if __name__ == "__main__":
    run_all([Task.from_dict(found) for found in json.loads(Path(sys.argv[1]).read_text())], Path(sys.argv[2]))
