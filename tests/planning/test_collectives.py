"""What layouts of 8 GPUs exchange in a step of the host's Trainer, counted on PyTorch's "fake" backend in one process,
against the formulas behind `megalodon plan` and docs/scaling.md.
"""

import json
from pathlib import Path

import pytest

from megalodon_plugin.bench.parallel.launch import command_of_a_rank
from megalodon_plugin.bench.parallel.rank import Task
from megalodon_plugin.bench.parallel.run import SMALL
from megalodon_plugin.bench.train.job import TrainingJob
from megalodon_plugin.parallel.layout import Layout

from support.processes import run_python

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
    done = run_python(*command_of_a_rank([Task(job, steps=4, count=True)], tmp_path))
    assert done.returncode == 0, done.stdout[-3000:]
    found = json.loads((tmp_path / "0.0.json").read_text())
    assert found["exchanges"].keys() == LAYOUTS[name]
    assert found["differences"] == []
