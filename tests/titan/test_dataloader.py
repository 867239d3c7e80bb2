"""Loaders: batches, the state that any number of ranks can load, prefetching, and validation on held-out text."""

import dataclasses
import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megalodon_plugin.data.files import Unit
from megalodon_plugin.data.reader import TextReader
from megalodon_plugin.titan import dataloader
from megalodon_plugin.titan.data_source import side_as_bytes
from megalodon_plugin.titan.dataloader import (
    OrderedTextLoader,
    TextLoader,
    build_text_dataloader,
    build_text_validation_dataloader,
)
from megalodon_plugin.titan.job_config import Data
from megalodon_plugin.titan.tokenizer import ByteTokenizer

SEQ_LEN = 16


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    data = tmp_path / "data"
    data.mkdir()
    for n in range(30):
        (data / f"{n:02}.txt").write_text(f"file {n} " + "".join(f"{n}.{word} " for word in range(10 + n % 7)))
    return data


def config(path: Path | str | None, dataset: str = "local_text", batch: int = 2, **data: Any) -> SimpleNamespace:
    def section() -> SimpleNamespace:
        path_or_none = None if path is None else str(path)
        return SimpleNamespace(dataset=dataset, dataset_path=path_or_none, local_batch_size=batch, seq_len=SEQ_LEN)

    validation = section()
    validation.steps = -1
    validation.enable = True
    return SimpleNamespace(training=section(), validation=validation, data=Data(**data))


def build(job_config: Any, rank: int = 0, n_ranks: int = 1) -> TextLoader:
    loader = build_text_dataloader(n_ranks, rank, ByteTokenizer(), job_config)
    assert isinstance(loader, TextLoader)
    return loader


def build_validation(job_config: Any, rank: int = 0, n_ranks: int = 1, infinite: bool = False) -> OrderedTextLoader:
    loader = build_text_validation_dataloader(n_ranks, rank, ByteTokenizer(), job_config, infinite)
    assert isinstance(loader, OrderedTextLoader)
    return loader


def take(loader: Any, n_batches: int) -> torch.Tensor:
    """Input rows of the next batches, (n_batches, batch, seq_len)."""
    return torch.stack([batch["input"] for batch, _ in itertools.islice(loader, n_batches)])


def global_rows(of_ranks: list[torch.Tensor]) -> torch.Tensor:
    """Rows of all ranks in the run's order, from each rank's (n_batches, batch, seq_len)."""
    return torch.stack(of_ranks, dim=2).flatten(0, 2)


def texts_of(loader: Any) -> str:
    return " ".join(text for unit in loader._corpus.units for text in loader._corpus.reader.documents(unit))


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
def test_a_run_of_two_ranks_goes_on_at_another_number_of_ranks(folder: Path, tmp_path: Path, n_ranks: int) -> None:
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


def test_the_state_is_of_what_was_handed_out_not_of_what_is_prepared(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = threading.Semaphore(0)
    prepare = TextLoader._prepare

    def observed(self: TextLoader, rows: Any) -> Any:
        try:
            return prepare(self, rows)
        finally:
            prepared.release()

    monkeypatch.setattr(TextLoader, "_prepare", observed)
    loader = build(config(folder))
    batches = iter(loader)
    for n in range(1, 4):
        next(batches)
        state = loader.state_dict()
        assert int(state["position"]) == 2 * n
    for _ in range(4):  # the three that were handed out, and one ahead of them
        assert prepared.acquire(timeout=10)
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
    with pytest.raises(ValueError, match=r"checkpoint of other data: `data\.seed`.*checkpoint\.exclude_from_loading"):
        other.load_state_dict(state)
    other.load_state_dict({})
    assert int(other.state_dict()["position"]) == 0


def test_errors_of_the_thread_reach_the_consumer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: TextReader, unit: Unit, shuffle_seed: object = None) -> Any:
        raise ValueError("broken text")

    monkeypatch.setattr(TextReader, "documents", broken)
    for loader in (build(config(folder)), build_validation(config(folder, validation_fraction=0.5))):
        with pytest.raises(ValueError, match="broken text"):
            next(iter(loader))


def test_an_iterator_that_is_alive_at_the_end_lets_the_process_go_quietly(folder: Path) -> None:
    code = (
        "from pathlib import Path\n"
        "from test_dataloader import build, config\n"
        f"batches = iter(build(config(Path({str(folder)!r}))))\n"
        "next(batches)\n"
    )
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    environment = os.environ | {"PYTHONPATH": paths}
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0 and "Traceback" not in ended.stderr, ended.stderr


def test_training_and_validation_share_no_text(folder: Path) -> None:
    job_config = config(folder, validation_fraction=0.3)
    training, validation = texts_of(build(job_config)), texts_of(build_validation(job_config))
    files = [f"file {n} " for n in range(30)]
    assert sorted(name for name in files if name in training or name in validation) == sorted(files)
    assert not [name for name in files if name in training and name in validation]


def test_both_sides_cut_alike_when_rows_differ_in_length(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(f"<{n}> words\n" for n in range(2000)))
    job_config = config(tmp_path, validation_fraction=0.3)
    job_config.validation.seq_len = 64
    training, validation = build(job_config), build_validation(job_config)
    both = sorted((*training._corpus.units, *validation._corpus.units), key=lambda unit: unit.start)
    assert [unit.start for unit in both[1:]] == [unit.end for unit in both[:-1]] and len(both) > 50
    assert next(iter(validation))[1].shape == (2, 64)


