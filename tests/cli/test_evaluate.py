"""Evaluations broken off inside a piece, gone on with something else changed, and what their report says."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from megalodon_plugin.bench.environment import Environment
from megalodon_plugin.checkpoint.checkpoint import Checkpoint, write_checkpoint
from megalodon_plugin.cli import evaluate_report
from megalodon_plugin.cli.main import main
from megalodon_plugin.model import Megalodon, MegalodonConfig
from megalodon_plugin.model.inference.norm_window import NormWindow
from megalodon_plugin.model.inference.scoring import Score

from support.small_model import SIZES

C = SIZES["chunk_size"]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(2)
    model = Megalodon(MegalodonConfig(**SIZES | {"vocab_size": 258}))
    model.init_weights()
    write_checkpoint(tmp_path / "model", Checkpoint(model.cfg, "byte", model.state_dict(), "dcp"), "safetensors")
    return tmp_path / "model"


@pytest.fixture
def arguments(checkpoint: Path, tmp_path: Path) -> list[object]:
    (tmp_path / "a.txt").write_text("one two three\n" * 30)
    return ["evaluate", checkpoint, "--data", tmp_path / "a.txt", "--context", 10 * C + 3, "--piece-tokens", C]


def run(*arguments: object) -> None:
    main([str(argument) for argument in arguments])


def fails(*arguments: object) -> str:
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    return str(stopped.value)


def report_of(folder: Path) -> dict:
    """evaluation.json without what differs from run to run."""
    report = json.loads((folder / "evaluation.json").read_text())
    for name in Environment.__annotations__:
        del report[name]
    for found in report["contexts"]:
        del found["tokens_per_s"], found["peak_mib"]
    return report


def interrupt(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, call: int) -> None:
    """Let Ctrl-C arrive right after that call of a method has done its work."""
    real, calls = getattr(owner, name), []

    def interrupted(*arguments):
        result = real(*arguments)
        calls.append(name)
        if len(calls) == call:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(owner, name, interrupted)


@pytest.mark.parametrize("call", [1, 4, 12])
@pytest.mark.parametrize(
    ("owner", "name", "options"), [(Score, "add", []), (NormWindow, "advance", ["--windowed-norm"])]
)
def test_ctrl_c_inside_a_piece_counts_no_token_twice(arguments, tmp_path, monkeypatch, owner, name, options, call):
    run(*arguments, *options, "--out", tmp_path / "whole")
    interrupt(monkeypatch, owner, name, call)
    with pytest.raises(KeyboardInterrupt):
        run(*arguments, *options, "--out", tmp_path / "out")
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["progress.safetensors"]
    run(*arguments, *options, "--out", tmp_path / "out")
    assert report_of(tmp_path / "out") == report_of(tmp_path / "whole")


def test_progress_of_another_tokenizer_is_refused_unless_it_is_restarted(arguments, tmp_path, monkeypatch):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = Tokenizer(WordLevel({"one": 0, "two": 1, "three": 2, "?": 3}, unk_token="?"))
    words.pre_tokenizer = Whitespace()
    (tmp_path / "words").mkdir()
    words.save(str(tmp_path / "words" / "tokenizer.json"))
    arguments[5] = C + 3  # the context: there are 90 words
    interrupt(monkeypatch, Score, "add", 3)
    with pytest.raises(KeyboardInterrupt):
        run(*arguments, "--out", tmp_path / "out")
    monkeypatch.undo()
    other = [*arguments, "--tokenizer", tmp_path / "words", "--out", tmp_path / "out"]
    assert "must be the progress of this evaluation, but its `tokenizer` is" in fails(*other)
    run(*other, "--restart")
    assert report_of(tmp_path / "out")["tokens"] == 90


def test_the_report_tells_how_it_came_about(arguments, tmp_path):
    run(*arguments, "--out", tmp_path / "out")
    report = report_of(tmp_path / "out")
    assert report["config"] == dataclasses.asdict(MegalodonConfig(**SIZES | {"vocab_size": 258}))
    assert report["piece_tokens"] == C
    assert "every token but the first is scored once" in report["scoring"]
    assert report["tokens"] == 30 * 14 + 2
    assert str(tmp_path) not in json.dumps(report)
    assert all(math.isfinite(found["loss"]) for found in report["contexts"])


def test_windowed_statistics_tell_the_pieces_that_were_read(arguments, tmp_path):
    run(*arguments, "--windowed-norm", "--out", tmp_path / "out")
    assert report_of(tmp_path / "out")["piece_tokens"] == 2 * C


def test_a_picture_that_fails_leaves_none_and_is_drawn_next_time(arguments, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    def fail(self, target, **options):
        Path(target).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="no space left"):
        run(*arguments, "--out", tmp_path / "out")
    monkeypatch.undo()
    assert not (tmp_path / "out" / "evaluation.png").exists()
    monkeypatch.setattr(evaluate_report, "result_of", None)  # nothing is scored again
    run(*arguments, "--out", tmp_path / "out")
    assert (tmp_path / "out" / "evaluation.png").read_bytes().startswith(b"\x89PNG")
