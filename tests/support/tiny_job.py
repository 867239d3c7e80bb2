"""A job so small that training takes seconds: its TOML, and ways to read and to run it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import megalodon_plugin.titan  # noqa: F401  chooses the device before torchtitan does
from megalodon_plugin.bench.parallel.matrix import write_texts

from support.processes import HANG_S, run_python, run_python_until

SECTIONS: dict[str, dict[str, Any]] = {
    "job": {"custom_config_module": "megalodon_plugin.titan.job_config"},
    "experimental": {"custom_import": "megalodon_plugin.titan"},
    "metrics": {"log_freq": 1, "disable_color_printing": True},
    "model": {"name": "megalodon", "flavor": "debug", "hf_assets_path": "byte"},
    "megalodon": {
        "dim": 32,
        "n_layers": 2,
        "n_heads": 2,
        "z_dim": 16,
        "value_dim": 64,
        "ffn_dim": 48,
        "chunk_size": 16,
        "norm_groups": 4,
    },
    "optimizer": {"lr": 5e-3},
    # total_steps keeps the schedule when training.steps changes.
    "lr_scheduler": {"warmup_steps": 2, "total_steps": 12},
    "training": {
        "dataset": "local_text",
        "local_batch_size": 4,
        "seq_len": 48,
        "steps": 8,
        "mixed_precision_param": "float32",
    },
    "activation_checkpoint": {"mode": "none"},
    "checkpoint": {"enable": True, "interval": 3, "last_save_model_only": False, "keep_latest_k": 0},
    "comm": {"init_timeout_seconds": HANG_S, "train_timeout_seconds": HANG_S},
    "debug": {"seed": 0},
}


def write_job(folder: Path, **sections: dict[str, Any]) -> Path:
    """Write `job.toml` and the texts it trains on into `folder`; its dump folder is `run` there.

    `sections` change single options of SECTIONS; an option that is None is left out.
    """
    texts = write_texts(folder / "texts")
    own = {"job": {"dump_folder": str(folder / "run")}, "training": {"dataset_path": str(texts)}}
    lines = []
    for name in dict.fromkeys([*SECTIONS, *sections]):
        options = SECTIONS.get(name, {}) | own.get(name, {}) | sections.get(name, {})
        # Strings, numbers, booleans and lists are written alike in JSON and in TOML.
        values = [f"{key} = {json.dumps(value)}" for key, value in options.items() if value is not None]
        lines += [f"[{name}]", *values, ""]
    config = folder / "job.toml"
    config.write_text("\n".join(lines))
    return config


def read_job(config: Path, *options: str) -> Any:
    """The host's configuration of a job, as its entry makes it from a command line."""
    from torchtitan.config import ConfigManager

    return ConfigManager().parse_args(["--job.config_file", str(config), *options])


def train(config: Path, *options: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
    """Run the job to its end. `stdout` of the result is the whole log."""
    return run_python("-m", "megalodon_plugin.cli.train", "--job.config_file", config, *options, ranks=processes)


def torchrun(
    config: Path, *options: str, processes: int = 1, module: str = "megalodon_plugin.cli.train"
) -> subprocess.CompletedProcess[str]:
    """Run the job to its end as a user does, with new interpreters: for tests of how it starts.

    A single process does without torchrun.
    """
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    paths = filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")])
    start = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m"]
    return subprocess.run(
        [sys.executable, "-m", *(start if processes > 1 else []), module, "--job.config_file", str(config), *options],
        env=os.environ | rank | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=HANG_S,
        check=False,
    )


def train_well(config: Path, *options: str, processes: int = 1) -> str:
    """The log of a run that must succeed."""
    result = train(config, *options, processes=processes)
    assert result.returncode == 0, result.stdout
    return result.stdout


def train_and_kill(config: Path, mark: str) -> str:
    """Start the job and end it by SIGKILL as soon as its log shows `mark`; the log until then."""
    return run_python_until(mark, "-m", "megalodon_plugin.cli.train", "--job.config_file", config)


def read_records(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    """The records of `metrics.jsonl`, in the order in which they were written."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == kind]


def losses_and_norms(records: list[dict[str, Any]]) -> dict[int, tuple[float, float]]:
    """step -> (loss, gradient norm); of several records of a step the last."""
    return {r["step"]: (r["loss_metrics/global_avg_loss"], r["grad_norm"]) for r in records}