def test_other_validation_data_leave_training_whole(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("words " * 100)
    job_config = config(folder, validation_fraction=0.3)
    job_config.validation.dataset_path = str(tmp_path / "other.txt")
    assert len(build(job_config)._corpus.units) == 30
    assert len(list(build_validation(job_config))) == 602 // SEQ_LEN // 2


@pytest.mark.parametrize("n_ranks", [1, 2, 3])
def test_validation_gives_all_ranks_the_same_number_of_the_same_rows_each_time(folder: Path, n_ranks: int) -> None:
    job_config = config(folder, validation_fraction=0.5)
    alone = take(build_validation(config(folder, batch=1, validation_fraction=0.5)), 10**6).flatten(0, 1)
    loaders = [build_validation(job_config, rank, n_ranks) for rank in range(n_ranks)]
    passes = [global_rows([take(loader, 10**6) for loader in loaders]) for _ in range(2)]
    n_rows = len(alone) // (2 * n_ranks) * 2 * n_ranks
    assert torch.equal(passes[0], alone[:n_rows]) and torch.equal(passes[1], passes[0]) and n_rows > 6


def test_endless_validation_wraps_and_starts_anew(folder: Path) -> None:
    job_config = config(folder, validation_fraction=0.5)
    once = take(build_validation(job_config), 10**6)
    endless = build_validation(job_config, infinite=True)
    assert torch.equal(take(endless, len(once) + 3), torch.cat([once, once[:3]]))
    assert torch.equal(take(endless, 3), once[:3])


def test_one_pass_over_training_text(folder: Path) -> None:
    loader = build_text_dataloader(1, 0, ByteTokenizer(), config(folder), infinite=False)
    assert len(list(loader)) == len(list(loader)) > 50


def too_little_text(job_config: Any) -> None:
    job_config.validation.local_batch_size = 10**4


def same_text_without_fraction(job_config: Any) -> None:
    job_config.data = Data()


def one_unit(job_config: Any) -> None:
    path = Path(job_config.training.dataset_path) / "00.txt"
    job_config.training.dataset_path = job_config.validation.dataset_path = str(path)


def fraction_of_one(job_config: Any) -> None:
    job_config.data = dataclasses.replace(job_config.data, validation_fraction=1.0)


def no_path(job_config: Any) -> None:
    job_config.validation.dataset_path = None


def no_rows(job_config: Any) -> None:
    job_config.validation.seq_len = 0


def no_batch(job_config: Any) -> None:
    job_config.validation.local_batch_size = 0


def unknown_name(job_config: Any) -> None:
    job_config.validation.dataset = "c5"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (too_little_text, "must fill a batch on every rank, 10000 rows of 16 tokens, but holds"),
        (same_text_without_fraction, r"`data\.validation_fraction` must be above 0 .*`validation\.dataset_path`"),
        (one_unit, r"`data\.validation_fraction` must leave text on both sides.*`validation\.dataset_path`"),
        (fraction_of_one, r"`data\.validation_fraction` must be in \[0, 1\), but is 1\.0"),
        (no_path, r"`validation\.dataset_path` must name files"),
        (no_rows, "`seq_len` must be at least 1, but is 0"),
        (no_batch, "`local_batch_size` must be at least 1, but is 0"),
        (unknown_name, r"`validation\.dataset` must be one of local_text, python_stdlib, c4.* but is \"c5\""),
    ],
)
def test_what_cannot_be_is_told_by_key_rule_and_value(
    folder: Path, change: Callable[[Any], None], message: str
) -> None:
    job_config = config(folder, validation_fraction=0.3)
    change(job_config)
    with pytest.raises(ValueError, match=message):
        next(iter(build_validation(job_config)))


def test_standard_library_needs_no_path_and_no_section_of_ours() -> None:
    job_config = config(None, dataset="python_stdlib")
    del job_config.data
    assert next(iter(build(job_config)))[1].shape == (2, SEQ_LEN)


@pytest.mark.parametrize("name", ["build_text_dataloader", "build_text_validation_dataloader"])
def test_other_names_go_to_the_host(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(dataloader.text_datasets, name, lambda *arguments: calls.append(arguments) or "host's")
    job_config = config("somewhere", dataset="c4_test")
    assert getattr(dataloader, name)(2, 1, "tokenizer", job_config, True) == "host's"
    assert calls == [(2, 1, "tokenizer", job_config, True)]


def test_one_folder_spelled_two_ways_is_split(folder: Path) -> None:
    job_config = config(folder, validation_fraction=0.3)
    job_config.validation.dataset_path = str(folder / "*.txt")
    sides = [side_as_bytes(job_config, section).split(b"file ")[1:] for section in ("training", "validation")]
    assert all(sides)
    assert not set(sides[0]) & set(sides[1])
    assert len(sides[0]) + len(sides[1]) == 30


def test_files_that_overlap_in_part_are_refused(folder: Path) -> None:
    job_config = config(folder, validation_fraction=0.3)
    job_config.validation.dataset_path = str(folder / "0*.txt")
    with pytest.raises(ValueError, match="of its 10 files 10 are training files, and 20 training files are not"):
        build(job_config)


@pytest.mark.parametrize(("name", "value"), [("validation_fraction", "0.05"), ("seed", "0"), ("text_field", 3)])
def test_data_options_of_the_wrong_type_are_refused(folder: Path, name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"\[data\] `{name}` must be of type"):
        build(config(folder, **{name: value}))
