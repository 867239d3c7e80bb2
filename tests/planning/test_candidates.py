"""`megalodon plan`: the layouts it allows, what it prints and writes, its errors; its memory against measured runs."""

import argparse
import json
import math
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from megalodon_plugin.cli.main import main
from megalodon_plugin.cli.options import options_of
from megalodon_plugin.cli.plan import add_plan
from megalodon_plugin.parallel.layout import Layout
from megalodon_plugin.planning.candidates import Candidate, PlanOptions, all_layouts, candidates
from megalodon_plugin.planning.job import load_job
from megalodon_plugin.planning.memory import Stage

from support.tiny_job import write_job

CONFIGS = Path(__file__).parents[2] / "train_configs"
GIB = 2**30


def parse(config: Path, *arguments: str) -> PlanOptions:
    parser = argparse.ArgumentParser()
    add_plan(parser.add_subparsers(dest="command", required=True))
    return options_of(PlanOptions, parser.parse_args(["plan", str(config), *arguments]))


def planned(config: Path, *arguments: str, overrides: list[str] | None = None) -> list[Candidate]:
    options = parse(config, *arguments)
    return candidates(load_job(config, options.seq_len, overrides or []), options)[0]


def status(*arguments: Any) -> Any:
    try:
        main(["plan", *map(str, arguments)])
    except SystemExit as ended:
        return ended.code
    return 0


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Two heads, four groups, two layers, rows of four chunks; 16 rows a step."""
    return write_job(tmp_path, training={"seq_len": 64, "global_batch_size": 16}, compile={"enable": True})


# The layouts


def test_all_products_of_five_degrees() -> None:
    found = list(all_layouts(12))
    assert len(found) == len(set(found)) == math.comb(6, 4) * 5  # of 2 x 2 and of 3, on five places
    assert all(layout.gpus == 12 for layout in found)


def test_the_rules_leave_what_the_adapter_takes(config: Path) -> None:
    """Each layout is asked for by the host's options, as a training job does."""
    from megalodon_plugin.titan import job_rules

    job = load_job(config, None, [])
    allowed = {c.layout for c in planned(config, "--gpus", "8")}
    for layout in all_layouts(8):
        for key, degree in layout.options.items():
            setattr(job.options.parallelism, key.removeprefix("parallelism."), degree)
        assert job_rules.layout_of(job.options) == layout
        try:
            job_rules.check(job.options, job.args, own_trainer=True)
            taken = True
        except ValueError:
            taken = False
        expected = layout.tp <= 2 and layout.cp <= 4 and layout.pp <= 4 and 16 % (4 * layout.data) == 0
        assert (layout in allowed) == taken == expected, layout
    assert (
        {c.tp for c in allowed} == {1, 2}
        and {c.cp for c in allowed} == {1, 2, 4}
        and {c.pp for c in allowed} == {1, 2, 4}
    )


def test_a_job_that_carries_a_state_can_be_planned(config: Path) -> None:
    found = planned(config, "--gpus", "4", overrides=["--megalodon.carry_state"])
    assert {c.layout.data for c in found} == {4}


def test_tensor_parallelism_stays_in_a_node(config: Path) -> None:
    found = planned(config, "--gpus", "4", "--gpus-per-node", "1")
    assert found and {c.layout.tp for c in found} == {1}


def test_no_stages_with_a_shared_embedding(config: Path) -> None:
    found = planned(config, "--gpus", "2", overrides=["--megalodon.tie_embedding", "True"])
    assert found and {c.layout.pp for c in found} == {1}


def test_no_dropout_on_ranks_that_share_a_seed(config: Path) -> None:
    found = planned(config, "--gpus", "2", overrides=["--megalodon.hidden_dropout", "0.1"])
    assert [c.layout for c in found] == [Layout(pp=2)]


def test_stages_are_the_hosts() -> None:
    job = load_job(CONFIGS / "megalodon_7b.toml", None, ["--training.local_batch_size", "8"])
    stages = job.stages(4)
    assert sum(stage.layers for stage in stages) == 32
    assert [stage.in_flight for stage in stages] == [4, 3, 2, 1]
    assert stages[0] == Stage(8, True, False, 4) and stages[3].last
    job.options.parallelism.pipeline_parallel_schedule = "GPipe"
    assert {stage.in_flight for stage in job.stages(4)} == {8}


def test_a_pipeline_of_few_microbatches_idles(config: Path) -> None:
    gpipe = ["--parallelism.pipeline_parallel_schedule", "GPipe"]
    few, many = (
        next(c for c in planned(config, "--gpus", "2", overrides=[*gpipe, *more]) if c.layout.pp == 2)
        for more in (["--training.local_batch_size", "1"], ["--training.local_batch_size", "16"])
    )
    assert few.seconds["idle"] == pytest.approx(few.seconds["compute"])
    assert many.seconds["idle"] == pytest.approx(many.seconds["compute"] / 16)


