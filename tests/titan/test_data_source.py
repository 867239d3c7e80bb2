"""Which text a job trains and validates on: what follows from its options, and that no text is on both sides."""

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torchtitan.config import ConfigManager, JobConfig
from torchtitan.config.job_config import Training, Validation

from megalodon_plugin.titan import dataloader
from megalodon_plugin.titan.data_source import side_as_bytes, source_of, use_hosts_validation_data
from megalodon_plugin.titan.dataloader import build_text_validation_dataloader
from megalodon_plugin.titan.job_config import Data
from megalodon_plugin.titan.tokenizer import ByteTokenizer

from support.text_jobs import SEQ_LEN, build, build_validation, config, write_files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_files(tmp_path / "data")


def texts_of(loader: Any) -> str:
    return " ".join(text for unit in loader._corpus.units for text in loader._corpus.reader.documents(unit))


def sides_of(job_config: Any) -> list[set[str]]:
    return [
        {unit.identity for unit in build_side(job_config)._corpus.units} for build_side in (build, build_validation)
    ]


def test_validation_follows_training_unless_it_is_set(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By its options' defaults, by an empty text, and by the data set's name alone."""
    both_named = config(folder, validation_fraction=0.3)
    with caplog.at_level(logging.INFO):
        expected = sides_of(both_named)
    assert all(expected) and not expected[0] & expected[1] and len(expected[0] | expected[1]) == 30
    assert "Validation reads" not in caplog.text
    for dataset, path in ((None, None), ("", ""), ("local_text", None), ("LOCAL_text", None)):
        job_config = config(folder, validation_fraction=0.3)
        job_config.validation.dataset, job_config.validation.dataset_path = dataset, path
        caplog.clear()
        with caplog.at_level(logging.INFO):
            assert sides_of(job_config) == expected
        (said,) = (record.getMessage() for record in caplog.records if "Validation reads" in record.getMessage())
        assert f'the training data, "{folder}": `data.validation_fraction` = 0.3' in said


def test_text_is_held_out_whether_validation_is_on_or_not(folder: Path) -> None:
    job_config = config(folder, validation_fraction=0.3)
    job_config.validation.dataset = job_config.validation.dataset_path = None
    expected = sides_of(job_config)
    job_config.validation.enable = False
    assert sides_of(job_config) == expected


def test_a_validation_path_alone_names_files(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("words " * 100)
    for dataset, n_units in (("local_text", 30), ("python_stdlib", None)):
        job_config = config(folder, dataset=dataset, validation_fraction=0.3)
        job_config.validation.dataset, job_config.validation.dataset_path = None, str(other)
        training, validation = sides_of(job_config)
        assert {name.partition("[")[0] for name in validation} == {"other.txt"} and (
            n_units is None or len(training) == n_units
        )


def test_validation_follows_the_standard_library(folder: Path) -> None:
    job_config = config(None, dataset="python_stdlib", validation_fraction=0.1)
    expected = sides_of(job_config)
    job_config.validation.dataset = None
    assert sides_of(job_config) == expected and not expected[0] & expected[1]


def test_following_needs_a_share_to_hold_out(folder: Path) -> None:
    job_config = config(folder)
    job_config.validation.dataset = job_config.validation.dataset_path = None
    with pytest.raises(ValueError, match=r"`data\.validation_fraction` must be above 0 when validation reads"):
        build_validation(job_config)


def test_beside_the_hosts_data_validation_is_the_hosts_default(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    build_hosts = "build_text_validation_dataloader"
    monkeypatch.setattr(dataloader.text_datasets, build_hosts, lambda *arguments: asked.append(arguments[3]))
    job_config = JobConfig(training=Training(dataset="c4"), validation=Validation(dataset=None))  # type: ignore[arg-type]
    build_text_validation_dataloader(1, 0, ByteTokenizer(), job_config)
    assert asked[0].validation.dataset == "c4_validation" and job_config.validation.dataset is None


def test_another_model_keeps_the_hosts_validation_data() -> None:
    path = str(Path(__file__).parents[2] / "train_configs" / "debug.toml")
    for options, expected in (([], "c4_validation"), (["--validation.dataset", "c4_test"], "c4_test")):
        job_config = ConfigManager().parse_args([f"--job.config_file={path}", *options])
        use_hosts_validation_data(job_config)
        assert job_config.validation.dataset == expected


@pytest.mark.parametrize("options", [[], ["--training.dataset_path", "my_texts"]])
def test_a_config_file_needs_no_key_to_validate_on_the_training_data(options: list[str]) -> None:
    path = Path(__file__).parents[2] / "train_configs" / "megalodon_200m.toml"
    job_config = ConfigManager().parse_args([f"--job.config_file={path}", *options])
    assert source_of(job_config, "validation") == source_of(job_config, "training")
    assert source_of(job_config, "validation") == ("local_text", options[-1] if options else "./data")


def test_training_and_validation_share_no_text(folder: Path) -> None:
    job_config = config(folder, validation_fraction=0.3)
    training, validation = texts_of(build(job_config)), texts_of(build_validation(job_config))
    files = [f"file {n} " for n in range(30)]
    assert sorted(name for name in files if name in training or name in validation) == sorted(files)
    assert not [name for name in files if name in training and name in validation]


def test_both_sides_cut_alike_when_rows_differ_in_length(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(f"<{n}> words\n" for n in range(2000)))
    job_config = config(tmp_path, validation_fraction=0.3)
    job_config.validation.seq_len = 64
    training, validation = build(job_config), build_validation(job_config)
    both = sorted((*training._corpus.units, *validation._corpus.units), key=lambda unit: unit.start)
    assert [unit.start for unit in both[1:]] == [unit.end for unit in both[:-1]] and len(both) > 50
    assert next(iter(validation))[1].shape == (2, 64)


def test_other_validation_data_leave_training_whole(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("words " * 100)
    job_config = config(folder, validation_fraction=0.3)
    job_config.validation.dataset_path = str(tmp_path / "other.txt")
    assert len(build(job_config)._corpus.units) == 30
    assert len(list(build_validation(job_config))) == 602 // SEQ_LEN // 2


def too_little_text(job_config: Any) -> None:
    job_config.validation.local_batch_size = 10**4


def same_text_without_fraction(job_config: Any) -> None:
    job_config.data = Data()


def one_unit(job_config: Any) -> None:
    path = Path(job_config.training.dataset_path) / "00.txt"
    job_config.training.dataset_path = job_config.validation.dataset_path = str(path)


def fraction_of_one(job_config: Any) -> None:
    job_config.data = dataclasses.replace(job_config.data, validation_fraction=1.0)


def no_path(job_config: Any) -> None:
    job_config.training.dataset, job_config.training.dataset_path = "python_stdlib", None
    job_config.validation.dataset_path = None


def no_rows(job_config: Any) -> None:
    job_config.validation.seq_len = 0


def no_batch(job_config: Any) -> None:
    job_config.validation.local_batch_size = 0


def unknown_name(job_config: Any) -> None:
    job_config.validation.dataset = "c5"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (too_little_text, "must fill a batch on every rank, 10000 rows of 16 tokens, but holds"),
        (same_text_without_fraction, r"`data\.validation_fraction` must be above 0 .*`validation\.dataset_path`"),
        (
            one_unit,
            r"`data\.validation_fraction` must leave text for training and .*`validation\.dataset_path`",
        ),
        (fraction_of_one, r"`data\.validation_fraction` must be in \[0, 1\), but is 1\.0"),
        (no_path, r"`validation\.dataset_path` must name files"),
        (no_rows, "`seq_len` must be at least 1, but is 0"),
        (no_batch, "`local_batch_size` must be at least 1, but is 0"),
        (unknown_name, r"`validation\.dataset` must be one of local_text, python_stdlib, c4.* but is \"c5\""),
    ],
)
def test_what_cannot_be_is_reported_by_key_rule_and_value(
    folder: Path, change: Callable[[Any], None], message: str
) -> None:
    job_config = config(folder, validation_fraction=0.3)
    change(job_config)
    with pytest.raises(ValueError, match=message):
        next(iter(build_validation(job_config)))


def test_standard_library_needs_no_path_and_no_section_of_ours() -> None:
    job_config = config(None, dataset="python_stdlib")
    del job_config.data
    assert next(iter(build(job_config)))[1].shape == (2, SEQ_LEN)


def test_one_folder_spelled_two_ways_is_split(folder: Path) -> None:
    job_config = config(folder, validation_fraction=0.3)
    job_config.validation.dataset_path = str(folder / "*.txt")
    sides = [side_as_bytes(job_config, section).split(b"file ")[1:] for section in ("training", "validation")]
    assert all(sides)
    assert not set(sides[0]) & set(sides[1])
    assert len(sides[0]) + len(sides[1]) == 30


def test_files_that_overlap_in_part_are_refused(folder: Path) -> None:
    job_config = config(folder, validation_fraction=0.3)
    job_config.validation.dataset_path = str(folder / "0*.txt")
    with pytest.raises(ValueError, match="of its 10 files 10 are training files, and 20 training files are not"):
        build(job_config)


@pytest.mark.parametrize(("name", "value"), [("validation_fraction", "0.05"), ("seed", "0"), ("text_field", 3)])
def test_data_options_of_the_wrong_type_are_refused(folder: Path, name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"\[data\] `{name}` must be of type"):
        build(config(folder, **{name: value}))
