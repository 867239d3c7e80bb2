"""The run behind `megalodon bench ops`: check, ceilings, times, report."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalodon_plugin.files import write_json
from megalodon_plugin.model.precision import DTYPES
from megalodon_plugin.ops.dispatch import use_kernels

from ..environment import device_name, environment
from ..timing import MIB, copy_rate, cpu_us, empty_op, free_memory, input_sets, kernel_times, matmul_rate, measure, size
from . import OPS, layer
from .accuracy import Case, golden_cases, judge, standard_cases
from .implementations import CEMA_ORDER, implementation, norm_groups
from .problems import cema_parameters, cema_problem, timestep_norm_problem
from .report import accuracy_table, draw, flatness, floor_ms, speed_table, sweep_shapes
from .results import PASSES, CpuTimes, OpsResults, Shape, SpeedRow, multiple

MAIN_SHAPES = ((8, 4096, 1024), (8, 4096, 4096), (1, 32768, 4096))
QUICK_LENGTHS = (256, 65536, 1048576)
REFERENCES = {"cema": ("torch", "compiled", "fft"), "timestep_norm": ("torch", "compiled")}
REFERENCE_LIMIT = 2.0
"""Units of error of a reference: it must compute the op, not meet the kernels' limits."""


@dataclass(frozen=True)
class OpsOptions:
    """What is checked and timed."""

    out: Path
    """Folder of the results."""
    only: str | None = None
    """One op in place of all."""
    quick: bool = False
    """Only the kernels, fewer lengths, shorter measurements."""
    shapes: Sequence[Shape] | None = None
    """These in place of the main ones and the sweep over lengths."""
    layer: bool = False
    """Also a whole layer."""
    profile: bool = False
    """Also the time of each GPU kernel."""
    accuracy_only: bool = False
    """Check, and time nothing."""
    golden: Path | None = None
    """A folder of golden vectors to check with as well."""
    commit: str | None = None
    """In place of what git says."""


