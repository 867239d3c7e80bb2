"""Speeds of the links between GPUs, and how long a message takes on them."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .traffic import Exchange


@dataclass(frozen=True)
class Links:
    """Speeds of one GPU's links in one direction, and what a message costs however short it is."""

    gpus_per_node: int = 8
    node_gb_s: float = 450.0
    network_gb_s: float = 50.0
    latency_us: float = 10.0

    def seconds(self, exchange: "Exchange") -> float:
        """Time of one message if nothing else uses the links.

        A group that spans nodes has `here` of its ranks in each node, and each rank has its own network link.
        """
        ranks, part = exchange.ranks, exchange.part
        here = min(ranks, max(1, self.gpus_per_node // exchange.stride))
        nodes = -(-ranks // here)
        if exchange.kind == "send":  # to the next stage, which may lie on another node
            inside = exchange.stride < self.gpus_per_node
            return part / ((self.node_gb_s if inside else self.network_gb_s) * 1e9) + self.latency_us * 1e-6
        transfer = max((ranks - 1) * part / self.node_gb_s if here > 1 else 0, (nodes - 1) * part / self.network_gb_s)
        passes = 2 if exchange.kind == "all-reduce" else 1
        return passes * (transfer * 1e-9 + self.latency_us * 1e-6 * math.ceil(math.log2(ranks)))
