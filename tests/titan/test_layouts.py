"""Some of the matrix of layouts (bench/parallel/matrix.py, `make layouts` runs all): processes together equal one."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megalodon_plugin.bench.parallel.matrix import (
    ENTRIES,
    LENGTH,
    LOW_PRECISION,
    MODEL,
    ROWS,
    TOLERANCE,
    Entry,
    check,
    check_move,
    task_of,
    task_without_moves,
    tasks_of_a_move,
    write_texts,
)
from megalodon_plugin.parallel.layout import ONE_RANK

from support.rank_tasks import run_forked

COMPILED = "cp, compiled"
# Compiling takes longer than all else here, for each layer again, and its layers are alike.
ALL = ENTRIES | LOW_PRECISION | {COMPILED: replace(ENTRIES[COMPILED], model=MODEL | {"n_layers": 2})}
ENTRIES_OF_TESTS = [
    (
        "fsdp",
        "replicate",
        "tp",
        "pp",
        "cp, accumulated gradients",
        "tp, the preset debug",
        "tp, bfloat16",
        "pp, bfloat16",
    ),
    ("fsdp, gathered in float8",),
    (COMPILED,),
    ("cp x tp", "cp x tp, float8"),
]
"""Those of a test run in the same processes, one after the other."""


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.mark.parametrize("names", ENTRIES_OF_TESTS, ids=" and ".join)
def test_processes_equal_one(tmp_path: Path, texts: Path, names: Sequence[str]) -> None:
    entries = [ALL[name] for name in names]
    singles = [entry.single for entry in entries]
    different = [single for number, single in enumerate(singles) if single not in singles[:number]]
    one_rank_each = run_forked([task_of(single, texts) for single in different], tmp_path / "single")
    of_singles = [row for (row,) in one_rank_each]
    of_entries = run_forked([task_of(entry, texts) for entry in entries], tmp_path / "ranks")
    found = [
        check(entry, ranks, of_singles[different.index(single)])
        for entry, single, ranks in zip(entries, singles, of_entries, strict=True)
    ]
    assert {name: row["failed"] for name, row in zip(names, found, strict=True) if "failed" in row} == {}
    for single in of_singles:
        assert sum("validation_metrics/loss" in record for record in single["records"]) == 2  # after the first and last


def test_a_checkpoint_moves_from_layout_to_layout(tmp_path: Path, texts: Path) -> None:
    *shared, last = tasks_of_a_move(texts, tmp_path / "moved")
    assert {task.job.layout.gpus for task in shared} == {2}
    moves = run_forked(shared, tmp_path / "ranks")
    last_move, unbroken = run_forked([last, task_without_moves(texts, tmp_path / "unbroken")], tmp_path / "single")
    found = check_move([*moves, last_move], unbroken)
    assert found.get("failed") is None and found["deviation"] < TOLERANCE


def row(*steps: tuple[float, float], tokens: int = ROWS * LENGTH) -> dict[str, Any]:
    records = [
        {
            "step": step,
            "loss_metrics/global_avg_loss": loss,
            "loss_metrics/global_max_loss": loss,
            "grad_norm": norm,
            "n_tokens_seen": step * tokens,
        }
        for step, (loss, norm) in enumerate(steps, 1)
    ]
    return {"losses_and_norms": [list(step) for step in steps], "records": records}


@pytest.mark.parametrize(
    ("entry", "found", "failure"),
    [
        (ALL["tp"], row((2.0, 1.0)), None),
        (ALL["tp"], row((2.0, 1.001)), "losses are off by 0.0e+00, gradient norms by 1.0e-03"),
        (ALL["tp"], row((2.001, 1.0)), "losses are off by 5.0e-04"),
        (ALL["tp"], row((2.0, 1.0), (2.0, 1.0)), "steps must be those of 1"),
        (ALL["tp"], row((2.0, 1.0), tokens=1), "must have seen 256 tokens, not 1"),
        (ALL["cp"], row((2.0, 1.0)), "the largest loss of a rank is 2.0, the mean 2.0"),
        (ALL["tp, bfloat16"], row((2.0, 1.0)), "precision is not lower"),
        (ALL["tp, bfloat16"], row((2.0, 1.001)), None),
    ],
)
def test_a_difference_is_seen(entry: Entry, found: dict[str, Any], failure: str | None) -> None:
    failed = check(entry, [found], row((2.0, 1.0))).get("failed")
    assert failed is None if failure is None else failure in str(failed)


def test_the_matrix_holds_every_pair_of_dimensions() -> None:
    assert len(ENTRIES) == 34
    assert {entry.layout.gpus for entry in ALL.values()} == {2, 4, 8}
    assert {str(entry.layout) for entry in ENTRIES.values()} >= {"fsdp 2 x cp 2", "replicate 2 x pp 2", "cp 4"}
    assert all(entry.single.layout == ONE_RANK for entry in ALL.values())