# Numbers


def test_the_estimate_against_measured_memory() -> None:
    """On one H100, compiled, reserved, as docs/performance.md has it."""
    by_op = ["--activation_checkpoint.mode", "selective", "--activation_checkpoint.selective_ac_option", "op"]
    width_of_7b = ("megalodon_7b.toml", [*by_op, "--megalodon.n_layers", "4"])
    full_200m = ("megalodon_200m.toml", ["--activation_checkpoint.mode", "full", "--megalodon.vocab_size", "32000"])
    for (config, options), rows, length, measured in (
        (width_of_7b, 8, 4096, 28.9),
        (width_of_7b, 1, 131072, 68.8),
        (full_200m, 8, 4096, 5.5),
        (full_200m, 1, 262144, 23.4),
        (full_200m, 1, 1048576, 77.8),
    ):
        batch = ["--training.local_batch_size", str(rows), "--training.seq_len", str(length)]
        (alone,) = planned(CONFIGS / config, "--gpus", "1", overrides=[*options, *batch])
        assert alone.memory.total / GIB == pytest.approx(measured, rel=0.14)
        assert alone.exchanges == [] and alone.lost == 0


def test_the_papers_7b_on_256_gpus() -> None:
    best, *_ = planned(CONFIGS / "megalodon_7b.toml", "--gpus", "256")
    assert best.fits(80) and best.layout.tp == best.layout.pp == 1
    state = best.memory.parameters + best.memory.gradients + best.memory.moments
    assert state * best.layout.shards == pytest.approx(16 * 7_385_817_088, rel=5e-3)  # parts are rounded up


def test_communication_of_slices_does_not_grow_with_their_length() -> None:
    layout, parts = Layout(dp_shard=4, cp=16), []
    for length in (2**18, 2**20):
        options = ("--gpus", "64", "--seq-len", str(length))
        found = planned(CONFIGS / "megalodon_7b.toml", *options, overrides=["--training.global_batch_size", "4"])
        (exchanges,) = (c.exchanges for c in found if c.layout == layout)
        parts.append({e.part for e in exchanges if e.dimension == "cp"})
    assert parts[0] == parts[1] == {64 * 2 * 4, 4096 * 16 * 2 * 4}


def test_the_numbers_of_the_page() -> None:
    lines = (CONFIGS.parent / "docs" / "scaling.md").read_text().splitlines()
    long = ("--seq-len", str(2**20))
    gpipe = ["--parallelism.pipeline_parallel_schedule", "GPipe"]  # 1F1B takes no fewer microbatches than stages
    of_lines = {
        "fsdp 128 x cp 2 (": (Layout(1, 128, 2), ()),
        "fsdp 128 x tp 2 ": (Layout(1, 128, 1, 2), ()),
        "fsdp 64 x tp 4,": (Layout(1, 64, 1, 4), ()),
        "fsdp 128 x pp 2,": (Layout(1, 128, 1, 1, 2), ()),
        "fsdp 4 x cp 64 (": (Layout(1, 4, 64), long),
        "fsdp 4 x cp 16 x tp 4 ": (Layout(1, 4, 16, 4), long),
    }
    found = {
        options: planned(
            CONFIGS / "megalodon_7b.toml",
            *("--gpus", "256", *options),
            overrides=[*gpipe, *(["--training.global_batch_size", "4"] if options else [])],
        )
        for options in ((), long)
    }
    for text, (layout, options) in of_lines.items():
        (line,) = (line for line in lines if text in line)
        (c,) = (c for c in found[options] if c.layout == layout)
        assert ("recommended" in line) == (c is found[options][0])
        sizes = f"| {c.memory.total / GIB:.1f} | {c.seconds['compute']:.2f} s | {c.seconds['exchange']:.2f} s"
        assert sizes in line and f"| {c.lost:.1%} |" in line


# What it prints and writes


def test_refused_layouts_are_counted_by_reason(capsys: pytest.CaptureFixture[str]) -> None:
    """The 7B file has one row a rank, too few for 1F1B, four heads, and rows of eight chunks."""
    options = parse(CONFIGS / "megalodon_7b.toml", "--gpus", "64")
    found, refused = candidates(load_job(options.config, None, []), options)
    assert len(found) + sum(one.layouts for one in refused) == len(list(all_layouts(64))) == 210
    few_rows, heads, chunks, layers = (one.reason for one in refused)
    assert [one.layouts for one in refused] == [105, 35, 15, 1]
    assert "`training.local_batch_size` must be" in few_rows and "1 x 2 under the schedule 1F1B" in few_rows
    assert "2 rows or more" in few_rows and 'schedule` = "GPipe"' in few_rows
    assert "`n_heads` = 4, but is 8; what would work: 1 or 2 or 4" in heads
    assert "4096 x 16" in chunks and "at most 34," in layers
    assert status(options.config, "--gpus", 64) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "Refused: 156 of 210 layouts" in printed
    assert all(f"{one.layouts} {one.reason}" in printed for one in refused)


