"""Tasks of `megalodon bench parallel` on ranks that start at once, without torchrun."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megalodon_plugin.bench.parallel.rank import Task, run_all

from support.processes import processes, wait_for


def run_forked(tasks: Sequence[Task], folder: Path) -> list[list[dict[str, Any]]]:
    """What each rank found of each task. All are for as many ranks, which run them one after the other."""
    folder.mkdir()
    n = tasks[0].job.layout.gpus
    with processes(run_all, tasks, folder, ranks=n) as started:
        wait_for(started)
    paths = [[folder / f"{number}.{rank}.json" for rank in range(n)] for number in range(len(tasks))]
    return [[json.loads(path.read_text()) for path in of_task] for of_task in paths]
