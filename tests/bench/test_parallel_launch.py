"""Ranks of `megalodon bench parallel`: processes that run tasks, and a rank alone."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from megalodon_plugin.bench.parallel.launch import command_of_a_rank, run_tasks, started, wait_for
from megalodon_plugin.bench.parallel.matrix import SMALL
from megalodon_plugin.bench.parallel.rank import Task
from megalodon_plugin.bench.parallel.rows import merged
from megalodon_plugin.bench.parallel.scenarios import Scenario
from megalodon_plugin.bench.parallel.simulate import simulated_row
from megalodon_plugin.bench.train.job import TrainingJob
from megalodon_plugin.bench.train.trainer import LEAST_STEPS
from megalodon_plugin.parallel.layout import Layout
from megalodon_plugin.planning.links import Links

from support.processes import HANG_S, run_python


def small_job(name: str, rows: int = 8, **more: Any) -> TrainingJob:
    layout = Layout.parse(name)
    how: dict[str, Any] = {"compiled": False, "low_precision": False, "layout": layout, "rows": rows}
    return TrainingJob("megalodon", tuple(SMALL.items()), rows // layout.data, 128, **how | more)


def test_tasks_survive_their_file() -> None:
    task = Task(small_job("fsdp 2 x cp 4"), 3, count=True)
    assert Task.from_dict(json.loads(json.dumps(task.as_dict()))) == task


def test_one_rank_alone_is_measured_and_its_links_simulated(tmp_path: Path) -> None:
    job = small_job("fsdp 4 x cp 2", rows=4, fake_ranks=True)
    done = run_python(*command_of_a_rank([Task(job, 4)], tmp_path))
    assert done.returncode == 0, done.stdout[-3000:]
    measured = json.loads((tmp_path / "0.0.json").read_text())
    assert measured["tokens_per_s"] * measured["seconds"] == pytest.approx(4 * 128)  # of all eight ranks
    scenario = Scenario("simulated", "debug", "megalodon", job.layout, 4, 128, 1)
    found = simulated_row(scenario, job, measured, Links())
    assert found["simulated"]
    assert found["seconds"] == pytest.approx(measured["seconds"] + sum(found["exposed"].values()))
    # 2 x 8 norms and 8 CEMAs forward and backward, and the final norm: two microseconds-long messages of 1 doubling.
    assert found["exposed"]["cp"] == pytest.approx((2 * 8 * 2 + 2) * 10e-6, rel=0.01)
    assert 0 < found["exposed"]["fsdp"] < found["exchanged"]["fsdp"]


def test_tasks_are_run_in_turn_and_go_on_after_one_that_fails(tmp_path: Path) -> None:
    wrong = small_job("cp 2", rows=2)
    wrong = replace(wrong, length=120)  # not whole chunks for two ranks
    good = Task(small_job("cp 2", rows=2), 4)
    slow = replace(good, longest_step=1e-6)
    short = replace(good, steps=50, most_seconds=1e-6)
    # Processes start twice: those of the task that fails have run one before it, those of the others go on to the last.
    one, failed, last, too_slow = run_tasks([good, Task(wrong, 4), short, slow], HANG_S, tmp_path / "log")
    assert [len(ranks) for ranks in (one, failed, last, too_slow)] == [2] * 4
    assert all("must be a multiple of" in rank["failed"] for rank in failed)
    assert merged(too_slow) == {"failed": "a step takes more than 1e-06 s"}
    assert [rank["steps"] for rank in one] == [1, 1]
    assert [rank["steps"] for rank in last] == [LEAST_STEPS] * 2
    assert [rank["losses_and_norms"] for rank in one] == [rank["losses_and_norms"] for rank in last]


def test_a_process_that_fails_or_hangs_is_reported_in_a_line_and_leaves_none_behind(tmp_path: Path) -> None:
    def reason(code: str, timeout: float = HANG_S) -> str | None:
        (tmp_path / "log").unlink(missing_ok=True)
        with started([sys.executable, "-c", code, str(tmp_path)], tmp_path, tmp_path / "log") as process:
            found = wait_for([tmp_path / "result"], process, timeout, tmp_path / "log")
        assert not process.is_running()
        return found

    assert reason("raise ValueError('no such thing')") == "ValueError: no such thing"
    assert reason("raise SystemExit(3)") == "ended with status 3"
    # A child in a new session, as a rank of torchrun is.
    sleeps = f"[sys.executable, '-c', 'import time; time.sleep(1000)', {str(tmp_path)!r}]"
    child = f"import pathlib, subprocess, sys; child = subprocess.Popen({sleeps}, start_new_session=True)"
    keeps = f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(child.pid))"

    def child_is_gone() -> bool:
        pid = int((tmp_path / "pid").read_text())
        return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE

    assert reason(f"{child}; {keeps}; child.wait()", 3) == "not done after 3 s"
    assert child_is_gone()
    assert reason(f"{child}; {keeps}; raise SystemExit(3)") == "ended with status 3"
    assert child_is_gone()
    (tmp_path / "result").touch()
    assert reason("pass") is None


def test_after_a_simulated_rank_that_fails_the_next_one_starts_fresh(tmp_path: Path) -> None:
    code = """
import dataclasses, json, sys
from megalodon_plugin.bench.parallel.rank import Task, run_task
first = Task.from_dict(json.loads(sys.argv[1]))
print("answer:", run_task(dataclasses.replace(first, longest_step=1e-6))["failed"])
other = dataclasses.replace(first.job, layout=dataclasses.replace(first.job.layout, cp=4))
print("answer:", run_task(dataclasses.replace(first, job=other))["tokens_per_s"] > 0)
"""
    task = json.dumps(Task(small_job("cp 2", rows=2, fake_ranks=True), 4).as_dict())
    done = run_python("-c", code, task)
    assert done.returncode == 0, done.stdout[-3000:]
    answers = [line for line in done.stdout.splitlines() if line.startswith("answer:")]
    assert answers == ["answer: a step takes more than 1e-06 s", "answer: True"]
