"""The host's metrics, right under every layout and also written as JSON lines, which plots and tests read."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torchtitan.components.metrics import BaseLogger, LoggerContainer, MetricsProcessor, _get_metrics_rank

from megalodon_plugin.data import records

from .job_rules import has_own_trainer
from .loss_totals import Losses
from .model_json import write_model_json


class StepNumbers(NamedTuple):
    """What a step's record says of all ranks together; `others` by their names in the record."""

    losses: Losses
    n_tokens_seen: int
    others: Mapping[str, float] = {}


class Counts(Protocol):
    """What the host's metrics have counted since the last record: the rank's tokens, and when they began."""

    ntokens_since_last_log: int
    time_last_log: float


@contextmanager
def counted_apart(counts: Counts, clock: Callable[[], float] = time.perf_counter) -> Iterator[None]:
    """Count what runs inside, a validation, from zero, and continue afterwards as if it had not run.

    The host counts training's tokens since its last record as validation's too, and takes them from training's next
    one. `clock` is the one that `time_last_log` was read from.
    """
    n_tokens, begin = counts.ntokens_since_last_log, clock()
    in_training = begin - counts.time_last_log
    counts.ntokens_since_last_log, counts.time_last_log = 0, begin
    try:
        yield
    finally:
        counts.ntokens_since_last_log = n_tokens
        counts.time_last_log = clock() - in_training


class JsonLinesLogger(BaseLogger):
    """Appends every record to a file: {"step": …, "kind": "train" | "validation", …}, the host's names for numbers."""

    def __init__(self, path: Path):
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._end_cut_line()

    def log(self, metrics: dict[str, Any], step: int) -> None:
        kind = "validation" if any(name.startswith("validation") for name in metrics) else "train"
        record = {"step": step, "kind": kind} | {name: float(value) for name, value in metrics.items()}
        with self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def _end_cut_line(self) -> None:
        """Close the line that a killed run may have left half-written, so that the next record stands alone."""
        if self._path.is_file() and self._path.read_bytes()[-1:] not in (b"", b"\n"):
            with self._path.open("a") as file:
                file.write("\n")


class JsonLinesMetrics(MetricsProcessor):
    """`MetricsProcessor` that also logs to `metrics.jsonl` in the job's dump folder, see `JsonLinesLogger`.

    A resumed run appends; of several records of a step the last one counts.

    Under the plugin's Trainer the same numbers are logged on every rank, and they mean, under any layout:

    * `loss_metrics/global_avg_loss`: the step's mean cross-entropy a token;
    * `loss_metrics/global_max_loss`: that of the rank where it is largest, over the rank's own tokens;
    * `n_tokens_seen`: tokens that all ranks have received since the job's first step, earlier runs included;
    * `throughput(tps)`: tokens a second and device. The ranks that share a row (context, tensor and pipeline parallel)
      count it once each, and the host divides by their number;
    * `mfu(%)`: the floating-point operations of the whole model for a token (see `get_nparams_and_flops`), times that
      throughput, of the device's peak;
    * `validation_metrics/throughput(tps)`: likewise, of the validation alone.
    """

    logger: BaseLogger

    # Set by the plugin's Trainer; it is called on all ranks, at logged steps only. Without it, as under the stock
    # entry, the host's numbers are logged; layouts under which they are wrong are refused there.
    numbers_of_step: Callable[[], StepNumbers] | None = None

    def __init__(self, job_config: Any, parallel_dims: Any, tag: str | None = None):
        super().__init__(job_config, parallel_dims, tag)
        if torch.distributed.get_rank() == _get_metrics_rank(parallel_dims, job_config):
            both = LoggerContainer()
            both.add_logger(self.logger)
            both.add_logger(JsonLinesLogger(Path(job_config.job.dump_folder) / records.FILE))
            self.logger = both

    def log(
        self,
        step: int,
        global_avg_loss: float,
        global_max_loss: float,
        grad_norm: float,
        extra_metrics: dict[str, Any] | None = None,
    ) -> None:
        """The host's record of a training step, with the losses and the tokens of all ranks."""
        if self.numbers_of_step is not None:
            (global_avg_loss, global_max_loss), n_tokens_seen, others = self.numbers_of_step()
            extra_metrics = (extra_metrics or {}) | {records.TOKENS_SEEN: n_tokens_seen} | dict(others)
        super().log(step, global_avg_loss, global_max_loss, grad_norm, extra_metrics)


def build_metrics(job_config: Any, parallel_dims: Any, model_args: Any = None, tag: str | None = None):
    """`build_metrics_processor_fn` of the train spec.

    Under the stock entry it also writes `model.json`: it is the one call that gets the model's arguments. The plugin's
    own Trainer writes it after its checks.
    """
    if not has_own_trainer(job_config) and model_args is not None and torch.distributed.get_rank() == 0:
        write_model_json(job_config, model_args)
    return JsonLinesMetrics(job_config, parallel_dims, tag)
