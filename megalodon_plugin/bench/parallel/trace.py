"""The share of a step in communication, from a trace of PyTorch's profiler."""

import json
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from megalodon_plugin.planning.traffic import Exchange

from .exchanges import PADDING
from .results import Communication, DimensionShare

Interval = tuple[float, float]

GPU_KINDS = ("kernel", "gpu_memcpy", "gpu_memset")
MARK = "the step that is looked at"
COLLECTIVES = {
    "_allgather_base": "all-gather",
    "allgather_into_tensor_coalesced": "all-gather",
    "_reduce_scatter_base": "reduce-scatter",
    "reduce_scatter_tensor_coalesced": "reduce-scatter",
    "allreduce": "all-reduce",
    "allreduce_coalesced": "all-reduce",
}
"""Names in a trace -> kinds of `Exchange`."""
ITEM_BYTES = {"Float": 4, "BFloat16": 2, "Half": 2, "Double": 8, "Long": 8, "Int": 4}


def trace_step(trainer: Any, by_formula: Sequence[Exchange]) -> Communication:
    """Train one more step of the host's `trainer` under the profiler, all ranks at once; `communication` of it."""
    batches = trainer.batch_generator(trainer.dataloader)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        torch.distributed.barrier()
        torch.cuda.synchronize()
        with torch.profiler.record_function(MARK):
            trainer.train_step(batches)
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return communication(json.loads(path.read_text())["traceEvents"], by_formula)


def communication(events: Iterable[dict[str, Any]], by_formula: Sequence[Exchange] = ()) -> Communication:
    """What of a step's time on the GPU, from its first work there to its last, was communication.

    Args:
        events: of a Chrome trace; what ran before the event MARK, if there is one, does not count.
        by_formula: the exchanges that the formulas give. A message belongs to the dimension of the one of its kind and
            size; process groups do not say it, for dimensions that span the same ranks share one.

    Returns:
        the shares, in which waiting for other ranks counts; "dimensions" has "other" for messages of none.
    """
    events = list(events)
    marks = [event["ts"] for event in events if event.get("name") == MARK and event.get("cat") == "user_annotation"]
    begin = max(marks, default=float("-inf"))
    dimensions: dict[str, list[Interval]] = {}
    sizes: dict[str, set[int]] = {}
    compute: list[Interval] = []
    for event in events:
        if event.get("ph") != "X" or event.get("cat") not in GPU_KINDS or event["ts"] < begin:
            continue
        interval = (event["ts"], event["ts"] + event["dur"])
        if event["name"].startswith("nccl"):
            name = _dimension(event, by_formula)
            dimensions.setdefault(name, []).append(interval)
            sizes.setdefault(name, set()).add(event.get("args", {}).get("Group size", 0))
        else:
            compute.append(interval)
    everything = [interval for intervals in dimensions.values() for interval in intervals]
    whole = union([*compute, *everything])
    if not whole:
        return {"share": 0.0, "exposed": 0.0, "idle": 0.0, "seconds": 0.0, "dimensions": {}}
    span, busy = whole[-1][1] - whole[0][0], union(compute)

    def share(intervals: list[Interval]) -> float:
        return total(union(intervals)) / span

    def exposed(intervals: list[Interval]) -> float:
        return (total(union([*intervals, *busy])) - total(busy)) / span

    of_dimensions: dict[str, DimensionShare] = {
        name: {
            "share": share(found),
            "exposed": exposed(found),
            "durations": [(end - start) * 1e-6 for start, end in sorted(found)],
            "ranks": sorted(sizes[name]),
        }
        for name, found in sorted(dimensions.items())
    }
    return {
        "share": share(everything),
        "exposed": exposed(everything),
        "idle": 1 - total(whole) / span,
        "seconds": span * 1e-6,
        "dimensions": of_dimensions,
    }


def _dimension(kernel: dict[str, Any], by_formula: Sequence[Exchange]) -> str:
    """Of the exchange that a kernel of NCCL belongs to."""
    arguments = kernel.get("args", {})
    if "SendRecv" in kernel["name"]:  # of which a trace tells no size
        return next((exchange.dimension for exchange in by_formula if exchange.kind == "send"), "other")
    kind = COLLECTIVES.get(arguments.get("Collective name", ""))
    item = ITEM_BYTES.get(arguments.get("dtype", ""), 0)
    numbers = arguments.get("Out msg nelems" if kind == "reduce-scatter" else "In msg nelems", 0)
    alike = [exchange for exchange in by_formula if exchange.kind == kind]

    def distance(exchange: Exchange) -> float:
        expected = exchange.part * (exchange.ranks if kind == "all-reduce" else 1)
        return abs(numbers * item / expected - 1)

    nearest = min(alike, key=distance, default=None)
    return nearest.dimension if nearest is not None and distance(nearest) <= PADDING else "other"


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same points of time as disjoint intervals in order."""
    found: list[Interval] = []
    for begin, end in sorted(intervals):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((begin, end))
    return found


def total(disjoint: Iterable[Interval]) -> float:
    return sum(end - begin for begin, end in disjoint)
