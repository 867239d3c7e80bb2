"""Two processes compute what one does: FSDP over half batches each, and two pipeline stages.

As a program (`-m titan.test_data_parallel`) it trains one step and writes down the dtypes that the modules see.
"""

import json
import sys
from pathlib import Path

import pytest
import torch

from tiny_job import losses_and_norms, read_records, train_well, write_job

STEPS = 4


@pytest.fixture(scope="module")
def seed_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights that every layout starts from; stages would otherwise draw their own."""
    folder = tmp_path_factory.mktemp("seed")
    train_well(write_job(folder), "--checkpoint.create_seed_checkpoint")
    return folder / "run" / "checkpoint" / "step-0"


def run(folder: Path, seed_checkpoint: Path, *options: str, processes: int) -> dict[int, tuple[float, float]]:
    start = ["--checkpoint.load_only", "--checkpoint.initial_load_path", str(seed_checkpoint)]
    log = train_well(
        write_job(folder, training={"steps": STEPS, "max_norm": 0.5}), *start, *options, processes=processes
    )
    assert f"Loading the checkpoint from {seed_checkpoint}" in log
    return losses_and_norms(read_records(folder / "run"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, seed_checkpoint: Path) -> dict[int, tuple[float, float]]:
    """Losses and gradient norms of one process, with gradients that are clipped."""
    records = run(tmp_path_factory.mktemp("alone"), seed_checkpoint, processes=1)
    assert list(records) == list(range(1, STEPS + 1))
    assert all(norm > 0.5 for _, norm in records.values())
    return records


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(["--training.local_batch_size", "2"], id="fsdp"),
        pytest.param(
            [
                "--parallelism.pipeline_parallel_degree",
                "2",
                "--parallelism.pipeline_parallel_schedule",
                "1F1B",
                "--parallelism.pipeline_parallel_microbatch_size",
                "1",
            ],
            id="pipeline",
        ),
    ],
)
def test_two_processes_equal_one(
    tmp_path: Path, seed_checkpoint: Path, alone: dict[int, tuple[float, float]], layout: list[str]
) -> None:
    together = run(tmp_path, seed_checkpoint, *layout, processes=2)
    assert list(together) == list(alone)
    for step, expected in alone.items():
        assert together[step] == pytest.approx(expected, rel=1e-5), f"step {step}: loss, gradient norm"


def test_small_parameters_stay_float32_under_mixed_precision(tmp_path: Path) -> None:
    options = {"steps": 1, "local_batch_size": 2, "mixed_precision_param": "bfloat16"}
    config = write_job(tmp_path, training=options, checkpoint={"enable": False})
    train_well(config, processes=2, module="titan.test_data_parallel")
    seen = json.loads((tmp_path / "run" / "dtypes.json").read_text())
    full = {
        name: dtypes
        for name, dtypes in seen["forward"].items()
        if name.split(".")[-1] in ("cema", "qk") or "norm" in name
    }
    kinds = ("timestep_norm", "cema", "rms_norm", "qk")
    layer = [f"attention.{kind}" for kind in kinds] + ["feed_forward.norm"]
    assert set(full) == {"norm"} | {f"layers.{i}.{name}" for i in (0, 1) for name in layer}
    # Parameters are not rounded, and activations are not widened.
    for name, dtypes in seen["forward"].items():
        parameters = "float32" if name in full else "bfloat16"
        inputs = "int64" if name == "tok_embeddings" else "bfloat16"
        assert dtypes == {"parameters": [parameters], "input": inputs}, name
    assert {"tok_embeddings", "output", "layers.1.attention.wz", "layers.0.feed_forward.fc2"} <= set(seen["forward"])
    assert seen["sharded"] == ["float32"] and seen["gradients"] == ["float32"]


def main() -> None:
    """Train the job named on the command line and write `dtypes.json` into its dump folder."""
    from torchtitan.config import ConfigManager

    from megalodon_plugin.titan.trainer import MegalodonTrainer

    def name_of(dtype: torch.dtype) -> str:
        return str(dtype).removeprefix("torch.")

    job_config = ConfigManager().parse_args(sys.argv[1:])
    trainer = MegalodonTrainer(job_config)
    (model,) = trainer.model_parts
    forward: dict[str, dict] = {}
    gradients: set[str] = set()

    def look(name: str):
        def hook(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            dtypes = {name_of(parameter.dtype) for parameter in module.parameters(recurse=False)}
            forward[name] = {"parameters": sorted(dtypes), "input": name_of(args[0].dtype)}

        return hook

    for name, module in model.named_modules():
        if any(True for _ in module.parameters(recurse=False)):
            module.register_forward_pre_hook(look(name))
    sharded = {name_of(parameter.dtype) for parameter in model.parameters()}
    for optimizer in trainer.optimizers:
        optimizer.register_step_pre_hook(lambda *_: gradients.update(name_of(p.grad.dtype) for p in model.parameters()))
    trainer.train()
    if torch.distributed.get_rank() == 0:
        content = {"forward": forward, "sharded": sorted(sharded), "gradients": sorted(gradients)}
        (Path(job_config.job.dump_folder) / "dtypes.json").write_text(json.dumps(content))
    trainer.close()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
