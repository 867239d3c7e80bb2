"""Some of the matrix of layouts (tests/layouts.py, `make layouts` runs all): processes together equal one."""

from pathlib import Path

import pytest

from layouts import (
    FLOAT8,
    FLOAT8_LAYOUTS,
    LAYOUTS,
    STEPS,
    TOLERANCE,
    Layout,
    Records,
    deviation,
    make_seed,
    move,
    run,
    unbroken,
)


@pytest.fixture(scope="module")
def seed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_seed(tmp_path_factory.mktemp("seed"), Layout({}))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, seed: Path) -> Records:
    """Losses and gradient norms of one process, with gradients that are clipped."""
    records = run(tmp_path_factory.mktemp("alone"), Layout({}), seed)
    assert list(records) == list(range(1, STEPS + 1))
    assert all(norm > 0.5 for _, norm in records.values())
    return records


@pytest.mark.parametrize("name", ["fsdp", "replicate", "tp", "pp", "cp, accumulated gradients", "cp x tp"])
def test_processes_equal_one(tmp_path: Path, seed: Path, alone: Records, name: str) -> None:
    assert deviation(run(tmp_path, LAYOUTS[name], seed), alone) < TOLERANCE


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
