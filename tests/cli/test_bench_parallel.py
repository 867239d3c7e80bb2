"""`megalodon bench parallel` without a GPU: its cases, its arithmetic, and small runs of its parts."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from megalodon_plugin.cli.bench_parallel import SMALL
from megalodon_plugin.cli.bench_parallel_cases import (
    ONE,
    Case,
    default_layouts,
    name_of,
    parse_layout,
    reason_against,
    simulated_cases,
    strong,
    weak,
)
from megalodon_plugin.cli.bench_parallel_exchanges import differences
from megalodon_plugin.cli.bench_parallel_launch import command_of_a_rank, run_orders, started, wait_for
from megalodon_plugin.cli.bench_parallel_rank import Order
from megalodon_plugin.cli.bench_parallel_report import check_line, draw, table
from megalodon_plugin.cli.bench_parallel_rows import compare, deviation, held_against, merged
from megalodon_plugin.cli.bench_parallel_simulate import simulated_row
from megalodon_plugin.cli.bench_parallel_trace import MARK, communication
from megalodon_plugin.cli.bench_train_job import LEAST_STEPS, Job
from megalodon_plugin.cli.main import main
from megalodon_plugin.parallel.traffic import Exchange, Links

from tiny_job import environment


@pytest.mark.parametrize("name", ["1", "cp 8", "fsdp 2 x cp 4", "replicate 2 x fsdp 4 x cp 2 x tp 2 x pp 2"])
def test_layouts_have_names(name: str) -> None:
    assert name_of(parse_layout(name)) == name


@pytest.mark.parametrize("text", ["", "cp", "cp 0", "cp -2", "ring 2", "cp 2 x cp 2", "cp 2, tp 2", "cp ²"])
def test_what_is_no_layout_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a layout must be degrees of"):
        parse_layout(text)


def test_default_layouts_fit_the_gpus_and_hold_every_dimension_alone() -> None:
    assert default_layouts(1) == [ONE]
    names = [name_of(layout) for layout in default_layouts(7)]
    assert {"cp 2", "tp 4", "pp 4", "fsdp 4", "fsdp 2 x cp 2"} <= set(names)
    assert max(parse_layout(name).gpus for name in names) == 4
    assert max(layout.gpus for layout in default_layouts(8)) == 8


@pytest.mark.parametrize(
    ("name", "rows", "length", "local"),
    [
        ("1", 1, 100, 1),
        ("cp 8", 1, 800, 1),
        ("fsdp 8", 8, 100, 1),
        ("fsdp 2 x cp 4", 2, 400, 1),
        ("tp 4", 4, 100, 4),
        ("fsdp 2 x pp 4", 8, 100, 4),
    ],
)
def test_weak_scaling_gives_every_gpu_as_many_tokens(name: str, rows: int, length: int, local: int) -> None:
    case = weak("debug", "megalodon", parse_layout(name), 100)
    assert (case.rows, case.length, case.local_rows) == (rows, length, local)
    assert case.tokens == 100 * case.layout.gpus
    assert reason_against(case, mixed_precision=True) is None


@pytest.mark.parametrize(
    ("name", "local"), [("1", 2), ("cp 2", 4), ("fsdp 2", 2), ("fsdp 4", 2), ("fsdp 8", 1), ("tp 4", 8), ("pp 4", 8)]
)
def test_strong_scaling_accumulates_what_a_gpu_cannot_take_at_once(name: str, local: int) -> None:
    case = strong("debug", "megalodon", parse_layout(name), length=50, tokens_per_step=400, tokens_per_gpu=100)
    assert (case.rows, case.length, case.local_rows) == (8, 50, local)


def test_what_is_not_timed_is_told() -> None:
    def reason(name: str, length: int, model: str = "megalodon", mixed_precision: bool = True) -> str | None:
        case = strong("debug", model, parse_layout(name), length, 400, 100)
        return reason_against(case, mixed_precision)

    assert reason("cp 8", 1000) is None
    assert reason("fsdp 2", 1000) == "1 rows do not go round 2 data parallel ranks of fsdp 2"
    assert reason("pp 4", 200) == "2 rows are fewer than the 4 stages of pp 4"
    assert reason("tp 2", 50) is None
    assert reason("tp 2", 50, "llama") == "the host runs Llama under tp 2 in float32, without FSDP"
    assert reason("tp 2", 50, "llama", mixed_precision=False) is None
    assert reason("fsdp 2 x tp 2", 50, "llama") is None


def row(layout: str, speed: float, scaling: str = "weak", **more: Any) -> dict[str, Any]:
    found = {"scaling": scaling, "size": "debug", "model": "megalodon", "layout": layout, "tokens_per_s": speed}
    found |= {"gpus": parse_layout(layout).gpus, "rows": 2, "length": 64, "tokens_per_gpu": 64}
    return found | {"losses_and_norms": [[2.0, 1.0]]} | more


def test_rows_are_compared_with_one_gpu_and_with_fsdp() -> None:
    rows = [row("1", 100.0), row("fsdp 2", 190.0), row("cp 2", 180.0), row("cp 2", 1.0, tokens_per_gpu=128)]
    compare(rows)
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
    compare(rows)
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


def test_what_a_rank_tells_goes_before_what_its_end_looks_like() -> None:
    own = {"model": "megalodon", "failed": "a step takes more than 1 s"}
    assert merged([{"failed": "ended with status 1"}, own]) == {"failed": "a step takes more than 1 s"}


def test_deviation_is_the_largest_and_there_is_none_of_what_is_missing() -> None:
    assert deviation([[2.0, 1.1]], [[2.0, 1.0]]) == pytest.approx(0.1)
    assert deviation([[2.0, 1.0], [float("nan"), 1.0]], [[2.0, 1.0], [1.9, 1.0]]) is None
    assert deviation([[2.0, 1.0]], [[2.0, 1.0], [1.0, 1.0]]) is deviation([], []) is None


def test_a_check_fails_where_steps_are_missing_and_where_they_differ() -> None:
    def check(*steps: list[float]) -> dict[str, Any]:
        return held_against([{"losses_and_norms": list(steps)}], [[2.0, 1.0], [1.9, 1.0]], 1e-5)

    assert "failed" not in check([2.0, 1.0], [1.9, 1.0])
    assert "off by 1.0e-01" in check([2.0, 1.0], [1.9, 1.1])["failed"]
    assert "must be those of 2 steps" in check([2.0, 1.0])["failed"]


def test_exchanges_that_differ_from_the_formulas_are_told() -> None:
    planned = {"cp": {"all-gather": [4.0, 64.0]}, "fsdp": {"all-gather": [2.0, 100.0]}}
    padded = {"cp": {"all-gather": [4.0, 64.0]}, "fsdp": {"all-gather": [2.0, 108.0]}}
    assert differences(padded, planned) == []
    assert len(differences({"cp": {"all-gather": [4.0, 65.0]}, "fsdp": planned["fsdp"]}, planned)) == 1
    assert len(differences({"cp": planned["cp"], "fsdp": {"all-gather": [3.0, 100.0]}}, planned)) == 1
    assert len(differences({}, planned)) == 2
    assert len(differences(planned, {})) == 2


def kernel(name: str, begin: float, end: float, **arguments: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": "kernel", "name": name, "ts": begin, "dur": end - begin, "args": arguments}


def message(collective: str, numbers: int, dtype: str = "Float") -> dict[str, Any]:
    parts = {"In msg nelems": numbers, "Out msg nelems": 2 * numbers}
    if "reduce_scatter" in collective:
        parts = {"In msg nelems": 2 * numbers, "Out msg nelems": numbers}
    return {"Collective name": collective, "dtype": dtype, "Group size": 2} | parts


def exchange(dimension: str, kind: str, part: int) -> Exchange:
    return Exchange(dimension, "", kind, 2, 1, part, 1, 1, 1, 2)


def test_communication_is_what_nccl_runs_and_exposed_where_nothing_else_does() -> None:
    known = [exchange("fsdp", "all-gather", 2000), exchange("cp", "all-gather", 128), exchange("pp", "send", 64)]
    events = [
        kernel("gemm", -50, -10),
        kernel("gemm", 0, 40),
        kernel("gemm", 30, 50),  # overlaps the one before: 0 to 50 is busy
        kernel("ncclDevKernel_AllGather", 40, 60, **message("_allgather_base", 1010, "BFloat16")),  # padded by 1%
        kernel("ncclDevKernel_AllGather", 55, 70, **message("allgather_into_tensor_coalesced", 32)),
        kernel("norm", 75, 90),
        kernel("ncclDevKernel_SendRecv", 90, 95),
        kernel("ncclDevKernel_AllReduce", 95, 100, **message("allreduce", 1)),
        {"ph": "X", "cat": "cpu_op", "name": "nccl:all_gather", "ts": 0, "dur": 500},
        {"ph": "X", "cat": "user_annotation", "name": MARK, "ts": -5, "dur": 500},
        {"ph": "i", "name": "mark", "ts": 1000},
    ]
    found = communication(events, known)
    assert (found["share"], found["exposed"], found["idle"]) == pytest.approx((0.40, 0.30, 0.05))  # 40-70, 90-100
    assert found["seconds"] == pytest.approx(100e-6)
    shares = {name: (of["share"], of["exposed"]) for name, of in found["dimensions"].items()}
    assert shares == {"fsdp": (0.2, 0.1), "cp": (0.15, 0.15), "pp": (0.05, 0.05), "other": (0.05, 0.05)}
    assert found["dimensions"]["cp"]["durations"] == pytest.approx([15e-6])
    assert [found["dimensions"][name]["ranks"] for name in ("cp", "pp")] == [[2], [0]]
    assert communication(events)["dimensions"].keys() == {"other"}
    assert communication([])["share"] == 0.0


@pytest.mark.parametrize(
    ("collective", "numbers", "dimension"),
    [
        ("reduce_scatter_tensor_coalesced", 100, "tp"),
        ("_reduce_scatter_base", 960, "fsdp"),
        ("_reduce_scatter_base", 800, "other"),  # too few for any padding
        ("allreduce", 32, "tp"),  # the whole tensor, of which a part is half
        ("_allgather_base", 100, "other"),
    ],
)
def test_a_message_belongs_to_the_exchange_of_its_kind_and_size(collective: str, numbers: int, dimension: str) -> None:
    known = [
        exchange("fsdp", "reduce-scatter", 4000),
        exchange("tp", "reduce-scatter", 400),
        exchange("tp", "all-reduce", 64),
    ]
    found = communication([kernel("ncclDevKernel", 0, 1, **message(collective, numbers))], known)
    assert found["dimensions"].keys() == {dimension}


def test_what_a_message_takes_without_waiting_is_the_time_of_the_rank_that_comes_last() -> None:
    def rank(*durations: float, size: int = 2) -> dict[str, Any]:
        of_cp = {"share": sum(durations), "exposed": 0.0, "durations": list(durations), "ranks": [size]}
        found = {"share": 0.1, "exposed": 0.0, "idle": 0.0, "seconds": 2.0, "dimensions": {"cp": of_cp}}
        return {"seconds": 1.0, "losses_and_norms": [[2.0, 1.0]], "communication": found}

    of_cp = merged([rank(0.5, 0.1), rank(0.2, 0.3)])["communication"]["dimensions"]["cp"]
    assert of_cp == {"share": 0.6, "exposed": 0.0, "transfer": pytest.approx(0.15), "messages": 2}
    # Where ranks have other messages, and where not all of them share one, nobody is known to be last.
    assert merged([rank(0.5, 0.1), rank(0.2)])["communication"]["dimensions"]["cp"]["transfer"] is None
    several = [rank(0.5, size=2)] * 4
    assert merged(several)["communication"]["dimensions"]["cp"]["transfer"] is None


def small_job(name: str, rows: int = 8, **more: Any) -> Job:
    layout = parse_layout(name)
    how: dict[str, Any] = {"compiled": False, "low_precision": False, "layout": layout, "rows": rows}
    return Job("megalodon", tuple(SMALL.items()), rows // layout.data, 128, **how | more)


def test_orders_survive_their_file() -> None:
    order = Order(small_job("fsdp 2 x cp 4"), 3, count=True)
    assert Order.from_dict(json.loads(json.dumps(order.as_dict()))) == order


def test_one_rank_alone_is_measured_and_its_links_simulated(tmp_path: Path) -> None:
    job = small_job("fsdp 4 x cp 2", rows=4, alone=True)
    command = [sys.executable, *command_of_a_rank([Order(job, 4)], tmp_path)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    measured = json.loads((tmp_path / "0.0.json").read_text())
    assert measured["tokens_per_s"] * measured["seconds"] == pytest.approx(4 * 128)  # of all eight ranks
    case = Case("simulated", "debug", "megalodon", job.layout, 4, 128, 1)
    found = simulated_row(case, job, measured, Links())
    assert found["simulated"]
    assert found["seconds"] == pytest.approx(measured["seconds"] + sum(found["exposed"].values()))
    # 2 x 8 norms and 8 CEMAs forward and backward, and the final norm: two microseconds-long messages of 1 doubling.
    assert found["exposed"]["cp"] == pytest.approx((2 * 8 * 2 + 2) * 10e-6, rel=0.01)
    assert 0 < found["exposed"]["fsdp"] < found["exchanged"]["fsdp"]


def test_simulated_cases_begin_with_one_gpu_and_say_so() -> None:
    cases = simulated_cases(["debug"], [8, 256], 1024)
    assert [name_of(case.layout) for case in cases][:3] == ["1", "fsdp 8", "cp 8"]
    assert {case.scaling for case in cases} == {"simulated"}
    assert {case.tokens // case.layout.gpus for case in cases} == {1024}


def command(out: Path, *options: str) -> list[str]:
    return ["bench", "parallel", "--sizes", "debug", "--eager", "--out", str(out), "--commit", "abc", *options]


def test_the_command_checks_layouts_against_one_process_and_the_formulas(tmp_path: Path) -> None:
    code = "from megalodon_plugin.cli.main import main; main()"
    options = command(tmp_path, "--gpus", "2", "--layouts", "cp 2", "--scaling", "none")
    done = subprocess.run(
        [sys.executable, "-c", code, *options],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
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


def test_a_layout_that_fails_its_check_is_told_and_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    timed: list[str] = []

    def run_nothing(orders: list[Order], timeout: float, log: Path) -> Iterator[list[dict[str, Any]]]:
        for order in orders:
            layout = order.job.layout
            name = name_of(layout)
            if dict(order.job.options) != SMALL:
                timed.append(name)
                yield [{"seconds": 1.0, "tokens_per_s": 1.0, "losses_and_norms": [[2.0, 1.0]]}] * layout.gpus
                continue
            found = {"losses_and_norms": [[2.1 if "cp" in name else 2.0, 1.0]], "exchanges": {}, "differences": []}
            extra = ["pp send: 3 messages, 8 bytes, but by the formulas 2, 8"] if "pp" in name else []
            yield [found, *[found | {"differences": extra}] * (layout.gpus - 1)]

    monkeypatch.setattr("megalodon_plugin.cli.bench_parallel.run_orders", run_nothing)
    layouts = ["--layouts", "cp 2", "tp 2", "pp 2", "--scaling", "weak"]
    with pytest.raises(SystemExit) as ended:
        main(command(tmp_path, "--gpus", "2", *layouts))
    assert ended.value.code == 1
    assert timed == ["1", "tp 2"]
    told = capsys.readouterr().out
    assert "FAILED: losses or gradient norms are off by 5.0e-02" in told
    assert "FAILED: rank 1: pp send: 3 messages" in told


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


def test_orders_are_carried_out_in_turn_and_go_on_after_one_that_fails(tmp_path: Path) -> None:
    wrong = small_job("cp 2", rows=2)
    wrong = replace(wrong, length=120)  # not whole chunks for two ranks
    good = Order(small_job("cp 2", rows=2), 4)
    slow = replace(good, longest_step=1e-6)
    short = replace(good, steps=50, enough=1e-6)
    one, failed, too_slow, last = run_orders([good, Order(wrong, 4), slow, short], 120, tmp_path / "log")
    assert [len(ranks) for ranks in (one, failed, too_slow, last)] == [2] * 4
    assert all("must be a multiple of" in rank["failed"] for rank in failed)
    assert merged(too_slow) == {"failed": "a step takes more than 1e-06 s"}
    assert [rank["steps"] for rank in one] == [1, 1]
    assert [rank["steps"] for rank in last] == [LEAST_STEPS] * 2
    assert [rank["losses_and_norms"] for rank in one] == [rank["losses_and_norms"] for rank in last]


def test_a_process_that_fails_or_hangs_is_told_in_a_line_and_leaves_none_behind(tmp_path: Path) -> None:
    def reason(code: str, timeout: float = 60) -> str | None:
        (tmp_path / "log").unlink(missing_ok=True)
        with started([sys.executable, "-c", code, str(tmp_path)], tmp_path, tmp_path / "log") as process:
            found = wait_for([tmp_path / "result"], process, timeout, tmp_path / "log")
        assert not process.is_running()
        return found

    assert reason("raise ValueError('no such thing')") == "ValueError: no such thing"
    assert reason("raise SystemExit(3)") == "ended with status 3"
    # A child in a session of its own, as a rank of torchrun is.
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


def test_pictures_show_rows_that_ran_and_lines_say_what_checks_found(tmp_path: Path) -> None:
    rows = [row("1", 100.0), row("cp 2", 180.0), row("1", 100.0, "strong"), row("cp 2", 150.0, "strong")]
    rows.append(row("fsdp 8", 700.0, "simulated", seconds=0.11, work_seconds=0.1))
    failed = row("tp 2", 0.0)
    del failed["tokens_per_s"]
    rows.append(failed | {"failed": "out of memory"})
    compare(rows)
    results = {"rows": rows, "device": "GPU", "torch": "2", "dtype": "bfloat16"}
    draw(results, tmp_path / "bars.png")
    rows += [row("cp 4", 340.0), row("cp 4", 270.0, "strong")]
    compare(rows)
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


def test_after_a_simulated_rank_that_fails_the_next_one_begins_anew(tmp_path: Path) -> None:
    code = """
import dataclasses, json, sys
from megalodon_plugin.cli.bench_parallel_rank import Order, run_order
first = Order.from_dict(json.loads(sys.argv[1]))
print(run_order(dataclasses.replace(first, longest_step=1e-6))["failed"])
other = dataclasses.replace(first.job, layout=dataclasses.replace(first.job.layout, cp=4))
print(run_order(dataclasses.replace(first, job=other))["tokens_per_s"] > 0)
"""
    order = json.dumps(Order(small_job("cp 2", rows=2, alone=True), 4).as_dict())
    done = subprocess.run(
        [sys.executable, "-c", code, order], env=environment(), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-2:] == ["a step takes more than 1e-06 s", "True"]
