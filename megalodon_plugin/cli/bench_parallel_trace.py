"""The share of a step in communication, from a trace of PyTorch's profiler."""

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

Interval = tuple[float, float]

GPU_KINDS = ("kernel", "gpu_memcpy", "gpu_memset")


def trace_step(trainer: Any) -> dict[str, Any]:
    """Train one more step of the host's `trainer` under the profiler; `communication` of it."""
    batches = trainer.batch_generator(trainer.dataloader)
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        trainer.train_step(batches)
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return communication(json.loads(path.read_text())["traceEvents"])


def communication(events: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """What of the time between a trace's first and last work on the GPU was communication.

    Returns:
        "share": some kernel of NCCL ran, waiting for other ranks included; "exposed": one ran and nothing else did;
        "groups": both, and "messages", for each process group by its description, such as "mesh_cp".
    """
    groups: dict[str, list[Interval]] = {}
    compute: list[Interval] = []
    for event in events:
        if event.get("ph") != "X" or event.get("cat") not in GPU_KINDS:
            continue
        interval = (event["ts"], event["ts"] + event["dur"])
        if event["name"].startswith("nccl"):
            arguments = event.get("args", {})
            group = arguments.get("Process Group Description") or arguments.get("Process Group Name") or "unknown"
            groups.setdefault(group, []).append(interval)
        else:
            compute.append(interval)
    everything = [interval for intervals in groups.values() for interval in intervals]
    whole = union([*compute, *everything])
    if not whole:
        return {"share": 0.0, "exposed": 0.0, "groups": {}}
    span, busy = whole[-1][1] - whole[0][0], union(compute)

    def shares(intervals: list[Interval]) -> dict[str, float]:
        own = union(intervals)
        return {"share": total(own) / span, "exposed": (total(union([*own, *busy])) - total(busy)) / span}

    of_groups = {name: shares(found) | {"messages": len(found)} for name, found in sorted(groups.items())}
    return shares(everything) | {"groups": of_groups}


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
