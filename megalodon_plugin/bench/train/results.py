"""What `megalodon bench train` writes: the keys of train.json."""

from typing import NotRequired, TypedDict

from ..environment import Environment


class Profile(TypedDict):
    """Where a step's time on the GPU goes."""

    ms: dict[str, float]
    """Kind of kernel -> milliseconds."""
    kernels: list[tuple[str, float, int]]
    """The longest: name, milliseconds, calls."""


class JobNumbers(TypedDict, total=False):
    """What a training job came to: numbers, or why it failed."""

    failed: str
    checkpointing: str
    tokens_per_s: float
    """Of all ranks, by the median step."""
    seconds: float
    """Of the median step."""
    steps: int
    """That were counted."""
    spread: float
    """(Slowest - fastest step) / median step."""
    parameters: int
    gflop_per_token: float
    """Of the model, without recomputation."""
    peak_gib: float
    """Reserved by the allocator of this rank's GPU."""
    allocated_gib: float
    """In tensors there."""
    mfu: float
    """Share of the GPUs' peak FLOP/s."""


class JobRow(JobNumbers):
    """A training job and what it came to."""

    model: str
    """"megalodon" or "llama"."""
    batch: int
    """Rows of one forward and backward pass of a data parallel rank."""
    length: int
    """Tokens of a row."""


class TrainRow(JobRow):
    """A job of a benchmark."""

    size: str
    """Of `sizes.SIZES`."""
    profile: NotRequired[Profile]


class TrainResults(Environment):
    """train.json."""

    dtype: str
    compiled: bool
    rows: list[TrainRow]
