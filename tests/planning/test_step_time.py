"""Simulated steps against times added up by hand."""

import pytest

from megalodon_plugin.planning.links import Links
from megalodon_plugin.planning.step_time import simulate_step
from megalodon_plugin.planning.traffic import Exchange

LINKS = Links(gpus_per_node=8, node_gb_s=1.0, network_gb_s=1.0, latency_us=0.0)
"""A part of 10^9 bytes takes as many seconds as there are other ranks."""


def exchange(dimension: str, kind: str, seconds: float, forward: int, backward: int, layers: int) -> Exchange:
    messages = (forward + backward) * layers
    return Exchange(dimension, "", kind, 2, 1, round(seconds * 1e9), forward, backward, layers, messages)


def weights(seconds: float, layers: int) -> list[Exchange]:
    return [
        exchange("fsdp", "all-gather", seconds, 1, 1, layers),
        exchange("fsdp", "reduce-scatter", seconds, 0, 1, layers),
    ]


def test_work_hides_all_of_fsdp_but_its_ends() -> None:
    step = simulate_step(30.0, 1 / 3, weights(0.5, 4), LINKS)
    assert step.exposed == {"fsdp": pytest.approx(1.0)}  # the first gather, the last sum
    assert step.exchanged == {"fsdp": pytest.approx(6.0)}
    assert step.seconds == pytest.approx(31.0)


def test_what_is_longer_than_a_pass_lengthens_it() -> None:
    # Forward: 3 more gathers of 2 s beside 3 s. Backward: 4 gathers and 3 sums beside 6 s.
    step = simulate_step(9.0, 1 / 3, weights(2.0, 4), LINKS)
    assert step.exposed["fsdp"] == pytest.approx(2 * 2.0 + (6 - 3) + (14 - 6))


def test_sums_over_replicas_join_the_backward_pass() -> None:
    beside = [exchange("replicate", "all-reduce", 1.0, 0, 1, 4)]  # an all-reduce passes its parts twice
    assert simulate_step(60.0, 1 / 3, beside, LINKS).exposed == {"replicate": pytest.approx(2.0)}
    long = simulate_step(6.0, 1 / 3, beside, LINKS)
    assert long.seconds == pytest.approx(6.0 + 2.0 + (6.0 - 4.0))


def test_chunk_and_tensor_parallel_ranks_wait_for_every_exchange() -> None:
    both = [exchange("cp", "all-gather", 0.1, 1, 1, 4), exchange("tp", "reduce-scatter", 0.2, 2, 0, 4)]
    step = simulate_step(100.0, 1 / 3, both, LINKS)
    assert step.exposed == {"cp": pytest.approx(0.8), "tp": pytest.approx(1.6)}
    assert step.seconds == pytest.approx(102.4)


def test_without_exchanges_a_step_is_its_work() -> None:
    assert simulate_step(5.0, 0.5, [], LINKS).seconds == 5.0


def test_what_cannot_be_simulated_is_refused() -> None:
    with pytest.raises(ValueError, match="`forward_share` must lie between 0 and 1, but is 1"):
        simulate_step(1.0, 1, [], LINKS)
    with pytest.raises(ValueError, match="without pipeline stages"):
        simulate_step(1.0, 0.5, [exchange("pp", "send", 1.0, 1, 1, 1)], LINKS)
