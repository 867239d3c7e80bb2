"""What a rank exchanges in a step: counted while it runs, and by the formulas of docs/scaling.md."""

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from megalodon_plugin.parallel.layout import Layout
from megalodon_plugin.planning.job import planned_job
from megalodon_plugin.planning.traffic import Exchange

from .results import Exchanged

SINGLE_NUMBERS = 16  # bytes: the loss, norms and counts of tokens
PADDING = 0.1
"""By how much the bytes of FSDP may differ from the formulas': shards are padded to whole rows of their tensors."""


class ExchangeCounter(TorchDispatchMode):
    """Sums messages and bytes of the parts, by who issues them: FSDP by c10d, the others by functional collectives.

    Sees what runs eagerly.
    """

    KINDS = {  # noqa: RUF012  read only
        "c10d._allgather_base_": ("fsdp", "all-gather", 1),
        "c10d._reduce_scatter_base_": ("fsdp", "reduce-scatter", 0),
        "c10d.allreduce_": ("replicate", "all-reduce", 0),
        "c10d.send": ("pp", "send", 0),
        "_c10d_functional.all_gather_into_tensor": ("tp", "all-gather", 0),
        "_c10d_functional.reduce_scatter_tensor": ("tp", "reduce-scatter", 0),
        "_c10d_functional.all_reduce": ("tp", "all-reduce", 0),
        "megalodon.gather_summaries": ("cp", "all-gather", 0),
    }

    def __init__(self) -> None:
        super().__init__()
        self._counts: dict[str, dict[str, Counter[str]]] = {}

    @property
    def found(self) -> Exchanged:
        return {
            dimension: {kind: [row["messages"], row["bytes"]] for kind, row in kinds.items()}
            for dimension, kinds in self._counts.items()
        }

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).rpartition(".")[0]
        if name in self.KINDS:
            dimension, kind, argument = self.KINDS[name]
            tensors = args[argument] if isinstance(args[argument], (list, tuple)) else [args[argument]]
            size = sum(t.numel() * t.element_size() for t in tensors)
            if name == "_c10d_functional.reduce_scatter_tensor":
                size //= args[2]  # what goes in is of all ranks
            if size > SINGLE_NUMBERS:
                row = self._counts.setdefault(dimension, {}).setdefault(kind, Counter())
                row.update(messages=1, bytes=size)
        return func(*args, **kwargs or {})


def exchanges_by_formula(options: Any, layout: Layout, stage: int) -> list[Exchange]:
    """The exchanges that the formulas give for a rank in stage `stage` under the host's configuration `options`."""
    job = planned_job(options)
    exchanges = job.exchanges(layout, job.stages(layout.pp)[stage])
    return [exchange for exchange in exchanges if exchange.messages]


def summed(exchanges: list[Exchange]) -> Exchanged:
    found: Exchanged = {}
    for exchange in exchanges:
        row = found.setdefault(exchange.dimension, {}).setdefault(exchange.kind, [0, 0])
        whole = exchange.ranks if exchange.kind == "all-reduce" else 1
        row[0] += round(exchange.messages)
        row[1] += round(exchange.messages) * exchange.part * whole
    return found


def differences(found: Exchanged, planned: Exchanged) -> list[str]:
    """A sentence for each kind of exchange whose count differs from the formulas'."""
    found_differences = []
    for dimension, kind in sorted({(d, k) for side in (found, planned) for d, kinds in side.items() for k in kinds}):
        messages, size = found.get(dimension, {}).get(kind, [0, 0])
        expected, expected_size = planned.get(dimension, {}).get(kind, [0, 0])
        padding = PADDING * expected_size if dimension in ("fsdp", "replicate") else 0
        if messages != expected or abs(size - expected_size) > padding:
            found_differences.append(
                f"{dimension} {kind}: {messages:.0f} messages, {size:.0f} bytes, but by the formulas {expected:.0f}, "
                f"{expected_size:.0f}"
            )
    return found_differences
