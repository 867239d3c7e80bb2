"""Starts the ranks of `megalodon bench parallel`: processes that run tasks one after the other."""

import json
import os
import sys
import tempfile
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import torch

from .rank import Task
from .results import RankRow

ALLOCATOR = "expandable_segments:True"
"""As the host's start script sets it."""


def run_tasks(tasks: Sequence[Task], timeout: float, log: Path) -> Generator[list[RankRow], None, None]:
    """What each rank found of each task, in turn; {"failed": why} where it found nothing.

    All tasks are for as many ranks. Their processes start once, since starting takes longer than some tasks. A rank
    that fails, or a task that takes more than `timeout` seconds, ends them all, and they start again for the tasks
    that are left. What they print is added to the file `log`.
    """
    done = 0
    while done < len(tasks):
        for ranks in _started_once(tasks[done:], timeout, log):
            yield ranks
            done += 1


def _started_once(tasks: Sequence[Task], timeout: float, log: Path) -> Iterator[list[RankRow]]:
    """The first task's results at least, and those of the others until one fails."""
    processes = tasks[0].job.layout.gpus
    with tempfile.TemporaryDirectory() as name:
        folder, begin = Path(name), size_of(log)
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        with started([sys.executable, *torchrun, *command_of_a_rank(tasks, folder)], folder, log) as process:
            for number in range(len(tasks)):
                paths = [folder / f"{number}.{rank}.json" for rank in range(processes)]
                reason = wait_for(paths, process, timeout, log, begin)
                begin = size_of(log)
                ranks: list[RankRow] = [
                    json.loads(p.read_text()) if p.is_file() else {"failed": str(reason)} for p in paths
                ]
                yield ranks
                if any("failed" in rank for rank in ranks):
                    return


def command_of_a_rank(tasks: Sequence[Task], folder: Path) -> list[str]:
    """Arguments of Python that run the tasks, which are written into the folder, as the results will be."""
    path = folder / "tasks.json"
    path.write_text(json.dumps([task.as_dict() for task in tasks]))
    return ["-m", "megalodon_plugin.bench.parallel.rank", str(path), str(folder)]


@contextmanager
def started(command: list[str], folder: Path, log: Path) -> Iterator[psutil.Popen]:
    """The command, running. When the context ends, what is left of it is killed: every process whose command line names
    `folder`, and their children. (torchrun starts each rank in a new session, and may end before them.)
    """
    variables = {"PYTORCH_ALLOC_CONF": ALLOCATOR, "TOKENIZERS_PARALLELISM": "false"}
    threads = {} if torch.cuda.is_available() else {"OMP_NUM_THREADS": "1"}
    with log.open("a") as output:
        process = psutil.Popen(command, env=variables | dict(os.environ) | threads, stdout=output, stderr=output)
        try:
            yield process
        finally:
            left = [one for one in psutil.process_iter(["cmdline"]) if str(folder) in (one.info["cmdline"] or [])]
            for one in list(left):
                with suppress(psutil.NoSuchProcess):
                    left += one.children(recursive=True)
            for one in left:
                with suppress(psutil.NoSuchProcess):
                    one.kill()
            psutil.wait_procs([*left, process], timeout=10)


def wait_for(paths: Sequence[Path], process: psutil.Popen, timeout: float, log: Path, begin: int = 0) -> str | None:
    """Wait until the process has written all `paths`. Returns None, or a short reason why it has not.

    What it prints meanwhile is in `log`, from byte `begin` on.
    """
    end = time.monotonic() + timeout
    running = True
    while not all(path.is_file() for path in paths):
        if not running:  # and the files were looked for after its end
            output_text = log.read_bytes()[begin:].decode(errors="replace")
            errors = [line for line in output_text.splitlines() if "Error: " in line and "ChildFailedError" not in line]
            return errors[0].strip()[-200:] if errors else f"ended with status {process.returncode}"
        if time.monotonic() > end:
            return f"not done after {timeout:g} s"
        try:
            process.wait(0.1)
            running = False
        except psutil.TimeoutExpired:
            pass
    return None


def size_of(log: Path) -> int:
    return log.stat().st_size if log.exists() else 0
