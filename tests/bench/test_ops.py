"""`megalodon bench` without a GPU: its arguments, its arithmetic, its checks, its files, and a small run on the CPU."""

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch

from megalodon_plugin.bench import timing
from megalodon_plugin.bench.ops import accuracy, implementations, layer, report, run
from megalodon_plugin.bench.ops.problems import cema_parameters, cema_problem, padded, solve, timestep_norm_problem
from megalodon_plugin.cli import bench
from megalodon_plugin.cli.main import main
from megalodon_plugin.files import write_json
from megalodon_plugin.model import PRESETS

CPU = torch.device("cpu")
BF16 = torch.bfloat16


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench.add_bench(parser.add_subparsers(dest="command", required=True))
    return parser.parse_args(["bench", *arguments])


def made_up_row(op: str, impl: str, shape: tuple[int, int, int], times: float = 2.0, dtype: str = "bfloat16") -> dict:
    floor = report.floor_ms(2, shape, 2, 3.0)
    return {
        "op": op,
        "impl": impl,
        **dict(zip("BLD", shape, strict=True)),
        "dtype": dtype,
        "fwd_ms": times * floor,
        "fwd_bwd_ms": 2.5 * times * floor,
        "floor_fwd_ms": floor,
        "floor_fwd_bwd_ms": 2.5 * floor,
        "extra_mib": 1.0,
    }


def made_up_report(rows: list[dict]) -> dict:
    about = {"gpu": "no GPU", "torch": "2", "commit": "abc", "date": "2026-01-02T03:04:05+00:00", "copy_tb_s": 3.0}
    return {**about, "rows": rows}


# The command line


def test_defaults_of_the_options() -> None:
    known = parse("ops")
    assert (known.only, known.shapes, known.commit, known.golden) == (None, None, None, None)
    assert not (known.quick or known.layer or known.profile or known.accuracy_only)


def test_shapes_are_read() -> None:
    assert parse("ops", "--shapes", "8x4096x1024", "1x3x5").shapes == [(8, 4096, 1024), (1, 3, 5)]


