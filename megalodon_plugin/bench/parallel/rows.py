"""Rows of `megalodon bench parallel`: the results of ranks merged into one row, and ratios between rows."""

import math
from collections.abc import Iterable
from typing import Any, cast

from .results import Communication, DimensionShare, Measured, Outcome, RankRow, ScenarioRow, Steps


def merged(ranks: list[RankRow]) -> Measured:
    """One row of all ranks': the slowest, the fullest, and rank 0's numbers for the rest. "failed" where one failed."""
    reason = reason_of(ranks)
    if reason is not None:
        return {"failed": reason}
    slowest = max(ranks, key=lambda rank: rank["seconds"])
    found = cast(Measured, {name: value for name, value in slowest.items() if name in Measured.__annotations__})
    if "peak_gib" in slowest:
        found["peak_gib"] = max(rank["peak_gib"] for rank in ranks)
    if "allocated_gib" in slowest:
        found["allocated_gib"] = max(rank["allocated_gib"] for rank in ranks)
    if "communication" in ranks[0]:
        found["communication"] = _communication([rank["communication"] for rank in ranks])
    found["losses_and_norms"] = logged(ranks)
    return found


def reason_of(ranks: list[RankRow]) -> str | None:
    """Why these ranks have no valid result, preferably in the words of a rank itself; None if all have one."""
    failed = [rank for rank in ranks if "failed" in rank]
    if failed:
        return next((rank["failed"] for rank in failed if "model" in rank), failed[0]["failed"])
    numbers = [number for step in logged(ranks) for number in step]
    if not all(math.isfinite(number) and number > 0 for number in numbers):
        return f"losses and gradient norms must be positive numbers, but are {logged(ranks)}"
    return None


def _communication(ranks: list[Communication]) -> Communication:
    """Rank 0's, with the number of "messages" by dimension, and "transfer", what they take without waiting.

    The rank that joins a message last does not wait, so its time is the shortest. It can be found where all ranks take
    part in the same messages; elsewhere "transfer" is None.
    """
    first = ranks[0]
    dimensions: dict[str, DimensionShare] = {}
    for name, found in first["dimensions"].items():
        durations = [rank["dimensions"].get(name, {}).get("durations", []) for rank in ranks]
        together = found["ranks"] == [len(ranks)] and len({len(of_rank) for of_rank in durations}) == 1
        transfer = sum(map(min, zip(*durations, strict=True))) / first["seconds"] if together else None
        dimensions[name] = {
            "share": found["share"],
            "exposed": found["exposed"],
            "transfer": transfer,
            "messages": len(found["durations"]),
        }
    return {**first, "dimensions": dimensions}


def logged(ranks: list[RankRow]) -> Steps:
    """Losses and gradient norms of the logged steps, from a rank that has them: in a pipeline, of the last stage."""
    return max((rank["losses_and_norms"] for rank in ranks), key=lambda steps: [loss for loss, _ in steps])


def deviation(found: Steps, expected: Steps) -> float | None:
    """The largest relative difference of a loss or a gradient norm; None where steps or numbers are missing."""
    if len(found) != len(expected) or not found:
        return None
    pairs = [pair for a, b in zip(found, expected, strict=True) for pair in zip(a, b, strict=True)]
    found_all = all(math.isfinite(number) for pair in pairs for number in pair)
    return max(abs(a - b) / abs(b) for a, b in pairs) if found_all else None


def check_against_single(ranks: list[RankRow], single: Steps, tolerance: float) -> Outcome:
    """How far losses and gradient norms are from `single`'s, and counted exchanges from formulas."""
    far = deviation(logged(ranks), single)
    row: Outcome = {"deviation": far}
    if all("exchanges" in rank for rank in ranks):
        row["differences"] = [f"rank {n}: {text}" for n, rank in enumerate(ranks) for text in rank["differences"]]
        row["exchanges"] = {str(n): rank["exchanges"] for n, rank in enumerate(ranks)}
    if far is None:
        row["failed"] = f"losses and gradient norms must be those of {len(single)} steps, but are {logged(ranks)}"
    elif far > tolerance:
        row["failed"] = f"losses or gradient norms are off by {far:.1e}"
    elif row.get("differences"):
        row["failed"] = "; ".join(row["differences"])
    return row


def add_ratios(rows: Iterable[ScenarioRow]) -> None:
    """Add to each measured row its ratios to others of the same model and amount of work.

    "efficiency": tokens a second and GPU over those of one GPU, or the fewest that could ("base_gpus"), with as
    many tokens each (weak, simulated) or in a step (strong). "to_fsdp": the same against FSDP alone on as many GPUs.
    "deviation": of losses and gradient norms from the base's, where both had the same tokens (strong, Megalodon: the
    host's Llama logs losses that depend on the layout).
    """
    measured = [row for row in rows if "tokens_per_s" in row]
    for row in measured:
        alike = [other for other in measured if comparison_key(other) == comparison_key(row)]
        base = min(alike, key=lambda other: (other["gpus"], -_of_gpu(other)))
        row["efficiency"], row["base_gpus"] = _of_gpu(row) / _of_gpu(base), base["gpus"]
        fsdp = [other for other in alike if other["layout"] == f"fsdp {row['gpus']}"]
        if fsdp and row["gpus"] > 1:
            row["to_fsdp"] = _of_gpu(row) / _of_gpu(fsdp[0])
        if row["scaling"] == "strong" and row["model"] == "megalodon" and row is not base:
            row["deviation"] = deviation(row["losses_and_norms"], base["losses_and_norms"])


def _of_gpu(row: ScenarioRow) -> float:
    return row["tokens_per_s"] / row["gpus"]


def comparison_key(row: ScenarioRow) -> tuple[Any, ...]:
    """What rows must have in common to be compared, in the order of tables."""
    amount = (row["length"], row["rows"]) if row["scaling"] == "strong" else (row["tokens_per_gpu"],)
    return (row["scaling"], row["size"], row["model"], *amount)
