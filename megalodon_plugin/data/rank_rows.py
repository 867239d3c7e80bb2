"""The rows of one rank: those rows n of the job with n % n_ranks == rank, from the lanes that hold them."""

import numpy as np

from .corpus import Corpus
from .rows import Cursor, Row, RowStream


class RankRows:
    """Training rows of one rank: from row `position` of the job on, those n with n % n_ranks == rank.

    `cursors` are the places that the rank's lanes have at `position`, as `cursors()` gave them to any number of ranks.
    Where the number of ranks does not divide that of lanes, ranks share lanes and each walks past the others' rows.
    """

    def __init__(self, corpus: Corpus, rank: int, n_ranks: int, position: int, cursors: dict[int, Cursor]) -> None:
        self._corpus = corpus
        self._rank = rank
        self._n_ranks = n_ranks
        self.position = position
        self._cursors = cursors
        self._streams: dict[int, RowStream] = {}

    def advance(self, n_rows: int) -> list[Row]:
        """The rank's own among the job's next `n_rows` rows, in order; all its lanes move past all of these rows."""
        rows = []
        for n in range(self.position, self.position + n_rows):
            lane = n % self._corpus.n_lanes
            if lane in self._cursors:
                row = self._stream(lane).next_row()
                if n % self._n_ranks == self._rank:
                    assert row is not None, "a lane is endless"
                    rows.append(row)
        self.position += n_rows
        return rows

    def cursors(self) -> dict[int, Cursor]:
        """Place of each of the rank's lanes at `position`, by lane."""
        return self._cursors | {lane: stream.cursor for lane, stream in self._streams.items()}

    def _stream(self, lane: int) -> RowStream:
        if lane not in self._streams:
            self._streams[lane] = self._corpus.row_stream(lane, self._cursors[lane])
        return self._streams[lane]


def lanes_of_rank(n_lanes: int, rank: int, n_ranks: int) -> list[int]:
    """Lanes that hold a row n with n % n_ranks == rank."""
    step = int(np.gcd(n_lanes, n_ranks))
    return list(range(rank % step, n_lanes, step))
