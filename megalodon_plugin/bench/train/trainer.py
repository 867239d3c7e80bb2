"""The host's Trainer on random tokens, which times its steps."""

import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

import megalodon_plugin.titan  # noqa: F401  chooses the device before torchtitan does

# isort: split
from torchtitan.components.dataloader import BaseDataLoader

from megalodon_plugin.data.records import GRADIENT_NORM, MEAN_LOSS
from megalodon_plugin.titan.trainer import MegalodonTrainer

UNCOUNTED = 3
"""Steps: one compiles, one is the first without compilation, one shows how long a step takes."""
LEAST_STEPS = 3
"""Steps that are counted, however long they take."""


def check_steps(steps: int) -> None:
    """Raise ValueError unless at least one of `steps` is counted."""
    if steps <= UNCOUNTED:
        raise ValueError(f"`--steps` must be more than the {UNCOUNTED} that are not counted, but is {steps}")


class RandomTokens(BaseDataLoader):
    """The same rows of random tokens at every step, shared by the data parallel ranks in their order.

    Reading text takes no part in the times.
    """

    def __init__(self, job_config: Any, dp_rank: int, dp_world_size: int, vocabulary: int, **_: Any):
        training = job_config.training
        self.batch = training.local_batch_size
        rows = training.global_batch_size if training.global_batch_size > 0 else self.batch * dp_world_size
        tokens = torch.randint(vocabulary, (rows, training.seq_len + 1), generator=torch.Generator().manual_seed(0))
        self.rows = tokens.chunk(dp_world_size)[dp_rank]

    def __iter__(self) -> Iterator[Any]:
        while True:
            for rows in self.rows.split(self.batch):
                yield {"input": rows[:, :-1]}, rows[:, 1:]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


def _copy_part(own: Tensor, whole: Tensor) -> None:
    """Fill this rank's part without an exchange. `set_model_state_dict` scatters, and over a dimension of one rank,
    where the host has PyTorch's fake backend, that leaves memory as it was in torch 2.11.
    """
    if isinstance(own, DTensor):
        sizes, starts = compute_local_shape_and_global_offset(own.shape, own.device_mesh, own.placements)
        whole = whole[tuple(slice(start, start + size) for size, start in zip(sizes, starts, strict=True))]
        own = own.to_local()
    own.copy_(whole)


class TooSlow(Exception):
    """A step took longer than is allowed."""


class TimedTrainer(MegalodonTrainer):
    """Times each step after the first UNCOUNTED ones on the GPU's clock. As in a run, the end of a step waits only for
    what the host itself waits for. Memory is measured from the last uncounted step on.

    Makes fewer steps where `most_seconds` are over sooner.

    Raises:
        TooSlow: a step takes more than `longest_step` seconds.
    """

    def __init__(
        self,
        job_config: Any,
        same_weights: bool = False,
        fake_ranks: bool = False,
        most_seconds: float = math.inf,
        longest_step: float = math.inf,
    ):
        super().__init__(job_config)
        self.most_seconds, self.longest_step = most_seconds, longest_step
        self._ends: list[Any] = []
        """Of the last uncounted step and of each after it."""
        self.records: list[dict[str, float]] = []
        """Of the logged steps and of validations, with the host's names for the numbers."""
        if same_weights:
            self._take_same_weights()
        if fake_ranks:
            self.optimizers.register_step_pre_hook(self._clear_gradients)
        metrics = self.metrics_processor
        if job_config.metrics.log_freq > 1:
            metrics.should_log = lambda step: step < UNCOUNTED
        metrics.logger.log = lambda numbers, step: self.records.append(
            {"step": step} | {name: float(number) for name, number in numbers.items()}
        )

    @property
    def losses_and_norms(self) -> list[tuple[float, float]]:
        """Of each logged step, over all ranks."""
        steps = [record for record in self.records if GRADIENT_NORM in record]
        return [(record[MEAN_LOSS], record[GRADIENT_NORM]) for record in steps]

    def _clear_gradients(self, *_: Any) -> None:
        """What the fake backend leaves as a sum of gradients may be anything; NaNs would make the next step faster."""
        for parameter in (p for part in self.model_parts for p in part.parameters() if p.grad is not None):
            parameter.grad.zero_()

    def _take_same_weights(self) -> None:
        """This rank's part of the weights that a single process on this kind of device would draw."""
        torch.manual_seed(0)
        with torch.device("meta"):
            whole: Any = self.train_spec.model_cls(self.model_args)
        whole.to_empty(device=self.device)
        with torch.no_grad():
            whole.init_weights(buffer_device=None)
            values = whole.state_dict()
            for part in self.model_parts:
                parts: dict[str, Any] = get_model_state_dict(part)
                for name, own in parts.items():
                    _copy_part(own, values[name])

    def train_step(self, data_iterator: Iterator[Any]) -> None:
        if self.step > UNCOUNTED:
            super().train_step(data_iterator)
        else:
            self._wait()
            if self.step == UNCOUNTED and self.device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            super().train_step(data_iterator)
            self._wait()
            if self.step > 1:
                self._look_at_time(time.perf_counter() - start)
            if self.step < UNCOUNTED:
                return
        self._ends.append(self._now())

    def _look_at_time(self, seconds: float) -> None:
        """Give up, or choose the number of steps, by the time of one without compilation; alike on all ranks."""
        slowest = torch.tensor(seconds, device=self.device)
        torch.distributed.all_reduce(slowest, torch.distributed.ReduceOp.MAX)
        if slowest > self.longest_step:
            raise TooSlow(f"a step takes more than {self.longest_step:g} s")
        if self.step == UNCOUNTED:
            counted = max(LEAST_STEPS, self.most_seconds / float(slowest))
            self.job_config.training.steps = int(min(self.job_config.training.steps, UNCOUNTED + counted))

    def seconds(self) -> list[float]:
        """Of the counted steps."""
        self._wait()
        pairs = zip(self._ends, self._ends[1:], strict=False)
        if self.device.type == "cuda":
            return [start.elapsed_time(end) / 1e3 for start, end in pairs]
        return [end - start for start, end in pairs]

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
