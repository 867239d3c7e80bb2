"""Which variant of CEMA's kernels takes an activation, and how the work is divided; kernels/README.md says why.

Nothing but shapes and dtypes decides, so that a traced call can ask too.
"""

import functools
from typing import NamedTuple

import torch

MAX_ORDER = 32
PASS_BLOCKS, GROUP_BLOCKS = 16, 32  # blocks of a tile of cema_pass, and of a group of cema_grad


class Tiles(NamedTuple):
    """Which variant of the kernels takes an activation; the letters are those of the macros in cema/common.cuh."""

    block: int  # T
    orders: int
    terms: int
    pass_channels: int
    grad_channels: int
    out_shared: int  # whether cema_pass keeps its table of outputs in shared memory

    def defines(self, channels: int, aligned: bool, **more: int) -> tuple[tuple[str, int], ...]:
        return (
            ("BLOCK", self.block),
            ("ORDERS", self.orders),
            ("TERMS", self.terms),
            ("CHANNELS", channels),
            ("ALIGNED", int(aligned)),
            *more.items(),
        )

    def split(self, length: int) -> tuple[int, int]:
        """Steps in whole blocks, and the rest."""
        return length - length % self.block, length % self.block

    def groups(self, length: int) -> int:
        """Groups of blocks at whose edges states are kept."""
        return -(-(length - length % self.block) // (GROUP_BLOCKS * self.block))

    def kept_states(self, length: int) -> int:
        """States that the forward pass keeps: between groups, and before the rest that fills no block."""
        whole, rest = self.split(length)
        return max(self.groups(length) - 1, 0) + int(whole > 0 and rest > 0)


def choose_tiles(length: int, order: int, dtype: torch.dtype) -> Tiles | None:
    """The kernels' variant for an activation of `length` steps, or None if there is none for it."""
    if order > MAX_ORDER or length >= 2**31 or dtype not in (torch.bfloat16, torch.float32):
        return None
    if dtype == torch.float32:
        return Tiles(16, 16 if order <= 16 else 32, 3, 8, 8, 1)
    if order > 16:
        return Tiles(16, 32, 2, 8, 8, 1)
    # A tile is 16 blocks. Blocks of 32 steps need fewer instructions a step, unless half of a tile would be empty.
    long_tiles, short_tiles = -(-length // 512), -(-length // 256)
    if 2 * long_tiles <= short_tiles + short_tiles // 4:
        return Tiles(32, 16, 2, 16, 8, 1)
    return Tiles(16, 16, 2, 16, 8, 0)


class Division(NamedTuple):
    """How one pass is divided among thread blocks."""

    rows: int  # batch rows of a thread block
    segments: int  # parts of the time axis
    segment_tiles: int


@functools.cache
def divide_pass(batch: int, n_tiles: int, channel_groups: int, processors: int) -> Division:
    """A thread block walks whole rows if that fills the GPU: a segment's start must first be found by a second pass."""
    segments = 1
    if 2 * batch * channel_groups <= processors and n_tiles >= 16:
        segments = min(processors // (batch * channel_groups), n_tiles // 8)
    segment_tiles = -(-n_tiles // segments)
    segments = -(-n_tiles // segment_tiles)
    start = 4  # making the tables takes about as long as so many tiles

    def cost(parts: int) -> tuple[int, int]:
        waves = -(-channel_groups * parts * segments // processors)
        return waves * (-(-batch // parts) * segment_tiles + start), parts

    parts = min(range(1, batch + 1), key=cost)
    return Division(-(-batch // parts), segments, segment_tiles)


@functools.cache
def divide_grad(batch: int, groups: int, channel_groups: int, processors: int) -> int:
    """Thread blocks that share a channel's groups of blocks; each leaves a partial sum."""
    items, start = batch * groups, 2

    def cost(parts: int) -> tuple[int, int]:
        waves = -(-channel_groups * parts // processors)
        return waves * (-(-items // parts) + start), parts

    return min(range(1, min(items, 16) + 1), key=cost)


def pass_shared_bytes(tiles: Tiles) -> int:
    """Of cema/pass.cu: two tiles, the scan's powers and the out table of every channel."""
    planes, powers, entry = (3, 112, 24) if tiles.terms == 3 else (1, 8, 16)
    channel_words = planes * PASS_BLOCKS * (tiles.block // 2 + 2) + 2
    tile_words = -(-tiles.pass_channels * channel_words // 4) * 4
    out_entries = tiles.block // 8 * (tiles.orders // 8) * tiles.out_shared
    return 2 * tile_words * 4 + tiles.pass_channels * (tiles.orders * powers + out_entries * 32 * entry)


def grad_shared_bytes(tiles: Tiles) -> int:
    """Of cema/grad.cu: two tiles of x and of dy, and both tables of every channel."""
    planes = 3 if tiles.terms == 3 else 1
    tile = tiles.grad_channels * planes * 4 * (8 * (tiles.block // 2 + 4) + 8) * 4
    return 4 * tile + tiles.grad_channels * 2 * 2 * (tiles.block // 16) * tiles.terms * 32 * 16


def _variants() -> tuple[tuple[str, str, tuple[tuple[str, int], ...]], ...]:
    variants = [
        choose_tiles(4096, 16, torch.bfloat16),
        choose_tiles(256, 16, torch.bfloat16),
        choose_tiles(4096, 32, torch.bfloat16),
        choose_tiles(4096, 16, torch.float32),
        choose_tiles(4096, 32, torch.float32),
    ]
    found = []
    for tiles in variants:
        assert tiles is not None
        found += [(name, tiles.defines(8, True)) for name in ("prepare", "finish", "fold")]
        found += [("short", tiles.defines(8, True, BACKWARD=b)) for b in (0, 1)]
        for aligned in (True, False):
            for reverse in (0, 1):
                for summary in (0, 1):
                    more = {"REVERSE": reverse, "OUT_SHARED": tiles.out_shared, "SUMMARY": summary}
                    found.append(("pass", tiles.defines(tiles.pass_channels, aligned, **more)))
            found.append(("grad", tiles.defines(tiles.grad_channels, aligned)))
    return tuple((f"cema/{name}.cu", f"cema_{name}", defines) for name, defines in found)


VARIANTS = _variants()
"""Source, kernel and macros of everything that can be launched; the tests compile all of them for Hopper."""
