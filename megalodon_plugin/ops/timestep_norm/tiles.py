"""Which variant of TimestepNorm's kernels takes an activation, and how it shares out the work.

Every number that was chosen for speed stands in this file.
"""

from typing import NamedTuple

import torch
from torch import Tensor

Defines = tuple[tuple[str, int], ...]

_KEPT_WORDS = {False: 32, True: 16}
"""Most registers in which a thread holds its part of one step, forward and backward; larger groups are read again."""

LARGEST_GROUP = 8192
"""Most features of a group: the backward pass keeps sums for each in shared memory."""


def takes(x: Tensor, weight: Tensor, num_groups: int) -> bool:
    """Whether there is a kernel for these dtypes and shapes."""
    return (
        x.dtype in (torch.bfloat16, torch.float32)
        and weight.dtype == torch.float32
        and x.shape[2] <= LARGEST_GROUP * num_groups
        and x.shape[1] < 2**30
    )


class Tiles(NamedTuple):
    """How a kernel shares out the work: values of the macros of kernels/timestep_norm/common.cuh."""

    vector: int
    lanes: int
    steps: int
    threads: int
    min_blocks: int
    keep: bool

    def defines(self, features: int, activation_bytes: int, masked: bool) -> Defines:
        """The macros that the kernel is compiled with."""
        return (
            ("FEATURES", features),
            ("ACTIVATION_BYTES", activation_bytes),
            ("VECTOR", self.vector),
            ("LANES", self.lanes),
            ("STEPS", self.steps),
            ("THREADS", self.threads),
            ("MIN_BLOCKS", self.min_blocks),
            ("KEEP", int(self.keep)),
            ("MASKED", int(masked)),
        )


def choose_tiles(features: int, activation_bytes: int, alignment: int, backward: bool) -> Tiles:
    """The tiles for groups of `features`, with activations at multiples of `alignment` bytes."""
    vector = 16 // activation_bytes
    while features % vector or alignment % (vector * activation_bytes):
        vector //= 2
    vectors = features // vector
    lanes = min(32, 1 << (vectors - 1).bit_length())
    words = max(1, vector * activation_bytes // 4) * -(-vectors // lanes)  # registers of one step
    if words > _KEPT_WORDS[backward]:
        return Tiles(vector, lanes, 1, 32, 1, False)
    # A tile and the next one, of x alone or of x and dy, are in registers: 64 bytes a thread and load in flight. Narrow
    # vectors need more addresses for the same bytes.
    steps = max(1, min(lanes, (8 if backward and vector * activation_bytes < 16 else 16) // words))
    min_blocks = 4 if words <= 8 else 2
    return Tiles(vector, lanes, 1 << (steps.bit_length() - 1), 128, min_blocks, True)


def _variants() -> tuple[tuple[str, str, Defines], ...]:
    found: list[tuple[str, str, Defines]] = [("timestep_norm/parameters.cu", "timestep_norm_parameters", ())]
    for features, activation_bytes, masked in (
        *((32, 2, False), (64, 2, False), (64, 2, True), (64, 4, False), (128, 2, False)),
        *((99, 4, True), (1024, 4, True), (4096, 2, True)),
    ):
        for name, backward in (("forward", False), ("backward", True)):
            tiles = choose_tiles(features, activation_bytes, 16, backward)
            found.append(
                (
                    f"timestep_norm/{name}.cu",
                    f"timestep_norm_{name}",
                    tiles.defines(features, activation_bytes, masked),
                )
            )
    return tuple(found)


VARIANTS = _variants()
"""Source, name and macros of the kernels that the tests compile, all of them for Hopper."""
