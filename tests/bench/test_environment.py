"""The head of benchmark results."""

import json
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch

from megalodon_plugin import __version__
from megalodon_plugin.bench import environment as environments
from megalodon_plugin.bench.environment import Environment, device_name, device_of, environment

ROOT = Path(__file__).resolve().parents[2]
RESULTS = [ROOT / "kernels/results/h100_ops.json", *sorted((ROOT / "docs/results").glob("[!l]*.json"))]


def test_a_head_says_where_and_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/some/folder/megalodon", "bench", "ops", "--shapes", "1x2 3"])
    head = environment(device_name(torch.device("cpu")), "abc")
    assert head.keys() == Environment.__annotations__.keys()
    assert head["device"] == f"CPU, {torch.get_num_threads()} threads"
    assert (head["torch"], head["version"], head["commit"]) == (torch.__version__, __version__, "abc")
    assert head["command"] == "megalodon bench ops --shapes '1x2 3'"
    assert (datetime.now(UTC) - datetime.fromisoformat(head["date"])).total_seconds() >= 0
    assert json.loads(json.dumps(head)) == head


@pytest.mark.parametrize(
    ("printed", "commit"),
    [
        ({"ls-files": "environment.py", "rev-parse": "0123456789ab", "status": ""}, "0123456789ab"),
        ({"ls-files": "environment.py", "rev-parse": "0123456789ab", "status": " M a"}, "0123456789ab-changed"),
        ({"rev-parse": "0123456789ab", "status": ""}, "unknown"),  # of a repository that does not hold the package
        ({}, "unknown"),
    ],
)
def test_the_commit_is_what_git_says(printed: dict[str, str], commit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments, "_output", lambda *command: printed.get(command[3]) if len(command) > 3 else None)
    head = environment("CPU")
    assert head["commit"] == commit and head["driver"] is None


def test_a_program_that_is_missing_or_fails_prints_nothing() -> None:
    assert environments._output("no such program") is None
    assert environments._output(sys.executable, "--no-such-option") is None


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_results_of_earlier_versions_are_read(path: Path) -> None:
    assert "H100" in device_of(json.loads(path.read_text()))