class Bench:
    """One run on one device.

    Args:
        kernels: the mode of the ops (`ops.dispatch.use_kernels`) in the rows of "cuda".
        small: sizes and durations for a test.
    """

    def __init__(self, options: OpsOptions, device: torch.device, kernels: str = "require", small: bool = False):
        self.options, self.device, self.kernels, self.small = options, device, kernels, small
        self.results: OpsResults = {**environment(device_name(device), options.commit), "rows": [], "accuracy": []}
        self.ops = (options.only,) if options.only else OPS
        self.seconds = 0.0 if small else 0.15 if options.quick else 0.4
        self.started = time.monotonic()

    def say(self, text: str) -> None:
        """Print a line of progress, unbuffered."""
        print(f"[{time.monotonic() - self.started:6.1f} s] {text}", flush=True)

    def run(self) -> None:
        """Everything; files are written as soon as they have content.

        Raises:
            SystemExit: a result of the kernels is wrong; nothing is timed.
        """
        self.options.out.mkdir(parents=True, exist_ok=True)
        references = self.check()
        if self.options.accuracy_only:
            self.write("accuracy.json")
            return
        self.ceilings()
        self.time_ops(references)
        if self.options.layer:
            self.time_layer()
        self.cpu_times()
        if self.options.profile:
            self.profile()
        self.write("ops.json")
        self.show()
        try:
            draw(self.results, self.options.out / "ops.png")
            self.say(f"wrote {self.options.out / 'ops.json'} and ops.png")
        except ImportError as error:
            self.say(f"wrote {self.options.out / 'ops.json'}; no picture ({error}): `megalodon bench plot` draws it")

    def write(self, name: str) -> None:
        """Write the results so far."""
        write_json(self.results, self.options.out / name)

    # Correctness

    def check(self) -> dict[str, list[str]]:
        """Judge the kernels on every case and the references on one; the references of each op that may be timed.

        Raises:
            SystemExit: a result of the kernels has a larger error than is allowed.
        """
        rows = self.results["accuracy"]
        for op in self.ops:
            for dtype in DTYPES.values():
                cases = standard_cases(op, dtype, self.device, large=not self.small)
                if self.options.golden:
                    cases += golden_cases(self.options.golden, op, dtype, self.device)
                for case in cases:
                    found = judge(case, mode=self.kernels)
                    rows += found
                    worst = max(found, key=lambda row: row["ratio"] / row["limit"])
                    verdict = "ok   " if all(row["ok"] for row in found) else "WRONG"
                    self.say(
                        f"{verdict} {op}, {worst['dtype']}, {case.name}: "
                        f"worst {worst['quantity']}, {worst['ratio']:.2f} of at most {worst['limit']:.1f} units"
                    )
        print(accuracy_table(rows), flush=True)
        wrong = [row for row in rows if not row["ok"]]
        if wrong:
            self.write("accuracy.json")
            named = {f"{row['op']} ({row['dtype']}, {row['case']}: {row['quantity']})" for row in wrong}
            sys.exit(f"megalodon bench: nothing is timed, for these are wrong: {', '.join(sorted(named))}")
        if self.options.quick or self.options.accuracy_only:
            return {op: [] for op in self.ops}
        return {op: [impl for impl in REFERENCES[op] if self.reference_is_right(op, impl)] for op in self.ops}

    def reference_is_right(self, op: str, impl: str) -> bool:
        """Whether a reference computes the op; why not is printed."""
        dim, length = (256, 1025) if not self.small else (8, 33)
        shape = (2, length, dim)
        try:
            function, mode = implementation(op, impl, dim)

            def call(*, cema_input: str = "released", groups: int = 0, **arguments: Tensor) -> dict[str, Tensor]:
                return {"y": function(*arguments.values())}

            if op == "cema":
                problem = cema_problem(shape, CEMA_ORDER, torch.bfloat16, self.device, state=False)
            else:
                problem = timestep_norm_problem(shape, norm_groups(dim), torch.bfloat16, self.device, state=False)
            case = Case(op, f"as initialised, L {length}", [lambda: problem])
            rows = judge(case, impl, mode, call, REFERENCE_LIMIT)
        except Exception as error:  # a reference that does not run here is left out, whatever the reason
            self.say(f"{op}: {impl} is left out, it does not run: {type(error).__name__}: {str(error)[:300]}")
            return False
        self.results["accuracy"] += rows
        wrong = [f"{row['quantity']} {row['ratio']:.2f}" for row in rows if not row["ok"]]
        self.say(
            f"{op}: {impl} " + (f"is left out, its results are wrong: {', '.join(wrong)}" if wrong else "is right")
        )
        return not wrong

    # Speed

    def ceilings(self) -> None:
        """Rates of a copy and of a matrix product on this device, measured in the same run."""
        numbers, width = (2**30, 8192) if not self.small else (2**16, 64)
        numbers = min(numbers, free_memory(self.device) // 8)
        self.results["copy_tb_s"] = copy_rate(self.device, numbers)
        self.results["matmul_tflops"] = matmul_rate(self.device, width)
        self.say(f"copy {self.results['copy_tb_s']:.2f} TB/s, bf16 product {self.results['matmul_tflops']:.0f} TFLOP/s")

    def plan(self, references: dict[str, list[str]]) -> list[tuple[str, str, Shape, str]]:
        """(op, impl, shape, dtype) of every row, each once, in the order of measuring."""
        shapes = tuple(self.options.shapes or MAIN_SHAPES)
        wanted = []
        for op in self.ops:
            for shape in shapes:
                wanted += [(op, impl, shape, "bfloat16") for impl in ("cuda", *references[op])]
            if not self.options.shapes:
                wanted += [(op, impl, shapes[0], "float32") for impl in ("cuda", *references[op])]
                lengths = [s for s in sweep_shapes() if not self.options.quick or s[1] in QUICK_LENGTHS]
                wanted += [(op, "cuda", shape, "bfloat16") for shape in lengths]
        return list(dict.fromkeys(wanted))

    def time_ops(self, references: dict[str, list[str]]) -> None:
        """A row for each entry of the plan; what does not fit into memory is skipped, and the skip printed."""
        for op, impl, shape, dtype in self.plan(references):
            label = f"{op}, {impl}, {shape}, {dtype}"
            itemsize = DTYPES[dtype].itemsize
            free = free_memory(self.device)
            needed = int(5.5 * itemsize * shape[0] * shape[1] * shape[2])  # x, dy, y, dx and half an activation
            if needed > free:
                self.say(f"{label}: skipped, {needed / 2**30:.1f} GiB are needed and {free / 2**30:.1f} GiB free")
                continue
            try:
                row = self.time_op(op, impl, shape, DTYPES[dtype])
            except torch.OutOfMemoryError:
                self.say(f"{label}: skipped, it needs more memory than {free / 2**30:.1f} GiB")
                continue
            except Exception as error:
                if impl == "cuda":
                    raise
                self.say(f"{label}: skipped, {type(error).__name__}: {str(error)[:300]}")
                continue
            self.results["rows"].append(row)
            self.write("ops.unfinished.json")
            x = [multiple(row, which) or 0.0 for which in PASSES]
            self.say(
                f"{label}: forward {row['fwd_ms']:.3f} ms ({x[0]:.2f} x floor), with backward "
                f"{row['fwd_bwd_ms']:.3f} ms ({x[1]:.2f} x), "
                f"{row['extra_mib']:.0f} MiB extra ({row['extra_share']:.3f})"
            )
        (self.options.out / "ops.unfinished.json").unlink(missing_ok=True)

    def time_op(self, op: str, impl: str, shape: Shape, dtype: torch.dtype) -> SpeedRow:
        """The row of one implementation at one shape."""
        function, mode = implementation(op, impl, shape[2])
        with use_kernels(self.kernels if impl == "cuda" else mode):
            sets = self.inputs(op, shape, dtype)
            found = measure(function, sets, self.device, self.seconds)
        row: SpeedRow = {
            "op": op,
            "impl": impl,
            "B": shape[0],
            "L": shape[1],
            "D": shape[2],
            "dtype": str(dtype).removeprefix("torch."),
            **found,
            "floor_fwd_ms": floor_ms(2, shape, dtype.itemsize, self.results["copy_tb_s"]),
            "floor_fwd_bwd_ms": floor_ms(5, shape, dtype.itemsize, self.results["copy_tb_s"]),
            "extra_share": found["extra_mib"] * MIB / size(sets[0][0][0]),
        }
        if op == "cema":
            row["N"] = CEMA_ORDER
        else:
            row["G"] = norm_groups(shape[2])
        return row

    def inputs(self, op: str, shape: Shape, dtype: torch.dtype) -> list[tuple[list[Tensor], Tensor]]:
        """Sets of (inputs, gradient of the output) that share their parameters, all inputs with a gradient."""
        dim = shape[2]
        if op == "cema":
            parameters = [p.to(self.device) for p in cema_parameters(dim, CEMA_ORDER, 0).values()]
        else:
            parameters = [torch.randn(dim, device=self.device) / 4 for _ in range(2)]
        parameters = [p.requires_grad_(True) for p in parameters]
        sets = []
        for _ in range(input_sets(dtype.itemsize * shape[0] * shape[1] * dim, self.device)):
            x, dy = (torch.empty(shape, dtype=dtype, device=self.device).normal_() for _ in range(2))
            sets.append(([x.requires_grad_(True), *parameters], dy))
        return sets

    def time_layer(self) -> None:
        """Rows with op "layer", and the ratio of the two."""
        for shape in layer.SHAPES if not self.small else ((2, 40),):
            rows = []
            for impl in ("cuda", "torch"):
                free_memory(self.device)
                cfg = layer.layer_config(64 if self.small else None)
                seconds = 0.0 if self.small else 1.0
                mode = self.kernels if impl == "cuda" else "off"
                tflops = self.results["matmul_tflops"]
                rows.append(layer.measure_layer(cfg, shape, impl, mode, self.device, tflops, seconds))
                self.say(f"layer, {impl}, {shape}: {rows[-1]['fwd_bwd_ms']:.1f} ms forward and backward")
            self.say(f"layer, {shape}: {rows[1]['fwd_bwd_ms'] / rows[0]['fwd_bwd_ms']:.2f} times as fast")
            self.results["rows"] += rows

    def cpu_times(self) -> None:
        """CPU time of an eager call, at a shape that keeps the GPU idle, beside that of an op that does nothing."""
        shape = (1, 64, 64) if not self.small else (1, 8, 8)
        found: dict[str, CpuTimes] = {}
        calls, rounds, profiled = (100, 9, 10) if not self.small else (1, 3, 1)
        with use_kernels(self.kernels):
            for op in self.ops:
                inputs, dy = self.inputs(op, shape, torch.bfloat16)[0]
                function = implementation(op, "cuda", shape[2]).function

                def forward(_: int, function=function, inputs=inputs) -> Tensor:
                    return function(*inputs)

                def both(_: int, function=function, inputs=inputs, dy=dy) -> Any:
                    return torch.autograd.grad(function(*inputs), inputs, dy)

                found[op] = {
                    "cpu_us_fwd": cpu_us(forward, self.device, calls, rounds),
                    "cpu_us_fwd_bwd": cpu_us(both, self.device, calls, rounds),
                    "kernels_fwd": sum(n for _, n, _ in kernel_times(forward, self.device, profiled)),
                    "kernels_fwd_bwd": sum(n for _, n, _ in kernel_times(both, self.device, profiled)),
                }
        empty = empty_op()
        x = torch.randn(shape, device=self.device).requires_grad_(True)
        dy = torch.randn(shape, device=self.device)
        found["empty"] = {
            "cpu_us_fwd": cpu_us(lambda _: empty(x), self.device, calls, rounds),
            "cpu_us_fwd_bwd": cpu_us(lambda _: torch.autograd.grad(empty(x), [x], dy), self.device, calls, rounds),
        }
        self.results["cpu"] = found
        for op, times in found.items():
            self.say(f"CPU, {op}: " + ", ".join(f"{name} {value:.1f}" for name, value in times.items()))
        for row in self.results["rows"]:
            if row["impl"] == "cuda" and row["op"] in found:
                row["cpu_us_fwd"] = found[row["op"]]["cpu_us_fwd"]

    def profile(self) -> None:
        """Times of the GPU kernels at the main shapes."""
        self.results["profile"] = []
        with use_kernels(self.kernels):
            for op in self.ops:
                for shape in self.options.shapes or MAIN_SHAPES:
                    free_memory(self.device)
                    inputs, dy = self.inputs(op, shape, torch.bfloat16)[0]
                    function = implementation(op, "cuda", shape[2]).function

                    def both(_: int, function=function, inputs=inputs, dy=dy) -> Any:
                        return torch.autograd.grad(function(*inputs), inputs, dy)

                    self.say(f"kernels of {op} at {shape}, forward and backward, launches and microseconds a call")
                    for name, launches, us in kernel_times(both, self.device):
                        print(f"    {us:9.1f}  {launches:4.1f}  {name[:120]}", flush=True)
                        self.results["profile"].append(
                            {"op": op, "shape": shape, "kernel": name, "launches": launches, "us": us}
                        )

    def show(self) -> None:
        """Print the table, and how flat the sweep is."""
        print(speed_table(self.results["rows"]))
        for op in self.ops:
            for which in PASSES:
                spread = flatness(self.results["rows"], op, which)
                if spread is not None:
                    self.results.setdefault("spread", {})[f"{op}_{which}"] = spread
                    print(f"{op}, {which}: time per element over the lengths within {spread:.1%} of the fastest")
        self.write("ops.json")
