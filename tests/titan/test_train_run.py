"""Whole runs through the plugin's entry: resuming, records, errors, and the commands that use what a run wrote."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib import image

from megalodon_plugin.cli.main import main

from support.tiny_job import (
    losses_and_norms,
    read_job,
    read_records,
    torchrun,
    train,
    train_and_kill,
    train_well,
    write_job,
    write_texts,
)

# Everything that a resumed run could get wrong: random numbers, two groups of the optimizer, held-out text.
HARD = {
    "megalodon": {"dropout": 0.1, "hidden_dropout": 0.1, "attention_dropout": 0.1, "weight_decay_on": "matrices"},
    "data": {"validation_fraction": 0.3},
    "validation": {
        "enable": True,
        "dataset": "local_text",
        "local_batch_size": 4,
        "seq_len": 48,
        "freq": 4,
        "steps": 2,
    },
}


def hard_job(folder: Path) -> Path:
    sections: dict[str, dict[str, Any]] = {name: dict(options) for name, options in HARD.items()}
    sections["validation"]["dataset_path"] = str(folder / "texts")
    return write_job(folder, **sections)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a job that ran its ten steps without a break."""
    folder = tmp_path_factory.mktemp("unbroken")
    train_well(hard_job(folder), "--training.steps", "10")
    return folder


@pytest.fixture
def finished(unbroken: Path, tmp_path: Path) -> Path:
    """A copy of what the unbroken run wrote."""
    return shutil.copytree(unbroken / "run", tmp_path / "run")


def saved_steps(run: Path) -> set[str]:
    return {path.name for path in (run / "checkpoint").iterdir()}


def test_a_killed_run_continues_to_the_last_bit(unbroken: Path, tmp_path: Path) -> None:
    config, run = hard_job(tmp_path), tmp_path / "run"
    train_and_kill(config, "step:  5")
    killed = len(read_records(run))
    assert killed >= 5 and saved_steps(run) >= {"step-3"}
    log = train_well(config)
    assert "Loading the checkpoint" in log
    resumed = read_records(run)[killed:]
    assert resumed[0]["step"] == 4 and resumed[-1]["step"] == 8

    # A finished run goes on too, with more steps.
    before = len(read_records(run))
    train_well(config, "--training.steps", "10")
    extended = read_records(run)[before:]
    assert [record["step"] for record in extended] == [9, 10]

    whole = losses_and_norms(read_records(unbroken / "run"))
    assert set(whole) == set(range(1, 11)) and len(set(whole.values())) == 10
    for records in (resumed, extended):
        assert losses_and_norms(records) == {record["step"]: whole[record["step"]] for record in records}
    assert losses_and_norms(read_records(run)) == whole
    validations = [
        {record["step"]: record["validation_metrics/loss"] for record in read_records(folder, "validation")}
        for folder in (run, unbroken / "run")
    ]
    assert validations[0] == validations[1]


def test_a_run_killed_while_saving_continues_from_the_step_before(
    unbroken: Path, finished: Path, tmp_path: Path
) -> None:
    assert saved_steps(finished) == {"step-3", "step-6", "step-9", "step-10"}
    (finished / "checkpoint" / "step-10" / ".metadata").unlink()
    before = len(read_records(finished))
    log = train_well(hard_job(tmp_path), "--training.steps", "10")
    assert f"Deleting the half-written checkpoint {finished / 'checkpoint' / 'step-10'}" in log
    again = read_records(finished)[before:]
    assert [record["step"] for record in again] == [10]
    assert losses_and_norms(again)[10] == losses_and_norms(read_records(unbroken / "run"))[10]
    assert (finished / "checkpoint" / "step-10" / ".metadata").is_file()


def test_records_of_training_and_validation(unbroken: Path) -> None:
    run = unbroken / "run"
    training, validation = read_records(run), read_records(run, "validation")
    assert [record["step"] for record in training] == list(range(1, 11))
    assert [record["step"] for record in validation] == [1, 4, 8]
    for record in training:
        assert record["throughput(tps)"] > 0 and record["memory/max_reserved(GiB)"] > 0 and record["mfu(%)"] > 0
        assert record["n_tokens_seen"] == 4 * 48 * record["step"]
    for record in validation:
        prefix = "validation_metrics/"
        assert record[f"{prefix}throughput(tps)"] > 0 and record[f"{prefix}memory/max_reserved(GiB)"] > 0
    # A new model knows nothing of its 258 tokens (its logits have a variance of about 1); a few steps teach it some.
    losses = [record["validation_metrics/loss"] for record in validation]
    assert abs(losses[0] - math.log(258)) < 1
    assert losses[0] > losses[1] > losses[2]


def test_model_json_holds_the_configuration(unbroken: Path) -> None:
    content = json.loads((unbroken / "run" / "model.json").read_text())
    assert content["tokenizer"] == "byte"
    assert content["model"]["dim"] == 32 and content["model"]["vocab_size"] == 258
    assert read_job(unbroken / "job.toml").megalodon.dim == 32


