"""Data loaders for text on disk: the data sets `local_text` and `python_stdlib`; others are the host's."""

import functools
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config import JobConfig
from torchtitan.hf_datasets import text_datasets
from torchtitan.tools.logging import logger

from megalodon_plugin.data.corpus import Corpus, rows_in_order
from megalodon_plugin.data.documents import DocumentCorpus, split_files
from megalodon_plugin.data.files import (
    PYTHON_STDLIB,
    TextFile,
    Unit,
    cut_into_units,
    find_python_stdlib,
    find_text_files,
    range_bytes_of,
)
from megalodon_plugin.data.files import split_units as split
from megalodon_plugin.data.rank_rows import RankRows, lanes_of_rank
from megalodon_plugin.data.reader import TextReader
from megalodon_plugin.data.rows import Cursor, Row
from megalodon_plugin.model.config import check_types

from .job_config import Data
from .tokenizer import load_tokenizer

LOCAL_TEXT = "local_text"
OWN_DATASETS = (LOCAL_TEXT, PYTHON_STDLIB)

Batch = tuple[dict[str, torch.Tensor], torch.Tensor]


def build_text_dataloader(
    dp_world_size: int, dp_rank: int, tokenizer: BaseTokenizer, job_config: JobConfig, infinite: bool = True
) -> BaseDataLoader:
    """Loader of `training.dataset`: endless and shuffled, or, if not `infinite`, one pass in order."""
    training = job_config.training
    if not _is_own("training", training.dataset):
        if carries_state(job_config):
            raise ValueError(
                f"`training.dataset` must be one of {', '.join(OWN_DATASETS)} with `megalodon.carry_state`, whose rows "
                f'follow documents, but is "{training.dataset}"'
            )
        return text_datasets.build_text_dataloader(dp_world_size, dp_rank, tokenizer, job_config, infinite)
    if carries_state(job_config):
        n_lanes = rows_of_step(job_config, dp_world_size)
        corpus = _corpus(job_config, "training", tokenizer, n_lanes)
        return DocumentLoader(corpus, dp_rank, dp_world_size, training.local_batch_size)
    corpus = _corpus(job_config, "training", tokenizer)
    if infinite:
        return TextLoader(corpus, dp_rank, dp_world_size, training.local_batch_size)
    return OrderedTextLoader(corpus, dp_rank, dp_world_size, training.local_batch_size, endless=False)


def build_text_validation_dataloader(
    dp_world_size: int, dp_rank: int, tokenizer: BaseTokenizer, job_config: JobConfig, infinite: bool = False
) -> BaseDataLoader:
    """Loader of `validation.dataset`, from the first row at each iteration. See `OrderedTextLoader`."""
    validation = job_config.validation
    if not _is_own("validation", validation.dataset):
        return text_datasets.build_text_validation_dataloader(dp_world_size, dp_rank, tokenizer, job_config, infinite)
    corpus = _corpus(job_config, "validation", tokenizer)
    return OrderedTextLoader(corpus, dp_rank, dp_world_size, validation.local_batch_size, endless=infinite)


def side_as_bytes(job_config: JobConfig, section: str) -> bytes:
    """All documents of one side ("training" | "validation") of a small data set of the plugin's, end to end, in UTF-8.

    It is in memory as a whole: for looking at a text, not for training on it.
    """
    corpus = _corpus(job_config, section, load_tokenizer("byte"))
    documents = (text for unit in corpus.units for text in corpus.reader.documents(unit))
    return "".join(documents).encode()


