"""Jobs that read text, as far as the loaders look at them, and the loaders of these jobs."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megalodon_plugin.titan.dataloader import (
    OrderedTextLoader,
    TextLoader,
    build_text_dataloader,
    build_text_validation_dataloader,
)
from megalodon_plugin.titan.job_config import Data
from megalodon_plugin.titan.tokenizer import ByteTokenizer

SEQ_LEN = 16


def write_files(data: Path) -> Path:
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
