"""The share of communication in a step, from events as a profile has them."""

from typing import Any

import pytest

from megalodon_plugin.bench.parallel.rows import merged
from megalodon_plugin.bench.parallel.trace import MARK, communication
from megalodon_plugin.planning.traffic import Exchange


def kernel(name: str, begin: float, end: float, **arguments: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": "kernel", "name": name, "ts": begin, "dur": end - begin, "args": arguments}


def message(collective: str, numbers: int, dtype: str = "Float") -> dict[str, Any]:
    parts = {"In msg nelems": numbers, "Out msg nelems": 2 * numbers}
    if "reduce_scatter" in collective:
        parts = {"In msg nelems": 2 * numbers, "Out msg nelems": numbers}
    return {"Collective name": collective, "dtype": dtype, "Group size": 2} | parts


def exchange(dimension: str, kind: str, part: int) -> Exchange:
    return Exchange(dimension, "", kind, 2, 1, part, 1, 1, 1, 2)


def test_communication_is_what_nccl_runs_and_exposed_where_nothing_else_does() -> None:
    by_formula = [exchange("fsdp", "all-gather", 2000), exchange("cp", "all-gather", 128), exchange("pp", "send", 64)]
    events = [
        kernel("gemm", -50, -10),
        kernel("gemm", 0, 40),
        kernel("gemm", 30, 50),  # overlaps the one before: 0 to 50 is busy
        kernel("ncclDevKernel_AllGather", 40, 60, **message("_allgather_base", 1010, "BFloat16")),  # padded by 1%
        kernel("ncclDevKernel_AllGather", 55, 70, **message("allgather_into_tensor_coalesced", 32)),
        kernel("norm", 75, 90),
        kernel("ncclDevKernel_SendRecv", 90, 95),
        kernel("ncclDevKernel_AllReduce", 95, 100, **message("allreduce", 1)),
        {"ph": "X", "cat": "cpu_op", "name": "nccl:all_gather", "ts": 0, "dur": 500},
        {"ph": "X", "cat": "user_annotation", "name": MARK, "ts": -5, "dur": 500},
        {"ph": "i", "name": "mark", "ts": 1000},
    ]
    found = communication(events, by_formula)
    assert (found["share"], found["exposed"], found["idle"]) == pytest.approx((0.40, 0.30, 0.05))  # 40-70, 90-100
    assert found["seconds"] == pytest.approx(100e-6)
    shares = {name: (of["share"], of["exposed"]) for name, of in found["dimensions"].items()}
    assert shares == {"fsdp": (0.2, 0.1), "cp": (0.15, 0.15), "pp": (0.05, 0.05), "other": (0.05, 0.05)}
    assert found["dimensions"]["cp"]["durations"] == pytest.approx([15e-6])
    assert [found["dimensions"][name]["ranks"] for name in ("cp", "pp")] == [[2], [0]]
    assert communication(events)["dimensions"].keys() == {"other"}
    assert communication([])["share"] == 0.0


@pytest.mark.parametrize(
    ("collective", "numbers", "dimension"),
    [
        ("reduce_scatter_tensor_coalesced", 100, "tp"),
        ("_reduce_scatter_base", 960, "fsdp"),
        ("_reduce_scatter_base", 800, "other"),  # too few for any padding
        ("allreduce", 32, "tp"),  # the whole tensor, of which a part is half
        ("_allgather_base", 100, "other"),
    ],
)
def test_a_message_belongs_to_the_exchange_of_its_kind_and_size(collective: str, numbers: int, dimension: str) -> None:
    by_formula = [
        exchange("fsdp", "reduce-scatter", 4000),
        exchange("tp", "reduce-scatter", 400),
        exchange("tp", "all-reduce", 64),
    ]
    found = communication([kernel("ncclDevKernel", 0, 1, **message(collective, numbers))], by_formula)
    assert found["dimensions"].keys() == {dimension}


def test_what_a_message_takes_without_waiting_is_the_time_of_the_rank_that_comes_last() -> None:
    def rank(*durations: float, size: int = 2) -> dict[str, Any]:
        of_cp = {"share": sum(durations), "exposed": 0.0, "durations": list(durations), "ranks": [size]}
        found = {"share": 0.1, "exposed": 0.0, "idle": 0.0, "seconds": 2.0, "dimensions": {"cp": of_cp}}
        return {"seconds": 1.0, "losses_and_norms": [[2.0, 1.0]], "communication": found}

    of_cp = merged([rank(0.5, 0.1), rank(0.2, 0.3)])["communication"]["dimensions"]["cp"]
    assert of_cp == {"share": 0.6, "exposed": 0.0, "transfer": pytest.approx(0.15), "messages": 2}
    # Where ranks have other messages, and where not all of them share one, nobody is known to be last.
    assert merged([rank(0.5, 0.1), rank(0.2)])["communication"]["dimensions"]["cp"]["transfer"] is None
    several = [rank(0.5, size=2)] * 4
    assert merged(several)["communication"]["dimensions"]["cp"]["transfer"] is None