def without_text(folder: Path) -> None:
    (folder / "empty").mkdir()
    (folder / "empty" / "picture.bin").write_bytes(b"none")


def with_a_broken_line(folder: Path) -> None:
    (folder / "lines.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n{"text": \n{"text": "four"}\n')


@pytest.mark.parametrize(
    ("prepare", "options", "message"),
    [
        (None, {"training.dataset_path": "absent"}, '"{}/absent" does not exist'),
        (without_text, {"training.dataset_path": "empty"}, '"{}/empty" has none'),
        (with_a_broken_line, {"training.dataset_path": "lines.jsonl"}, "{}/lines.jsonl, line 3: must be JSON"),
        (None, {"model.flavor": "huge"}, "`model.flavor` must be one of debug, "),
    ],
    ids=["no path", "no text", "broken line", "flavor"],
)
def test_bad_input_ends_before_the_first_step(tmp_path: Path, prepare, options: dict[str, str], message: str) -> None:
    config = write_job(tmp_path)
    if prepare is not None:
        prepare(tmp_path)
    words = []
    for name, value in options.items():
        words += [f"--{name}", str(tmp_path / value) if "path" in name else value]
    result = train(config, *words)
    assert result.returncode != 0
    assert message.format(tmp_path) in result.stdout
    assert "step:  1" not in result.stdout


def test_a_checkpoint_of_another_configuration_ends_the_run(finished: Path, tmp_path: Path) -> None:
    before = (finished / "model.json").read_text()
    result = train(hard_job(tmp_path), "--megalodon.ffn_dim", "56", "--training.steps", "12")
    assert result.returncode != 0
    assert "`layers.0.feed_forward.fc1.weight` has shape (48, 32) there, but (56, 32) in this model" in result.stdout
    assert "step: 11" not in result.stdout
    assert (finished / "model.json").read_text() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="the stock entry works on a machine with a GPU")
def test_stock_entry_without_a_gpu_names_the_own_one(tmp_path: Path) -> None:
    result = torchrun(write_job(tmp_path), module="torchtitan.train")
    assert result.returncode != 0
    assert "python -m torch.distributed.run -m megalodon_plugin.cli.train" in result.stdout


def generated(capsys: pytest.CaptureFixture[str], checkpoint: Path, seed: int) -> str:
    options = ["--prompt", "3 times", "--max-new-tokens", "40", "--temperature", "1", "--seed", str(seed)]
    main(["generate", str(checkpoint), *options])
    return capsys.readouterr().out


def test_generate_is_repeatable(unbroken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = unbroken / "run" / "checkpoint" / "step-10"
    first = generated(capsys, checkpoint, seed=1)
    assert first.startswith("3 times") and len(first) > len("3 times") + 10
    assert generated(capsys, checkpoint, seed=1) == first
    assert generated(capsys, checkpoint, seed=2) != first


def test_generate_says_what_is_wrong_with_a_checkpoint(finished: Path) -> None:
    checkpoint = finished / "checkpoint"
    with pytest.raises(
        SystemExit,
        match=r"megalodon generate: the checkpoint must be a `step-N` .*, but .*step-7",
    ):
        main(["generate", str(checkpoint / "step-7"), "--prompt", "a"])
    (checkpoint / "step-9" / ".metadata").unlink()
    with pytest.raises(SystemExit, match=r"the checkpoint .*step-9 must be complete .*, but has no \.metadata"):
        main(["generate", str(checkpoint / "step-9"), "--prompt", "a"])
    description = json.loads((finished / "model.json").read_text())
    description["model"]["ffn_dim"] = 56
    (finished / "model.json").write_text(json.dumps(description))
    with pytest.raises(SystemExit, match=r"must have shape \(56, 32\) .*, but has \(48, 32\)"):
        main(["generate", str(checkpoint / "step-10"), "--prompt", "a"])
    (finished / "model.json").unlink()
    with pytest.raises(SystemExit, match=r"`model\.json`, which training writes, must lie in a folder above"):
        main(["generate", str(checkpoint / "step-10"), "--prompt", "a"])


def test_plot_draws_the_losses(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["plot", str(finished)])
    assert capsys.readouterr().out.strip() == str(finished / "loss.png")
    picture = image.imread(finished / "loss.png")  # (height, width, channels)
    assert picture.shape[0] > 300 and picture.shape[1] > 500
    red, _, blue = (picture[..., channel] for channel in range(3))
    assert (blue - red > 0.4).sum() > 500, "no curve in the colour of training"
    assert (red - blue > 0.4).sum() > 100, "no curve in the colour of validation"
    numbers = json.loads((finished / "loss.json").read_text())
    expected = {step: loss for step, (loss, _) in losses_and_norms(read_records(finished)).items()}
    assert {point["step"]: point["loss"] for point in numbers["train"]} == expected
    assert [point["step"] for point in numbers["validation"]] == [1, 4, 8]


def test_plot_of_no_run(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"megalodon plot: .* must hold `metrics\.jsonl`"):
        main(["plot", str(write_texts(tmp_path / "texts"))])
