"""What layouts of 8 GPUs exchange in a step of the host's Trainer, counted on PyTorch's "fake" backend in one process,
against the formulas behind `megalodon plan` and docs/scaling.md.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megalodon_plugin.bench.parallel.launch import command_of_a_rank
from megalodon_plugin.bench.parallel.rank import Task
from megalodon_plugin.bench.parallel.run import SMALL
from megalodon_plugin.bench.train.job import TrainingJob
from megalodon_plugin.parallel.layout import Layout

from support.processes import HANG_S
from support.tiny_job import environment

LAYOUTS = {
    "fsdp 8": {"fsdp"},
    "cp 8": {"fsdp", "cp"},
    "replicate 2 x fsdp 4": {"fsdp", "replicate"},
    "fsdp 2 x cp 2 x tp 2": {"fsdp", "cp", "tp"},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_step_exchanges_what_the_formulas_say(name: str, tmp_path: Path) -> None:
    layout = Layout.parse(name)
    job = TrainingJob(
        "megalodon",
        tuple(SMALL.items()),
        batch=2,
        length=256,
        compiled=False,
        low_precision=False,
        layout=layout,
        fake_ranks=True,
    )
    command = [sys.executable, *command_of_a_rank([Task(job, steps=4, count=True)], tmp_path)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=HANG_S, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "0.0.json").read_text())
    assert found["exchanges"].keys() == LAYOUTS[name]
    assert found["differences"] == []
