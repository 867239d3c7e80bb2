"""`megalodon bench parallel`: layouts of several GPUs, checked, timed, and simulated for more GPUs than there are.

Three parts, each optional, in this order:

1. Checks. A small model takes two steps under every layout, in float32 and in bfloat16; losses and gradient norms must
   be those of one process, messages and bytes those of docs/scaling.md. A layout that fails is not timed.
2. Times. Weak and strong scaling of training steps in the host, as `bench train` takes them.
3. Simulation. One process computes one rank's part of a layout of 2 to 256 GPUs, with the host's fake backend in
   place of the others; published link speeds give the rest. Such rows say "simulated".

What is checked or timed runs in processes of its own. After a failure the rest goes on in new ones.
"""

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import torch

from megalodon_plugin.files import write_json
from megalodon_plugin.model import PRESETS
from megalodon_plugin.parallel.chunk import check_chunk_parallel
from megalodon_plugin.parallel.tensor_plan import check_tensor_parallel
from megalodon_plugin.planning.memory import Layout
from megalodon_plugin.planning.traffic import Links

from ..environment import environment
from ..sizes import SIZES
from ..train.job import Job, check_steps
from .launch import ALLOCATOR, run_orders
from .rank import Order, run_order
from .report import check_line, draw, table
from .rows import Row, compare, held_against, logged, merged, reason_of, work
from .scenarios import ONE, Case, default_layouts, name_of, parse_layout, reason_against, simulated_cases, strong, weak
from .simulate import simulated_row

SMALL = {
    "flavor": "debug",
    "dim": 32,
    "n_layers": 8,
    "n_heads": 8,
    "z_dim": 32,
    "value_dim": 64,
    "ffn_dim": 64,
    "chunk_size": 16,
    "norm_groups": 8,
    "vocab_size": 512,
}
"""The model of the checks, which 8 ranks of any dimension can share."""
SMALL_ROWS, SMALL_LENGTH = 8, 128
TOLERANCES = {False: 1e-5, True: 5e-3}
"""Of losses and gradient norms in float32 and, by whether the precision is low, in bfloat16."""


def run_bench_parallel(known: argparse.Namespace) -> int:
    """Run the command; the exit status: 0, or 1 if a check failed.

    Raises:
        ValueError: an option is out of range.
    """
    on_gpu = torch.cuda.is_available()
    gpus = known.gpus or (torch.cuda.device_count() if on_gpu else 2)
    layouts = _checked_layouts(known, gpus, on_gpu)
    results: dict[str, Any] = {
        # Ranks report which GPU; this process takes no memory of it.
        **environment("GPU" if on_gpu else "CPU", known.commit),
        "backend": "nccl" if on_gpu else "gloo",
        "gpus": gpus,
        "dtype": "bfloat16" if on_gpu else "float32",
        "compiled": not known.eager,
        "checkpointing": known.checkpointing,
        "checks": [],
        "rows": [],
        "links": {"node_gb_s": known.node_gb_s, "network_gb_s": known.network_gb_s, "latency_us": known.latency_us},
    }
    known.out.mkdir(parents=True, exist_ok=True)
    bench = ParallelBench(known, results, on_gpu)
    failed: set[str] = set()
    if not known.no_checks:
        failed = bench.check(layouts)
    bench.time([layout for layout in layouts if name_of(layout) not in failed])
    if known.simulate:
        bench.simulate()
    bench.write()
    draw(results, known.out / "parallel.png")
    print(table(results["rows"]))
    print(known.out / "parallel.json", known.out / "parallel.png")
    return 1 if failed else 0


def _checked_layouts(known: argparse.Namespace, gpus: int, on_gpu: bool) -> list[Layout]:
    """The layouts to run, one GPU first, which the others are compared with."""
    for name in (
        "gpus",
        "tokens_per_gpu",
        "tokens_per_step",
        "lengths",
        "seconds",
        "longest_step",
        "timeout",
        "node_gb_s",
        "network_gb_s",
    ):
        value = getattr(known, name)
        if value is not None and min(value if isinstance(value, list) else [value]) <= 0:
            raise ValueError(f"`--{name.replace('_', '-')}` must be positive, but is {value}")
    check_steps(known.steps)
    if on_gpu and gpus > torch.cuda.device_count():
        raise ValueError(f"`--gpus` must be at most the {torch.cuda.device_count()} that are there, but is {gpus}")
    if known.against and not on_gpu:
        raise ValueError("`--against llama` needs GPUs: the host's context parallel attention has no CPU kernel")
    named = [parse_layout(text) for text in known.layouts] if known.layouts else default_layouts(gpus)
    for layout in named:
        if layout.gpus > gpus:
            raise ValueError(f"`--layouts` must fit {gpus} GPUs, but {name_of(layout)!r} takes {layout.gpus}")
    return list(dict.fromkeys([ONE, *named]))


