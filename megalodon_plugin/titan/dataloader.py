"""Data loaders for text on disk: the data sets `local_text` and `python_stdlib`; others are the host's."""

import copy
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config import JobConfig
from torchtitan.hf_datasets import text_datasets

from megalodon_plugin.data.corpus import Corpus, rows_in_order
from megalodon_plugin.data.prefetch import Prefetch
from megalodon_plugin.data.rank_rows import RankRows, lanes_of_rank
from megalodon_plugin.data.rows import Cursor, Row

from .data_source import OWN_DATASETS, check_batch, corpus_of, rows_of_step, source_of
from .job_rules import carries_state, check_other_dataset

Batch = tuple[dict[str, torch.Tensor], torch.Tensor]
# A batch, and the rank's position and cursors after it.
Prepared = tuple[Batch, int, dict[int, Cursor]]


def build_text_dataloader(
    dp_world_size: int, dp_rank: int, tokenizer: BaseTokenizer, job_config: JobConfig, infinite: bool = True
) -> BaseDataLoader:
    """Loader of `training.dataset`: endless and shuffled, or, if not `infinite`, one pass in order."""
    training = job_config.training
    if not source_of(job_config, "training").is_own:
        check_other_dataset(job_config, OWN_DATASETS)
        return text_datasets.build_text_dataloader(dp_world_size, dp_rank, tokenizer, job_config, infinite)
    if carries_state(job_config):
        n_lanes = rows_of_step(job_config, dp_world_size)
        corpus = corpus_of(job_config, "training", tokenizer, n_lanes)
        return DocumentLoader(corpus, dp_rank, dp_world_size, training.local_batch_size)
    corpus = corpus_of(job_config, "training", tokenizer)
    if infinite:
        return TextLoader(corpus, dp_rank, dp_world_size, training.local_batch_size)
    return OrderedTextLoader(corpus, dp_rank, dp_world_size, training.local_batch_size, endless=False)


def build_text_validation_dataloader(
    dp_world_size: int, dp_rank: int, tokenizer: BaseTokenizer, job_config: JobConfig, infinite: bool = False
) -> BaseDataLoader:
    """Loader of validation's text, from the first row at each iteration. See `OrderedTextLoader` and `source_of`."""
    validation = job_config.validation
    source = source_of(job_config, "validation")
    if not source.is_own:
        if not validation.dataset:  # the host reads its own default from the job
            job_config = copy.copy(job_config)
            job_config.validation = dataclasses.replace(validation, dataset=source.dataset)
        return text_datasets.build_text_validation_dataloader(dp_world_size, dp_rank, tokenizer, job_config, infinite)
    corpus = corpus_of(job_config, "validation", tokenizer)
    return OrderedTextLoader(corpus, dp_rank, dp_world_size, validation.local_batch_size, endless=infinite)


