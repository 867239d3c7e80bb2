"""The time of a step on many GPUs, from the measured time of one rank's own work and the speed of links.

    step = the rank's measured work + the part of its exchanges that does not overlap with it

A share of the work is the forward pass, the rest the backward pass, both spread evenly over the layers. FSDP's
exchanges overlap with it: the first gather of each kind of weights and the last reduce-scatter have nothing to overlap
with, the others follow each other on the link and lengthen a pass only if they take longer than it. HSDP's sums join
the backward pass. Exchanges of chunk and tensor parallelism are all waited for, though CEMA's forward one in fact
overlaps with the projection of the values. All ranks are assumed to be equally fast. That collectives take
multiprocessors and memory from the computation is not counted.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from .links import Links
from .traffic import Exchange


@dataclass(frozen=True)
class SimulatedStep:
    """Seconds of a step, and of what in it waits for exchanges, by dimension."""

    seconds: float
    exposed: dict[str, float]
    exchanged: dict[str, float]
    """If nothing overlapped."""


def simulate_step(work: float, forward_share: float, exchanges: Iterable[Exchange], links: Links) -> SimulatedStep:
    """A step whose rank works for `work` seconds, `forward_share` of them in forward passes.

    Raises:
        ValueError: `forward_share` is not a share, or there are stages of a pipeline, whose idle time is not in `work`.
    """
    if not 0 < forward_share < 1:
        raise ValueError(f"`forward_share` must lie between 0 and 1, but is {forward_share}")
    beside = {"forward": 0.0, "backward": 0.0}  # overlaps with the pass, as far as that is long enough
    exposed: dict[str, float] = {}
    exchanged: dict[str, float] = {}
    for exchange in exchanges:
        if exchange.dimension == "pp":
            raise ValueError("`exchanges` must be of layouts without pipeline stages, but some are of dimension pp")
        one = links.seconds(exchange)
        exchanged[exchange.dimension] = exchanged.get(exchange.dimension, 0.0) + exchange.messages * one
        waited = exchange.messages * one
        if exchange.dimension in ("fsdp", "replicate"):
            passes = exchange.messages / ((exchange.forward + exchange.backward) * exchange.layers)
            once = passes * one  # of a group of layers the first gather or the last sum
            waited = once
            for direction, messages in (("forward", exchange.forward), ("backward", exchange.backward)):
                beside[direction] += passes * messages * exchange.layers * one
            beside["forward" if exchange.forward else "backward"] -= once
        exposed[exchange.dimension] = exposed.get(exchange.dimension, 0.0) + waited
    forward, backward = work * forward_share, work * (1 - forward_share)
    too_long = max(0.0, beside["forward"] - forward) + max(0.0, beside["backward"] - backward)
    if too_long:
        exposed["fsdp"] = exposed.get("fsdp", 0.0) + too_long
    return SimulatedStep(work + sum(exposed.values()), exposed, exchanged)
