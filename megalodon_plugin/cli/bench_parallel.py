"""`megalodon bench parallel`: layouts of several GPUs, checked, timed, and simulated for more GPUs than there are.

Three parts, each optional, in this order:

1. Checks. A small model in float32 takes two steps under every layout; losses and gradient norms must be those of one
   process, messages and bytes those of docs/scaling.md. A layout that fails is not timed.
2. Times. Weak and strong scaling of training steps in the host, as `bench train` takes them.
3. Simulation. One process computes one rank's part of a layout of 8, 64 or 256 GPUs, with the host's fake backend in
   place of the others; published link speeds give the rest. Such rows say "simulated".

What is checked or timed runs in processes of its own, so that one that fails takes nothing along.
"""

import argparse
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megalodon_plugin import __version__
from megalodon_plugin.parallel.estimate import Layout
from megalodon_plugin.parallel.traffic import Links

from .bench_ops import commit_of_this_code
from .bench_parallel_cases import (
    ONE,
    Case,
    default_layouts,
    name_of,
    parse_layout,
    simulated_cases,
    strong,
    weak,
    without_a_row_for_all,
)
from .bench_parallel_rank import Order, run_order
from .bench_parallel_report import check_line, draw, table
from .bench_parallel_rows import Row, compare, deviation, logged, merged
from .bench_parallel_simulate import simulated_row
from .bench_train import SIZES
from .bench_train_job import Job

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
ALLOCATOR = "expandable_segments:True"
"""As the host's start script sets it."""
TOLERANCE = 1e-5
"""Of losses and gradient norms in float32."""


