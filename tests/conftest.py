"""Settings for every test, and what the suite says at its end."""

import os
from collections import Counter

import pytest

# Two threads that share two cores with another process spend their time waiting for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Inductor compiles in the process itself: a pool of compilers would take longer to start than the tests' graphs take.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# For the CPU, Inductor writes loops without vector instructions: the same graphs, in half of the C++ compiler's time.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "0")

# Their single tests take longest. They come first, so that no process is left with one when the others have none.
LONGEST = ("titan/test_layouts.py", "bench/test_parallel_launch.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.path.as_posix().endswith(LONGEST))


def pytest_sessionstart(session: pytest.Session) -> None:
    """Choose the device, which must come before any import of torchtitan."""
    if session.config.getoption("dist", "no") != "no":
        return  # this process hands the tests to others, so it would import torch for nothing
    import torch

    import megalodon_plugin.titan  # noqa: F401

    torch.set_num_threads(1)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Each reason for which tests were skipped, on one line, however many tests it has skipped."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in skipped)
    if reasons:
        terminalreporter.section("skipped")
    for reason, number in reasons.most_common():
        terminalreporter.write_line(f"{number:5} {reason}")
