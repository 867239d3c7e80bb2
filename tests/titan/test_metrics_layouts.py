"""Records and checkpoints say the same under every layout: losses, counts of tokens, validation, resuming elsewhere."""

import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining.schedules import ScheduleZBVZeroBubble
from torch.distributed.tensor import DTensor, Replicate, Shard

import megalodon_plugin.titan  # noqa: F401  chooses the device before torchtitan does
from megalodon_plugin.titan.checkpoint_checks import check_fits, saved_tensors
from megalodon_plugin.titan.loss import ScaledLoss
from megalodon_plugin.titan.loss_totals import LossTotals, combine, count_labels
from megalodon_plugin.titan.metrics import JsonLinesMetrics, StepNumbers, counted_apart
from megalodon_plugin.titan.trainer import tokens_of_other_ranks
from megalodon_plugin.titan.validator import MegalodonValidator, equally_many

# isort: split
from torchtitan.config import JobConfig
from torchtitan.config.job_config import Job, Validation
from torchtitan.distributed import ParallelDims

from support.tiny_job import read_records, train, train_well, write_job

IGNORED = -100
NAN = float("nan")


def sums(*of_ranks: tuple[float, float]) -> torch.Tensor:
    return torch.tensor(of_ranks, dtype=torch.float64)


@pytest.mark.parametrize(
    ("of_ranks", "mean", "largest"),
    [
        pytest.param(sums((6, 4), (10, 2)), 16 / 6, 5.0, id="slices or rows of unequal numbers of tokens"),
        pytest.param(sums((6, 4), (0, 0), (10, 2)), 16 / 6, 5.0, id="a rank whose labels are all ignored"),
        pytest.param(sums((0, 0), (0, 0), (6, 4), (10, 2)), 16 / 6, 5.0, id="two pipeline stages"),
        pytest.param(sums((6, 4), (6, 4), (10, 2), (10, 2)), 16 / 6, 5.0, id="two tensor parallel ranks"),
        pytest.param(sums((6, 4), (NAN, 2)), NAN, NAN, id="a loss that is not a number"),
        pytest.param(sums((0, 0), (0, 0)), NAN, NAN, id="no tokens"),
    ],
)
def test_losses_over_ranks(of_ranks: torch.Tensor, mean: float, largest: float) -> None:
    assert combine(of_ranks) == pytest.approx((mean, largest), rel=1e-15, nan_ok=True)


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def test_totals_add_microbatches_and_start_again(one_rank: None) -> None:
    totals = LossTotals("cpu")
    totals.add(torch.tensor(2.0), torch.tensor(4))
    totals.add(torch.tensor(7.0, dtype=torch.bfloat16), torch.tensor(2))
    assert totals.over_ranks() == (1.5, 1.5)
    # As the loss comes under loss parallel.
    whole = DTensor.from_local(torch.tensor(3.0), init_device_mesh("cpu", (1,)), [Replicate()])
    totals.add(whole, torch.tensor(6))
    assert totals.over_ranks() == (1.0, 1.0)
    totals.clear()
    assert all(math.isnan(loss) for loss in totals.over_ranks())


def test_a_checkpoint_fits_shards_of_the_whole_shape() -> None:
    whole = torch.nn.Linear(6, 8, bias=False, device="meta")
    saved = {"weight": whole.weight.shape}
    dist.init_process_group("fake", rank=1, world_size=2)
    try:
        shard = DTensor.from_local(whole.weight[4:].detach(), init_device_mesh("cpu", (2,)), [Shard(0)])
        whole.weight = torch.nn.Parameter(shard)
        assert whole.weight.to_local().shape == (4, 6)
        check_fits(Path("step-1"), saved, [whole])
        with pytest.raises(ValueError, match=r"`weight` has shape \(4, 6\) there, but \(8, 6\) in this model"):
            check_fits(Path("step-1"), {"weight": torch.Size([4, 6])}, [whole])
    finally:
        dist.destroy_process_group()


def dims(dp_replicate: int = 1, dp_shard: int = 1, cp: int = 1, pp: int = 1) -> ParallelDims:
    return ParallelDims(dp_replicate, dp_shard, cp, 1, pp, 1, 1, world_size=dp_replicate * dp_shard * cp * pp)


def test_tokens_are_counted_once_each_whatever_shares_them() -> None:
    """By the host for this rank; here for the others, of which those that share a row have no tokens of their own."""
    assert tokens_of_other_ranks(40, dims(dp_replicate=2, dp_shard=3, cp=2, pp=2)) == 5 * 40
    assert tokens_of_other_ranks(40, dims(cp=2, pp=2)) == 0