class TextLoader(BaseDataLoader):
    """Endless shuffled batches of one rank of `n_ranks`, with a state that any number of ranks can load.

    Batch i holds the rows n = i * n_ranks * batch_size + j * n_ranks + rank, j = 0 … batch_size - 1, of the job, as
    ({"input": (batch_size, seq_len)}, labels (batch_size, seq_len)), int64, labels one token ahead. So the ranks' i-th
    batches together are a contiguous range of rows, the same however many ranks share it.

    The next batch is prepared in a thread while one is used; the state is that of the batches handed out.
    """

    def __init__(self, corpus: Corpus, rank: int, n_ranks: int, batch_size: int) -> None:
        _check_batch(batch_size, corpus.seq_len)
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
        with _Ahead() as ahead:
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

    def _prepare(self, rows: RankRows) -> tuple[Batch, int, dict[int, Cursor]]:
        batch = self._batch_of(rows.advance(self._n_ranks * self._batch_size))
        return batch, rows.position, rows.cursors()

    def _batch_of(self, rows: list[Row]) -> Batch:
        return _batch(rows)

    def state_dict(self) -> dict[str, Any]:
        """`position`, `fingerprint`, and `lane_<k>` (epoch, unit, token) for the rank's lanes, as new int64 tensors.

        `position` counts the rows that all ranks together have been handed. Ranks that share a lane agree on it.
        """
        state = {f"lane_{lane}": torch.tensor(cursor) for lane, cursor in self._cursors.items()}
        return state | {"position": torch.tensor(self._position), "fingerprint": torch.tensor(self._fingerprint)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` was saved. ValueError when it is of other data; an empty one is left alone."""
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
                "the data position in the checkpoint must be of this run's data, but it is a checkpoint of other data: "
                "`data.seed`, `data.validation_fraction`, `data.text_field`, `training.seq_len`, the tokenizer, the "
                f'files of "{self._corpus.path}", `megalodon.carry_state` or, where that is true, the rows of a step '
                "have changed. Set them back, or start the data from their beginning "
                'with `checkpoint.exclude_from_loading` = ["dataloader"]'
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

    Rows are dealt as by `TextLoader`. All ranks get the same number of batches: rows that do not fill a batch on every
    rank are left out. Each rank reads and tokenises everything, which suits sets of the size of a validation set.
    """

    def __init__(self, corpus: Corpus, rank: int, n_ranks: int, batch_size: int, endless: bool) -> None:
        _check_batch(batch_size, corpus.seq_len)
        self._corpus = corpus
        self._rank = rank
        self._n_ranks = n_ranks
        self._batch_size = batch_size
        self._endless = endless

    def __iter__(self) -> Iterator[Batch]:
        batches = self._batches()
        with _Ahead() as ahead:
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
        """Nothing: each iteration begins anew."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to load."""


class _Ahead:
    """Runs one call at a time in a thread; its result, or exception, comes out of `result`."""

    def __enter__(self) -> "_Ahead":
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="text-loader")
        # Bound here: an iterator alive at the interpreter's end is closed when modules, this one too, are empty.
        self._is_finalizing = sys.is_finalizing
        return self

    def __exit__(self, *_: object) -> None:
        if not self._is_finalizing():
            self._executor.shutdown(wait=False, cancel_futures=True)

    def start(self, call: Any) -> None:
        self._future = self._executor.submit(call)

    def result(self) -> Any:
        return self._future.result()

    def discard(self) -> None:
        """Drop what was started; the thread takes the next call once it is done with this one."""
        self._future.cancel()


def _batch(rows: list[Row]) -> Batch:
    tokens = torch.from_numpy(np.stack([row.tokens for row in rows])).to(torch.int64)  # (batch_size, seq_len + 1)
    return {"input": tokens[:, :-1].contiguous()}, tokens[:, 1:].contiguous()


def _check_batch(batch_size: int, seq_len: int) -> None:
    for name, value in (("local_batch_size", batch_size), ("seq_len", seq_len)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, but is {value}")


def _is_own(section: str, dataset: str) -> bool:
    """Whether the data set is the plugin's; ValueError when it is neither that nor the host's."""
    name = dataset.lower()
    known = (*OWN_DATASETS, *text_datasets.DATASETS)
    if name not in known:
        raise ValueError(f'`{section}.dataset` must be one of {", ".join(known)}, but is "{dataset}"')
    return name in OWN_DATASETS


def carries_state(job_config: JobConfig) -> bool:
    """Whether the job's rows follow documents. Any other value than true counts as false here and is refused later."""
    return getattr(getattr(job_config, "megalodon", None), "carry_state", False) is True


def rows_of_step(job_config: JobConfig, dp_world_size: int) -> int:
    """Rows of one step of the whole job."""
    training = job_config.training
    asked: int = training.global_batch_size
    return asked if asked > 0 else training.local_batch_size * dp_world_size


def _corpus(
    job_config: JobConfig, section: str, tokenizer: BaseTokenizer, n_document_lanes: int | None = None
) -> Corpus:
    """The corpus of `section` ("training" | "validation"), without what is held out for the other one.

    With `n_document_lanes` its rows follow documents.
    """
    data = getattr(job_config, "data", None) or Data()
    try:
        check_types(data, Data)
    except ValueError as error:
        raise ValueError(f"[data] {error}") from error
    if not 0 <= data.validation_fraction < 1:
        raise ValueError(f"`data.validation_fraction` must be in [0, 1), but is {data.validation_fraction}")
    options = getattr(job_config, section)
    files, shared = _files_of_side(job_config, section)
    # Both sides of a split must cut the files alike, whatever the length of their rows.
    seq_len = job_config.training.seq_len if shared else options.seq_len
    _check_batch(options.local_batch_size, min(seq_len, options.seq_len))
    range_bytes = range_bytes_of(files, seq_len)
    units = cut_into_units(files, range_bytes)
    if shared:
        divide = split_files if carries_state(job_config) else split
        units = _side(units, section, data.validation_fraction, data.seed, divide)
    path = options.dataset_path or options.dataset
    size = sum(unit.n_bytes for unit in units) / 2**20
    logger.info(f'{section} text: "{path}", {len(files)} files; {size:.1f} MiB in {len(units)} units')
    reader = TextReader(range_bytes, data.text_field, data.broken_lines)
    how = (reader, tokenizer, options.seq_len, data.seed, path)
    return Corpus(units, *how) if n_document_lanes is None else DocumentCorpus(units, *how, n_lanes=n_document_lanes)


def _files(section: str, job_config: JobConfig) -> list[TextFile]:
    options = getattr(job_config, section)
    if options.dataset.lower() == PYTHON_STDLIB:
        return find_python_stdlib()
    key = f"{section}.dataset_path"
    if not options.dataset_path:
        raise ValueError(
            f'`{key}` must name files, folders or globs for "{LOCAL_TEXT}", but is {options.dataset_path!r}'
        )
    return find_text_files(options.dataset_path, key)


def _files_of_side(job_config: JobConfig, section: str) -> tuple[list[TextFile], bool]:
    """The files of `section`, and whether training and validation are the same files, however they are spelled.

    Where they are, both sides get the training's list: a split must name the files alike.

    Raises:
        ValueError: they have some files in common and others not, so that held-out text would be trained on.
    """
    names = {job_config.training.dataset.lower(), job_config.validation.dataset.lower()}
    if not names <= set(OWN_DATASETS):
        return _files(section, job_config), False
    if names == {PYTHON_STDLIB}:
        return find_python_stdlib(), True
    files = {"training": _files("training", job_config)}
    try:
        files["validation"] = _files("validation", job_config)
    except ValueError:
        if job_config.validation.enable:
            raise
        return files["training"], False
    training, validation = ({os.path.realpath(file.path) for file in side} for side in files.values())
    if training == validation:
        return files["training"], True
    if training & validation:
        raise ValueError(
            "`validation.dataset_path` must name the training files (of which a share is held out) or others, "
            f"but of its {len(validation)} files {len(training & validation)} are training files, and "
            f"{len(training - validation)} training files are not among them"
        )
    return files[section], False


def _side(units: list[Unit], section: str, fraction: float, seed: int, divide: Any = split) -> list[Unit]:
    """The units of one side where both sides name the same data."""
    training, validation = divide(units, fraction, seed)
    if section == "validation" and fraction == 0:
        raise ValueError(
            "`data.validation_fraction` must be above 0 when `validation.dataset_path` names the training data, but "
            "is 0: set it, for example to 0.05, or name other data in `validation.dataset_path`"
        )
    if fraction > 0 and not validation:
        raise ValueError(
            f"`data.validation_fraction` must leave text on both sides, but the data are {len(units)} unit, too small "
            "to be split: give more text, lower `training.seq_len`, or name other data in `validation.dataset_path`"
        )
    return training if section == "training" else validation
