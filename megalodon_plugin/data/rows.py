"""Rows of tokens, cut from the runs of tokens that a lane of the corpus reads."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Cursor(NamedTuple):
    """Place of a lane's next token: epoch, unit in the lane's order of that epoch, token in that unit's stream."""

    epoch: int
    unit: int
    token: int


@dataclass
class Run:
    """Consecutive tokens (int32) of one unit, the place of the first, and whether a document begins with it."""

    at: Cursor
    tokens: np.ndarray
    begins: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """n inputs and, one ahead, their labels; tokens (n + 1,) int32. Does a document begin with the first one?"""

    tokens: np.ndarray
    begins: bool


class RowStream:
    """Cuts a stream of runs into rows. `cursor` is the place of the next row's first token."""

    def __init__(self, runs: Iterator[Run], seq_len: int, cursor: Cursor) -> None:
        self.cursor = cursor
        self._source = runs
        self._seq_len = seq_len
        self._runs: deque[Run] = deque()
        self._n_tokens = 0

    def next_row(self) -> Row | None:
        """seq_len inputs, whose last label is the next row's first input; None when the tokens run out."""
        while self._n_tokens <= self._seq_len:
            run = next(self._source, None)
            if run is None:
                return None
            self._runs.append(run)
            self._n_tokens += len(run.tokens)
        return self._take(self._seq_len)

    def _take(self, n: int) -> Row:
        """A row of the next n tokens and, as its last label, the one after them, which stays."""
        tokens = np.empty(n + 1, dtype=np.int32)
        begins = self._runs[0].begins
        filled = 0
        while filled < n:
            run = self._runs[0]
            taken = run.tokens[: n - filled]
            tokens[filled : filled + len(taken)] = taken
            filled += len(taken)
            if len(taken) == len(run.tokens):
                self._runs.popleft()
            else:
                at = run.at._replace(token=run.at.token + len(taken))
                self._runs[0] = Run(at, run.tokens[len(taken) :])
        tokens[-1] = self._runs[0].tokens[0]
        self.cursor = self._runs[0].at
        self._n_tokens -= n
        return Row(tokens, begins)