def test_only_some_schedules_are_estimated(config: Path, tmp_path: Path) -> None:
    for option, value, message in (
        ("schedule", "Interleaved1F1B", "must be 1F1B or GPipe for a plan with stages, but is 'Interleaved1F1B'"),
        ("schedule_csv", str(tmp_path), "schedule_csv` must be empty for a plan with stages"),
    ):
        options = parse(config, "--gpus", "2")
        job = load_job(config, None, [f"--parallelism.pipeline_parallel_{option}", value])
        found, refused = candidates(job, options)
        assert {c.layout.pp for c in found} == {1} and [one.layouts for one in refused] == [1]
        assert message in refused[0].reason
    job = load_job(config, None, ["--parallelism.pipeline_parallel_schedule", "gpipe"])
    assert {c.layout.pp for c in candidates(job, options)[0]} == {1, 2}


def test_what_it_prints_and_writes(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status(config, "--gpus", 4, "--json", tmp_path / "plan.json", "--optimizer.lr", "1e-3") == 0
    printed = capsys.readouterr().out
    content = json.loads((tmp_path / "plan.json").read_text())
    best = content["layouts"][0]
    assert content["n_parameters"] == sum(p.numel() for p in _model(config).parameters())
    assert all(entry["fits"] for entry in content["layouts"])
    assert best["memory"]["total"] == sum(size for name, size in best["memory"].items() if name != "total")
    assert "estimates" in printed.lower() and "Recommended" in printed
    assert printed.count("\nreplicate ") == 1 and "Refused: 1 of 15 layouts" in printed
    lines = printed[printed.index("    [parallelism]") :].splitlines()[:6]
    degrees = tomllib.loads("\n".join(lines))["parallelism"]
    assert math.prod(degrees.values()) == 4
    assert degrees["context_parallel_degree"] == best["cp"]
    for key, degree in degrees.items():
        assert f"--parallelism.{key} {degree}" in printed
    assert f"megalodon train {config} --nproc 4" in printed and "--optimizer.lr 1e-3" in printed
    assert not torch.distributed.is_initialized()


def _model(config: Path) -> torch.nn.Module:
    from megalodon_plugin.model import Megalodon

    with torch.device("meta"):
        return Megalodon(load_job(config, None, []).args.config)


def test_several_nodes_are_started_by_torchrun(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status(config, "--gpus", 4, "--gpus-per-node", 2, "--seq-len", 128) == 0
    printed = capsys.readouterr().out
    assert "torchrun --nnodes 2 --nproc_per_node 2" in printed and "--training.seq_len 128" in printed


def test_where_nothing_fits_it_says_what_would(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status(config, "--gpus", 1, "--memory", 0.001) == 1
    printed = capsys.readouterr().out
    assert "No layout fits" in printed and "GPUs with" in printed and "local_batch_size" in printed
    assert 'activation_checkpoint.mode = "full"' in printed
    assert status(CONFIGS / "megalodon_7b.toml", "--gpus", 4, "--memory", 24) == 1
    assert "8 GPUs, as " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpus", "0"], "`--gpus` must be positive, but is 0"),
        (["--gpus", "12"], "`--gpus` must be a multiple of `--gpus-per-node` = 8, but is 12"),
        (["--gpus", "7"], "`--gpus` must allow at least one layout, but 7 allows none:\n"),
        (["--gpus", "2", "--memory", "-1"], "`--memory` must be positive"),
        (["--gpus", "2", "--seq-len", "0"], "`--seq-len` must be at least 1"),
        (["--gpus", "2", "--parallelism.tensor_parallel_degree=2"], "because the plan chooses the degrees"),
        (["--gpus", "2", "--activation_checkpoint.mode", "memory_budget"], "must be none, full or selective"),
        (["--gpus", "2", "--training.enable_cpu_offload"], "`training.enable_cpu_offload` must be false"),
        (["--gpus", "2", "--model.flavor", "whale"], "`model.flavor` must be one of"),
    ],
)
def test_errors(config: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert status(config, *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("megalodon plan: ") and message in error


def test_the_file_must_exist(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status(tmp_path / "none.toml", "--gpus", 2) == 2
    assert "the first argument must be a configuration file" in capsys.readouterr().err
