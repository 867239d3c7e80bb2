"""`megalodon plan`: which layouts of GPUs a job may take, what each needs, and which to take. No GPU is used.

Everything it prints but the parameter count is an estimate: memory from `planning.memory`, time from
`planning.traffic` and the speeds given as options.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megalodon_plugin.parallel.layout import DIMENSIONS, Layout, is_schedule, refusal

from .job import PlannedJob
from .links import Links
from .memory import Memory, Work
from .traffic import Exchange

GIB = 2**30
ESTIMATED_SCHEDULES = ("1F1B", "GPipe")
RESERVE = 0.1
"""Share of the memory left free: the allocator's gaps, attention's scores, NCCL's buffers, the CUDA context."""


@dataclass(frozen=True)
class PlanOptions:
    """What is asked of a plan, beside the job itself."""

    config: Path
    """The TOML file."""
    gpus: int
    memory: float = 80.0
    """Of a GPU, GiB."""
    gpus_per_node: int = 8
    seq_len: int | None = None
    """Tokens a row, in place of the file's."""
    rows: int = 12
    """Layouts to print."""
    json: Path | None = None
    """Where every layout and exchange is written."""
    node_gb_s: float = Links.node_gb_s
    network_gb_s: float = Links.network_gb_s
    latency_us: float = Links.latency_us
    tflops: float = 400.0

    @property
    def links(self) -> Links:
        return Links(self.gpus_per_node, self.node_gb_s, self.network_gb_s, self.latency_us)

    def validate(self) -> None:
        """Raise ValueError for what is out of range."""
        if not self.config.is_file():
            raise ValueError(f"the first argument must be a configuration file, but {str(self.config)!r} is not a file")
        for name in ("gpus", "gpus_per_node", "rows", "memory", "node_gb_s", "network_gb_s", "tflops"):
            if getattr(self, name) <= 0:
                raise ValueError(f"`--{name.replace('_', '-')}` must be positive, but is {getattr(self, name)}")
        if self.latency_us < 0:
            raise ValueError(f"`--latency-us` must not be negative, but is {self.latency_us}")
        if self.seq_len is not None and self.seq_len < 1:
            raise ValueError(f"`--seq-len` must be at least 1, but is {self.seq_len}")
        if self.gpus > self.gpus_per_node and self.gpus % self.gpus_per_node:
            raise ValueError(
                f"`--gpus` must be a multiple of `--gpus-per-node` = {self.gpus_per_node}, but is {self.gpus}"
            )


@dataclass(frozen=True)
class Candidate:
    """A layout that the rules allow, with its estimates for the rank that has most of each."""

    layout: Layout
    work: Work
    rows: int
    """Of a step, over all ranks."""
    memory: Memory
    exchanges: list[Exchange]
    seconds: dict[str, float]
    """Of a step: "compute", "exchange" (if nothing of it hid behind computation) and "idle" (a pipeline's)."""
    exchange_seconds: dict[str, float]
    """By dimension."""

    @property
    def lost(self) -> float:
        """Share of the step that is not computation."""
        return 1 - self.seconds["compute"] / sum(self.seconds.values())

    def fits(self, gib: float) -> bool:
        return self.memory.total <= (1 - RESERVE) * gib * GIB


