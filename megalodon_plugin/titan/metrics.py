"""The host's metrics, also written as JSON lines, which plots and tests read."""

import json
from pathlib import Path
from typing import Any

import torch
from torchtitan.components.metrics import MetricsProcessor, _get_metrics_rank


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
        host_log = self.logger.log

        def log_both(metrics: dict[str, Any], step: int) -> None:
            host_log(metrics, step)
            self._write(metrics, step)

        self.logger.log = log_both  # type: ignore[method-assign]

    def _write(self, metrics: dict[str, Any], step: int) -> None:
        if self._path is None:
            return
        kind = "validation" if any(name.startswith("validation") for name in metrics) else "train"
        record = {"step": step, "kind": kind} | {name: float(value) for name, value in metrics.items()}
        with self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def build_metrics(job_config: Any, parallel_dims: Any, model_args: Any = None, tag: str | None = None):
    """`build_metrics_processor_fn` of the train spec."""
    return JsonLinesMetrics(job_config, parallel_dims, tag)
