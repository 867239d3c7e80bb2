"""One training job of a benchmark: a few steps of the host's Trainer on random tokens, timed one by one.

Under a layout of several ranks every rank runs the job, on its part of the same tokens and, with `same_weights`, of the
same weights, so that losses can be compared with one rank's.
"""

import gc
import math
import socket
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

import megalodon_plugin.titan  # noqa: F401  chooses the device before torchtitan does

# isort: split
from torchtitan.models.llama3 import TransformerModelArgs
from torchtitan.protocols import train_spec
from torchtitan.tools import utils

from megalodon_plugin.checkpoint.tokenizer_files import BYTE_TOKENIZER
from megalodon_plugin.parallel.layout import ONE_RANK, Layout
from megalodon_plugin.titan.command_line import read_job

from ..sizes import VOCABULARY
from .results import JobRow
from .trainer import RandomTokens, TimedTrainer, TooSlow

SPECS = {"llama": "llama3", "megalodon": "megalodon"}


@dataclass(frozen=True)
class TrainingJob:
    """What is trained: `model` "megalodon" with options of `[megalodon]`, or "llama" with sizes of the host's."""

    model: str
    options: tuple[tuple[str, Any], ...]
    batch: int
    """Rows of one forward and backward pass of a data parallel rank."""
    length: int
    checkpointing: str = "selective"
    compiled: bool = True
    low_precision: bool = True
    layout: Layout = ONE_RANK
    rows: int | None = None
    """Of a step, over all ranks; by default one pass of each rank."""
    same_weights: bool = False
    """The same on any layout; otherwise as the host initialises them, whose random numbers depend on the layout."""
    fake_ranks: bool = False
    """This process is rank 0, and the host's "fake_backend" stands for the others. It copies this rank's part into all
    places of what is gathered, so shapes, sizes and the range of the numbers are those of a real step."""
    text: str | None = None
    """Folder of text that is read as in any run, every step of which is logged. Such a job is checked and not timed.
    None: random tokens."""
    folder: str | None = None
    """The host's dump folder; None: a temporary one."""
    host_options: tuple[tuple[str, Any], ...] = ()
    """More of the host's options, or others than the benchmark's."""

    @property
    def vocabulary(self) -> int:
        return dict(self.options).get("vocab_size", VOCABULARY)

    @property
    def tokens(self) -> int:
        """Of a step, over all ranks."""
        return (self.rows or self.batch * self.layout.data) * self.length

    def arguments(self, steps: int, folder: str) -> list[str]:
        """The host's command line."""
        found = {
            "job.dump_folder": folder,
            "job.custom_config_module": "megalodon_plugin.titan.job_config",
            "experimental.custom_import": "megalodon_plugin.titan",
            "model.name": SPECS[self.model],
            "model.flavor": "bench",
            "model.hf_assets_path": BYTE_TOKENIZER,
            "training.local_batch_size": self.batch,
            "training.seq_len": self.length,
            "training.global_batch_size": self.rows or -1,
            "training.steps": steps,
            "training.mixed_precision_param": "bfloat16" if self.low_precision else "float32",
            "activation_checkpoint.mode": self.checkpointing,
            "activation_checkpoint.selective_ac_option": "op",
            "lr_scheduler.warmup_steps": 2,
            "lr_scheduler.total_steps": 10**4,
            "metrics.log_freq": 10**6,
            "debug.seed": 0,
            "comm.mode": "fake_backend" if self.fake_ranks else "default",
        }
        found |= self.layout.options
        if self.text is not None:
            found |= {"training.dataset": "local_text", "training.dataset_path": self.text, "metrics.log_freq": 1}
        if self.model == "megalodon":
            found |= {f"megalodon.{name}": value for name, value in self.options if name != "flavor"}
            found |= {"megalodon.vocab_size": self.vocabulary, "model.flavor": dict(self.options)["flavor"]}
        flags = [f"--compile.{'' if self.compiled else 'no-'}enable"]
        found |= dict(self.host_options)
        return [*flags, *(part for name, value in found.items() for part in _argument(name, value))]


