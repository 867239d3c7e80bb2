"""What the plugin replaces in its host: each only where and as long as it says."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from megalodon_plugin.titan.command_line import read_job
from megalodon_plugin.titan.host_patches import around_load

from support.tiny_job import write_job


def test_a_tokenizers_name_is_no_missing_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """And the root logger is as it was: importing the options changes nothing in it."""
    filters = list(logging.getLogger().filters)
    config = str(write_job(tmp_path))
    for path, warns in (("byte", False), ("nowhere", True)):
        caplog.clear()
        read_job(["--job.config_file", config, "--model.hf_assets_path", path])
        assert (f"HF assets path {path} does not exist" in caplog.text) == warns
        assert logging.getLogger().filters == filters == []


def test_what_surrounds_the_loading_ends_with_it() -> None:
    happened: list[str] = []

    @contextmanager
    def context() -> Iterator[None]:
        happened.append("begin")
        try:
            yield
        finally:
            happened.append("end")

    def load(step: int = -1) -> bool:
        happened.append(f"load {step}")
        if step == 5:
            raise ValueError("broken")
        return step > 0

    checkpointer = SimpleNamespace(load=load)
    around_load(checkpointer, context)  # type: ignore[arg-type]
    assert checkpointer.load(step=3) is True and checkpointer.load() is False
    with pytest.raises(ValueError, match="broken"):
        checkpointer.load(step=5)
    assert happened == ["begin", "load 3", "end", "begin", "load -1", "end", "begin", "load 5", "end"]
