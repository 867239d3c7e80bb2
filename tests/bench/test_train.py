"""`megalodon bench train` without a GPU: a small run of both models through the host, its files, its arithmetic."""

import json
from pathlib import Path

import pytest

from megalodon_plugin.bench.train.job import TrainingJob
from megalodon_plugin.bench.train.report import draw, ratio, table
from megalodon_plugin.cli.main import main

from support.processes import run_python

RESULTS = sorted((Path(__file__).resolve().parents[2] / "docs/results").glob("train*.json"))


def row(model: str, speed: float, memory: float, length: int = 64) -> dict:
    about = {"size": "debug", "model": model, "batch": 2, "length": length}
    return about | {"tokens_per_s": speed, "peak_gib": memory, "mfu": 0.5}


def test_both_models_train_and_the_files_say_so(tmp_path: Path) -> None:
    options = ["--lengths", "64", "128", "--tokens", "128", "--steps", "4"]
    command = ["bench", "train", "--sizes", "debug", "--eager", "--against", "llama", *options]
    files = ["--longest-step", "1000", "--out", str(tmp_path), "--commit", "abc"]
    done = run_python("-m", "megalodon_plugin.cli.main", *command, *files)
    assert done.returncode == 0, done.stdout[-3000:]
    results = json.loads((tmp_path / "train.json").read_text())
    assert (results["commit"], results["compiled"], results["dtype"]) == ("abc", False, "float32")
    found = [(r["model"], r["batch"], r["length"]) for r in results["rows"]]
    assert found == [("megalodon", 2, 64), ("llama", 2, 64), ("megalodon", 1, 128), ("llama", 1, 128)]
    assert all(r["tokens_per_s"] > 0 for r in results["rows"])
    megalodon, llama = results["rows"][:2]
    assert abs(megalodon["parameters"] / llama["parameters"] - 1) < 0.02
    # 2 a weight and 3 passes, and the causal pairs of each layer: 4 dim (L + 1) / 2.
    dim, hidden, layers = 128, 512, 4
    matrices = layers * (4 * dim * dim + 3 * dim * hidden) + dim * 32000
    assert llama["gflop_per_token"] == pytest.approx((6 * matrices + 3 * layers * 4 * dim * 65 / 2) / 1e9)
    assert (tmp_path / "train.png").stat().st_size > 1000
    assert "to Llama" in done.stdout


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_results_of_before_are_drawn(path: Path, tmp_path: Path) -> None:
    results = json.loads(path.read_text())
    draw(results, tmp_path / "train.png")
    assert (tmp_path / "train.png").stat().st_size > 1000
    assert len(table(results["rows"]).splitlines()) == len(results["rows"])


def test_ratios_are_of_the_same_size_and_length() -> None:
    rows = [row("megalodon", 300, 11), row("llama", 200, 10), row("megalodon", 100, 5, 128)]
    assert ratio(rows, rows[0]) == (1.5, 1.1)
    assert ratio(rows, rows[1]) == ratio(rows, rows[2]) == (None, None)
    assert "1.500  1.100" in table(rows, ratios=True)


def test_a_row_that_failed_is_shown_and_has_no_ratio() -> None:
    failed = {"size": "debug", "model": "llama", "batch": 1, "length": 64, "failed": "out of memory"}
    rows = [row("megalodon", 300, 11), failed]
    assert ratio(rows, rows[0]) == (None, None)
    assert "out of memory" in table(rows)


def test_a_job_is_the_hosts_command_line() -> None:
    arguments = TrainingJob("megalodon", (("flavor", "debug"), ("n_layers", 2)), 3, 64).arguments(5, "folder")
    pairs = dict(zip(arguments[1::2], arguments[2::2], strict=True))
    assert pairs["--megalodon.n_layers"] == "2"
    assert pairs["--model.flavor"] == "debug"
    assert (pairs["--training.local_batch_size"], pairs["--training.steps"]) == ("3", "5")
    assert pairs["--activation_checkpoint.selective_ac_option"] == "op"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lengths", "0"], "`--lengths` must be positive"),
        (["--tokens", "-1"], "`--tokens` must be positive"),
        (["--steps", "3"], "`--steps` must be more than the 3 that are not counted, but is 3"),
    ],
)
def test_numbers_out_of_range_are_refused(options: list[str], message: str, tmp_path) -> None:
    with pytest.raises(SystemExit, match=message):
        main(["bench", "train", "--out", str(tmp_path / "out"), *options])
    assert not (tmp_path / "out").exists()