def all_layouts(gpus: int) -> Iterator[Layout]:
    """Every way to write the number of GPUs as a product of the five degrees."""

    def products(rest: int, factors: int) -> Iterator[tuple[int, ...]]:
        if factors == 1:
            yield (rest,)
            return
        for first in (n for n in range(1, rest + 1) if rest % n == 0):
            for others in products(rest // first, factors - 1):
                yield (first, *others)

    for degrees in products(gpus, len(DIMENSIONS)):
        yield Layout(*degrees)


@dataclass(frozen=True)
class Refused:
    """Layouts that the job cannot take for one reason."""

    reason: str
    """With the numbers of one of them."""
    layouts: int


def candidates(job: PlannedJob, plan: PlanOptions) -> tuple[list[Candidate], list[Refused]]:
    """The layouts that the rules allow, best first, and why the others are refused, the commonest reason first.

    The best loses the least time. Estimates do not tell apart what differs by less than a percent of the step, so
    there the one with fewer dimensions comes first, then the one that needs less memory. A layout that several rules
    refuse counts for the first of them.
    """
    from megalodon_plugin.titan.job_rules import facts_of

    facts = dataclasses.replace(facts_of(job.options), gpus_per_node=plan.gpus_per_node)
    reasons = {
        layout: refusal(layout, job.args, facts) or schedule_refusal(job, layout) for layout in all_layouts(plan.gpus)
    }
    found = [estimate(job, layout, plan.links, plan.tflops) for layout, reason in reasons.items() if reason is None]
    found.sort(
        key=lambda c: (
            round(c.lost, 2),
            sum(degree > 1 for degree in dataclasses.astuple(c.layout)),
            c.memory.total,
        )
    )
    return found, counted(reason for reason in reversed(reasons.values()) if reason is not None)


def counted(reasons: Iterable[str]) -> list[Refused]:
    """Reasons that differ in their numbers alone are one."""
    refused: dict[str, Refused] = {}
    for reason in reasons:
        rule = re.sub(r"\d+", "N", reason.partition("; what would work")[0])
        before = refused.get(rule, Refused(reason, 0))
        refused[rule] = Refused(before.reason, before.layouts + 1)
    return sorted(refused.values(), key=lambda one: one.layouts, reverse=True)


def schedule_refusal(job: PlannedJob, layout: Layout) -> str | None:
    """Why a pipeline under the job's schedule cannot be estimated; None if it can."""
    parallelism = job.options.parallelism
    schedule, csv = parallelism.pipeline_parallel_schedule, parallelism.pipeline_parallel_schedule_csv
    if layout.pp > 1 and csv:
        return f"`parallelism.pipeline_parallel_schedule_csv` must be empty for a plan with stages, but is {csv!r}"
    if layout.pp > 1 and not is_schedule(schedule, *ESTIMATED_SCHEDULES):
        return (
            f"`parallelism.pipeline_parallel_schedule` must be {' or '.join(ESTIMATED_SCHEDULES)} for a plan with "
            f"stages, but is {schedule!r}"
        )
    return None


def estimate(job: PlannedJob, layout: Layout, links: Links, tflops: float) -> Candidate:
    """A candidate; each of its numbers is that of the rank that has most of it."""
    work, rows, stages = job.work(layout), job.rows(layout), job.stages(layout.pp)
    memory = max((job.memory(layout, stage) for stage in stages), key=lambda m: m.total)
    of_stages = [job.exchanges(layout, stage) for stage in stages]

    def by_dimension(exchanges: list[Exchange]) -> dict[str, float]:
        seconds = dict.fromkeys(DIMENSIONS, 0.0)
        for exchange in exchanges:
            seconds[exchange.dimension] += exchange.messages * links.seconds(exchange)
        return seconds

    exchanges = max(of_stages, key=lambda found: sum(by_dimension(found).values()))
    repeated = {"none": 0.0, "op": 0.0, "full": 1.0}.get(work.checkpointing)
    if repeated is None:
        repeated = 1 / int(work.checkpointing)
    flops = job.forward_flops * (3 + repeated) * rows * work.length
    compute = flops / (layout.gpus * tflops * 1e12)
    # The fullest stage sets the pace, and a pipeline fills and drains once a backward pass.
    pace = max(stage.layers for stage in stages) * layout.pp / job.args.n_layers
    idle = compute * (pace * (1 + (layout.pp - 1) / work.microbatches) - 1)
    exchange_seconds = by_dimension(exchanges)
    seconds = {"compute": compute, "exchange": sum(exchange_seconds.values()), "idle": idle}
    return Candidate(layout, work, rows, memory, exchanges, seconds, exchange_seconds)
