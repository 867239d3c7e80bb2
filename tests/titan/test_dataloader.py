"""Loaders: batches, the state that any number of ranks can load, prefetching, and validation on held-out text."""

import itertools
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megalodon_plugin.data.rank_rows import RankRows
from megalodon_plugin.titan import dataloader
from megalodon_plugin.titan.dataloader import (
    Prepared,
    TextLoader,
    build_text_dataloader,
)
from megalodon_plugin.titan.tokenizer import ByteTokenizer

from support.processes import HANG_S
from support.text_jobs import SEQ_LEN, build, build_validation, config, write_files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_files(tmp_path / "data")


def take(loader: Any, n_batches: int) -> torch.Tensor:
    """Input rows of the next batches, (n_batches, batch, seq_len)."""
    return torch.stack([batch["input"] for batch, _ in itertools.islice(loader, n_batches)])


def global_rows(of_ranks: list[torch.Tensor]) -> torch.Tensor:
    """Rows of all ranks in the run's order, from each rank's (n_batches, batch, seq_len)."""
    return torch.stack(of_ranks, dim=2).flatten(0, 2)


def test_batches_are_int64_with_labels_one_ahead(folder: Path) -> None:
    inputs, labels = next(iter(build(config(folder))))
    assert set(inputs) == {"input"}
    assert inputs["input"].shape == labels.shape == (2, SEQ_LEN)
    assert inputs["input"].dtype == labels.dtype == torch.int64
    assert torch.equal(inputs["input"][:, 1:], labels[:, :-1])


@pytest.mark.parametrize(("n_ranks", "batch"), [(1, 12), (2, 6), (3, 4), (4, 3), (12, 1)])
def test_a_global_batch_holds_the_same_rows_however_ranks_share_it(folder: Path, n_ranks: int, batch: int) -> None:
    expected = take(build(config(folder, batch=1)), 36).flatten(0, 1)
    loaders = [build(config(folder, batch=batch), rank, n_ranks) for rank in range(n_ranks)]
    assert torch.equal(global_rows([take(loader, 3) for loader in loaders]), expected)


