"""Rows: the same for any number of ranks, each token once in an epoch, and a share of the reading for each rank."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from megalodon_plugin.data.corpus import Corpus, lane_count, rows_in_order
from megalodon_plugin.data.files import TextFile, Unit, cut_into_units, find_text_files
from megalodon_plugin.data.rank_rows import RankRows, lanes_of_rank
from megalodon_plugin.data.reader import TextReader
from megalodon_plugin.data.rows import Cursor, Row
from megalodon_plugin.titan.tokenizer import ByteTokenizer

SEQ_LEN = 16
START = Cursor(0, 0, 0)


class RecordingReader(TextReader):
    """A reader that records what it was asked for."""

    def documents(self, unit: Unit, shuffle_seed: object = None) -> Iterator[str]:
        self.__dict__.setdefault("opened", []).append((shuffle_seed, unit.identity))
        yield from super().documents(unit, shuffle_seed)


def write_corpus(folder: Path, n_files: int = 24) -> None:
    for n in range(n_files):
        (folder / f"{n:02}.txt").write_text(f"file {n} " + "".join(f"{n}.{word} " for word in range(10 + n % 7)))
    lines = [json.dumps({"text": f"document {n} of lines"}) for n in range(40)]
    (folder / "lines.jsonl").write_text("\n".join(lines))


def corpus_of(folder: Path, seed: int = 0, range_bytes: int = 400, seq_len: int = SEQ_LEN) -> Corpus:
    units = cut_into_units(find_text_files(str(folder)), range_bytes)
    return Corpus(units, RecordingReader(range_bytes), ByteTokenizer(), seq_len, seed, str(folder))


def start(corpus: Corpus, rank: int, n_ranks: int) -> RankRows:
    lanes = lanes_of_rank(corpus.n_lanes, rank, n_ranks)
    return RankRows(corpus, rank, n_ranks, 0, dict.fromkeys(lanes, START))


def stacked(rows: list[Row]) -> np.ndarray:
    return np.stack([row.tokens for row in rows])


def interleave(rows_of_ranks: list[list[Row]]) -> np.ndarray:
    return stacked([row for together in zip(*rows_of_ranks, strict=True) for row in together])


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    write_corpus(tmp_path)
    corpus = corpus_of(tmp_path)
    assert corpus.n_lanes == 4 and len(corpus.units) >= 28
    return corpus


@pytest.mark.parametrize("n_ranks", [2, 3, 4, 8, 12])
def test_rows_are_the_same_for_any_number_of_ranks(corpus: Corpus, n_ranks: int) -> None:
    alone = stacked(start(corpus, 0, 1).advance(480))  # some three epochs
    ranks = [start(corpus, rank, n_ranks) for rank in range(n_ranks)]
    assert np.array_equal(interleave([rank.advance(480) for rank in ranks]), alone)


def test_rows_differ_by_seed_and_epoch(corpus: Corpus, tmp_path: Path) -> None:
    rows = stacked(start(corpus, 0, 1).advance(40))
    assert not np.array_equal(rows, stacked(start(corpus_of(tmp_path, seed=1), 0, 1).advance(40)))
    assert not np.array_equal(corpus._order(0), corpus._order(1))


def test_each_token_is_read_once_in_an_epoch(corpus: Corpus) -> None:
    expected: Counter[int] = Counter()
    n_documents = 0
    for unit in corpus.units:
        for document in corpus.reader.documents(unit):
            expected.update(corpus.tokenizer.encode(document, add_bos=True, add_eos=True))
            n_documents += 1
    found: Counter[int] = Counter()
    for lane in range(corpus.n_lanes):
        for run in corpus.lane_runs(lane, START):
            if run.at.epoch == 1:
                break
            found.update(run.tokens.tolist())
    assert found == expected and found[256] == n_documents > 60


def test_inputs_of_a_lane_are_its_stream_and_labels_are_one_ahead(corpus: Corpus) -> None:
    stream: list[int] = []
    for run in corpus.lane_runs(1, START):
        stream += run.tokens.tolist()
        if run.at.epoch == 2:
            break
    n_rows = (len(stream) - 1) // SEQ_LEN
    rows = start(corpus, 1, corpus.n_lanes).advance(n_rows * corpus.n_lanes)
    assert np.concatenate([row.tokens[:-1] for row in rows]).tolist() == stream[: n_rows * SEQ_LEN]
    assert np.concatenate([row.tokens[1:] for row in rows]).tolist() == stream[1 : n_rows * SEQ_LEN + 1]
    assert rows[0].tokens.dtype == np.int32
    assert [row.begins for row in rows] == [row.tokens[0] == corpus.tokenizer.bos_id for row in rows]


@pytest.mark.parametrize("saved_by", [1, 2, 3])
@pytest.mark.parametrize("n_rows", [0, 6, 66, 300])
@pytest.mark.parametrize("loaded_by", [1, 3, 4, 5])
def test_cursors_continue_at_any_number_of_ranks(corpus: Corpus, saved_by: int, n_rows: int, loaded_by: int) -> None:
    unbroken = stacked(start(corpus, 0, 1).advance(n_rows + 60)[n_rows:])
    saved: dict[int, Cursor] = {}
    for rank in range(saved_by):
        rows = start(corpus, rank, saved_by)
        rows.advance(n_rows)
        for lane, cursor in rows.cursors().items():
            assert saved.setdefault(lane, cursor) == cursor, "ranks that share a lane must agree on it"
    assert sorted(saved) == list(range(corpus.n_lanes))
    resumed = []
    for rank in range(loaded_by):
        cursors = {lane: saved[lane] for lane in lanes_of_rank(corpus.n_lanes, rank, loaded_by)}
        resumed.append(iter(RankRows(corpus, rank, loaded_by, n_rows, cursors).advance(60)))
    rows_in_turn = [next(resumed[n % loaded_by]) for n in range(n_rows, n_rows + 60)]
    assert np.array_equal(stacked(rows_in_turn), unbroken)


def test_a_rank_opens_its_own_share_and_a_resumed_one_a_unit_for_each_lane(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    opened = []
    for rank in range(2):
        corpus = corpus_of(tmp_path)
        assert corpus.n_lanes == 4
        rows = start(corpus, rank, 2)
        while all(cursor.epoch == 0 for cursor in rows.cursors().values()):
            rows.advance(4)
        # The shuffle seed names the epoch; a lane that is done early goes on with other units in the next.
        opened.append([name for seed, name in corpus.reader.opened if str(seed).split()[1] == "0"])
    assert not {*opened[0]} & {*opened[1]}
    assert all(10 < len(own) == len({*own}) <= len(corpus.units) / 2 for own in opened)
    corpus = corpus_of(tmp_path)
    cursors = {lane: Cursor(0, 2, 5) for lane in range(4)}
    RankRows(corpus, 0, 1, 0, cursors).advance(4)
    expected = {corpus.units[corpus._order(0)[lane::4][2]].identity for lane in range(4)}
    assert {name for _, name in corpus.reader.opened} == expected and len(corpus.reader.opened) == 4


@pytest.mark.parametrize("seq_len", [1, 7, 10_000])
def test_rows_of_any_length(tmp_path: Path, seq_len: int) -> None:
    write_corpus(tmp_path, n_files=5)
    corpus = corpus_of(tmp_path, seq_len=seq_len)
    first, second = start(corpus, 0, 1).advance(corpus.n_lanes + 1)[:: corpus.n_lanes]
    assert first.tokens.shape == second.tokens.shape == (seq_len + 1,)
    assert first.tokens[-1] == second.tokens[0]


def test_text_without_tokens_is_an_error_not_an_endless_loop(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n' * 30)
    corpus = corpus_of(tmp_path)
    with pytest.raises(ValueError, match=rf"{tmp_path}.*holds no text"):
        start(corpus, 0, 1).advance(1)


def test_a_file_that_shrank_since_the_checkpoint_is_reported(corpus: Corpus) -> None:
    rows = RankRows(corpus, 0, 1, 0, dict.fromkeys(range(4), Cursor(0, 1, 10**6)))
    with pytest.raises(ValueError, match=r"must be as it was when the checkpoint was saved, but .* token 1000000"):
        rows.advance(1)


def test_ordered_rows_are_the_units_in_turn(corpus: Corpus) -> None:
    stream: list[int] = []
    for unit in corpus.units:
        for document in corpus.reader.documents(unit):
            stream += corpus.tokenizer.encode(document, add_bos=True, add_eos=True)
    rows = list(rows_in_order(corpus))
    assert len(rows) == (len(stream) - 1) // SEQ_LEN
    assert np.concatenate([row.tokens[:-1] for row in rows]).tolist() == stream[: len(rows) * SEQ_LEN]


@pytest.mark.parametrize(
    ("n_units", "unit_bytes", "expected"),
    [(1, 100, 1), (4, 100, 1), (64, 100, 16), (400, 100, 64), (10**4, 2**22, 256), (10**4, 2**20, 960)],
)
def test_lane_count_depends_on_units_and_memory(n_units: int, unit_bytes: int, expected: int) -> None:
    units = [Unit(TextFile(str(n), str(n), unit_bytes), 0, unit_bytes) for n in range(n_units)]
    assert lane_count(units, 2**24) == expected


def test_large_gz_files_count_as_the_range_that_is_open() -> None:
    units = [Unit(TextFile(f"{n}.gz", f"{n}.txt.gz", 2**30), 0, 2**30) for n in range(1000)]
    assert lane_count(units, 2**20) == 240  # 250 units for 4 a lane; 1 MiB of each is open


@pytest.mark.parametrize("change", ["seed", "seq_len", "content size", "name", "tokenizer"])
def test_fingerprint_differs_for_other_data(tmp_path: Path, change: str) -> None:
    write_corpus(tmp_path)
    before = corpus_of(tmp_path).fingerprint()
    assert corpus_of(tmp_path).fingerprint() == before
    if change == "content size":
        (tmp_path / "03.txt").write_text("other")
    elif change == "name":
        (tmp_path / "03.txt").rename(tmp_path / "3.txt")
    changed = corpus_of(tmp_path, seed=int(change == "seed"), seq_len=SEQ_LEN + (change == "seq_len"))
    if change == "tokenizer":
        changed.tokenizer.bos_id = 258
    assert changed.fingerprint() != before
