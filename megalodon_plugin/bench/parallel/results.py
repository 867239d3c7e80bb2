"""What `megalodon bench parallel` and `make layouts` write: the keys of parallel.json and layouts.json."""

from collections.abc import Sequence
from typing import NotRequired, TypedDict

from megalodon_plugin.data.records import Record

from ..environment import Environment
from ..train.results import JobNumbers

Steps = Sequence[Sequence[float]]
"""Loss and gradient norm of each logged step."""
Exchanged = dict[str, dict[str, list[float]]]
"""dimension -> kind -> [messages, bytes of all parts together (of an all-reduce the whole tensors)]"""


class DimensionShare(TypedDict, total=False):
    """What a dimension's exchanges take of a step."""

    share: float
    """Of the step's time on the GPU, in which one ran."""
    exposed: float
    """In which one ran and nothing else did."""
    durations: list[float]
    """Of the messages of a rank, seconds, in their order."""
    ranks: list[int]
    """How many ranks share a message; 0: the trace does not tell."""
    messages: int
    """Of a rank, where those of all ranks are merged."""
    transfer: float | None
    """Share of the step that they would take without waiting; None where that cannot be found."""


class Communication(TypedDict, total=False):
    """What exchanges take of a step's time on the GPU."""

    share: float
    exposed: float
    """As in `DimensionShare`, of all dimensions together."""
    idle: float
    """Share in which nothing ran."""
    seconds: float
    dimensions: dict[str, DimensionShare]


class Measured(JobNumbers, total=False):
    """What was measured of a job, by one rank or by all together."""

    batch: int
    losses_and_norms: Steps
    communication: Communication


class RankRow(Measured, total=False):
    """What one rank found of a task, depending on what it was asked for; "failed" alone where it found nothing."""

    model: str
    length: int
    device: str
    records: list[Record]
    exchanges: Exchanged
    planned: Exchanged
    differences: list[str]


class Simulated(Measured, total=False):
    """A rank's measured work and, in place of its own time, that of a whole step."""

    simulated: bool
    work_seconds: float
    """What was measured."""
    exposed: dict[str, float]
    exchanged: dict[str, float]
    """Seconds by dimension: what of the exchanges nothing hides, and all of them."""


class ScenarioRow(Simulated):
    """A scenario that was timed or simulated, or why it was not, and its ratios to others (see `rows.add_ratios`)."""

    scaling: str
    size: str
    model: str
    layout: str
    gpus: int
    rows: int
    length: int
    tokens_per_gpu: int
    efficiency: NotRequired[float]
    base_gpus: NotRequired[int]
    to_fsdp: NotRequired[float]
    deviation: NotRequired[float | None]


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
    rows: list[ScenarioRow]
    links: LinkSpeeds