def test_labels_that_do_not_count_are_not_counted() -> None:
    labels = torch.tensor([[1, 2, 3, 4, IGNORED, 6], [1, IGNORED, 3, 4, 5, 6]])
    assert int(count_labels(labels)) == 10
    assert int(count_labels(labels[:, 3:])) == 5, "the slice of a context parallel rank"
    assert int(count_labels(torch.full((2, 3), IGNORED))) == 0


def test_a_loss_is_scaled_until_its_step_has_ended_or_failed() -> None:
    loss_fn = ScaledLoss(lambda pred, labels: pred.sum())
    ones = torch.ones(3)
    with loss_fn.scaled_by(torch.tensor(0.5)):
        assert float(loss_fn(ones, ones)) == 1.5
    assert float(loss_fn(ones, ones)) == 3.0
    with pytest.raises(RuntimeError, match="failed"), loss_fn.scaled_by(0.5):
        raise RuntimeError("failed")
    assert float(loss_fn(ones, ones)) == 3.0


def test_a_record_has_the_numbers_of_all_ranks(one_rank: None, tmp_path: Path) -> None:
    metrics = JsonLinesMetrics(JobConfig(job=Job(dump_folder=str(tmp_path))), dims())
    metrics.num_flops_per_token = 1
    others = {"carried_context/mean(tokens)": 7.0}
    for numbers in (None, lambda: StepNumbers(combine(sums((6, 4), (10, 4))), 20, others)):
        metrics.numbers_of_step = numbers
        metrics.data_loading_times.append(0.1)
        metrics.log(3, -1.0, -2.0, 0.5, {"n_tokens_seen": 80, "lr": 0.1})
    of_host, of_all_ranks = read_records(tmp_path)
    right = {"loss_metrics/global_avg_loss": 2.0, "loss_metrics/global_max_loss": 2.5, "n_tokens_seen": 20, **others}
    assert of_all_ranks.items() >= {"step": 3, "kind": "train", "grad_norm": 0.5, "lr": 0.1, **right}.items()
    stock = {"loss_metrics/global_avg_loss": -1.0, "loss_metrics/global_max_loss": -2.0, "n_tokens_seen": 80}
    assert of_host.items() >= {"step": 3, "kind": "train", "grad_norm": 0.5, "lr": 0.1, **stock}.items()
    assert of_all_ranks.keys() - of_host.keys() == others.keys()


def test_validation_leaves_training_its_time_and_tokens() -> None:
    times = iter([100.0, 130.0])
    counts = SimpleNamespace(ntokens_since_last_log=40, time_last_log=95.0)
    with counted_apart(counts, clock=lambda: next(times)):
        assert (counts.ntokens_since_last_log, counts.time_last_log) == (0, 100.0)
        counts.ntokens_since_last_log, counts.time_last_log = 0, 129.0  # as the host's record does
    assert (counts.ntokens_since_last_log, counts.time_last_log) == (40, 125.0), "5 s of training, before and after"


