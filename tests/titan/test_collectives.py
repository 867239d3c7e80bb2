"""What layouts of 8 GPUs exchange in a step of the host's Trainer, counted on PyTorch's "fake" backend in one process,
against the formulas behind `megalodon plan` and docs/scaling.md.

As a program it trains one step of the job named on the command line, as rank 0 of 8 on the fake backend, and prints
what was exchanged.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tiny_job import environment, write_job

DEGREES = {
    "fsdp": "data_parallel_shard_degree",
    "replicate": "data_parallel_replicate_degree",
    "cp": "context_parallel_degree",
    "tp": "tensor_parallel_degree",
}
LAYOUTS: dict[str, dict[str, int]] = {
    "fsdp 8": {"fsdp": 8},
    "cp 8": {"cp": 8},
    "replicate 2 x fsdp 4": {"replicate": 2, "fsdp": 4},
    "fsdp 2 x cp 2 x tp 2": {"fsdp": 2, "cp": 2, "tp": 2},
}
SINGLE_NUMBERS = 16  # bytes: the loss, norms and counts of tokens
Found = dict[str, dict[str, list[int]]]
"""dimension -> kind -> messages, bytes of all parts together (of an all-reduce the whole tensors)"""


def count(degrees: dict[str, int], folder: Path) -> Found:
    sections: dict[str, dict[str, Any]] = {
        "megalodon": {"n_layers": 4},
        "training": {"steps": 1, "seq_len": 256, "local_batch_size": 2},
        "parallelism": {key: degrees.get(name, 1) for name, key in DEGREES.items()},
        "checkpoint": {"enable": False},
        "activation_checkpoint": {"mode": "selective", "selective_ac_option": "op"},
    }
    config = write_job(folder, **sections)
    ranks = {"NGPU": "8", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "8"}
    result = subprocess.run(
        [sys.executable, __file__, "--job.config_file", str(config), "--comm.mode", "fake_backend"],
        env=environment() | ranks,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def planned(degrees: dict[str, int], config: Path) -> Found:
    from megalodon_plugin.cli.plan import estimate, load_job, stages_of
    from megalodon_plugin.parallel.estimate import Layout
    from megalodon_plugin.parallel.traffic import Links

    job = load_job(config, None, [])
    layout = Layout(
        dp_replicate=degrees.get("replicate", 1),
        dp_shard=degrees.get("fsdp", 1),
        cp=degrees.get("cp", 1),
        tp=degrees.get("tp", 1),
        pp=1,
    )
    candidate = estimate(job, layout, stages_of(job, 1), Links(), 400.0)
    found: Found = {}
    for exchange in candidate.exchanges:
        row = found.setdefault(exchange.dimension, {}).setdefault(exchange.kind, [0, 0])
        whole = exchange.ranks if exchange.kind == "all-reduce" else 1
        row[0] += round(exchange.messages)
        row[1] += round(exchange.messages) * exchange.part * whole
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_step_exchanges_what_the_formulas_say(name: str, tmp_path: Path) -> None:
    found = count(LAYOUTS[name], tmp_path)
    expected = planned(LAYOUTS[name], tmp_path / "job.toml")
    assert {dimension: {kind: row[0] for kind, row in kinds.items()} for dimension, kinds in found.items()} == {
        dimension: {kind: row[0] for kind, row in kinds.items()} for dimension, kinds in expected.items()
    }
    for dimension, kinds in expected.items():
        for kind, (_, size) in kinds.items():
            # Shards are padded to whole rows, which in a model this small is a few percent.
            assert found[dimension][kind][1] == pytest.approx(size, rel=0.1 if dimension == "fsdp" else 1e-9), kind


class _Exchanges(TorchDispatchMode):
    """Sums messages and bytes of the parts, by who issues them: FSDP by c10d, the others by functional collectives."""

    KINDS = {  # noqa: RUF012  read only
        "c10d._allgather_base_": ("fsdp", "all-gather", 1),
        "c10d._reduce_scatter_base_": ("fsdp", "reduce-scatter", 0),
        "c10d.allreduce_": ("replicate", "all-reduce", 0),
        "_c10d_functional.all_gather_into_tensor": ("tp", "all-gather", 0),
        "_c10d_functional.reduce_scatter_tensor": ("tp", "reduce-scatter", 0),
        "_c10d_functional.all_reduce": ("tp", "all-reduce", 0),
        "megalodon.gather_summaries": ("cp", "all-gather", 0),
    }

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, dict[str, Counter[str]]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).rpartition(".")[0]
        if name in self.KINDS:
            dimension, kind, argument = self.KINDS[name]
            tensors = args[argument] if isinstance(args[argument], (list, tuple)) else [args[argument]]
            size = sum(t.numel() * t.element_size() for t in tensors)
            if name == "_c10d_functional.reduce_scatter_tensor":
                size //= args[2]  # what goes in is of all ranks
            if size > SINGLE_NUMBERS:
                row = self.found.setdefault(dimension, {}).setdefault(kind, Counter())
                row.update(messages=1, size=size)
        return func(*args, **kwargs or {})


def main() -> None:
    import megalodon_plugin.titan  # noqa: F401  chooses the device
    from megalodon_plugin.titan.entry import read_job
    from megalodon_plugin.titan.trainer import MegalodonTrainer

    torch.set_num_threads(1)
    trainer = MegalodonTrainer(read_job())
    batches = trainer.batch_generator(trainer.dataloader)
    trainer.step = 1
    with _Exchanges() as exchanges:
        trainer.train_step(batches)
    rows = {
        dimension: {kind: [row["messages"], row["size"]] for kind, row in kinds.items()}
        for dimension, kinds in exchanges.found.items()
    }
    print(json.dumps(rows), flush=True)
    os._exit(0)  # the fake backend has nothing to take down


if __name__ == "__main__":
    main()