@pytest.mark.parametrize("n_ranks", [1, 3, 4])
def test_a_run_of_two_ranks_continues_at_another_number_of_ranks(folder: Path, tmp_path: Path, n_ranks: int) -> None:
    """Through torch.distributed.checkpoint, which fills the loading rank's own state dict in place."""
    unbroken = take(build(config(folder, batch=1)), 20 + 24).flatten(0, 1)
    saving = [build(config(folder), rank, 2) for rank in range(2)]
    before = global_rows([take(loader, 5) for loader in saving])
    merged = saving[0].state_dict()
    for key, value in saving[1].state_dict().items():
        assert torch.equal(merged.setdefault(key, value), value)
    dcp.save({"dataloader": merged}, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    after = []
    for rank in range(n_ranks):
        loader = build(config(folder), rank, n_ranks)
        state = {"dataloader": loader.state_dict()}
        dcp.load(state, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
        assert int(loader.state_dict()["position"]) == 0, "filling a state dict must not reach into the loader"
        loader.load_state_dict(state["dataloader"])
        after.append(list(itertools.islice(loader, 24 // (2 * n_ranks))))
    # 20 rows do not divide by 3: a rank keeps the rows n with n % 3 == rank.
    rows = [torch.cat([batch["input"] for batch, _ in batches]) for batches in after]
    read = [iter(own) for own in rows]
    in_turn = torch.stack([next(read[n % n_ranks]) for n in range(20, 44)])
    assert torch.equal(torch.cat([before, in_turn]), unbroken)


def test_the_state_is_plain_tensors_named_by_lane_not_rank(folder: Path) -> None:
    state = build(config(folder), rank=1, n_ranks=2).state_dict()
    assert set(state) == {"position", "fingerprint", "lane_1", "lane_3"}
    assert all(type(value) is torch.Tensor and value.dtype == torch.int64 for value in state.values())
    assert state["position"].shape == () and state["lane_1"].tolist() == [0, 0, 0]


def test_the_state_is_of_what_was_handed_out_not_of_what_is_prepared(folder: Path) -> None:
    prepared = threading.Semaphore(0)

    class Observed(TextLoader):
        def _prepare(self, rows: RankRows) -> Prepared:
            try:
                return super()._prepare(rows)
            finally:
                prepared.release()

    loader = Observed(build(config(folder))._corpus, rank=0, n_ranks=1, batch_size=2)
    batches = iter(loader)
    for n in range(1, 4):
        next(batches)
        state = loader.state_dict()
        assert int(state["position"]) == 2 * n
    for _ in range(4):  # the three that were handed out, and one ahead of them
        assert prepared.acquire(timeout=HANG_S)
    later = loader.state_dict()
    assert all(torch.equal(later[key], value) for key, value in state.items())
    resumed = build(config(folder))
    resumed.load_state_dict(later)
    assert torch.equal(next(iter(resumed))[0]["input"], next(batches)[0]["input"])


def test_a_running_iterator_notices_a_loaded_state(folder: Path) -> None:
    loader = build(config(folder))
    beginning = loader.state_dict()
    batches = iter(loader)
    first, second = next(batches)[0]["input"], next(batches)[0]["input"]
    loader.load_state_dict(beginning)
    assert torch.equal(next(batches)[0]["input"], first)
    assert torch.equal(take(loader, 1)[0], second), "a new iterator goes on where the last one stopped"


def test_other_data_refuse_the_checkpoint(folder: Path) -> None:
    state = build(config(folder)).state_dict()
    other = build(config(folder, seed=1))
    with pytest.raises(
        ValueError, match=r"must belong to the data of .*: `data\.seed`.*checkpoint\.exclude_from_loading"
    ):
        other.load_state_dict(state)
    other.load_state_dict({})
    assert int(other.state_dict()["position"]) == 0


def test_errors_of_the_thread_reach_the_consumer(tmp_path: Path) -> None:
    for n in range(4):
        (tmp_path / f"{n}.jsonl").write_text("{\n")
    for loader in (build(config(tmp_path)), build_validation(config(tmp_path, validation_fraction=0.5))):
        with pytest.raises(ValueError, match=r"jsonl, line 1: must be JSON"):
            next(iter(loader))


def test_an_iterator_that_is_alive_at_the_end_lets_the_process_go_quietly(folder: Path) -> None:
    code = (
        "from pathlib import Path\n"
        "from support.text_jobs import build, config\n"
        f"batches = iter(build(config(Path({str(folder)!r}))))\n"
        "next(batches)\n"
    )
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)])
    environment = os.environ | {"PYTHONPATH": paths}
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANG_S)
    assert ended.returncode == 0 and "Traceback" not in ended.stderr, ended.stderr


@pytest.mark.parametrize("n_ranks", [1, 2, 3])
def test_validation_gives_all_ranks_the_same_number_of_the_same_rows_each_time(folder: Path, n_ranks: int) -> None:
    job_config = config(folder, validation_fraction=0.5)
    alone = take(build_validation(config(folder, batch=1, validation_fraction=0.5)), 10**6).flatten(0, 1)
    loaders = [build_validation(job_config, rank, n_ranks) for rank in range(n_ranks)]
    passes = [global_rows([take(loader, 10**6) for loader in loaders]) for _ in range(2)]
    n_rows = len(alone) // (2 * n_ranks) * 2 * n_ranks
    assert torch.equal(passes[0], alone[:n_rows]) and torch.equal(passes[1], passes[0]) and n_rows > 6


def test_endless_validation_wraps_and_starts_again(folder: Path) -> None:
    job_config = config(folder, validation_fraction=0.5)
    once = take(build_validation(job_config), 10**6)
    endless = build_validation(job_config, infinite=True)
    assert torch.equal(take(endless, len(once) + 3), torch.cat([once, once[:3]]))
    assert torch.equal(take(endless, 3), once[:3])


def test_one_pass_over_training_text(folder: Path) -> None:
    loader = build_text_dataloader(1, 0, ByteTokenizer(), config(folder), infinite=False)
    assert len(list(loader)) == len(list(loader)) > 50


@pytest.mark.parametrize("name", ["build_text_dataloader", "build_text_validation_dataloader"])
def test_other_names_go_to_the_host(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(dataloader.text_datasets, name, lambda *arguments: calls.append(arguments) or "host's")
    job_config = config("somewhere", dataset="c4_test")
    assert getattr(dataloader, name)(2, 1, "tokenizer", job_config, True) == "host's"
    assert calls == [(2, 1, "tokenizer", job_config, True)]
