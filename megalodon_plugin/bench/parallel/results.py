"""What `megalodon bench parallel` and `make layouts` write: the keys of parallel.json and layouts.json."""

from typing import Any, NotRequired, TypedDict

from ..environment import Environment

Row = dict[str, Any]
"""What a rank found of a task, or a timed scenario, whose keys depend on what was measured."""
Exchanged = dict[str, dict[str, list[float]]]
"""dimension -> kind -> [messages, bytes of all parts together (of an all-reduce the whole tensors)]"""


class Outcome(TypedDict):
    """Of a check against one process."""

    deviation: float | None
    """The largest relative difference of a loss or a gradient norm; None where numbers are missing."""
    failed: NotRequired[str]
    """Why."""
    differences: NotRequired[list[str]]
    """Of counted exchanges from the formulas."""
    exchanges: NotRequired[dict[str, Exchanged]]
    """Rank -> what it exchanged in a step."""


class CheckRow(Outcome):
    """A layout that was checked before it is timed."""

    layout: str
    gpus: int
    dtype: str


class MatrixRow(Outcome):
    """An entry of the matrix of layouts."""

    layout: str
    processes: int
    seconds: float


class LinkSpeeds(TypedDict):
    """That simulated rows assume."""

    node_gb_s: float
    network_gb_s: float
    latency_us: float


class ParallelResults(Environment):
    """parallel.json."""

    backend: str
    gpus: int
    dtype: str
    compiled: bool
    checkpointing: str
    checks: list[CheckRow]
    rows: list[Row]
    links: LinkSpeeds
