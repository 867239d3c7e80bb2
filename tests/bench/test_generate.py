"""`megalodon bench generate` without a GPU: a small run of both models, its files, its refusals."""

import json
from pathlib import Path

import pytest

from megalodon_plugin.bench.generate import GenerateOptions, draw, run_bench_generate
from megalodon_plugin.cli.main import main

RESULTS = Path(__file__).resolve().parents[2] / "docs/results/generate.json"


def test_a_run_writes_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = GenerateOptions(tmp_path, "debug", lengths=(9, 4), batches=(1, 2), steps=2, against="llama", commit="abc")
    run_bench_generate(options)
    results = json.loads((tmp_path / "generate.json").read_text())
    assert (results["commit"], results["flavor"], results["dtype"]) == ("abc", "debug", "float32")
    assert results["parameters"].keys() == {"megalodon", "llama"}
    found = [(row["model"], row["what"], row["batch"], row["context"]) for row in results["rows"]]
    reads = [("megalodon", "read", 1, 4), ("megalodon", "read", 1, 9)]
    decodes = [("megalodon", "decode", batch, context) for context in (9, 1) for batch in (1, 2)]
    assert found == [*reads, *decodes, ("llama", "read", 1, 4), ("llama", "read", 1, 9)]
    assert all(row["tokens_per_s"] > 0 and row["peak_mib"] > 0 for row in results["rows"])
    assert (tmp_path / "generate.png").stat().st_size > 1000
    assert capsys.readouterr().out.count("tokens/s") == len(found)


def test_results_of_before_are_drawn(tmp_path: Path) -> None:
    draw(json.loads(RESULTS.read_text()), tmp_path / "generate.png")
    assert (tmp_path / "generate.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lengths", "0"], "`--lengths` must be positive"),
        (["--batches", "1", "-1"], "`--batches` must be positive"),
        (["--flavor", "no such"], "`--flavor` must be one of .*debug.*, but is 'no such'"),
        (["--flavor", "released_7.1B", "--against", "llama"], "needs a flavor of .*, but `--flavor` is released_7.1B"),
    ],
)
def test_options_out_of_range_are_refused(options: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=message):
        main(["bench", "generate", "--out", str(tmp_path / "out"), *options])
    assert not (tmp_path / "out").exists()