def run_bench_parallel(known: argparse.Namespace) -> int:
    """Run the command; the exit status: 0, or 1 if a check failed.

    Raises:
        ValueError: an option is out of range.
    """
    on_gpu = torch.cuda.is_available()
    gpus = known.gpus or (torch.cuda.device_count() if on_gpu else 2)
    layouts = _checked_layouts(known, gpus, on_gpu)
    results: dict[str, Any] = {
        "device": "GPU" if on_gpu else "CPU",  # ranks tell which; this process takes no memory of it
        "backend": "nccl" if on_gpu else "gloo",
        "gpus": gpus,
        "torch": torch.__version__,
        "version": __version__,
        "commit": known.commit or commit_of_this_code(),
        "date": datetime.date.today().isoformat(),
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
    for name in ("gpus", "tokens_per_gpu", "tokens_per_step", "lengths", "timeout", "node_gb_s", "network_gb_s"):
        value = getattr(known, name)
        if value is not None and min(value if isinstance(value, list) else [value]) <= 0:
            raise ValueError(f"`--{name.replace('_', '-')}` must be positive, but is {value}")
    if known.steps < 3:
        raise ValueError(f"`--steps` must be at least 3, for the first two are not counted, but is {known.steps}")
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

    def write(self) -> None:
        """Efficiencies of the rows so far, and all of it into parallel.json."""
        compare(self.results["rows"])
        unfinished = self.known.out / "parallel.json.unfinished"
        unfinished.write_text(json.dumps(self.results, indent=1) + "\n")
        unfinished.replace(self.known.out / "parallel.json")

    def check(self, layouts: Iterable[Layout]) -> set[str]:
        """Names of the layouts that failed."""
        alone: list[list[float]] | None = None
        failed = set()
        for layout in layouts:
            job = Job(
                "megalodon",
                tuple(SMALL.items()),
                batch=SMALL_ROWS // layout.data,
                length=SMALL_LENGTH,
                compiled=False,
                low_precision=False,
                layout=layout,
                rows=SMALL_ROWS,
                same_weights=True,
            )
            ranks = self._run(Order(job, steps=3, count=True), layout.gpus)
            row: Row = {"layout": name_of(layout), "gpus": layout.gpus}
            reasons = {rank["failed"] for rank in ranks if "failed" in rank}
            if reasons:
                row["failed"] = ", ".join(sorted(reasons))
            else:
                found = logged(ranks)
                alone = found if alone is None else alone
                row["deviation"] = deviation(found, alone)
                row["differences"] = [f"rank {n}: {text}" for n, r in enumerate(ranks) for text in r["differences"]]
                row["exchanges"] = {str(n): rank["exchanges"] for n, rank in enumerate(ranks)}
                if row["deviation"] > TOLERANCE:
                    row["failed"] = f"losses or gradient norms are off by {row['deviation']:.1e}"
                elif row["differences"]:
                    row["failed"] = "; ".join(row["differences"])
            if "failed" in row:
                failed.add(row["layout"])
            self.results["checks"].append(row)
            print(check_line(row), flush=True)
            self.write()
        return failed

    def time(self, layouts: list[Layout]) -> None:
        """Weak scaling for each number of tokens a GPU, strong scaling for each length."""
        known = self.known
        for size in known.sizes:
            for model in ("megalodon", "llama") if known.against else ("megalodon",):
                cases = []
                if "weak" in known.scaling:
                    cases += [weak(size, model, layout, n) for n in known.tokens_per_gpu for layout in layouts]
                if "strong" in known.scaling:
                    most = max(known.tokens_per_gpu)
                    cases += [
                        strong(size, model, layout, length, known.tokens_per_step, most)
                        for length in known.lengths
                        for layout in layouts
                    ]
                for case in cases:
                    self._add(case, self._time_one(case))

    def _time_one(self, case: Case) -> Row:
        reason = without_a_row_for_all(case)
        if reason is not None:
            return {"failed": reason}
        before = [row for row in self.results["rows"] if row["layout"] == "1" and "seconds" in row]
        alike = [row for row in before if (row["size"], row["model"]) == (case.size, case.model)]
        if case.layout.gpus == 1 and alike:
            last = alike[-1]
            growth = case.tokens / (last["rows"] * last["length"])
            growth *= case.length / last["length"] if case.model == "llama" else 1
            if last["seconds"] * growth > self.known.longest_step:
                return {"failed": f"a step might take more than {self.known.longest_step} s"}
        order = Order(self._job(case), self.known.steps, trace=self.on_gpu and case.layout.gpus > 1)
        return merged(self._run(order, case.layout.gpus))

    def simulate(self) -> None:
        """This process computes rank 0's part of large layouts, one after the other."""
        known = self.known
        os.environ.setdefault("PYTORCH_ALLOC_CONF", ALLOCATOR)
        links = Links(8, known.node_gb_s, known.network_gb_s, known.latency_us)
        for tokens in known.tokens_per_gpu:
            for case in simulated_cases(known.sizes, known.simulate, tokens):
                job = replace(self._job(case), alone=True, same_weights=False)
                measured = run_order(Order(job, known.steps))
                self.results["device"] = measured.pop("device", self.results["device"])
                if "seconds" in measured:
                    measured = simulated_row(case, job, measured, links)
                self._add(case, measured)

    def _job(self, case: Case) -> Job:
        return Job(
            case.model,
            tuple(SIZES[case.size][0 if case.model == "megalodon" else 1].items()),
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
        self.results["rows"].append(row | measured)
        self.write()
        print(table([self.results["rows"][-1]], header=len(self.results["rows"]) == 1), flush=True)

    def _run(self, order: Order, processes: int) -> list[Row]:
        """What each rank found; {"failed": why} where it found nothing."""
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "order.json").write_text(json.dumps(order.as_dict()))
            torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
            rank = ["-m", "megalodon_plugin.cli.bench_parallel_rank", str(folder / "order.json"), name]
            reason = _start([sys.executable, *torchrun, *rank], folder / "log.txt", self.known.timeout)
            ranks = [_read(folder / f"{rank}.json", reason) for rank in range(processes)]
        self.results["device"] = next((rank["device"] for rank in ranks if "device" in rank), self.results["device"])
        return ranks


def _start(command: list[str], log: Path, timeout: float) -> str:
    """Run the command; in a few words what went wrong, if something did."""
    variables = {"PYTORCH_ALLOC_CONF": ALLOCATOR, "TOKENIZERS_PARALLELISM": "false"}
    threads = {} if torch.cuda.is_available() else {"OMP_NUM_THREADS": "1"}
    with (
        log.open("w") as output,
        subprocess.Popen(
            command, env=variables | dict(os.environ) | threads, stdout=output, stderr=output, start_new_session=True
        ) as process,
    ):
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return f"not done after {timeout:g} s"
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    errors = [line for line in log.read_text(errors="replace").splitlines() if "Error: " in line]
    return errors[0].strip()[-200:] if errors else f"ended with status {process.returncode}"


def _read(path: Path, reason: str) -> Row:
    return json.loads(path.read_text()) if path.is_file() else {"failed": reason}