@pytest.mark.parametrize("text", ["8x4096", "8x-1x3", "0x1x1", "axbxc", "1x2x3x4", ""])
def test_what_is_no_shape_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("ops", "--shapes", text)
    assert "8x4096x1024" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_nothing_is_done(tmp_path) -> None:
    with pytest.raises(SystemExit, match="needs a CUDA GPU"):
        main(["bench", "ops", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_plot_needs_the_numbers(tmp_path) -> None:
    with pytest.raises(SystemExit, match=r"must hold ops\.json"):
        main(["bench", "plot", str(tmp_path)])


# Arithmetic


def test_floor_is_the_time_to_move_the_activations() -> None:
    shape = (8, 4096, 4096)
    assert report.floor_ms(2, shape, 2, 3.0) == pytest.approx(0.179, abs=5e-4)
    assert report.floor_ms(5, shape, 2, 3.0) == pytest.approx(0.447, abs=5e-4)
    assert report.floor_ms(2, shape, 4, 3.0) == 2 * report.floor_ms(2, shape, 2, 3.0)


def test_the_sweep_keeps_its_tokens_up_to_the_longest_rows() -> None:
    shapes = report.sweep_shapes()
    assert shapes[0] == (128, 256, 4096) and shapes[-1] == (1, 1048576, 4096)
    assert [batch * length for batch, length, _ in shapes] == [32768] * 4 + [65536, 262144, 1048576]


def test_flatness_compares_time_per_element_of_the_sweep() -> None:
    rows = [made_up_row("cema", "cuda", shape) for shape in report.sweep_shapes()]
    assert report.flatness(rows, "cema") == pytest.approx(0)
    rows[3]["fwd_ms"] *= 1.2
    others = [made_up_row("cema", "torch", (8, 4096, 4096), 99), made_up_row("cema", "cuda", (8, 4096, 1024), 99)]
    assert report.flatness(rows + others, "cema") == pytest.approx(0.2)
    assert report.flatness(rows, "timestep_norm") is None


def test_groups_follow_the_presets() -> None:
    for preset in (PRESETS["released_200M"], PRESETS["released_7.1B"]):
        assert implementations.norm_groups(preset.dim) == preset.norm_groups


def test_flops_of_a_layer() -> None:
    cfg = layer.layer_config(64)
    d, z, v, f = cfg.dim, cfg.z_dim, cfg.value_dim, cfg.ffn_dim
    weights = d * z + 2 * d * v + d * d + v * d + 2 * d * f
    assert layer.layer_flops(cfg, 1000) == 2 * weights + (cfg.chunk_size + 1) * (z + v)


# Accuracy


def test_rounding_the_truth_is_one_unit() -> None:
    truth = torch.randn(500, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    error, largest = accuracy.rounding_errors(truth, BF16)
    assert accuracy.relative_errors(truth.bfloat16(), truth) == (error, largest)
    assert 1e-3 < error < 2.3e-3  # 2^-8 / sqrt(12) of a number between 1 and 2, and a little less on average
    assert accuracy.relative_errors(truth * 1.5, truth)[0] == pytest.approx(0.5)


def test_an_error_against_zero_is_absolute() -> None:
    assert accuracy.relative_errors(torch.full((4,), 3.0), torch.zeros(4)) == (6.0, 3.0)


@pytest.mark.parametrize("op", bench.OPS)
@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
def test_the_torch_path_passes_its_own_check(op: str, dtype: torch.dtype) -> None:
    for case in accuracy.standard_cases(op, dtype, CPU, large=False):
        rows = accuracy.judge(case, mode="off")
        assert {row["quantity"] for row in rows} >= {"y", "dx"}
        assert all(row["ok"] for row in rows), case.name
        if dtype == torch.float32:
            assert all(row["ratio"] == 1 for row in rows)
        else:
            assert max(row["ratio"] for row in rows) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("value", [1 + 2.0**-7, float("nan")])
def test_a_wrong_result_is_not_ok(value: float) -> None:
    case = accuracy.Case("cema", "wrong", [lambda: cema_problem((1, 9, 4), 2, BF16, CPU)])

    def wrong(x, *parameters, **others):
        from megalodon_plugin.bench.ops.problems import call_cema

        found = call_cema(x, *parameters, **others)
        return found | {"h": found["h"] * value}

    ok = {row["quantity"]: row["ok"] for row in accuracy.judge(case, mode="off", call=wrong)}
    assert ok["y"] and not ok["h"]


def test_slow_decays_are_slow_and_extreme_ones_reach_the_ends() -> None:
    slow, extreme = (cema_parameters(16, 8, 0, decays) for decays in ("slow", "extreme"))
    lost = torch.sigmoid(slow["alpha"].double()) * torch.sigmoid(slow["delta"].double())
    assert lost.min() < 1e-6 and 1e-3 < lost.max() < 0.1
    assert {-40.0, 40.0} <= set(extreme["alpha"].unique().tolist())
    with pytest.raises(ValueError, match="`decays` must be one of"):
        cema_parameters(4, 2, 0, "none")


def test_problems_are_seeded_and_pad_with_nan() -> None:
    first, second = (padded(timestep_norm_problem((2, 40, 8), 2, BF16, CPU, seed=3)) for _ in range(2))
    assert torch.equal(first.weights["y"], second.weights["y"])
    mask = first.options["padding_mask"]
    assert mask[-1].all() and not mask[0].all()
    assert torch.equal(first.arguments["x"].isnan().all(-1), mask)


# References


@pytest.mark.parametrize("at_once", [2**28, 3 * 16 * 33])
def test_the_fft_path_computes_cema(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the powers of q are made a few orders at a time."""
    monkeypatch.setattr(implementations, "MOST_POWERS", at_once)
    problem = cema_problem((2, 33, 16), 8, torch.float32, CPU, state=False)
    found = solve(problem, torch.float64, lambda *, cema_input, **a: {"y": implementations.cema_fft(*a.values())})
    for name, want in solve(problem, torch.float64).items():
        if name != "h":
            torch.testing.assert_close(found[name], want, rtol=1e-9, atol=1e-9)


def test_the_plain_norm_computes_timestep_norm() -> None:
    problem = timestep_norm_problem((2, 33, 16), 4, torch.float32, CPU, state=False)

    def plain(*, groups, **arguments):
        return {"y": implementations.timestep_norm_plain(*arguments.values(), groups)}

    found = solve(problem, torch.float64, plain)
    for name, want in solve(problem, torch.float64).items():
        if name in found:
            torch.testing.assert_close(found[name], want, rtol=1e-9, atol=1e-9)


def test_an_unknown_implementation_is_refused() -> None:
    with pytest.raises(ValueError, match="`impl` must be an implementation of timestep_norm, but is 'fft'"):
        implementations.implementation("timestep_norm", "fft", 64)


# Files


def test_report_is_written_whole_and_drawn(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        made_up_row(op, impl, shape, times)
        for op in bench.OPS
        for shape in run.MAIN_SHAPES
        for impl, times in (("cuda", 2.0), ("compiled", 9.0), ("torch", 30.0))
    ]
    rows += [made_up_row(op, "cuda", shape) for op in bench.OPS for shape in report.sweep_shapes()]
    rows.append(made_up_row("layer", "cuda", (8, 4096, 4096)))
    write_json(made_up_report(rows), tmp_path / "ops.json")
    main(["bench", "plot", str(tmp_path)])
    assert (tmp_path / "ops.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "ops.json").read_text())["rows"] == rows
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ops.json", "ops.png"]
    with pytest.raises(ValueError, match="none to draw"):
        report.draw(made_up_report(rows[-1:]), tmp_path / "none.png")


def test_results_of_before_are_drawn(tmp_path) -> None:
    results = json.loads((Path(__file__).resolve().parents[2] / "kernels/results/h100_ops.json").read_text())
    report.draw(results, tmp_path / "ops.png")
    assert (tmp_path / "ops.png").read_bytes().startswith(b"\x89PNG")
    assert len(report.speed_table(results["rows"]).splitlines()) == len(results["rows"]) + 2


def test_tables_show_multiples_and_dashes() -> None:
    text = report.speed_table([made_up_row("cema", "cuda", (8, 4096, 1024), 2.5)])
    lines = text.splitlines()
    assert lines[0].split()[:5] == ["op", "impl", "B", "L", "D"]
    assert lines[2].split().count("2.50") == 2
    assert "-" in lines[2].split()


# A run


def small_run(tmp_path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> dict:
    monkeypatch.setattr(run, "MAIN_SHAPES", ((2, 16, 8), (1, 32, 16)))
    monkeypatch.setattr(run, "CEMA_ORDER", 2)
    monkeypatch.setattr(run, "sweep_shapes", lambda: [(2, 16, 8), (1, 40, 8)])
    options = bench.options_of(run.OpsOptions, parse("ops", "--out", str(tmp_path), *arguments))
    run.Bench(options, CPU, kernels="off", small=True).run()
    return json.loads((tmp_path / "ops.json").read_text())


def test_a_run_writes_what_it_measured(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "REFERENCES", {"cema": ("fft",), "timestep_norm": ("torch",)})
    results = small_run(tmp_path, monkeypatch, "--commit", "abc", "--layer")
    assert results["commit"] == "abc"
    assert {"device", "torch", "date", "copy_tb_s", "matmul_tflops", "rows", "accuracy", "cpu"} <= results.keys()
    names = [(row["op"], row["impl"], row["B"], row["L"], row["D"], row["dtype"]) for row in results["rows"]]
    assert len(names) == len(set(names))
    assert ("cema", "fft", 1, 32, 16, "bfloat16") in names and ("timestep_norm", "cuda", 1, 40, 8, "bfloat16") in names
    assert ("cema", "cuda", 2, 16, 8, "float32") in names and ("layer", "torch", 2, 40, 64, "bfloat16") in names
    for row in results["rows"]:
        assert row["fwd_bwd_ms"] > 0 and row["fwd_ms"] > 0 and row["extra_mib"] == 0
        if row["op"] != "layer":
            assert row["floor_fwd_bwd_ms"] == pytest.approx(2.5 * row["floor_fwd_ms"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ops.json", "ops.png"]


def test_without_matplotlib_the_numbers_are_written(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    results = small_run(tmp_path, monkeypatch, "--quick", "--only", "timestep_norm", "--shapes", "1x9x8")
    assert [row["impl"] for row in results["rows"]] == ["cuda"]
    assert not (tmp_path / "ops.png").exists() and "no picture" in capsys.readouterr().out


def test_what_is_wrong_is_not_timed(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "LIMITS", dict.fromkeys(accuracy.LIMITS, 0.5))
    monkeypatch.setattr(run.Bench, "ceilings", lambda self: pytest.fail("timed"))
    with pytest.raises(SystemExit, match=r"nothing is timed.*cema \(bfloat16.*: y\)"):
        small_run(tmp_path, monkeypatch, "--only", "cema")
    judged = json.loads((tmp_path / "accuracy.json").read_text())["accuracy"]
    assert not all(row["ok"] for row in judged) and not (tmp_path / "ops.json").exists()


def test_measuring_takes_the_sets_in_turn() -> None:
    seen = []

    def function(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.data_ptr())
        return x * 2

    sets = [([torch.randn(4).requires_grad_()], torch.ones(4)) for _ in range(3)]
    found = timing.measure(function, sets, CPU, seconds=0.001)
    assert seen[:3] == [inputs[0].data_ptr() for inputs, _ in sets]
    assert found["graph"] == [] and found["extra_mib"] == 0
