"""What the plugin finds out about a checkpoint before the host loads it."""

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megalodon_plugin.model import PRESETS, Megalodon, MegalodonConfig
from megalodon_plugin.titan.checkpoint_checks import (
    check_fits,
    checkpoint_to_load,
    is_complete,
    remove_incomplete,
    saved_tensors,
)

from support.tiny_job import read_job, write_job

TINY = dataclasses.replace(
    PRESETS["debug"], vocab_size=258, dim=32, n_layers=2, z_dim=16, value_dim=64, ffn_dim=48, norm_groups=4
)


def model_of(cfg: MegalodonConfig) -> Megalodon:
    with torch.device("meta"):
        return Megalodon(cfg)


def save(folder: Path, cfg: MegalodonConfig = TINY) -> Path:
    dcp.save(Megalodon(cfg).state_dict(), checkpoint_id=folder, no_dist=True)
    return folder


def steps(folder: Path, complete: tuple[int, ...], broken: tuple[int, ...]) -> None:
    for step in (*complete, *broken):
        dcp.save({"value": torch.ones(2)}, checkpoint_id=folder / f"step-{step}", no_dist=True)
    for step in broken:
        (folder / f"step-{step}" / ".metadata").unlink()


def test_half_written_folders_are_deleted_and_nothing_else(tmp_path: Path) -> None:
    steps(tmp_path, complete=(3, 12), broken=(9, 15))
    (tmp_path / "step-20").mkdir()
    (tmp_path / "step-6").mkdir()
    (tmp_path / "step-6" / "model.safetensors").touch()
    (tmp_path / "notes").mkdir()
    (tmp_path / "step-21").touch()
    removed = remove_incomplete(tmp_path)
    assert {path.name for path in removed} == {"step-9", "step-15", "step-20"}
    assert {path.name for path in tmp_path.iterdir()} == {"step-3", "step-6", "step-12", "step-21", "notes"}
    assert [step for step in (3, 6, 12) if is_complete(tmp_path / f"step-{step}")] == [3, 12]
    assert saved_tensors(tmp_path / "step-12") == {"value": torch.Size([2])}
    assert saved_tensors(tmp_path / "step-6") is None
    assert remove_incomplete(tmp_path) == []


def test_no_folder_has_nothing_to_delete(tmp_path: Path) -> None:
    assert remove_incomplete(tmp_path / "checkpoint") == []
    assert not (tmp_path / "checkpoint").exists()


def test_the_latest_complete_step_is_loaded(tmp_path: Path) -> None:
    job_config = read_job(write_job(tmp_path))
    folder = tmp_path / "run" / "checkpoint"
    assert checkpoint_to_load(job_config) is None
    steps(folder, complete=(3, 12, 9), broken=(15,))
    assert checkpoint_to_load(job_config) == folder / "step-12"
    job_config.checkpoint.load_step = 9
    assert checkpoint_to_load(job_config) == folder / "step-9"
    job_config.checkpoint.enable = False
    assert checkpoint_to_load(job_config) is None


@pytest.mark.parametrize("step", [6, 15], ids=["absent", "half-written"])
def test_a_step_asked_for_must_be_complete(tmp_path: Path, step: int) -> None:
    job_config = read_job(write_job(tmp_path), "--checkpoint.load_step", str(step))
    steps(tmp_path / "run" / "checkpoint", complete=(3, 12), broken=(15,))
    with pytest.raises(
        ValueError, match=rf"`checkpoint\.load_step` must name a complete .* \[3, 12\]\), but is {step}$"
    ):
        checkpoint_to_load(job_config)


def test_initial_checkpoint_only_for_a_run_without_its_own(tmp_path: Path) -> None:
    job_config = read_job(write_job(tmp_path), "--checkpoint.initial_load_path", "elsewhere/step-0")
    assert checkpoint_to_load(job_config) == Path("elsewhere/step-0")
    steps(tmp_path / "run" / "checkpoint", complete=(3,), broken=())
    assert checkpoint_to_load(job_config) == tmp_path / "run" / "checkpoint" / "step-3"


def test_a_checkpoint_of_the_same_configuration_fits(tmp_path: Path) -> None:
    saved = saved_tensors(save(tmp_path / "step-1"))
    assert saved is not None
    check_fits(tmp_path / "step-1", saved, [model_of(TINY)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ffn_dim": 56}, r"`layers\.0\.feed_forward\.fc1\.weight` has shape \(48, 32\) there, but \(56, 32\) in"),
        ({"vocab_size": 300}, r"`tok_embeddings\.weight` has shape \(258, 32\) there, but \(300, 32\) in this model"),
        ({"cema_ndim": 8}, r"`layers\.0\.attention\.cema\.alpha` has shape \(32, 16, 1\) there, but \(32, 8, 1\) in"),
        ({"swiglu": True}, r"it lacks `layers\.0\.feed_forward\.fc3\.weight` of shape \(48, 32\)"),
        ({"n_layers": 3}, r"it lacks `layers\.2\.attention\.timestep_norm\.weight` of shape \(32,\)"),
        ({"n_layers": 1}, r"it has 2 layers, but `n_layers` is 1"),
    ],
    ids=str,
)
def test_a_checkpoint_of_another_configuration_is_refused(tmp_path: Path, changes: dict, message: str) -> None:
    saved = saved_tensors(save(tmp_path / "step-1"))
    assert saved is not None
    with pytest.raises(ValueError, match=f"step-1 is of another model configuration: {message}"):
        check_fits(tmp_path / "step-1", saved, [model_of(dataclasses.replace(TINY, **changes))])


def test_a_pipeline_stage_looks_at_its_own_layers(tmp_path: Path) -> None:
    saved = saved_tensors(save(tmp_path / "step-1"))
    assert saved is not None
    stage = model_of(TINY)
    del stage.layers["0"]
    stage.tok_embeddings = None
    check_fits(tmp_path / "step-1", saved, [stage])


def test_a_folder_that_held_half_a_checkpoint_goes_so_that_the_initial_load_path_counts(tmp_path: Path) -> None:
    job_config = read_job(write_job(tmp_path), "--checkpoint.initial_load_path", str(tmp_path / "seed"))
    folder = tmp_path / "run" / "checkpoint"
    steps(folder, complete=(), broken=(3,))
    with pytest.raises(ValueError, match=r"with `checkpoint\.initial_load_path`, .* must not exist or"):
        checkpoint_to_load(job_config)
    remove_incomplete(folder)
    assert not folder.exists()
    assert checkpoint_to_load(job_config) == tmp_path / "seed"