class ParallelBench:
    """The three parts; rows are added to `results`, which is written after each."""

    def __init__(self, known: argparse.Namespace, results: dict[str, Any], on_gpu: bool):
        self.known, self.results, self.on_gpu = known, results, on_gpu
        self.log = known.out / "parallel.log"
        self.log.unlink(missing_ok=True)

    def write(self) -> None:
        """Efficiencies of the rows so far, and all of it into parallel.json."""
        self.results["rows"].sort(key=work)
        compare(self.results["rows"])
        write_json(self.results, self.known.out / "parallel.json", allow_nan=False)

    def check(self, layouts: Sequence[Layout]) -> set[str]:
        """Names of the layouts that failed."""
        alone: dict[bool, list[list[float]]] = {}
        failed = set()
        for gpus in sorted({layout.gpus for layout in layouts}):
            cases = [(layout, low) for layout in layouts if layout.gpus == gpus for low in (False, True)]
            # Exchanges of bfloat16 are the same in half the bytes.
            orders = [Order(_small_job(layout, low), steps=4, count=not low) for layout, low in cases]
            for (layout, low), ranks in self._run(cases, orders):
                row: Row = {"layout": name_of(layout), "gpus": gpus, "dtype": "bfloat16" if low else "float32"}
                reason = reason_of(ranks)
                if reason is None and layout == ONE:
                    alone[low] = logged(ranks)
                if reason is not None or low not in alone:
                    row["failed"] = reason or "one process failed"
                else:
                    row |= held_against(ranks, alone[low], TOLERANCES[low])
                if "failed" in row:
                    failed.add(row["layout"])
                self.results["checks"].append(row)
                print(check_line(row), flush=True)
                self.write()
        return failed

    def _run(self, cases: list[Any], orders: list[Order]) -> Iterator[tuple[Any, list[Row]]]:
        """Each case with what the ranks found of its order."""
        with closing(run_orders(orders, self.known.timeout, self.log)) as results:
            yield from zip(cases, results, strict=True)

    def time(self, layouts: Sequence[Layout]) -> None:
        """Weak scaling for each number of tokens a GPU, strong scaling for each length."""
        groups: dict[tuple[Any, ...], list[Case]] = {}
        for model in ("megalodon", "llama") if self.known.against else ("megalodon",):
            for layout in layouts:
                # What the host does to attention for context parallelism stays in a process.
                group = groups.setdefault((model, layout.gpus, layout.cp > 1), [])
                for case in self._cases(model, layout):
                    reason = reason_against(case, mixed_precision=self.on_gpu) or _reason_of_model(case)
                    if reason is None:
                        group.append(case)
                    else:
                        self._add(case, {"failed": reason})
        for group in groups.values():
            for case, ranks in self._run(group, [self._order(case) for case in group]):
                self._know_device(ranks[0])
                self._add(case, merged(ranks))

    def _cases(self, model: str, layout: Layout) -> Iterator[Case]:
        known = self.known
        for size in known.sizes:
            if "weak" in known.scaling:
                for tokens in known.tokens_per_gpu:
                    yield weak(size, model, layout, tokens)
            if "strong" in known.scaling:
                for length in known.lengths:
                    yield strong(size, model, layout, length, known.tokens_per_step, max(known.tokens_per_gpu))

    def _order(self, case: Case) -> Order:
        known = self.known
        trace = self.on_gpu and case.layout.gpus > 1
        return Order(self._job(case), known.steps, trace=trace, enough=known.seconds, longest_step=known.longest_step)

    def simulate(self) -> None:
        """This process computes rank 0's part of large layouts, one after the other."""
        known = self.known
        os.environ.setdefault("PYTORCH_ALLOC_CONF", ALLOCATOR)
        links = Links(8, known.node_gb_s, known.network_gb_s, known.latency_us)
        for tokens in known.tokens_per_gpu:
            for case in simulated_cases(known.sizes, known.simulate, tokens):
                job = replace(self._job(case), alone=True, same_weights=False)
                measured = run_order(Order(job, known.steps, enough=known.seconds))
                self._know_device(measured)
                if "seconds" in measured:
                    measured = simulated_row(case, job, measured, links)
                self._add(case, measured)

    def _job(self, case: Case) -> Job:
        return Job(
            case.model,
            tuple(SIZES[case.size].options(case.model).items()),
            case.local_rows,
            case.length,
            self.known.checkpointing,
            compiled=not self.known.eager,
            low_precision=self.on_gpu,
            layout=case.layout,
            rows=case.rows,
            same_weights=True,
        )

    def _add(self, case: Case, measured: Row) -> None:
        row = {
            "scaling": case.scaling,
            "size": case.size,
            "model": case.model,
            "layout": name_of(case.layout),
            "gpus": case.layout.gpus,
            "rows": case.rows,
            "length": case.length,
            "tokens_per_gpu": case.tokens // case.layout.gpus,
        }
        row |= measured
        self.results["rows"].append(row)
        self.write()
        print(table([row], header=len(self.results["rows"]) == 1), flush=True)

    def _know_device(self, row: Row) -> None:
        self.results["device"] = row.pop("device", self.results["device"])


def _reason_of_model(case: Case) -> str | None:
    """Why the model's sizes do not allow the layout; None if they do."""
    layout, size = case.layout, SIZES[case.size]
    options = size.options("megalodon")
    cfg = replace(PRESETS[options.pop("flavor")], **options)
    n_layers = cfg.n_layers if case.model == "megalodon" else size.llama.n_layers
    if layout.pp > n_layers:
        return f"{n_layers} layers are fewer than the {layout.pp} stages of {name_of(layout)}"
    if case.model == "llama":
        return None
    try:
        check_tensor_parallel(cfg, layout.tp)
        check_chunk_parallel(case.length, cfg.chunk_size, layout.cp, ("row", "chunk_size", "cp"))
    except ValueError as error:
        return str(error)
    return None


def _small_job(layout: Layout, low_precision: bool) -> Job:
    return Job(
        "megalodon",
        tuple(SMALL.items()),
        batch=SMALL_ROWS // layout.data,
        length=SMALL_LENGTH,
        compiled=False,
        low_precision=low_precision,
        layout=layout,
        rows=SMALL_ROWS,
        same_weights=True,
    )
