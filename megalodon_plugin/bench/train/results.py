"""What `megalodon bench train` writes: the keys of train.json."""

from typing import NotRequired, TypedDict

from ..environment import Environment


class Profile(TypedDict):
    """Where a step's time on the GPU goes."""

    ms: dict[str, float]
    """Kind of kernel -> milliseconds."""
    kernels: list[tuple[str, float, int]]
    """The longest: name, milliseconds, calls."""


class JobRow(TypedDict):
    """What a training job came to; without numbers where it failed."""

    model: str
    """"megalodon" or "llama"."""
    batch: int
    """Rows of one forward and backward pass of a data parallel rank."""
    length: int
    """Tokens of a row."""
    checkpointing: NotRequired[str]
    failed: NotRequired[str]
    """Why."""
    tokens_per_s: NotRequired[float]
    """Of all ranks, by the median step."""
    seconds: NotRequired[float]
    """Of the median step."""
    steps: NotRequired[int]
    """That were counted."""
    spread: NotRequired[float]
    """(Slowest - fastest step) / median step."""
    parameters: NotRequired[int]
    gflop_per_token: NotRequired[float]
    """Of the model, without recomputation."""
    peak_gib: NotRequired[float]
    """Reserved by the allocator of this rank's GPU."""
    allocated_gib: NotRequired[float]
    """In tensors there."""
    mfu: NotRequired[float]
    """Share of the GPUs' peak FLOP/s."""


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
