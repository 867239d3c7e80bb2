"""Some of the matrix of layouts (tests/support/layouts.py, `make layouts` runs all): processes together equal one."""

from pathlib import Path
from typing import Any

import pytest

from support.layouts import (
    FLOAT8,
    FLOAT8_LAYOUTS,
    LAYOUTS,
    LENGTH,
    ROWS,
    STEPS,
    TOLERANCE,
    Layout,
    Records,
    deviation,
    make_seed,
    move,
    run,
    unbroken,
    validation,
)
from support.tiny_job import read_records


@pytest.fixture(scope="module")
def seed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_seed(tmp_path_factory.mktemp("seed"), Layout({}))


def train(folder: Path, layout: Layout, seed: Path) -> tuple[Records, list[dict[str, Any]], list[float]]:
    """Losses and gradient norms, the whole records of training, and the losses of validation."""
    records = run(folder, layout, seed, validation=validation(layout, folder), data={"validation_fraction": 0.3})
    validations = [r["validation_metrics/loss"] for r in read_records(folder / "run", "validation")]
    return records, read_records(folder / "run"), validations


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, seed: Path) -> tuple[Records, list[dict[str, Any]], list[float]]:
    """One process, with gradients that are clipped."""
    records, whole, validations = train(tmp_path_factory.mktemp("alone"), Layout({}), seed)
    assert list(records) == list(range(1, STEPS + 1))
    assert all(norm > 0.5 for _, norm in records.values())
    assert [r["n_tokens_seen"] for r in whole] == [ROWS * LENGTH * step for step in records]
    assert len(validations) == 2  # after the first step and the last
    return records, whole, validations


@pytest.mark.parametrize(
    "name", ["fsdp", "replicate", "tp", "pp", "cp, accumulated gradients", "cp, compiled", "cp x tp"]
)
def test_processes_equal_one(tmp_path: Path, seed: Path, alone: Any, name: str) -> None:
    layout = LAYOUTS[name]
    expected, whole, expected_validations = alone
    records, found, validations = train(tmp_path, layout, seed)
    assert deviation(records, expected) < TOLERANCE
    assert validations == pytest.approx(expected_validations, rel=TOLERANCE)
    assert [r["n_tokens_seen"] for r in found] == [r["n_tokens_seen"] for r in whole]
    for record in found:
        mean, largest = (record[f"loss_metrics/global_{which}_loss"] for which in ("avg", "max"))
        if {"fsdp", "replicate", "cp"} & layout.degrees.keys():  # ranks have tokens of their own
            assert mean < largest < 1.5 * mean
        else:
            assert largest == pytest.approx(mean, rel=1e-6)


@pytest.mark.parametrize("name", ["tp", "pp"])
def test_mixed_precision_needs_no_fsdp(tmp_path: Path, seed: Path, alone: Any, name: str) -> None:
    layout = Layout(LAYOUTS[name].degrees, {"training": {"mixed_precision_param": "bfloat16"}})
    records, _, validations = train(tmp_path, layout, seed)
    # The host leaves such layouts in float32, which would be within TOLERANCE.
    assert TOLERANCE < deviation(records, alone[0]) < 0.01
    assert validations == pytest.approx(alone[2], rel=0.01)


@pytest.fixture(scope="module")
def float8_seed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = {"megalodon": next(iter(FLOAT8_LAYOUTS.values())).options["megalodon"]}
    return make_seed(tmp_path_factory.mktemp("float8_seed"), Layout({}, model))


@pytest.fixture(scope="module")
def alone_in_float8(tmp_path_factory: pytest.TempPathFactory, float8_seed: Path) -> Records:
    return run(tmp_path_factory.mktemp("alone_in_float8"), Layout({}, FLOAT8), float8_seed)


@pytest.mark.parametrize("name", FLOAT8_LAYOUTS)
def test_float8_processes_are_near_one(tmp_path: Path, float8_seed: Path, alone_in_float8: Records, name: str) -> None:
    found = run(tmp_path, FLOAT8_LAYOUTS[name], float8_seed)
    assert found.keys() == alone_in_float8.keys()
    for step, (loss, norm) in alone_in_float8.items():
        # What scales of parts instead of wholes change is some of float8's own rounding, 3% of a number.
        assert found[step] != (loss, norm)
        assert found[step][0] == pytest.approx(loss, rel=0.01)
        assert found[step][1] == pytest.approx(norm, rel=0.05)


def test_a_checkpoint_moves_from_layout_to_layout(tmp_path: Path) -> None:
    assert deviation(move(tmp_path / "moved"), unbroken(tmp_path / "unbroken")) < TOLERANCE


def test_a_difference_is_seen() -> None:
    assert deviation({1: (2.0, 1.0)}, {1: (2.0, 1.001)}) > TOLERANCE
    assert deviation({1: (2.0, 1.0)}, {1: (2.0, 1.0), 2: (2.0, 1.0)}) > TOLERANCE
