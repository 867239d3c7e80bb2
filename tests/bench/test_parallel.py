"""`megalodon bench parallel` without a GPU: its scenarios, its arithmetic, and small runs of its parts."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megalodon_plugin.bench.parallel.exchanges import differences
from megalodon_plugin.bench.parallel.matrix import SMALL
from megalodon_plugin.bench.parallel.rank import Task
from megalodon_plugin.bench.parallel.report import check_line, draw, table
from megalodon_plugin.bench.parallel.rows import add_ratios, check_against_single, deviation, merged
from megalodon_plugin.bench.parallel.scenarios import (
    default_layouts,
    refusal_of,
    simulated_scenarios,
    strong,
    weak,
)
from megalodon_plugin.cli.main import main
from megalodon_plugin.parallel.layout import ONE_RANK, Layout

from support.rank_tasks import run_forked


def test_default_layouts_fit_the_gpus_and_hold_every_dimension_alone() -> None:
    assert default_layouts(1) == [ONE_RANK]
    names = [str(layout) for layout in default_layouts(7)]
    assert {"cp 2", "tp 4", "pp 4", "fsdp 4", "fsdp 2 x cp 2"} <= set(names)
    assert max(Layout.parse(name).gpus for name in names) == 4
    assert max(layout.gpus for layout in default_layouts(8)) == 8


@pytest.mark.parametrize(
    ("name", "rows", "length", "local"),
    [
        ("1", 1, 4096, 1),
        ("cp 8", 1, 8 * 4096, 1),
        ("fsdp 8", 8, 4096, 1),
        ("fsdp 2 x cp 4", 2, 4 * 4096, 1),
        ("tp 4", 4, 4096, 4),
        ("fsdp 2 x pp 4", 8, 4096, 4),
    ],
)
def test_weak_scaling_gives_every_gpu_as_many_tokens(name: str, rows: int, length: int, local: int) -> None:
    scenario = weak("7B-width", "megalodon", Layout.parse(name), 4096)
    assert (scenario.rows, scenario.length, scenario.local_rows) == (rows, length, local)
    assert scenario.tokens == 4096 * scenario.layout.gpus
    assert refusal_of(scenario, mixed_precision=True) is None


@pytest.mark.parametrize(
    ("name", "local"), [("1", 2), ("cp 2", 4), ("fsdp 2", 2), ("fsdp 4", 2), ("fsdp 8", 1), ("tp 4", 8), ("pp 4", 8)]
)
def test_strong_scaling_accumulates_what_a_gpu_cannot_take_at_once(name: str, local: int) -> None:
    scenario = strong("debug", "megalodon", Layout.parse(name), length=50, tokens_per_step=400, tokens_per_gpu=100)
    assert (scenario.rows, scenario.length, scenario.local_rows) == (8, 50, local)


def test_what_is_not_timed_says_why() -> None:
    def reason(name: str, length: int, model: str = "megalodon", mixed_precision: bool = True) -> str | None:
        scenario = strong("7B-width", model, Layout.parse(name), length * 4096, 8 * 4096, 2 * 4096)
        return refusal_of(scenario, mixed_precision)

    assert reason("cp 8", 24) is None
    assert "x data parallel ranks = 1 x 2, but is 1" in str(reason("fsdp 2", 24))
    assert "= 1 x 4 under the schedule 1F1B, but is 2" in str(reason("pp 4", 4))
    assert reason("tp 2", 1) is None
    assert reason("tp 2", 1, "llama") == "the host runs Llama under tp 2 in float32, without FSDP"
    assert reason("tp 2", 1, "llama", mixed_precision=False) is None
    assert reason("fsdp 2 x tp 2", 1, "llama") is None


@pytest.mark.parametrize(
    ("size", "model", "name", "reason"),
    [
        ("1.3B", "megalodon", "tp 2", None),
        ("1.3B", "megalodon", "tp 4", "must divide `n_heads` = 2, but is 4"),
        ("7B-width", "megalodon", "pp 4", None),
        ("7B-width", "megalodon", "pp 8", "must be at most 6, so that each stage has at least 1 of"),
        ("7B-width", "llama", "pp 8", "must be at most 6, so that each stage has at least 1 of"),
        ("7B-width", "llama", "fsdp 2 x tp 4", None),
        ("7B-width", "megalodon", "cp 8", None),
        (
            "7B-width",
            "megalodon",
            "cp 16",
            "must be a multiple of `megalodon.chunk_size` x `parallelism.context_parallel_degree` = 4096 x 16",
        ),
    ],
)
def test_what_a_models_sizes_do_not_allow_is_refused(size: str, model: str, name: str, reason: str | None) -> None:
    layout = Layout.parse(name)
    found = refusal_of(strong(size, model, layout, 32768, 262144, 32768), mixed_precision=False)
    assert found is None if reason is None else reason in str(found)


def row(layout: str, speed: float, scaling: str = "weak", **more: Any) -> dict[str, Any]:
    found = {"scaling": scaling, "size": "debug", "model": "megalodon", "layout": layout, "tokens_per_s": speed}
    found |= {"gpus": Layout.parse(layout).gpus, "rows": 2, "length": 64, "tokens_per_gpu": 64}
    return found | {"losses_and_norms": [[2.0, 1.0]]} | more


def test_rows_are_compared_with_one_gpu_and_with_fsdp() -> None:
    rows = [row("1", 100.0), row("fsdp 2", 190.0), row("cp 2", 180.0), row("cp 2", 1.0, tokens_per_gpu=128)]
    add_ratios(rows)
    assert [r["efficiency"] for r in rows] == [1.0, 0.95, 0.9, 1.0]
    assert [r.get("to_fsdp") for r in rows] == [None, 1.0, pytest.approx(180 / 190), None]
    assert all("deviation" not in r for r in rows)  # other rows for other numbers of GPUs


def test_strong_rows_are_held_to_the_losses_of_the_fewest_gpus() -> None:
    failed = {name: value for name, value in row("1", 0.0, "strong").items() if name != "tokens_per_s"}
    rows = [
        failed | {"failed": "out of memory"},
        row("cp 2", 150.0, "strong"),
        row("cp 4", 240.0, "strong", losses_and_norms=[[2.002, 1.0]]),
    ]
    add_ratios(rows)
    assert (rows[2]["efficiency"], rows[2]["base_gpus"]) == (0.8, 2)
    assert rows[2]["deviation"] == pytest.approx(1e-3)
    assert "efficiency" not in rows[0]
    assert "out of memory" in table(rows)


def test_ranks_become_one_row() -> None:
    first = {"seconds": 1.0, "tokens_per_s": 10.0, "peak_gib": 3.0, "losses_and_norms": [[-1.0, 0.5]]}
    last = {"seconds": 2.0, "tokens_per_s": 5.0, "peak_gib": 2.0, "losses_and_norms": [[4.0, 0.5]]}
    found = merged([first, last])
    assert (found["tokens_per_s"], found["peak_gib"], found["losses_and_norms"]) == (5.0, 3.0, [[4.0, 0.5]])
    ended = {"failed": "ended with status 1"}
    assert merged([first, ended]) == ended
    assert merged([ended, {"model": "megalodon", "failed": "out of memory"}]) == {"failed": "out of memory"}


def test_a_run_that_has_learnt_nothing_is_no_result() -> None:
    def ranks(*steps: list[float]) -> list[dict[str, Any]]:
        return [{"seconds": 1.0, "tokens_per_s": 10.0, "losses_and_norms": list(steps)}] * 2

    assert "failed" not in merged(ranks([10.0, 1.0], [9.0, 1.0]))
    for wrong in ([10.0, 0.0], [float("nan"), 1.0], [10.0, float("inf")], [-1.0, 1.0]):
        assert "must be positive numbers" in merged(ranks([10.0, 1.0], wrong))["failed"]


def test_a_ranks_own_reason_goes_before_how_it_ended() -> None:
    own = {"model": "megalodon", "failed": "a step takes more than 1 s"}
    assert merged([{"failed": "ended with status 1"}, own]) == {"failed": "a step takes more than 1 s"}


def test_deviation_is_the_largest_and_there_is_none_of_what_is_missing() -> None:
    assert deviation([[2.0, 1.1]], [[2.0, 1.0]]) == pytest.approx(0.1)
    assert deviation([[2.0, 1.0], [float("nan"), 1.0]], [[2.0, 1.0], [1.9, 1.0]]) is None
    assert deviation([[2.0, 1.0]], [[2.0, 1.0], [1.0, 1.0]]) is deviation([], []) is None


def test_a_check_fails_where_steps_are_missing_and_where_they_differ() -> None:
    def check(*steps: list[float]) -> dict[str, Any]:
        return check_against_single([{"losses_and_norms": list(steps)}], [[2.0, 1.0], [1.9, 1.0]], 1e-5)

    assert "failed" not in check([2.0, 1.0], [1.9, 1.0])
    assert "off by 1.0e-01" in check([2.0, 1.0], [1.9, 1.1])["failed"]
    assert "must be those of 2 steps" in check([2.0, 1.0])["failed"]


def test_exchanges_that_differ_from_the_formulas_are_named() -> None:
    planned = {"cp": {"all-gather": [4.0, 64.0]}, "fsdp": {"all-gather": [2.0, 100.0]}}
    padded = {"cp": {"all-gather": [4.0, 64.0]}, "fsdp": {"all-gather": [2.0, 108.0]}}
    assert differences(padded, planned) == []
    assert len(differences({"cp": {"all-gather": [4.0, 65.0]}, "fsdp": planned["fsdp"]}, planned)) == 1
    assert len(differences({"cp": planned["cp"], "fsdp": {"all-gather": [3.0, 100.0]}}, planned)) == 1
    assert len(differences({}, planned)) == 2
    assert len(differences(planned, {})) == 2


def test_simulated_cases_begin_with_one_gpu_and_say_so() -> None:
    scenarios = simulated_scenarios(["debug"], [8, 256], 1024)
    assert [str(scenario.layout) for scenario in scenarios][:3] == ["1", "fsdp 8", "cp 8"]
    assert {scenario.scaling for scenario in scenarios} == {"simulated"}
    assert {scenario.tokens // scenario.layout.gpus for scenario in scenarios} == {1024}


def command(out: Path, *options: str) -> list[str]:
    return ["bench", "parallel", "--sizes", "debug", "--eager", "--out", str(out), "--commit", "abc", *options]


def test_the_command_checks_layouts_against_one_process_and_the_formulas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(tasks: list[Task], timeout: float, log: Path) -> Iterator[list[dict[str, Any]]]:
        if tasks:  # none is timed
            yield from run_forked(tasks, tmp_path / f"{tasks[0].job.layout.gpus} ranks")

    monkeypatch.setattr("megalodon_plugin.bench.parallel.run.run_tasks", run)  # which test_parallel_launch.py tests
    main(command(tmp_path, "--gpus", "2", "--layouts", "cp 2", "--scaling", "none"))
    results = json.loads((tmp_path / "parallel.json").read_text())
    assert (results["backend"], results["commit"], results["dtype"]) == ("gloo", "abc", "float32")
    alone, alone_low, shared, shared_low = results["checks"]
    assert (alone["layout"], alone["exchanges"]) == ("1", {"0": {}})
    assert [row["dtype"] for row in results["checks"]] == ["float32", "bfloat16"] * 2
    assert 0 < shared["deviation"] < 1e-5 < shared_low["deviation"] < 5e-3
    assert alone_low["deviation"] == 0
    assert shared["differences"] == []
    # Eight layers of a norm and a CEMA, and the final norm, each forward and backward.
    assert shared["exchanges"]["1"]["cp"]["all-gather"][0] == 2 * (8 * 2 + 1)
    assert (tmp_path / "parallel.png").stat().st_size > 1000


def test_a_layout_that_fails_its_check_is_reported_and_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    timed: list[str] = []

    def run_nothing(tasks: list[Task], timeout: float, log: Path) -> Iterator[list[dict[str, Any]]]:
        for task in tasks:
            layout = task.job.layout
            name = str(layout)
            if dict(task.job.options) != SMALL:
                timed.append(name)
                yield [{"seconds": 1.0, "tokens_per_s": 1.0, "losses_and_norms": [[2.0, 1.0]]}] * layout.gpus
                continue
            found = {"losses_and_norms": [[2.1 if "cp" in name else 2.0, 1.0]], "exchanges": {}, "differences": []}
            extra = ["pp send: 3 messages, 8 bytes, but by the formulas 2, 8"] if "pp" in name else []
            yield [found, *[found | {"differences": extra}] * (layout.gpus - 1)]

    monkeypatch.setattr("megalodon_plugin.bench.parallel.run.run_tasks", run_nothing)
    layouts = ["--sizes", "1.3B", "--layouts", "cp 2", "tp 2", "pp 2", "--scaling", "weak"]
    with pytest.raises(SystemExit) as ended:
        main(command(tmp_path, "--gpus", "2", *layouts))
    assert ended.value.code == 1
    assert timed == ["1", "tp 2"]
    printed = capsys.readouterr().out
    assert "FAILED: losses or gradient norms are off by 5.0e-02" in printed
    assert "FAILED: rank 1: pp send: 3 messages" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpus", "0"], "`--gpus` must be positive"),
        (["--steps", "3"], "`--steps` must be more than the 3 that are not counted, but is 3"),
        (["--lengths", "64", "0"], "`--lengths` must be positive"),
        (["--longest-step", "0"], "`--longest-step` must be positive"),
        (["--network-gb-s", "0"], "`--network-gb-s` must be positive"),
        (["--layouts", "ring 2"], "a layout must be degrees of"),
        (["--layouts", "cp 4"], "`--layouts` must fit 2 GPUs, but 'cp 4' takes 4"),
        (["--against", "llama"], "`--against llama` needs GPUs"),
    ],
)
def test_wrong_options_are_refused_before_anything_runs(options: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=message):
        main(command(tmp_path / "out", *options))
    assert not (tmp_path / "out").exists()


def test_pictures_show_rows_that_ran_and_lines_say_what_checks_found(tmp_path: Path) -> None:
    rows = [row("1", 100.0), row("cp 2", 180.0), row("1", 100.0, "strong"), row("cp 2", 150.0, "strong")]
    rows.append(row("fsdp 8", 700.0, "simulated", seconds=0.11, work_seconds=0.1))
    failed = row("tp 2", 0.0)
    del failed["tokens_per_s"]
    rows.append(failed | {"failed": "out of memory"})
    add_ratios(rows)
    results = {"rows": rows, "device": "GPU", "torch": "2", "dtype": "bfloat16"}
    draw(results, tmp_path / "bars.png")
    rows += [row("cp 4", 340.0), row("cp 4", 270.0, "strong")]
    add_ratios(rows)
    draw(results, tmp_path / "lines.png")
    assert min((tmp_path / name).stat().st_size for name in ("bars.png", "lines.png")) > 1000
    line = check_line(
        {
            "layout": "cp 2",
            "gpus": 2,
            "dtype": "float32",
            "deviation": 1e-7,
            "exchanges": {"0": {"cp": {"x": [3.0, 4096.0]}}},
        }
    )
    assert "3 messages, 4,096 bytes" in line
