"""Run a function on several processes of this machine that can talk to each other."""

import contextlib
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from support.processes import HANG_S, processes, wait_for


class RankError(Exception):
    """A function failed on a rank; the message is the traceback."""


def run_on_ranks(n: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """`function(*args)` on n processes, which are the ranks of a gloo group; what each returned, in their order.

    The function stands at module level, in a test's own file too. Arguments and results are whatever torch can pickle.

    Raises:
        RankError: with the traceback of the first process that failed; the others are killed.
        TimeoutError: one hangs.
    """
    with tempfile.TemporaryDirectory() as folder, processes(_run, Path(folder), function, args, ranks=n) as started:
        wait_for(started)
        failure = Path(folder) / "failure"
        if failure.exists():
            raise RankError(failure.read_text())
        for rank, process in enumerate(started):
            if process.exitcode:
                raise RankError(f"rank {rank} ended with exit code {process.exitcode}")
        return [torch.load(Path(folder) / f"result_{rank}", weights_only=False) for rank in range(n)]


def _run(folder: Path, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        dist.init_process_group("gloo", timeout=timedelta(seconds=HANG_S))
        rank = dist.get_rank()
        torch.save(function(*args), folder / f"result_{rank}")
        dist.destroy_process_group()
    except BaseException:
        # The first to fail writes; the others fail because it is gone.
        with contextlib.suppress(FileExistsError), (folder / "failure").open("x") as file:
            file.write(traceback.format_exc())
        raise