def _argument(name: str, value: Any) -> list[str]:
    """One option of the host's command line."""
    if isinstance(value, bool) and not name.startswith("megalodon."):  # where None is a third value
        section, _, key = name.rpartition(".")
        return [f"--{name}" if value else f"--{section}.no-{key}"]
    return [f"--{name}", ",".join(value) if isinstance(value, (list, tuple)) else str(value)]


def run_job(
    job: TrainingJob,
    steps: int,
    after: Callable[[TimedTrainer], object] | None = None,
    most_seconds: float = math.inf,
    longest_step: float = math.inf,
) -> JobRow:
    """Train at most `steps` steps, the first `trainer.UNCOUNTED` uncounted; fewer where the others would take more than
    `most_seconds`.

    `after` is called with the trainer at the end.

    Returns:
        the numbers, or "failed" in their place where the memory was not enough or a step takes more than
        `longest_step` seconds.
    """
    torch._dynamo.reset()
    failed = True
    row: JobRow = {
        "model": job.model,
        "batch": job.batch,
        "length": job.length,
        "checkpointing": job.checkpointing,
    }
    trainer = None
    try:
        with tempfile.TemporaryDirectory() as folder, _spec_of(job):
            config = read_job(job.arguments(steps, job.folder or folder))
            trainer = TimedTrainer(config, job.same_weights, job.fake_ranks, most_seconds, longest_step)
            trainer.train()
            measured = _with_numbers(row, trainer, job) if job.text is None else row
            if after is not None:
                after(trainer)
            failed = False
            return measured
    except torch.OutOfMemoryError:
        return {**row, "failed": "out of memory"}
    except TooSlow as error:
        return {**row, "failed": str(error)}
    finally:
        if trainer is not None:
            trainer.close()
        del trainer
        sys.last_exc = None  # type: ignore[attr-defined]  # a traceback would hold the model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        # Other ranks may be waiting in a collective that this one will not join, and then so would it here.
        nobody_waits = job.fake_ranks or job.layout.gpus == 1 or not failed
        if torch.distributed.is_initialized() and nobody_waits:
            torch.distributed.destroy_process_group()


def _with_numbers(row: JobRow, trainer: TimedTrainer, job: TrainingJob) -> JobRow:
    counted = trainer.seconds()
    seconds = statistics.median(counted)
    with torch.device("meta"):  # the rank's own part may be one stage
        model: Any = trainer.train_spec.model_cls(trainer.model_args)
    flops, rate = _flops(trainer.model_args, model, job), job.tokens / seconds
    measured: JobRow = {
        **row,
        "tokens_per_s": rate,
        "seconds": seconds,
        "steps": len(counted),
        "spread": (max(counted) - min(counted)) / seconds,
        "parameters": sum(p.numel() for p in model.parameters()),
        "gflop_per_token": flops / 1e9,
    }
    if trainer.device.type == "cuda":
        measured["peak_gib"] = torch.cuda.max_memory_reserved() / 2**30
        measured["allocated_gib"] = torch.cuda.max_memory_allocated() / 2**30
        peak = utils.get_peak_flops(torch.cuda.get_device_name()) * job.layout.gpus
        measured["mfu"] = flops * rate / peak
    return measured


def _flops(args: Any, model: torch.nn.Module, job: TrainingJob) -> float:
    """Of a trained token: of attention the pairs that the causal mask leaves, nothing recomputed."""
    if job.model == "megalodon":
        return args.get_nparams_and_flops(model, job.length)[1]
    matrices = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    return 6 * matrices + 6 * args.n_layers * args.dim * (job.length + 1)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextmanager
def _spec_of(job: TrainingJob) -> Iterator[None]:
    """The host's train spec with random tokens, unless the job reads text, and, for its Llama, these sizes."""
    if job.text is not None:
        yield
        return
    name = SPECS[job.model]
    before = train_spec._extra_train_specs.get(name)
    loader = partial(RandomTokens, vocabulary=job.vocabulary)
    spec = replace(train_spec.get_train_spec(name), build_dataloader_fn=loader, build_validator_fn=None)
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
