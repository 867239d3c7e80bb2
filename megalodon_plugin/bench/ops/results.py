"""What `megalodon bench ops` writes: the keys of ops.json and accuracy.json."""

from typing import Literal, NotRequired, TypedDict

from ..environment import Environment
from ..timing import Measured

Shape = tuple[int, int, int]
"""(B, L, D)"""
Pass = Literal["fwd", "fwd_bwd"]
"""The forward pass, or forward and backward pass together."""
PASSES: tuple[Pass, ...] = ("fwd", "fwd_bwd")


class SpeedRow(Measured):
    """Times of an implementation at a shape."""

    op: str
    """"cema", "timestep_norm" or "layer"."""
    impl: str
    B: int
    L: int
    D: int
    N: NotRequired[int]
    """Of CEMA."""
    G: NotRequired[int]
    """Of TimestepNorm."""
    dtype: str
    floor_fwd_ms: float
    floor_fwd_bwd_ms: float
    """The time to move the activations once; of a layer, the time of its matrix products."""
    extra_share: float
    """`extra_mib` over the size of x."""
    cpu_us_fwd: NotRequired[float]


class AccuracyRow(TypedDict):
    """The error of one result, in units of the error that cannot be avoided."""

    op: str
    case: str
    dtype: str
    impl: str
    quantity: str
    """An output, or "d" and the name of an argument: its gradient."""
    error: float
    unit: float
    ratio: float
    """`error` / `unit`, Euclidean."""
    error_max: float
    unit_max: float
    ratio_max: float
    """The same by the largest number."""
    limit: float
    """Units that are allowed."""
    ok: bool


class CpuTimes(TypedDict):
    """Microseconds that an eager call costs the CPU, and the GPU kernels that it launches."""

    cpu_us_fwd: float
    cpu_us_fwd_bwd: float
    kernels_fwd: NotRequired[float]
    kernels_fwd_bwd: NotRequired[float]


class KernelRow(TypedDict):
    """A GPU kernel of one forward and backward pass."""

    op: str
    shape: Shape
    kernel: str
    launches: float
    us: float


class OpsResults(Environment):
    """The whole file; what is not yet measured is missing."""

    rows: list[SpeedRow]
    accuracy: list[AccuracyRow]
    copy_tb_s: NotRequired[float]
    """Rate of a copy in device memory, bytes read and written."""
    matmul_tflops: NotRequired[float]
    """Rate of a large bfloat16 product."""
    cpu: NotRequired[dict[str, CpuTimes]]
    profile: NotRequired[list[KernelRow]]
    spread: NotRequired[dict[str, float]]
    """OP_PASS -> how much longer the slowest length of the sweep takes an element than the fastest."""


def shape_of(row: SpeedRow) -> Shape:
    """(B, L, D)"""
    return row["B"], row["L"], row["D"]


def elements(row: SpeedRow) -> int:
    """B * L * D"""
    return row["B"] * row["L"] * row["D"]


def multiple(row: SpeedRow, which: Pass) -> float | None:
    """The time as a multiple of its floor; None where one of them is 0."""
    if which == "fwd":
        time, floor = row["fwd_ms"], row["floor_fwd_ms"]
    else:
        time, floor = row["fwd_bwd_ms"], row["floor_fwd_bwd_ms"]
    return time / floor if floor and time else None
