"""What `megalodon bench parallel` runs: layouts by name, and the rows and lengths of a step under each."""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from megalodon_plugin.planning.memory import Layout

DIMENSIONS = {"replicate": "dp_replicate", "fsdp": "dp_shard", "cp": "cp", "tp": "tp", "pp": "pp"}
"""Names of degrees, as tables show them -> fields of `Layout`."""
OPTIONS = {
    "replicate": "data_parallel_replicate_degree",
    "fsdp": "data_parallel_shard_degree",
    "cp": "context_parallel_degree",
    "tp": "tensor_parallel_degree",
    "pp": "pipeline_parallel_degree",
}
"""The same -> the host's options of `[parallelism]`."""

ONE = Layout()
SINGLE = ("fsdp", "cp", "tp", "pp")
MIXED = {
    4: ("fsdp 2 x cp 2", "cp 2 x tp 2", "cp 2 x pp 2"),
    8: ("fsdp 2 x cp 4", "fsdp 2 x cp 2 x tp 2", "fsdp 2 x cp 2 x pp 2"),
}
"""GPUs -> layouts of more than one dimension that are run if none are named."""
SIMULATED = {
    2: ("fsdp 2", "cp 2"),
    8: ("fsdp 8", "cp 8"),
    64: ("fsdp 64", "fsdp 8 x cp 8", "cp 64"),
    256: ("fsdp 256", "fsdp 32 x cp 8", "fsdp 4 x cp 64"),
}
"""GPUs -> layouts that are simulated. None is tensor parallel: the fake backend's sums would not be sums."""


@dataclass(frozen=True)
class Scenario:
    """A step of training: `rows` rows of `length` tokens, over all ranks of `layout`."""

    scaling: str
    """"weak" (each GPU has as many tokens, whatever their number), "strong" (a step has), "simulated"."""
    size: str
    model: str
    layout: Layout
    rows: int
    length: int
    local_rows: int
    """Of one forward and backward pass of a data parallel rank, all microbatches of a pipeline together."""

    @property
    def tokens(self) -> int:
        return self.rows * self.length


def parse_layout(text: str) -> Layout:
    """ "fsdp 2 x cp 4" -> Layout(dp_shard=2, cp=4); "1" is one GPU.

    Raises:
        ValueError: it is not written so.
    """
    if text.strip() == "1":
        return ONE
    degrees: dict[str, int] = {}
    for part in text.split(" x "):
        name, _, degree = part.strip().partition(" ")
        known = name in DIMENSIONS and name not in degrees
        if not known or not (degree.isascii() and degree.isdigit()) or int(degree) < 1:
            names = ", ".join(DIMENSIONS)
            raise ValueError(f"a layout must be degrees of {names}, as in 'fsdp 2 x cp 4', but is {text!r}")
        degrees[name] = int(degree)
    return Layout(**{DIMENSIONS[name]: degree for name, degree in degrees.items()})


def name_of(layout: Layout) -> str:
    """ "fsdp 2 x cp 4"; "1" for one GPU."""
    degrees = {name: getattr(layout, field) for name, field in DIMENSIONS.items()}
    return " x ".join(f"{name} {degree}" for name, degree in degrees.items() if degree > 1) or "1"


def default_layouts(gpus: int) -> list[Layout]:
    """One GPU, then every dimension alone on 2, 4 and 8 of them, then mixtures, as far as there are GPUs."""
    names = ["1"]
    for number in (2, 4, 8):
        if number <= gpus:
            names += [f"{dimension} {number}" for dimension in SINGLE]
            names += MIXED.get(number, ())
    return [parse_layout(name) for name in names]


def weak(size: str, model: str, layout: Layout, tokens_per_gpu: int) -> Scenario:
    """As many rows as GPUs that do not share one; chunk parallel ranks share a longer one."""
    rows = layout.gpus // layout.cp
    return Scenario("weak", size, model, layout, rows, tokens_per_gpu * layout.cp, rows // layout.data)


def strong(size: str, model: str, layout: Layout, length: int, tokens_per_step: int, tokens_per_gpu: int) -> Scenario:
    """A step of `tokens_per_step`, or of one row if that is longer, on any number of GPUs.

    Gradients are accumulated so that a rank's forward pass has about `tokens_per_gpu`.
    """
    rows = max(1, tokens_per_step // length)
    local = max(1, rows // layout.data)
    if layout.pp == 1:
        fitting = max(1, tokens_per_gpu * layout.cp * layout.tp // length)
        local = max(n for n in range(1, local + 1) if local % n == 0 and n <= fitting)
    return Scenario("strong", size, model, layout, rows, length, local)


def reason_against(scenario: Scenario, mixed_precision: bool) -> str | None:
    """Why the scenario is not timed: rows do not go round, or the host runs the layout in float32. None if it is."""
    layout, name = scenario.layout, name_of(scenario.layout)
    if mixed_precision and scenario.model == "llama" and layout.gpus > 1 and not layout.has_fsdp:
        return f"the host runs Llama under {name} in float32, without FSDP"
    if scenario.rows % (layout.data * scenario.local_rows):
        return f"{scenario.rows} rows do not go round {layout.data} data parallel ranks of {name}"
    if layout.pp > 1 and scenario.local_rows < layout.pp:
        return f"{scenario.local_rows} rows are fewer than the {layout.pp} stages of {name}"
    return None


def simulated_scenarios(sizes: Sequence[str], gpus: Iterable[int], tokens_per_gpu: int) -> list[Scenario]:
    """One rank's part of large layouts, and of one GPU, which they are held to."""
    layouts = [ONE, *(parse_layout(name) for number in gpus for name in SIMULATED[number])]
    return [
        replace(weak(size, "megalodon", layout, tokens_per_gpu), scaling="simulated")
        for size in sizes
        for layout in layouts
    ]


def degrees_of(layout: Layout) -> dict[str, int]:
    """The host's options of `[parallelism]`."""
    fields = dataclasses.asdict(layout)
    return {OPTIONS[name]: fields[field] for name, field in DIMENSIONS.items()}
