"""`megalodon bench parallel`: layouts of several GPUs, checked, timed, and simulated for more GPUs than there are.

Three parts, each optional, in this order:

1. Checks. A small model takes two steps under every layout, in float32 and in bfloat16; losses and gradient norms must
   be those of one process, messages and bytes those that docs/scaling.md gives. A layout that fails is not timed.
2. Times. Weak and strong scaling of training steps in the host, as `bench train` takes them.
3. Simulation. One process computes one rank's part of a layout of 2 to 256 GPUs, with the host's fake backend in
   place of the others; published link speeds give the rest. Such rows say "simulated".

Checks and timed steps run in separate processes. After a failure the remaining tasks run in new ones.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any, TypeVar

import torch

from megalodon_plugin.files import write_json
from megalodon_plugin.parallel.layout import ONE_RANK, Layout
from megalodon_plugin.planning.links import Links

from ..environment import environment
from ..sizes import SIZES
from ..train.job import TrainingJob
from .launch import ALLOCATOR, run_tasks
from .matrix import SMALL_TOLERANCES, small_task
from .options import ParallelOptions
from .rank import Task, run_task
from .report import check_line, draw, table
from .results import CheckRow, Measured, Outcome, ParallelResults, RankRow, ScenarioRow, Steps
from .rows import add_ratios, check_against_single, comparison_key, logged, merged, reason_of
from .scenarios import (
    Scenario,
    default_layouts,
    refusal_of,
    simulated_scenarios,
    strong,
    weak,
)
from .simulate import simulated_row

Subject = TypeVar("Subject")


def run_bench_parallel(options: ParallelOptions) -> int:
    """Run the command; the exit status: 0, or 1 if a check failed.

    Raises:
        ValueError: an option is out of range.
    """
    on_gpu = torch.cuda.is_available()
    gpus = options.gpus or (torch.cuda.device_count() if on_gpu else 2)
    layouts = _checked_layouts(options, gpus, on_gpu)
    results: ParallelResults = {
        # Ranks report which GPU; this process takes no memory of it.
        **environment("GPU" if on_gpu else "CPU", options.commit),
        "backend": "nccl" if on_gpu else "gloo",
        "gpus": gpus,
        "dtype": "bfloat16" if on_gpu else "float32",
        "compiled": not options.eager,
        "checkpointing": options.checkpointing,
        "checks": [],
        "rows": [],
        "links": {
            "node_gb_s": options.node_gb_s,
            "network_gb_s": options.network_gb_s,
            "latency_us": options.latency_us,
        },
    }
    options.out.mkdir(parents=True, exist_ok=True)
    bench = ParallelBench(options, results, on_gpu)
    failed: set[str] = set()
    if not options.no_checks:
        failed = bench.check(layouts)
    bench.time([layout for layout in layouts if str(layout) not in failed])
    if options.simulate:
        bench.simulate()
    bench.write()
    draw(results, options.out / "parallel.png")
    print(table(results["rows"]))
    print(options.out / "parallel.json", options.out / "parallel.png")
    return 1 if failed else 0


def _checked_layouts(options: ParallelOptions, gpus: int, on_gpu: bool) -> list[Layout]:
    """The layouts to run, one GPU first, which the others are compared with."""
    options.check()
    if on_gpu and gpus > torch.cuda.device_count():
        raise ValueError(f"`--gpus` must be at most the {torch.cuda.device_count()} that are there, but is {gpus}")
    if options.against and not on_gpu:
        raise ValueError("`--against llama` needs GPUs: the host's context parallel attention has no CPU kernel")
    named = [Layout.parse(text) for text in options.layouts] if options.layouts else default_layouts(gpus)
    for layout in named:
        if layout.gpus > gpus:
            raise ValueError(f"`--layouts` must fit {gpus} GPUs, but {str(layout)!r} takes {layout.gpus}")
    return list(dict.fromkeys([ONE_RANK, *named]))


class ParallelBench:
    """The three parts; rows are added to `results`, which is written after each."""

    def __init__(self, options: ParallelOptions, results: ParallelResults, on_gpu: bool):
        self.options, self.results, self.on_gpu = options, results, on_gpu
        self.log = options.out / "parallel.log"
        self.log.unlink(missing_ok=True)

    def write(self) -> None:
        """Efficiencies of the rows so far, and all of it into parallel.json."""
        self.results["rows"].sort(key=comparison_key)
        add_ratios(self.results["rows"])
        write_json(self.results, self.options.out / "parallel.json", allow_nan=False)

    def check(self, layouts: Sequence[Layout]) -> set[str]:
        """Names of the layouts that failed."""
        single: dict[bool, Steps] = {}
        failed = set()
        for gpus in sorted({layout.gpus for layout in layouts}):
            scenarios = [(layout, low) for layout in layouts if layout.gpus == gpus for low in (False, True)]
            tasks = [small_task(layout, low) for layout, low in scenarios]
            for (layout, low), ranks in self._run(scenarios, tasks):
                reason = reason_of(ranks)
                if reason is None and layout == ONE_RANK:
                    single[low] = logged(ranks)
                if reason is not None or low not in single:
                    outcome: Outcome = {"deviation": None, "failed": reason or "one process failed"}
                else:
                    outcome = check_against_single(ranks, single[low], SMALL_TOLERANCES[low])
                dtype = "bfloat16" if low else "float32"
                row: CheckRow = {"layout": str(layout), "gpus": gpus, "dtype": dtype, **outcome}
                if "failed" in row:
                    failed.add(row["layout"])
                self.results["checks"].append(row)
                print(check_line(row), flush=True)
                self.write()
        return failed

    def _run(self, subjects: Sequence[Subject], tasks: list[Task]) -> Iterator[tuple[Subject, list[RankRow]]]:
        """Each subject, of which there is one a task, with the results of its ranks."""
        with closing(run_tasks(tasks, self.options.timeout, self.log)) as results:
            yield from zip(subjects, results, strict=True)

    def time(self, layouts: Sequence[Layout]) -> None:
        """Weak scaling for each number of tokens a GPU, strong scaling for each length."""
        groups: dict[tuple[Any, ...], list[Scenario]] = {}
        for model in ("megalodon", "llama") if self.options.against else ("megalodon",):
            for layout in layouts:
                # The host patches attention for context parallelism, and the patch stays for the life of the process.
                group = groups.setdefault((model, layout.gpus, layout.cp > 1), [])
                for scenario in self._scenarios(model, layout):
                    reason = refusal_of(scenario, mixed_precision=self.on_gpu)
                    if reason is None:
                        group.append(scenario)
                    else:
                        self._add(scenario, {"failed": reason})
        for group in groups.values():
            for scenario, ranks in self._run(group, [self._task(scenario) for scenario in group]):
                self._know_device(ranks[0])
                self._add(scenario, merged(ranks))

    def _scenarios(self, model: str, layout: Layout) -> Iterator[Scenario]:
        options = self.options
        for size in options.sizes:
            if "weak" in options.scaling:
                for tokens in options.tokens_per_gpu:
                    yield weak(size, model, layout, tokens)
            if "strong" in options.scaling:
                for length in options.lengths:
                    yield strong(size, model, layout, length, options.tokens_per_step, max(options.tokens_per_gpu))

    def _task(self, scenario: Scenario) -> Task:
        options = self.options
        trace = self.on_gpu and scenario.layout.gpus > 1
        return Task(
            self._job(scenario),
            options.steps,
            trace=trace,
            most_seconds=options.seconds,
            longest_step=options.longest_step,
        )

    def simulate(self) -> None:
        """This process computes rank 0's part of large layouts, one after the other."""
        options = self.options
        os.environ.setdefault("PYTORCH_ALLOC_CONF", ALLOCATOR)
        links = Links(8, options.node_gb_s, options.network_gb_s, options.latency_us)
        for tokens in options.tokens_per_gpu:
            for scenario in simulated_scenarios(options.sizes, options.simulate or (), tokens):
                job = replace(self._job(scenario), fake_ranks=True, same_weights=False)
                found = run_task(Task(job, options.steps, most_seconds=options.seconds))
                self._know_device(found)
                self._add(scenario, simulated_row(scenario, job, found, links) if "seconds" in found else found)

    def _job(self, scenario: Scenario) -> TrainingJob:
        return TrainingJob(
            scenario.model,
            tuple(SIZES[scenario.size].options(scenario.model).items()),
            scenario.local_rows,
            scenario.length,
            self.options.checkpointing,
            compiled=not self.options.eager,
            low_precision=self.on_gpu,
            layout=scenario.layout,
            rows=scenario.rows,
            same_weights=True,
        )

    def _add(self, scenario: Scenario, measured: Measured) -> None:
        row: ScenarioRow = {
            "scaling": scenario.scaling,
            "size": scenario.size,
            "model": scenario.model,
            "layout": str(scenario.layout),
            "gpus": scenario.layout.gpus,
            "rows": scenario.rows,
            "length": scenario.length,
            "tokens_per_gpu": scenario.tokens // scenario.layout.gpus,
            **measured,
        }
        self.results["rows"].append(row)
        self.write()
        print(table([row], header=len(self.results["rows"]) == 1), flush=True)

    def _know_device(self, row: RankRow) -> None:
        self.results["device"] = row.pop("device", self.results["device"])
