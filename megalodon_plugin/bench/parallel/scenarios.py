"""What `megalodon bench parallel` runs: layouts by name, and the rows and lengths of a step under each."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from megalodon_plugin.model import PRESETS
from megalodon_plugin.parallel.layout import ONE_RANK, Job, Layout, host_refusal, refusal

from ..sizes import SIZES

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
    """Rows of one forward and backward pass of a data parallel rank, all microbatches of a pipeline together."""

    @property
    def tokens(self) -> int:
        return self.rows * self.length


def default_layouts(gpus: int) -> list[Layout]:
    """One GPU, then every dimension alone on 2, 4 and 8 of them, then mixtures, up to the number of GPUs."""
    names = ["1"]
    for number in (2, 4, 8):
        if number <= gpus:
            names += [f"{dimension} {number}" for dimension in SINGLE]
            names += MIXED.get(number, ())
    return [Layout.parse(name) for name in names]


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


def refusal_of(scenario: Scenario, mixed_precision: bool) -> str | None:
    """Why the scenario is not timed: the layout does not take the model or the rows, or the host runs it in float32.
    None if it is timed.
    """
    layout, size = scenario.layout, SIZES[scenario.size]
    job = Job({"training.seq_len": scenario.length}, scenario.local_rows, scenario.rows)
    if scenario.model == "llama":
        if mixed_precision and layout.gpus > 1 and not layout.has_fsdp:
            return f"the host runs Llama under {layout} in float32, without FSDP"
        return host_refusal(layout, size.llama.n_layers, job)
    options = size.options("megalodon")
    return refusal(layout, replace(PRESETS[options.pop("flavor")], **options), job)


def simulated_scenarios(sizes: Sequence[str], gpus: Iterable[int], tokens_per_gpu: int) -> list[Scenario]:
    """One rank's part of large layouts, and of one GPU, which they are compared with."""
    layouts = [ONE_RANK, *(Layout.parse(name) for number in gpus for name in SIMULATED[number])]
    return [
        replace(weak(size, "megalodon", layout, tokens_per_gpu), scaling="simulated")
        for size in sizes
        for layout in layouts
    ]
