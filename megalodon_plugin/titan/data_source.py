"""Which text a job trains and validates on (`local_text`, `python_stdlib`), and what of it is held out."""

import os
from collections.abc import Callable
from typing import NamedTuple

from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config import JobConfig
from torchtitan.config.job_config import Validation as HostValidation
from torchtitan.hf_datasets import text_datasets
from torchtitan.tools.logging import logger

from megalodon_plugin.checkpoint.tokenizer_files import BYTE_TOKENIZER
from megalodon_plugin.data.corpus import Corpus
from megalodon_plugin.data.documents import DocumentCorpus, split_files
from megalodon_plugin.data.files import (
    PYTHON_STDLIB,
    TextFile,
    Unit,
    cut_into_units,
    find_python_stdlib,
    find_text_files,
    range_bytes_of,
    split_units,
)
from megalodon_plugin.data.reader import TextReader
from megalodon_plugin.model.config import check_types

from .job_config import Data
from .job_rules import carries_state
from .tokenizer import load_tokenizer

LOCAL_TEXT = "local_text"
OWN_DATASETS = (LOCAL_TEXT, PYTHON_STDLIB)
HOST_VALIDATION = HostValidation.dataset

Divide = Callable[[list[Unit], float, int], tuple[list[Unit], list[Unit]]]


class TextSource(NamedTuple):
    """What `dataset` and `dataset_path` of a section come to."""

    dataset: str
    dataset_path: str | None

    @property
    def is_own(self) -> bool:
        """Whether the data set is the plugin's and not the host's."""
        return self.dataset.lower() in OWN_DATASETS

    @property
    def label(self) -> str:
        """What errors and the log call it."""
        return self.dataset_path or self.dataset


def source_of(job_config: JobConfig, section: str) -> TextSource:
    """The text of "training" | "validation", whose data are training's as far as they are not set.

    Set is what is neither None nor empty. A path alone names `local_text`. Beside the host's data sets, validation's is
    the host's default.

    Raises:
        ValueError: the data set is neither the plugin's nor the host's.
    """
    training = TextSource(job_config.training.dataset, job_config.training.dataset_path)
    if section == "training":
        return _checked(training, section)
    dataset, path = job_config.validation.dataset, job_config.validation.dataset_path
    if not training.is_own:
        return _checked(TextSource(dataset or HOST_VALIDATION, path), section)
    dataset = dataset or (LOCAL_TEXT if path else training.dataset)
    if not path and dataset.lower() == training.dataset.lower():
        path = training.dataset_path
    return _checked(TextSource(dataset, path), section)


def use_hosts_validation_data(job_config: JobConfig) -> None:
    """For another model, whose loaders are the host's: put the host's default back where the plugin's says None."""
    if not job_config.validation.dataset:
        job_config.validation.dataset = HOST_VALIDATION


def rows_of_step(job_config: JobConfig, dp_world_size: int) -> int:
    """Rows of one step of the whole job."""
    training = job_config.training
    asked: int = training.global_batch_size
    return asked if asked > 0 else training.local_batch_size * dp_world_size


def corpus_of(
    job_config: JobConfig, section: str, tokenizer: BaseTokenizer, n_document_lanes: int | None = None
) -> Corpus:
    """The corpus of `section` ("training" | "validation"), without what is held out for the other one.

    With `n_document_lanes` its rows follow documents.
    """
    data, options, source = _data_options(job_config), getattr(job_config, section), source_of(job_config, section)
    files, shared = _files_of_side(job_config, section)
    # Both sides of a split must cut the files alike, whatever the length of their rows.
    seq_len = job_config.training.seq_len if shared else options.seq_len
    check_batch(options.local_batch_size, min(seq_len, options.seq_len))
    range_bytes = range_bytes_of(files, seq_len)
    units = cut_into_units(files, range_bytes)
    if shared:
        units = _side(units, section, data, split_files if carries_state(job_config) else split_units)
    if shared and source != (options.dataset, options.dataset_path):
        logger.info(
            f'Validation reads the training data, "{source.label}": `data.validation_fraction` = '
            f"{data.validation_fraction} of it is held out. To validate on other data set `validation.dataset_path`"
        )
    size = sum(unit.n_bytes for unit in units) / 2**20
    logger.info(f'{section} text: "{source.label}", {len(files)} files; {size:.1f} MiB in {len(units)} units')
    reader = TextReader(range_bytes, data.text_field, data.broken_lines)
    if n_document_lanes is None:
        return Corpus(units, reader, tokenizer, options.seq_len, data.seed, source.label)
    return DocumentCorpus(units, reader, tokenizer, options.seq_len, data.seed, source.label, n_document_lanes)


