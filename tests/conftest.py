"""Settings for every test, and what the suite says at its end."""

import os
from collections import Counter

import pytest

# Two threads that share two cores with another process spend their time waiting for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Inductor compiles in the process itself: a pool of compilers would take longer to start than the tests' graphs take.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


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
