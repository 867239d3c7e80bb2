"""Rows that follow documents: every token once, a document at a time, and the same for any number of ranks."""

import gzip
import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megalodon_plugin.data.corpus import Corpus
from megalodon_plugin.data.documents import DocumentCorpus, files_of, split_files
from megalodon_plugin.data.files import cut_into_units, find_text_files
from megalodon_plugin.data.reader import TextReader
from megalodon_plugin.data.rows import Cursor, Row
from megalodon_plugin.titan.dataloader import DocumentLoader, build_text_dataloader, build_text_validation_dataloader
from megalodon_plugin.titan.job_config import Data
from megalodon_plugin.titan.tokenizer import ByteTokenizer

SEQ_LEN = 16
BOS, EOS = ByteTokenizer().bos_id, ByteTokenizer().eos_id
IGNORED = -100


def text_of(n: int) -> str:
    return "".join(f"{n}.{word}\n" for word in range(3 + 20 * n))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eight files, of fewer bytes than a row to several units, one of them compressed, and one of lines."""
    data = tmp_path / "data"
    data.mkdir()
    for n in range(8):
        (data / f"{n}.txt").write_text(text_of(n))
    with gzip.open(data / "9.txt.gz", "wt") as file:
        file.write(text_of(9))
    (data / "lines.jsonl").write_text("\n".join(json.dumps({"text": f"line {n} " * n}) for n in range(1, 8)))
    return data


def documents_of(folder: Path) -> list[str]:
    lines = [f"line {n} " * n for n in range(1, 8)]
    return [*(text_of(n) for n in (*range(8), 9)), *lines]


def corpus_of(folder: Path, n_lanes: int = 3, seq_len: int = SEQ_LEN, tokenizer: Any = None) -> DocumentCorpus:
    units = cut_into_units(find_text_files(str(folder)), range_bytes=100)
    reader = TextReader(range_bytes=100)
    return DocumentCorpus(units, reader, tokenizer or ByteTokenizer(), seq_len, 0, str(folder), n_lanes=n_lanes)


def rows_of_an_epoch(corpus: DocumentCorpus, lane: int) -> list[Row]:
    stream, rows = corpus.row_stream(lane, Cursor(0, 0, 0)), []
    while True:
        row = stream.next_row()
        if row.begins and stream._runs[0].at.epoch == 1:
            return rows
        rows.append(row)


def joined(rows: list[Row]) -> list[list[int]]:
    """Tokens of each document, from rows of which each one's last token is the next one's first."""
    documents: list[list[int]] = []
    for row in rows:
        tokens = row.tokens.tolist()
        if row.begins:
            documents.append(tokens)
        else:
            assert documents[-1][-1] == tokens[0]
            documents[-1] += tokens[1:]
    return documents


@pytest.mark.parametrize("seq_len", [1, 7, 16, 10_000])
def test_an_epoch_holds_every_document_once_and_whole(folder: Path, seq_len: int) -> None:
    corpus = corpus_of(folder, seq_len=seq_len)
    assert len(corpus.units) > len(corpus._files) + 10, "files are read in ranges"
    lanes = [rows_of_an_epoch(corpus, lane) for lane in range(3)]
    found = [document for rows in lanes for document in joined(rows)]
    expected = [[BOS, *text.encode(), EOS] for text in documents_of(folder)]
    assert sorted(found) == sorted(expected)
    # Every row is full but the last one of a document.
    for rows in lanes:
        for row, following in itertools.pairwise(rows):
            assert len(row.tokens) == seq_len + 1 or following.begins
            assert 2 <= len(row.tokens) <= seq_len + 1


def test_documents_without_marks_continue_after_one_that_has_no_label(tmp_path: Path) -> None:
    for n, text in enumerate(["a", "long enough", "b", "also long enough"]):
        (tmp_path / f"{n}.txt").write_text(text)
    bare = SimpleNamespace(encode=lambda text, add_bos, add_eos: list(text.encode()))
    rows = rows_of_an_epoch(corpus_of(tmp_path, n_lanes=1, seq_len=4, tokenizer=bare), 0)
    assert sorted(bytes(tokens).decode() for tokens in joined(rows)) == ["also long enough", "long enough"]


def test_a_lane_continues_from_any_row(folder: Path) -> None:
    corpus = corpus_of(folder)
    stream = corpus.row_stream(1, Cursor(0, 0, 0))
    cursors, rows = [], []
    for _ in range(60):
        cursors.append(stream.cursor)
        rows.append(stream.next_row())
    assert {row.begins for row in rows} == {True, False}
    for i, cursor in enumerate(cursors[:-1]):
        again = corpus.row_stream(1, cursor)
        for row in rows[i : i + 2]:
            found = again.next_row()
            assert found.tokens.tolist() == row.tokens.tolist() and found.begins == row.begins


def test_fewer_files_than_rows_of_a_step_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"`megalodon\.carry_state` .* one file for each of the 40 .*, but has 1\d"):
        corpus_of(folder, n_lanes=40)


def test_the_order_of_documents_is_part_of_the_fingerprint(folder: Path) -> None:
    prints = {corpus_of(folder, n_lanes=n).fingerprint() for n in (1, 2, 8)}
    units = cut_into_units(find_text_files(str(folder)), range_bytes=100)
    packed = Corpus(units, TextReader(100), ByteTokenizer(), SEQ_LEN, 0, str(folder))
    assert packed.n_lanes == 8
    assert len({*prints, packed.fingerprint()}) == 4


def test_held_out_files_are_whole(folder: Path) -> None:
    units = cut_into_units(find_text_files(str(folder)), range_bytes=100)
    training, validation = split_files(units, 0.3, seed=0)
    assert sorted([*training, *validation], key=units.index) == units and validation
    names = [{unit.file.name for unit in side if not unit.file.json_lines} for side in (training, validation)]
    assert not names[0] & names[1]
    for side in (training, validation):
        for part in files_of(side):
            first, last = side[part[0]], side[part[-1]]
            assert first.file.json_lines or (first.start, last.end) == (0, first.file.size)


def job(folder: Path, batch: int, global_batch: int = 4, **data: Any) -> SimpleNamespace:
    section = {"dataset": "local_text", "dataset_path": str(folder), "seq_len": SEQ_LEN}
    training = SimpleNamespace(**section, local_batch_size=batch, global_batch_size=global_batch)
    validation = SimpleNamespace(**section, local_batch_size=1, steps=-1, enable=True)
    carry = SimpleNamespace(carry_state=True)
    return SimpleNamespace(training=training, validation=validation, megalodon=carry, data=Data(**data))


def build(folder: Path, rank: int, n_ranks: int, batch: int) -> DocumentLoader:
    loader = build_text_dataloader(n_ranks, rank, ByteTokenizer(), job(folder, batch))
    assert isinstance(loader, DocumentLoader)
    return loader


def rows_by_lane(loader: DocumentLoader, n_steps: int, batch: int) -> dict[int, list[tuple[list[int], ...]]]:
    """Of each lane its (inputs, labels, [begins]), taken from the batches of some steps."""
    per_step = len(loader.lanes) // batch
    found: dict[int, list[Any]] = {lane: [] for lane in loader.lanes}
    for number, (inputs, labels) in enumerate(itertools.islice(loader, n_steps * per_step)):
        for i in range(batch):
            lane = loader.lanes[number % per_step * batch + i]
            found[lane].append((inputs["input"][i].tolist(), labels[i].tolist(), [int(inputs["begins"][i])]))
    return found


@pytest.mark.parametrize(("n_ranks", "batch"), [(1, 4), (1, 2), (1, 1), (2, 2), (2, 1), (4, 1)])
def test_a_lane_has_the_same_rows_however_ranks_and_micro_steps_share_a_step(
    folder: Path, n_ranks: int, batch: int
) -> None:
    expected = rows_by_lane(build(folder, 0, 1, 4), 12, 4)
    found: dict[int, Any] = {}
    for rank in range(n_ranks):
        found |= rows_by_lane(build(folder, rank, n_ranks, batch), 12, batch)
    assert found == expected and set(found) == {0, 1, 2, 3}


def test_another_number_of_ranks_continues_with_the_same_rows(folder: Path) -> None:
    expected = rows_by_lane(build(folder, 0, 1, 4), 12, 4)
    saving = [build(folder, rank, 2, 1) for rank in range(2)]
    state: dict[str, torch.Tensor] = {}
    for loader in saving:
        rows_by_lane(loader, 7, 1)
        state |= loader.state_dict()
    for rank in range(4):
        loader = build(folder, rank, 4, 1)
        loader.load_state_dict(state)
        assert rows_by_lane(loader, 5, 1) == {rank: expected[rank][7:]}
    other = build_text_dataloader(1, 0, ByteTokenizer(), job(folder, 2, global_batch=2))
    with pytest.raises(ValueError, match=r"`megalodon\.carry_state` or, where that is true, the rows of a step"):
        other.load_state_dict(state)


def test_places_behind_a_documents_end_do_not_count(folder: Path) -> None:
    loader = build(folder, 0, 1, 4)
    batches = list(itertools.islice(loader, 20))
    inputs = torch.cat([batch["input"] for batch, _ in batches])
    labels = torch.cat([labels for _, labels in batches])
    assert inputs.dtype == labels.dtype == torch.int64
    ends = (labels == EOS).nonzero()
    assert len(ends) > 3
    for row, place in ends.tolist():
        assert (labels[row, place + 1 :] == IGNORED).all() and (inputs[row, place + 1 :] == 0).all()
    assert (labels[:, 0] != IGNORED).all()


def test_validation_text_is_held_out_by_files_and_packed(folder: Path) -> None:
    config = job(folder, 1, global_batch=2, validation_fraction=0.3)
    training = build_text_dataloader(1, 0, ByteTokenizer(), config)
    validation = build_text_validation_dataloader(1, 0, ByteTokenizer(), config)
    names = [{unit.identity for unit in loader._corpus.units} for loader in (training, validation)]
    assert names[0] and names[1] and not names[0] & names[1]
    inputs, labels = next(iter(validation))
    assert set(inputs) == {"input"} and (labels != IGNORED).all()


def test_the_hosts_data_sets_are_refused(folder: Path) -> None:
    config = job(folder, 1)
    config.training.dataset = "c4"
    with pytest.raises(ValueError, match=r"`training\.dataset` must be one of local_text, .* but is \"c4\""):
        build_text_dataloader(1, 0, ByteTokenizer(), config)