def side_as_bytes(job_config: JobConfig, section: str) -> bytes:
    """All documents of one side ("training" | "validation") of a small data set of the plugin's, end to end, in UTF-8.

    It is in memory as a whole: for looking at a text, not for training on it.
    """
    corpus = corpus_of(job_config, section, load_tokenizer(BYTE_TOKENIZER))
    documents = (text for unit in corpus.units for text in corpus.reader.documents(unit))
    return "".join(documents).encode()


def check_batch(batch_size: int, seq_len: int) -> None:
    """Raise ValueError unless both are at least 1."""
    for name, value in (("local_batch_size", batch_size), ("seq_len", seq_len)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, but is {value}")


def _checked(source: TextSource, section: str) -> TextSource:
    names = (*OWN_DATASETS, *text_datasets.DATASETS)
    if source.dataset.lower() not in names:
        raise ValueError(f'`{section}.dataset` must be one of {", ".join(names)}, but is "{source.dataset}"')
    return source


def _data_options(job_config: JobConfig) -> Data:
    """`[data]`, checked; the defaults for a job without that section."""
    data = getattr(job_config, "data", None) or Data()
    try:
        check_types(data, Data)
    except ValueError as error:
        raise ValueError(f"[data] {error}") from error
    if not 0 <= data.validation_fraction < 1:
        raise ValueError(f"`data.validation_fraction` must be in [0, 1), but is {data.validation_fraction}")
    return data


def _files(section: str, job_config: JobConfig) -> list[TextFile]:
    source = source_of(job_config, section)
    if source.dataset.lower() == PYTHON_STDLIB:
        return find_python_stdlib()
    key = f"{section}.dataset_path"
    if not source.dataset_path:
        raise ValueError(
            f'`{key}` must name files, folders or globs for "{LOCAL_TEXT}", but is {source.dataset_path!r}'
        )
    return find_text_files(source.dataset_path, key)


def _files_of_side(job_config: JobConfig, section: str) -> tuple[list[TextFile], bool]:
    """The files of `section`, and whether training and validation are the same files, however they are spelled.

    Where they are, both sides get the training's list: a split must name the files alike.

    Raises:
        ValueError: they have some files in common and others not, so that held-out text would be trained on.
    """
    sources = [source_of(job_config, side) for side in ("training", "validation")]
    if not all(source.is_own for source in sources):
        return _files(section, job_config), False
    if sources[0] == sources[1]:
        return _files("training", job_config), True
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
            "`validation.dataset_path` must name all of the training files (a share of them is then held out) or none, "
            f"but of its {len(validation)} files {len(training & validation)} are training files, and "
            f"{len(training - validation)} training files are not among them"
        )
    return files[section], False


def _side(units: list[Unit], section: str, data: Data, divide: Divide) -> list[Unit]:
    """The units of one side where both sides name the same data."""
    training, validation = divide(units, data.validation_fraction, data.seed)
    if section == "validation" and data.validation_fraction == 0:
        raise ValueError(
            "`data.validation_fraction` must be above 0 when validation reads the training data, as it does unless "
            "`validation.dataset_path` names others, but is 0: set it, for example to 0.05, or name other data"
        )
    if data.validation_fraction > 0 and not validation:
        raise ValueError(
            "`data.validation_fraction` must leave text for training and for validation, but the data are too small to "
            f"be split ({len(units)} unit): give more text, lower `training.seq_len`, or name other data in "
            "`validation.dataset_path`"
        )
    return training if section == "training" else validation
