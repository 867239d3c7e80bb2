"""Processes that start at once, for tests that need several, or one that fails, is killed or starts from nothing.

A Python that imports torch and torchtitan works for seconds before its first line. Here one server (multiprocessing's
"forkserver", one for each process that runs tests) imports them, and every process is forked from it: as fresh as a new
interpreter after these imports, with no thread, no process group and nothing computed, in a few milliseconds.
"""

import contextlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

import megalodon_plugin.titan  # noqa: F401  chooses the device before torchtitan does

# isort: split
from torchtitan.config import ConfigManager

HANG_S = 600
"""What takes longer hangs. Nothing here takes a tenth of it, so that a busy machine fails no test."""
# The first chooses the host's device, which must come before any import of torchtitan.
IMPORTED_ONCE = ["megalodon_plugin.titan", "torchtitan.train", "pytest"]


def _context() -> Any:
    if torch.cuda.is_available():
        return multiprocessing.get_context("spawn")  # CUDA does not work in the fork of a process that has asked for it
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED_ONCE)
    return context


@contextlib.contextmanager
def processes(
    function: Callable[..., Any], *args: Any, ranks: int = 1, environment: Mapping[str, str] | None = None
) -> Iterator[list[BaseProcess]]:
    """Processes that call a function of a module, with the variables that torchrun sets for each rank.

    `environment` is theirs instead of this process's. On leaving, those that still run are killed.
    """
    started: list[BaseProcess] = []
    common: dict[str, str] = {
        **(os.environ if environment is None else environment),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "0",  # a free one, which will do for one rank
        # Two threads that share two cores with another process spend their time waiting for each other.
        "OMP_NUM_THREADS": "1",
    }
    if ranks > 1:
        # As under torchrun, the ranks meet at a store of their parent's, on a port that is certainly free.
        store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        common |= {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        common |= {"TORCHELASTIC_RESTART_COUNT": "0"}
    try:
        for rank in map(str, range(ranks)):
            variables = common | {"RANK": rank, "LOCAL_RANK": rank}
            started.append(_context().Process(target=_call, args=(variables, function, args)))
            started[-1].start()
        yield started
    finally:
        for process in started:
            process.kill()
            process.join()


def _call(variables: dict[str, str], function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.clear()
    os.environ.update(variables)
    torch.set_num_threads(1)
    _do_not_sleep_after_training()
    function(*args)


def _do_not_sleep_after_training() -> None:
    """The host's first rank sleeps for two seconds at the end, lest its store ends while others use it. Here it would
    only keep a test waiting: after the last step's exchanges, which all ranks take part in, nobody asks the store.
    """
    host: Any = sys.modules.get("torchtitan.train")  # already there where it is imported once
    if host is not None:
        host.time = SimpleNamespace(**vars(time) | {"sleep": lambda seconds: None})


def wait_for(started: Sequence[BaseProcess]) -> None:
    """Wait until every process has ended well or one has not.

    Raises:
        TimeoutError: neither is so after HANG_S seconds.
    """
    end = time.monotonic() + HANG_S
    while not any(process.exitcode for process in started):
        running = [process for process in started if process.exitcode is None]
        if not running:
            return
        if not connection.wait([process.sentinel for process in running], timeout=end - time.monotonic()):
            raise TimeoutError(f"{len(running)} of {len(started)} processes are still running after {HANG_S} s")


def run_python(
    *words: str | Path, ranks: int = 1, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `python -m MODULE ...`, `python -c CODE ...` or `python FILE ...` to its end, on every rank.

    `returncode` is 0 if all ended well; `stdout` is all that the ranks wrote, to stderr too.
    """
    with _python_processes(words, ranks, environment) as (started, log):
        try:
            wait_for(started)
        except TimeoutError as hang:
            raise TimeoutError(f"{hang}; they wrote:\n{log.read_text()}") from None
        codes = [process.exitcode for process in started if process.exitcode]
        return subprocess.CompletedProcess(words, codes[0] if codes else 0, log.read_text())


def run_python_until(mark: str, *words: str | Path) -> str:
    """Run Python as `run_python` does, until it is killed by what it writes to stdout: `mark`. The output until then.

    The process kills itself, so that it does nothing after the mark, however late others would see it.
    """
    with _python_processes(words, 1, None, mark) as (started, log):
        wait_for(started)
        text = log.read_text()
        assert mark in text and started[0].exitcode == -signal.SIGKILL, text
        return text


@contextlib.contextmanager
def _python_processes(
    words: Sequence[str | Path], ranks: int, environment: Mapping[str, str] | None, mark: str | None = None
) -> Iterator[tuple[list[BaseProcess], Path]]:
    """The processes, and the file that their output goes to."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        log.touch()
        with processes(_python, log, list(map(str, words)), mark, ranks=ranks, environment=environment) as started:
            yield started, log


def _python(log: Path, words: list[str], mark: str | None) -> None:
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if mark is not None:
        _end_at(mark)
    flag = words.pop(0) if words[0] in ("-m", "-c") else None
    what, *arguments = words
    sys.argv = [flag or what, *arguments]
    # A default that the host evaluates when it is imported: the arguments of the program.
    ConfigManager.parse_args.__defaults__ = (arguments,)
    if flag == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    elif flag == "-c":
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
    else:
        runpy.run_path(what, run_name="__main__")


def _end_at(mark: str) -> None:
    write = sys.stdout.write

    def write_and_end(text: str) -> int:
        written = write(text)
        if mark in text:
            sys.stdout.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return written

    sys.stdout.write = write_and_end  # type: ignore[method-assign]
