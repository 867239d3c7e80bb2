"""A run's record, `metrics.jsonl`: its name, what its numbers are called, and how it is read; no host is needed."""

import json
from pathlib import Path
from typing import Any

FILE = "metrics.jsonl"
"""In the job's dump folder; a line for each logged step and each validation."""
MEAN_LOSS = "loss_metrics/global_avg_loss"
"""Of a step, the mean cross-entropy a token."""
LARGEST_LOSS = "loss_metrics/global_max_loss"
"""That of the rank where it is largest."""
VALIDATION_LOSS = "validation_metrics/loss"
GRADIENT_NORM = "grad_norm"
"""Before clipping."""
TOKENS_SEEN = "n_tokens_seen"
LOSSES = {"train": MEAN_LOSS, "validation": VALIDATION_LOSS}
"""Kind of record -> its loss."""

Record = dict[str, Any]
""""step" and "kind", then numbers by the host's names."""


def read_records(run: Path) -> list[Record]:
    """The records of a run's dump folder, by step; of several of one kind and step the last.

    Raises:
        ValueError: there is no such file, or it holds no record.
    """
    path = run / FILE
    if not path.is_file():
        raise ValueError(f"the run's folder must hold `{FILE}`, but {run} does not")
    records: dict[tuple[str, int], Record] = {}
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue  # a killed run may have left a line half-written
        records[record["kind"], record["step"]] = record
    if not records:
        raise ValueError(f"{path} must hold at least one record, but is empty")
    return sorted(records.values(), key=lambda record: record["step"])


def losses(records: list[Record], kind: str) -> tuple[list[int], list[float]]:
    """Steps and losses of one kind of record, "train" or "validation"."""
    chosen = [record for record in records if record["kind"] == kind]
    return [record["step"] for record in chosen], [record[LOSSES[kind]] for record in chosen]
