"""What layouts of 8 GPUs exchange in a step of the host's Trainer, counted on PyTorch's "fake" backend in one process,
against the formulas behind `megalodon plan` and docs/scaling.md.
"""

import json
from typing import Any

import pytest

from megalodon_plugin.bench.parallel.launch import command_of_a_rank
from megalodon_plugin.bench.parallel.matrix import SMALL
from megalodon_plugin.bench.parallel.rank import Task
from megalodon_plugin.bench.train.job import TrainingJob
from megalodon_plugin.parallel.layout import Layout

from support.processes import run_python

LAYOUTS = {
    "fsdp 8": {"fsdp"},
    "cp 8": {"fsdp", "cp"},
    "replicate 2 x fsdp 4": {"fsdp", "replicate"},
    "fsdp 2 x cp 2 x tp 2": {"fsdp", "cp", "tp"},
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the first rank found under each layout, one after the other in one process."""
    folder = tmp_path_factory.mktemp("ranks")
    done = run_python(*command_of_a_rank([Task(small_job(name), steps=4, count=True) for name in LAYOUTS], folder))
    assert done.returncode == 0, done.stdout[-3000:]
    return {name: json.loads((folder / f"{number}.0.json").read_text()) for number, name in enumerate(LAYOUTS)}


def small_job(layout: str) -> TrainingJob:
    return TrainingJob(
        "megalodon",
        tuple(SMALL.items()),
        batch=2,
        length=256,
        compiled=False,
        low_precision=False,
        layout=Layout.parse(layout),
        fake_ranks=True,
    )


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_step_exchanges_what_the_formulas_say(name: str, rows: dict[str, dict[str, Any]]) -> None:
    assert rows[name]["exchanges"].keys() == LAYOUTS[name]
    assert rows[name]["differences"] == []
