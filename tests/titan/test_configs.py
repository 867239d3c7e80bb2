"""Every file in train_configs: it parses, its model can be built, and it keeps the rules of such files."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from megalodon_plugin.titan import job_rules

from support.tiny_job import read_job

CONFIGS = sorted((Path(__file__).parents[2] / "train_configs").glob("*.toml"))


@pytest.fixture(params=CONFIGS, ids=[path.stem for path in CONFIGS])
def config(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture
def job_config(config: Path) -> Any:
    return read_job(config)


def test_there_are_configs() -> None:
    assert {"debug", "quickstart"} <= {path.stem for path in CONFIGS}


def test_first_line_says_what_it_is_for(config: Path) -> None:
    first_line = config.read_text().splitlines()[0]
    assert first_line.startswith("# ") and len(first_line) > 20


def test_the_plugin_comes_in_by_the_file_alone(job_config: Any) -> None:
    assert job_config.experimental.custom_import == "megalodon_plugin.titan"
    assert job_config.job.custom_config_module == "megalodon_plugin.titan.job_config"
    assert job_config.model.name == "megalodon"


def test_a_finished_run_can_be_continued(job_config: Any) -> None:
    assert not job_config.checkpoint.enable or job_config.checkpoint.last_save_model_only is False


def test_its_model_builds(job_config: Any) -> None:
    from torchtitan.protocols.train_spec import get_train_spec

    job_rules.use_own_trainer(job_config)
    if not os.path.exists(job_config.model.hf_assets_path):
        job_config.model.hf_assets_path = "byte"
    train_spec = get_train_spec(job_config.model.name)
    args = train_spec.model_args[job_config.model.flavor]
    args.update_from_config(job_config)
    with torch.device("meta"):
        model = train_spec.model_cls(args)
    n_parameters, flops = args.get_nparams_and_flops(model, job_config.training.seq_len)
    assert n_parameters == sum(p.numel() for p in model.parameters()) > 0
    assert flops > 0
