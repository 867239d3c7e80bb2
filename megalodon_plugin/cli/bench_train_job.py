"""One training job of a benchmark: a few steps of the host's Trainer on random tokens, timed one by one."""

import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

import megalodon_plugin.titan  # noqa: F401  chooses the device before torchtitan does

# isort: split
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.models.llama3 import TransformerModelArgs
from torchtitan.protocols import train_spec
from torchtitan.tools import utils

from megalodon_plugin.titan.entry import read_job
from megalodon_plugin.titan.trainer import MegalodonTrainer

VOCABULARY = 32000
SPECS = {"llama": "llama3", "megalodon": "megalodon"}


class RandomTokens(BaseDataLoader):
    """The same rows of random tokens at every step: the time of reading text is left out."""

    def __init__(self, job_config: Any, **_: Any):
        shape = (job_config.training.local_batch_size, job_config.training.seq_len + 1)
        self.rows = torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(0))

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield {"input": self.rows[:, :-1]}, self.rows[:, 1:]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


@dataclass(frozen=True)
class Job:
    """What is trained: `model` "megalodon" with options of `[megalodon]`, or "llama" with sizes of the host's."""

    model: str
    options: tuple[tuple[str, Any], ...]
    batch: int
    length: int
    checkpointing: str = "selective"
    compiled: bool = True
    low_precision: bool = True

    def arguments(self, steps: int, folder: str) -> list[str]:
        """The host's command line."""
        found = {
            "job.dump_folder": folder,
            "job.custom_config_module": "megalodon_plugin.titan.job_config",
            "experimental.custom_import": "megalodon_plugin.titan",
            "model.name": SPECS[self.model],
            "model.flavor": "bench",
            "model.hf_assets_path": "byte",
            "training.local_batch_size": self.batch,
            "training.seq_len": self.length,
            "training.steps": steps,
            "training.mixed_precision_param": "bfloat16" if self.low_precision else "float32",
            "activation_checkpoint.mode": self.checkpointing,
            "activation_checkpoint.selective_ac_option": "op",
            "lr_scheduler.warmup_steps": 2,
            "lr_scheduler.total_steps": 10**4,
            "metrics.log_freq": 10**6,
            "debug.seed": 0,
        }
        if self.model == "megalodon":
            found |= {f"megalodon.{name}": value for name, value in self.options if name != "flavor"}
            found |= {"megalodon.vocab_size": VOCABULARY, "model.flavor": dict(self.options)["flavor"]}
        flags = [f"--compile.{'' if self.compiled else 'no-'}enable"]
        return [*flags, *(part for name, value in found.items() for part in (f"--{name}", str(value)))]


class TimedTrainer(MegalodonTrainer):
    """Keeps each step's seconds; after two steps, which compile, memory is counted anew."""

    seconds: list[float]

    def train_step(self, data_iterator: Iterator[Any]) -> None:
        if len(self.seconds) == 2 and self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self._wait()
        start = time.perf_counter()
        super().train_step(data_iterator)
        self._wait()
        self.seconds.append(time.perf_counter() - start)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def run_job(job: Job, steps: int, after: Callable[[TimedTrainer], dict[str, Any]] | None = None) -> dict[str, Any]:
    """Train `steps` steps, of which the first two are not counted. `after` may look at the trainer and add to the row.

    Returns:
        tokens_per_s (median step), peak memory in GiB, model GFLOPs a token; "failed" in their place where the memory
        was not enough.
    """
    torch._dynamo.reset()
    row = {"model": job.model, "batch": job.batch, "length": job.length, "checkpointing": job.checkpointing}
    trainer = None
    try:
        with tempfile.TemporaryDirectory() as folder, _spec_of(job):
            trainer = TimedTrainer(read_job(job.arguments(steps, folder)))
            trainer.seconds = []
            trainer.train()
            row |= _numbers(trainer, job)
            return row if after is None else row | after(trainer)
    except torch.OutOfMemoryError:
        return row | {"failed": "out of memory"}
    finally:
        if trainer is not None:
            trainer.close()
        del trainer
        sys.last_exc = None  # type: ignore[attr-defined]  # a traceback would hold the model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _numbers(trainer: TimedTrainer, job: Job) -> dict[str, Any]:
    counted = trainer.seconds[2:]
    seconds = statistics.median(counted)
    model = trainer.model_parts[0]
    numbers = {
        "tokens_per_s": job.batch * job.length / seconds,
        "seconds": seconds,
        "spread": (max(counted) - min(counted)) / seconds,
        "parameters": sum(p.numel() for p in model.parameters()),
        "gflop_per_token": _flops(trainer, job) / 1e9,
    }
    if trainer.device.type == "cuda":
        numbers |= {
            "peak_gib": torch.cuda.max_memory_reserved() / 2**30,
            "allocated_gib": torch.cuda.max_memory_allocated() / 2**30,
        }
        peak = utils.get_peak_flops(torch.cuda.get_device_name())
        numbers["mfu"] = numbers["gflop_per_token"] * 1e9 * numbers["tokens_per_s"] / peak
    return numbers


def _flops(trainer: TimedTrainer, job: Job) -> float:
    """Of a trained token, of the pairs that causal attention looks at and without recomputation."""
    model = trainer.model_parts[0]
    if job.model == "megalodon":
        return trainer.model_args.get_nparams_and_flops(model, job.length)[1]
    args: Any = trainer.model_args
    matrices = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    return 6 * matrices + 6 * args.n_layers * args.dim * (job.length + 1)


@contextmanager
def _spec_of(job: Job) -> Iterator[None]:
    """The host's train spec with random tokens and, for its Llama, these sizes."""
    name = SPECS[job.model]
    before = train_spec._extra_train_specs.get(name)
    spec = replace(train_spec.get_train_spec(name), build_dataloader_fn=RandomTokens, build_validator_fn=None)
    if job.model == "llama":
        args = TransformerModelArgs(vocab_size=VOCABULARY, **dict(job.options))
        spec = replace(spec, model_args={"bench": args}, build_tokenizer_fn=None)
    train_spec._extra_train_specs[name] = spec
    try:
        yield
    finally:
        del train_spec._extra_train_specs[name]
        if before is not None:
            train_spec.register_train_spec(name, before)
