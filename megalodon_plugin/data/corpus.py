"""Which text the n-th row of a job holds, and how far each lane of the corpus has been read.

Training text is read in K *lanes*. Lane k is the endless stream of the units `order(epoch)[k::K]`, epoch after epoch,
tokenised, each document between its begin and end tokens. Its j-th row is tokens [j * seq_len, (j + 1) * seq_len + 1)
of that stream: consecutive rows share one token, which is a label in the first and an input in the second, so that
each token is input once and label once. Row n of the job is row n // K of lane n % K. K depends on the corpus alone, so
row n depends on the seed and n alone, and R ranks that divide K among them read and tokenise a share each.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from .files import MIB, Unit
from .fingerprint import hash_of, tokenizer_probe
from .reader import TextReader
from .rows import Cursor, Row, RowStream, Run
from .tokenizer import Tokenizer

# Multiples of many numbers of ranks, foremost of powers of two.
LANE_COUNTS = (3840, 1920, 960, 480, 256, 240, 128, 120, 64, 48, 32, 24, 16, 12, 8, 4, 2, 1)
UNITS_PER_LANE = 4
# What the lanes together may hold of text that has been read and not been used yet; of several ranks each holds its
# share. With the largest ranges that makes 256 lanes, so that up to 256 ranks read nothing twice.
LANES_BYTES = 1024 * MIB
# A lane may draw units without a line of text for an epoch; several times in a row means that there is none.
MOST_EMPTY_EPOCHS = 4


class Passage(NamedTuple):
    """Consecutive text of one document: does the document begin with it, and end with it?"""

    text: str
    begins: bool
    ends: bool


def lane_count(units: Sequence[Unit], range_bytes: int) -> int:
    """K: at least 4 units for a lane, and at most 1 GiB of text open in all lanes together.

    A lane has at most `range_bytes` of one unit in memory. The mean over units is weighted by their size, since that is
    how long a lane stays in one: a corpus of many small files and a few large ones has its lanes in the large ones.
    """
    total = sum(unit.n_bytes for unit in units)
    open_bytes = sum(unit.n_bytes * min(unit.n_bytes, range_bytes) for unit in units) / max(total, 1)
    fits = (k for k in LANE_COUNTS if k * UNITS_PER_LANE <= len(units) and k * open_bytes <= LANES_BYTES)
    return next(fits, 1)


class Corpus:
    """Units, how to read and tokenise them, and their order in each epoch. `path` names it in errors."""

    kind = "corpus"

    def __init__(
        self, units: Sequence[Unit], reader: TextReader, tokenizer: Tokenizer, seq_len: int, seed: int, path: str
    ) -> None:
        self.units = units
        self.reader = reader
        self.tokenizer = tokenizer
        self.seq_len = seq_len
        self.seed = seed
        self.path = path
        self.n_lanes = lane_count(units, reader.range_bytes)
        # Two epochs are in use at a time: lanes cross from one into the next.
        self._order = functools.lru_cache(maxsize=3)(self._draw_order)

    def fingerprint(self) -> int:
        """63 bits that differ where rows do: a hash of seed, row length, tokenizer, units, and how they are read."""
        units = hash_of(*(f"{unit.identity} {unit.file.size} {unit.start} {unit.end}" for unit in self.units))
        vocabulary = tokenizer_probe(self.tokenizer)
        parts = (self.seed, self.seq_len, vocabulary, units.hex(), self.n_lanes, self.reader.text_field)
        return int.from_bytes(hash_of(self.kind, *parts)[:8], "big") >> 1

    def lane_order(self, lane: int, epoch: int) -> Sequence[int]:
        """Indices of the units that the lane reads in an epoch, in order."""
        order: list[int] = self._order(epoch)[lane :: self.n_lanes].tolist()
        return order

    def row_stream(self, lane: int, cursor: Cursor) -> RowStream:
        """The lane's rows from `cursor` on: `next_row` gives them, `cursor` is the place of the next one."""
        return RowStream(self.lane_runs(lane, cursor), self.seq_len, cursor)

    def lane_runs(self, lane: int, cursor: Cursor) -> Iterator[Run]:
        """The endless stream of lane `lane` from `cursor` on. ValueError when the lane finds no text."""
        epoch, index, token = cursor
        empty_epochs = 0
        while True:
            order = self.lane_order(lane, epoch)
            found = index > 0 or token > 0
            for place in range(index, len(order)):
                unit = self.units[order[place]]
                for run in self.unit_runs(unit, epoch, place, token, f"{self.seed} {epoch} {unit.identity}"):
                    found = True
                    yield run
                token = 0
            empty_epochs = 0 if found else empty_epochs + 1
            if empty_epochs == (1 if self.n_lanes == 1 else MOST_EMPTY_EPOCHS):
                raise ValueError(f'the text of "{self.path}" must yield tokens, but holds no text')
            epoch, index = epoch + 1, 0

    def unit_runs(
        self, unit: Unit, epoch: int = 0, place: int = 0, first: int = 0, shuffle_seed: str | None = None
    ) -> Iterator[Run]:
        """The unit's documents as tokens from token `first` on; ValueError when the unit has fewer than that."""
        end = 0
        for text, begins, ends in self.passages(unit, shuffle_seed):
            tokens = np.asarray(self.tokenizer.encode(text, add_bos=begins, add_eos=ends), dtype=np.int32)
            start, end = end, end + len(tokens)
            skip = max(first - start, 0)
            if skip < len(tokens):
                yield Run(Cursor(epoch, place, start + skip), tokens[skip:], begins and skip == 0)
        if end < first:
            raise ValueError(
                f"{unit.file.path} must be as it was when the checkpoint was saved, but {unit.identity} has {end} "
                f"tokens and the checkpoint continues at token {first}"
            )

    def passages(self, unit: Unit, shuffle_seed: str | None) -> Iterator[Passage]:
        """The unit's text: here each passage is a document."""
        for document in self.reader.documents(unit, shuffle_seed):
            yield Passage(document, begins=True, ends=True)

    def _draw_order(self, epoch: int) -> np.ndarray:
        return self.shuffled(len(self.units), epoch)

    def shuffled(self, n: int, epoch: int) -> np.ndarray:
        """0 … n - 1 in the epoch's order."""
        # Sorting raw draws, which NumPy never changes for a seed; `Generator.permutation` has no such promise.
        bits = np.random.PCG64(int.from_bytes(hash_of("order", self.seed, epoch), "big"))
        return np.argsort(bits.random_raw(n), kind="stable")


def rows_in_order(corpus: Corpus) -> Iterator[Row]:
    """Rows of one pass over the units in their order, unshuffled; the tokens after the last full row are left out."""
    runs = (run for place, unit in enumerate(corpus.units) for run in corpus.unit_runs(unit, 0, place))
    stream = RowStream(runs, corpus.seq_len, Cursor(0, 0, 0))
    while (row := stream.next_row()) is not None:
        yield row