class TextLoader(BaseDataLoader):
    """Endless shuffled batches of one rank of `n_ranks`, with a state that any number of ranks can load.

    Batch i holds the rows n = i * n_ranks * batch_size + j * n_ranks + rank, j = 0 … batch_size - 1, of the job, as
    ({"input": (batch_size, seq_len)}, labels (batch_size, seq_len)), int64, labels one token ahead. So the ranks' i-th
    batches together are a contiguous range of rows, the same however many ranks share it.

    The next batch is prepared in a thread while one is used; the state is that after the last batch yielded.
    """

    def __init__(self, corpus: Corpus, rank: int, n_ranks: int, batch_size: int) -> None:
        check_batch(batch_size, corpus.seq_len)
        self._corpus = corpus
        self._rank = rank
        self._n_ranks = n_ranks
        self._batch_size = batch_size
        self._fingerprint = corpus.fingerprint()
        self._position = 0
        self._cursors = {lane: Cursor(0, 0, 0) for lane in lanes_of_rank(corpus.n_lanes, rank, n_ranks)}
        # Counts loaded states, so that a running iterator notices one.
        self._loads = 0

    def __iter__(self) -> Iterator[Batch]:
        with Prefetch[Prepared]() as ahead:
            while True:
                rows = RankRows(self._corpus, self._rank, self._n_ranks, self._position, self._cursors)
                loads = self._loads
                prepare = functools.partial(self._prepare, rows)
                ahead.start(prepare)
                while loads == self._loads:
                    batch, position, cursors = ahead.result()
                    ahead.start(prepare)
                    self._position, self._cursors = position, cursors
                    yield batch
                ahead.discard()

    def _prepare(self, rows: RankRows) -> Prepared:
        batch = self._batch_of(rows.advance(self._n_ranks * self._batch_size))
        return batch, rows.position, rows.cursors()

    def _batch_of(self, rows: list[Row]) -> Batch:
        return _batch(rows)

    def state_dict(self) -> dict[str, Any]:
        """`position`, `fingerprint`, and `lane_<k>` (epoch, unit, token) for the rank's lanes, as new int64 tensors.

        `position` counts the rows that all ranks together have received. Ranks that share a lane agree on it.
        """
        state = {f"lane_{lane}": torch.tensor(cursor) for lane, cursor in self._cursors.items()}
        return state | {"position": torch.tensor(self._position), "fingerprint": torch.tensor(self._fingerprint)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where `state_dict` was saved. ValueError when it is of other data; an empty one is left alone."""
        if not state_dict:
            return
        self.check_fingerprint(state_dict["fingerprint"])
        self._cursors = {lane: Cursor(*state_dict[f"lane_{lane}"].tolist()) for lane in self._cursors}
        self._position = int(state_dict["position"])
        self._loads += 1

    def check_fingerprint(self, fingerprint: torch.Tensor) -> None:
        """Raise ValueError unless a checkpoint with this fingerprint is of this run's data."""
        if int(fingerprint) != self._fingerprint:
            raise ValueError(
                "the checkpoint's position in the data must belong to the data of this run, but something has changed: "
                "`data.seed`, `data.validation_fraction`, `data.text_field`, `training.seq_len`, the tokenizer, the "
                f'files of "{self._corpus.path}", `megalodon.carry_state` or, where that is true, the rows of a step. '
                "Set it back, or start the data from their beginning with "
                '`checkpoint.exclude_from_loading` = ["dataloader"]'
            )


class DocumentLoader(TextLoader):
    """`TextLoader` of a corpus whose rows follow documents: those of a step continue those of the step before.

    Batches are ({"input": (batch_size, seq_len), "begins": (batch_size,) bool}, labels): `begins` says which rows are
    the first of a document. Places behind a document's end have input 0 and the label that does not count.

    `lanes` are the rank's, in the order in which its batches of one step have them as rows.
    """

    @property
    def lanes(self) -> list[int]:
        return sorted(self._cursors)

    def _batch_of(self, rows: list[Row]) -> Batch:
        inputs = torch.zeros(len(rows), self._corpus.seq_len, dtype=torch.int64)
        labels = torch.full_like(inputs, IGNORE_INDEX)
        for i, row in enumerate(rows):
            tokens, n = torch.from_numpy(row.tokens), len(row.tokens) - 1  # (n + 1,)
            inputs[i, :n], labels[i, :n] = tokens[:-1], tokens[1:]
        return {"input": inputs, "begins": torch.tensor([row.begins for row in rows])}, labels


class OrderedTextLoader(BaseDataLoader):
    """Unshuffled batches of one rank of `n_ranks`, from the first row at each iteration; once over, or `endless`.

    Rows are shared as in `TextLoader`. All ranks get the same number of batches: rows that do not fill a batch on every
    rank are left out. Each rank reads and tokenises everything, which suits sets of the size of a validation set.
    """

    def __init__(self, corpus: Corpus, rank: int, n_ranks: int, batch_size: int, endless: bool) -> None:
        check_batch(batch_size, corpus.seq_len)
        self._corpus = corpus
        self._rank = rank
        self._n_ranks = n_ranks
        self._batch_size = batch_size
        self._endless = endless

    def __iter__(self) -> Iterator[Batch]:
        batches = self._batches()
        with Prefetch[Batch | None]() as ahead:
            ahead.start(lambda: next(batches, None))
            while (batch := ahead.result()) is not None:
                ahead.start(lambda: next(batches, None))
                yield batch

    def _batches(self) -> Iterator[Batch]:
        n_rows = self._n_ranks * self._batch_size
        while True:
            own: list[Row] = []
            count = 0
            for count, row in enumerate(rows_in_order(self._corpus), start=1):
                if (count - 1) % self._n_ranks == self._rank:
                    own.append(row)
                if count % n_rows == 0:
                    yield _batch(own)
                    own = []
            if count < n_rows:
                raise ValueError(
                    f'the text of "{self._corpus.path}" must fill a batch on every rank, {n_rows} rows of '
                    f"{self._corpus.seq_len} tokens, but holds {count} rows: give it more text, or lower seq_len or "
                    "local_batch_size"
                )
            if not self._endless:
                return

    def state_dict(self) -> dict[str, Any]:
        """Nothing: each iteration starts at the first row."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to load."""


def _batch(rows: list[Row]) -> Batch:
    tokens = torch.from_numpy(np.stack([row.tokens for row in rows])).to(torch.int64)  # (batch_size, seq_len + 1)
    return {"input": tokens[:, :-1].contiguous()}, tokens[:, 1:].contiguous()