def batch(n_rows: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    return {"input": torch.ones(n_rows, 3, dtype=torch.int64)}, torch.ones(n_rows, 3, dtype=torch.int64)


def batches_of_rank(own: list[Any], others: list[bool], steps: int = -1) -> list[tuple[int, int]]:
    """(rows, labels that count) of each batch, where the other ranks together have a batch as `others` says."""
    answers = iter(others)
    options = Validation(steps=steps, local_batch_size=2, seq_len=3)
    batches = equally_many(own, options, lambda has_batch: has_batch | next(answers))
    return [(len(inputs["input"]), int((labels != IGNORED).sum())) for inputs, labels in batches]


def test_a_rank_out_of_batches_takes_part_without_counting() -> None:
    own = [batch(2), batch(1)]
    assert batches_of_rank(own, [True, False, False]) == [(2, 6), (2, 3)]
    assert batches_of_rank(own, [True, True, True, True, False]) == [(2, 6), (2, 3), (2, 0), (2, 0)]
    assert batches_of_rank([], [True, False]) == [(2, 0)]
    assert batches_of_rank([batch(2)] * 9, [True] * 3, steps=3) == [(2, 6)] * 3
    with pytest.raises(ValueError, match=r"`validation\.dataset` must hold text for at least one batch"):
        batches_of_rank([], [False])


@pytest.mark.parametrize(
    ("key", "value", "schedule", "message"),
    [
        ("local_batch_size", 8, None, r"`validation\.local_batch_size` must be `training\.local_batch_size`, 4, .* 8$"),
        ("seq_len", 96, None, r"`validation\.seq_len` must be `training\.seq_len`, 48, .* but is 96$"),
        (
            "local_batch_size",
            4,
            object.__new__(ScheduleZBVZeroBubble),
            r'`validation\.enable` must be false with `.*_schedule` = "ZBVZeroBubble"',
        ),
    ],
    ids=["rows", "length", "schedule"],
)
def test_validation_that_a_pipeline_cannot_run_is_refused(key: str, value: int, schedule: Any, message: str) -> None:
    job_config = SimpleNamespace(
        training=SimpleNamespace(local_batch_size=4, seq_len=48),
        validation=SimpleNamespace(local_batch_size=4, seq_len=48),
        parallelism=SimpleNamespace(pipeline_parallel_schedule="ZBVZeroBubble"),
    )
    setattr(job_config.validation, key, value)
    with pytest.raises(ValueError, match=message):
        MegalodonValidator(job_config, 1, 0, None, parallel_dims=dims(pp=2), pp_schedule=schedule)


def job(folder: Path) -> Path:
    """Two microbatches a step, and validation on as many rows as there are."""
    validation = {"enable": True, "dataset": "local_text", "dataset_path": str(folder / "texts")}
    return write_job(
        folder,
        megalodon={"n_layers": 4},
        training={"steps": 6, "global_batch_size": 8},
        data={"validation_fraction": 0.3},
        validation=validation | {"local_batch_size": 4, "seq_len": 48, "freq": 1, "steps": -1},
        checkpoint={"interval": 2},
    )


ON_TWO_DATA_RANKS = ["--training.local_batch_size", "2", "--validation.local_batch_size", "2"]
IN_FOUR_STAGES = [
    "--parallelism.pipeline_parallel_degree",
    "2",
    "--parallelism.pipeline_parallel_schedule",
    "Interleaved1F1B",
    "--parallelism.pipeline_parallel_microbatch_size",
    "1",
]


def test_a_run_continues_in_other_layouts_with_the_same_records(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    train_well(job(whole))
    config, run = job(parts), parts / "run"
    shutil.copytree(whole / "run" / "checkpoint" / "step-2", run / "checkpoint" / "step-2")

    train_well(config, *ON_TWO_DATA_RANKS, "--training.steps", "3", processes=2)
    train_well(config, "--training.steps", "4")
    started = train(config, *IN_FOUR_STAGES, processes=2)
    log = started.stdout
    assert started.returncode == 0, log

    expected = {record["step"]: record for record in read_records(whole / "run")}
    records = read_records(run)
    assert [record["step"] for record in records] == [3, 4, 5, 6]
    for record in records:
        of_whole = expected[record["step"]]
        assert record["n_tokens_seen"] == record["step"] * 8 * 48 == of_whole["n_tokens_seen"]
        for name in ("loss_metrics/global_avg_loss", "grad_norm", "lr"):
            assert record[name] == pytest.approx(of_whole[name], rel=1e-5), f"step {record['step']}: {name}"
    # With one rank, and with one that has the losses, the largest mean is the mean.
    largest = {record["step"]: record["loss_metrics/global_max_loss"] for record in records}
    mean = {record["step"]: record["loss_metrics/global_avg_loss"] for record in records}
    assert mean[3] < largest[3] < 1.2 * mean[3]
    assert [largest[step] for step in (4, 5, 6)] == [mean[step] for step in (4, 5, 6)]

    validations = {
        folder: {
            record["step"]: record["validation_metrics/loss"] for record in read_records(folder / "run", "validation")
        }
        for folder in (whole, parts)
    }
    assert list(validations[parts]) == [3, 4, 5, 6]
    for step, loss in validations[parts].items():
        assert loss == pytest.approx(validations[whole][step], rel=1e-5), f"step {step}: validation"

    # Both ranks of the pipeline log the same.
    for kind, step, loss in (("step", 6, f"{mean[6]:8.5f}"), ("validate step", 6, f"{validations[parts][6]:7.4f}")):
        logged = re.findall(rf"INFO - {kind}: +{step}  loss: ([ -]*[0-9.]+) ", log)
        assert [text.strip() for text in logged] == [loss.strip()] * 2, kind

    # One process had no random state for a second stage; the stages save theirs apart.
    assert "The checkpoint holds no random state for this layout" in log
    saved = saved_tensors(run / "checkpoint" / "step-6")
    assert saved is not None and {"train_state.random_state_0", "train_state.random_state_1"} <= set(saved)
