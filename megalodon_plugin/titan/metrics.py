"""The host's metrics, also written as JSON lines, which plots and tests read."""

import json
from pathlib import Path
from typing import Any

import torch
from torchtitan.components.metrics import MetricsProcessor, _get_metrics_rank

from . import layout
from .model_json import write_model_json


class JsonLinesMetrics(MetricsProcessor):
    """`MetricsProcessor` that appends every record to `metrics.jsonl` in the job's dump folder.

    A record is {"step": …, "kind": "train" | "validation", …} with the host's names for the numbers. A resumed run
    appends; of several records of a step the last one counts.
    """

    def __init__(self, job_config: Any, parallel_dims: Any, tag: str | None = None):
        super().__init__(job_config, parallel_dims, tag)
        self._path: Path | None = None
        if torch.distributed.get_rank() == _get_metrics_rank(parallel_dims, job_config):
            self._path = Path(job_config.job.dump_folder) / "metrics.jsonl"
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._end_cut_line()
        host_log = self.logger.log

        def log_both(metrics: dict[str, Any], step: int) -> None:
            host_log(metrics, step)
            self._write(metrics, step)

        self.logger.log = log_both  # type: ignore[method-assign]

    def _end_cut_line(self) -> None:
        """Close the line that a killed run may have left half-written, so that the next record stands alone."""
        assert self._path is not None
        if self._path.is_file() and self._path.read_bytes()[-1:] not in (b"", b"\n"):
            with self._path.open("a") as file:
                file.write("\n")

    def _write(self, metrics: dict[str, Any], step: int) -> None:
        if self._path is None:
            return
        kind = "validation" if any(name.startswith("validation") for name in metrics) else "train"
        record = {"step": step, "kind": kind} | {name: float(value) for name, value in metrics.items()}
        with self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def build_metrics(job_config: Any, parallel_dims: Any, model_args: Any = None, tag: str | None = None):
    """`build_metrics_processor_fn` of the train spec.

    Under the stock entry it also writes `model.json`: it is the one call that gets the model's arguments. The plugin's
    own Trainer writes it after its checks.
    """
    if not layout.is_own_entry() and model_args is not None and torch.distributed.get_rank() == 0:
        write_model_json(job_config, model_args)
    return JsonLinesMetrics(job_config, parallel_dims, tag)
