"""Rows that follow documents: each lane reads one document front to back, row by row, before it takes another.

The order that training with a carried state needs. There are as many lanes as rows in a step of the whole job, so row
n of the job, of lane n % K, continues row n - K. A row holds tokens of one document only, the j-th of them tokens
[j * seq_len, (j + 1) * seq_len + 1). The last one holds fewer.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from .corpus import Corpus, Passage
from .files import Unit, split_units
from .reader import TextReader
from .rows import Cursor, Row, RowStream, Run
from .tokenizer import Tokenizer


class DocumentCorpus(Corpus):
    """A corpus whose files of text are documents, however long, and whose lanes are the rows of a step.

    A long file is read and tokenised a unit at a time. Of .jsonl files each line is a document, as elsewhere.

    Raises:
        ValueError: there are fewer files (or byte ranges of .jsonl files) than lanes.
    """

    kind = "documents"

    def __init__(
        self,
        units: Sequence[Unit],
        reader: TextReader,
        tokenizer: Tokenizer,
        seq_len: int,
        seed: int,
        path: str,
        n_lanes: int,
    ) -> None:
        super().__init__(units, reader, tokenizer, seq_len, seed, path)
        self.n_lanes = n_lanes
        self._files = files_of(units)
        if len(self._files) < n_lanes:
            raise ValueError(
                f'with `megalodon.carry_state` the text of "{self.path}" must have at least one file for each of the '
                f"{n_lanes} rows of a step, but has {len(self._files)}: give it more files, or lower "
                "`training.local_batch_size` and `training.global_batch_size` and lengthen `training.seq_len` instead"
            )

    def lane_order(self, lane: int, epoch: int) -> Sequence[int]:
        return [index for n in self._order(epoch)[lane :: self.n_lanes] for index in self._files[n]]

    def row_stream(self, lane: int, cursor: Cursor) -> "DocumentRows":
        return DocumentRows(self.lane_runs(lane, cursor), self.seq_len, cursor)

    def passages(self, unit: Unit, shuffle_seed: str | None) -> Iterator[Passage]:
        if unit.file.json_lines:
            yield from super().passages(unit, shuffle_seed)
            return
        begins = unit.start == 0
        texts = self.reader.documents(unit)
        text = next(texts, None)
        while text is not None:
            following = next(texts, None)
            yield Passage(text, begins, ends=following is None and unit.end == unit.file.size)
            text, begins = following, False

    def _draw_order(self, epoch: int) -> np.ndarray:
        return self.shuffled(len(self._files), epoch)


class DocumentRows(RowStream):
    """Cuts a stream of runs into rows of one document each. `cursor` is the place of the next row's first token,
    or of the last one of a document, which has been a label and is no input.
    """

    def __init__(self, runs: Iterator[Run], seq_len: int, cursor: Cursor) -> None:
        super().__init__(runs, seq_len, cursor)
        self._ahead: Run | None = None  # has been read, and is perhaps of the next document

    def next_row(self) -> Row:
        """The document's next row, of 1 to seq_len inputs, or the first one of the next document."""
        self._fill()
        while self._n_tokens < 2:  # nothing is left to predict
            self._runs.clear()
            self._n_tokens = 0
            self._fill()
        return self._take(min(self._seq_len, self._n_tokens - 1))

    def _fill(self) -> None:
        """Hold a row and its last label, or what the document has left."""
        while self._n_tokens <= self._seq_len:
            run = self._ahead or next(self._source)
            if self._runs and run.begins:
                self._ahead = run
                return
            self._ahead = None
            self._runs.append(run)
            self._n_tokens += len(run.tokens)


def files_of(units: Sequence[Unit]) -> list[list[int]]:
    """Indices of the units of each file of text, in order; a byte range of a .jsonl file stands alone."""
    files: list[list[int]] = []
    for index, unit in enumerate(units):
        same = index > 0 and not unit.file.json_lines and unit.file == units[index - 1].file
        if same:
            files[-1].append(index)
        else:
            files.append([index])
    return files


def split_files(units: list[Unit], validation_fraction: float, seed: int) -> tuple[list[Unit], list[Unit]]:
    """`split_units` that holds out whole files of text, so that the others stay whole."""
    parts = [[units[index] for index in indices] for indices in files_of(units)]
    whole = {Unit(part[0].file, part[0].start, part[-1].end): part for part in parts}
    sides = split_units(list(whole), validation_fraction, seed)
    training, validation = ([unit for file in side for unit in whole[file]] for side in sides)
    return training, validation
