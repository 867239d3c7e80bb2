"""Run a function on several processes of this machine that can talk to each other."""

import importlib.util
import inspect
import os
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SILENCE = timedelta(seconds=60)
"""After this long without an answer from another process a collective fails, so that no test waits for ever."""


def run_on_ranks(n: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """`function(*args)` on n processes, which are the ranks of a gloo group; what each returned, in their order.

    The function stands at module level, in a test's own file too. Arguments and results are whatever torch can pickle,
    of classes that the processes can import. Raises `torch.multiprocessing.ProcessRaisedException`, with the traceback
    of the first process that failed, after ending the others.
    """
    with tempfile.TemporaryDirectory() as folder:
        where = (inspect.getfile(function), function.__qualname__)
        torch.multiprocessing.spawn(_run, (n, Path(folder), where, args), nprocs=n)
        return [torch.load(Path(folder) / f"result_{rank}", weights_only=False) for rank in range(n)]


def _run(rank: int, n: int, folder: Path, where: tuple[str, str], args: tuple[Any, ...]) -> None:
    # Two threads that share two cores with another process spend their time waiting for each other.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=n, timeout=SILENCE)
    try:
        torch.save(_load(*where)(*args), folder / f"result_{rank}")
    finally:
        dist.destroy_process_group()


def _load(file: str, name: str) -> Callable[..., Any]:
    """A function of a file, whatever name pytest imported the file by."""
    module_name = f"on_rank_{Path(file).stem}"
    spec = importlib.util.spec_from_file_location(module_name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    spec.loader.exec_module(module)
    return getattr(module, name)
