"""The processes that tests start: the right ranks, fresh every time, and none left over."""

import os
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from support import processes, ranks
from support.processes import run_python, run_python_until
from support.ranks import RankError, run_on_ranks

LEFT_BY_A_CALL: list[int] = []


def gather(number: int) -> tuple[list[int], int]:
    LEFT_BY_A_CALL.append(number)
    gathered = [torch.zeros(()) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, torch.tensor(float(number + dist.get_rank())), group=dist.new_group())
    return [int(x) for x in gathered], len(LEFT_BY_A_CALL)


def test_ranks_talk_to_each_other_and_are_fresh_at_every_call() -> None:
    assert run_on_ranks(2, gather, 5) == [([5, 6], 1)] * 2
    assert run_on_ranks(3, gather, 7) == [([7, 8, 9], 1)] * 3


def fail_on_the_last_rank() -> None:
    if dist.get_rank() == dist.get_world_size() - 1:
        raise ValueError("of the last rank")
    dist.barrier()


def test_the_first_failure_is_the_one_that_is_raised() -> None:
    with pytest.raises(RankError, match=r"(?s)Traceback.*fail_on_the_last_rank.*ValueError: of the last rank"):
        run_on_ranks(3, fail_on_the_last_rank)


def die() -> None:
    os._exit(3)


def test_a_rank_that_dies_without_a_word() -> None:
    with pytest.raises(RankError, match="rank 0 ended with exit code 3"):
        run_on_ranks(1, die)


def wait_for_nothing(folder: str) -> None:
    with open(os.path.join(folder, str(os.getpid())), "w"):
        time.sleep(3600)


def test_ranks_that_hang_are_ended(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "HANG_S", 1)
    monkeypatch.setattr(ranks, "HANG_S", 600)
    with pytest.raises(TimeoutError, match="2 of 2 processes are still running after 1 s"):
        run_on_ranks(2, wait_for_nothing, str(tmp_path))
    assert not [path for path in tmp_path.iterdir() if psutil.pid_exists(int(path.name))]


def test_python_is_run_as_from_a_command_line(tmp_path: Path) -> None:
    code = "import os, sys; print(sys.argv[1:], os.environ['RANK'], os.environ.get('MINE'), flush=True)"
    done = run_python("-c", code, "a", "b", ranks=2, environment={"MINE": "x"})
    assert done.returncode == 0
    assert sorted(done.stdout.splitlines()) == ["['a', 'b'] 0 x", "['a', 'b'] 1 x"]
    (tmp_path / "program.py").write_text("import sys; print(sys.argv[1:])")
    assert run_python(tmp_path / "program.py", "a").stdout == "['a']\n"
    done = run_python("-m", "json.tool", "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage:")
    done = run_python("-c", "import sys; sys.exit('a reason')")
    assert (done.returncode, done.stdout) == (1, "a reason\n")
    done = run_python("-c", "1 / 0")
    assert done.returncode == 1 and "ZeroDivisionError" in done.stdout


def test_python_is_killed_at_a_mark() -> None:
    assert run_python_until("far", "-c", "print('so far'); print('further', flush=True)") == "so far"
    with pytest.raises(AssertionError, match="so far"):
        run_python_until("further", "-c", "print('so far')")
