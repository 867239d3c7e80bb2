"""The matrix of layouts: every dimension of the host's mesh alone, in pairs and three at once, with the options that
change what ranks exchange. Each trains a small model on text, from the same weights; one process is the measure.

As a program (`make layouts`) it runs all of them and then a checkpoint that moves from layout to layout, prints a table
and writes layouts.json and layouts.png. Ranks of one number start once. The tests run some of them.
"""

import argparse
import itertools
import math
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megalodon_plugin.data.records import GRADIENT_NORM, LARGEST_LOSS, MEAN_LOSS, TOKENS_SEEN, VALIDATION_LOSS, Record
from megalodon_plugin.files import write_json
from megalodon_plugin.parallel.layout import DIMENSIONS, ONE_RANK, Layout

from ..train.job import TrainingJob
from .launch import run_tasks
from .rank import Task
from .report import draw_matrix
from .results import MatrixRow, Outcome, RankRow
from .rows import check_against_single, logged, reason_of

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
SMALL_TOLERANCES = {False: 1e-5, True: 5e-3}
"""Is the precision bfloat16? -> the largest relative deviation of losses and gradient norms that is allowed."""

MODEL = SMALL | {"n_layers": 4, "n_heads": 2, "norm_groups": 4, "vocab_size": 258}
TIED = MODEL | {"tie_embedding": True, "scale_embedding": True}
PRESET = {"flavor": "debug", "vocab_size": 258}
STEPS, ROWS, LENGTH = 4, 4, 64  # a step: whole chunks for up to four ranks
TOLERANCE = 1e-4
"""Of losses and gradient norms in float32."""
SCHEDULE = "parallelism.pipeline_parallel_schedule"
FLOAT8 = {"model.converters": ["quantize.linear.float8"], "quantize.linear.float8.emulate": True}
GATHERED_FLOAT8 = FLOAT8 | {
    f"quantize.linear.float8.{name}": True
    for name in ("enable_fsdp_float8_all_gather", "precompute_float8_dynamic_scale_for_fsdp")
}
SELECTIVE, FULL = "selective", "full"


@dataclass(frozen=True)
class Entry:
    """A run of the matrix: a layout, and how the job differs from the plain one."""

    layout: Layout
    host: dict[str, Any] = field(default_factory=dict)
    """The host's options."""
    model: dict[str, Any] = field(default_factory=lambda: MODEL)
    """The preset as "flavor" and options of `[megalodon]`."""
    checkpointing: str = "none"
    compiled: bool = False
    accumulated: bool = False
    """One row a backward pass."""
    low_precision: bool = False
    most: tuple[float, float] = (TOLERANCE, TOLERANCE)
    """By how much losses and gradient norms may deviate from one process'."""
    least: float | None = None
    """More than this the largest deviation must be, and every step must differ: less would mean that the host has left
    the layout in float32, or that ranks do not scale their own parts."""

    @property
    def single(self) -> "Entry":
        """The run of one process that it is compared with: in float32, or in float8 if it is."""
        return Entry(ONE_RANK, {k: v for k, v in self.host.items() if k in FLOAT8}, self.model)


def _entries() -> dict[str, Entry]:
    one, two = ({" x ".join(names): _of(*names) for names in itertools.combinations(DIMENSIONS, n)} for n in (1, 2))
    cp, tp, pp, fsdp, cp_tp = one["cp"], one["tp"], one["pp"], one["fsdp"], two["cp x tp"]
    zero_bubble = {SCHEDULE: "ZBVZeroBubble"}
    return {
        **one,
        "cp 4": Entry(Layout(cp=4)),
        "pp, Interleaved1F1B": replace(pp, host={SCHEDULE: "Interleaved1F1B"}),
        "pp, ZBVZeroBubble": replace(pp, host=zero_bubble),
        **two,
        "cp x tp x pp": _of("cp", "tp", "pp"),
        "fsdp, compiled": replace(fsdp, compiled=True),
        "cp, compiled": replace(cp, compiled=True, checkpointing=SELECTIVE),
        "tp, compiled": replace(tp, compiled=True),
        "cp x tp, compiled": replace(cp_tp, compiled=True, checkpointing=SELECTIVE),
        "cp, selective recomputation": replace(cp, checkpointing=SELECTIVE),
        "cp x tp, full recomputation": replace(cp_tp, checkpointing=FULL),
        "cp, accumulated gradients": replace(cp, accumulated=True),
        "fsdp x tp, accumulated gradients": replace(two["fsdp x tp"], accumulated=True),
        "fsdp, kept gathered": replace(fsdp, host={"parallelism.fsdp_reshard_after_forward": "never"}),
        "cp x pp, ZBVZeroBubble": replace(two["cp x pp"], host=zero_bubble),
        "tp, whole logits": replace(tp, host={"parallelism.disable_loss_parallel": True}),
        "fsdp, tied": replace(fsdp, model=TIED),
        "tp, tied": replace(tp, model=TIED),
        "cp x tp, tied": replace(cp_tp, model=TIED),
        "tp, the preset debug": replace(tp, model=PRESET),
    }


def _of(*names: str) -> Entry:
    """Two ranks in each of the dimensions."""
    return Entry(Layout.parse(" x ".join(f"{name} 2" for name in names)))


ENTRIES = _entries()
"""Those that equal one process in float32."""
LOW_PRECISION = {
    "tp, bfloat16": replace(ENTRIES["tp"], low_precision=True, most=(0.01, 0.01), least=TOLERANCE),
    "pp, bfloat16": replace(ENTRIES["pp"], low_precision=True, most=(0.01, 0.01), least=TOLERANCE),
    # Ranks scale their own activations and parts, which is some of float8's own rounding, 3% of a number.
    "fsdp, gathered in float8": replace(ENTRIES["fsdp"], host=GATHERED_FLOAT8, most=(0.01, 0.05), least=0.0),
    "cp x tp, float8": replace(ENTRIES["cp x tp"], host=FLOAT8, most=(0.01, 0.05), least=0.0),
}
"""Those that are near one process and not equal to it."""
MOVES = ("fsdp", "tp", "cp", "pp", "1")
STEPS_OF_A_MOVE = 2
"""A checkpoint's way through layouts, and how many steps it makes in each."""


def task_of(entry: Entry, texts: Path, steps: int = STEPS, **more: Any) -> Task:
    """The training of an entry on the text of a folder; `more` are fields of the job."""
    rows = 1 if entry.accumulated else ROWS // entry.layout.data
    host = {
        "optimizer.lr": 5e-3,
        "training.max_norm": 0.5,  # which every step exceeds, so that clipping is compared too
        "data.validation_fraction": 0.3,
        "validation.enable": "ZBV" not in entry.host.get(SCHEDULE, ""),  # which the host cannot validate under
        "validation.seq_len": LENGTH,
        "validation.local_batch_size": ROWS // entry.layout.data,
        "validation.freq": STEPS,
        "validation.steps": 2,
        "metrics.disable_color_printing": True,
    }
    job = TrainingJob(
        "megalodon",
        tuple(entry.model.items()),
        batch=rows,
        length=LENGTH,
        checkpointing=entry.checkpointing,
        compiled=entry.compiled,
        low_precision=entry.low_precision,
        layout=entry.layout,
        rows=ROWS,
        same_weights=True,
        text=str(texts),
        host_options=tuple((host | entry.host | more.pop("host_options", {})).items()),
    )
    return Task(replace(job, **more), steps)


def tasks_of_a_move(texts: Path, folder: Path) -> list[Task]:
    """Training through MOVES, each from the checkpoint that the one before has left in the folder."""
    every = {"checkpoint.enable": True, "checkpoint.interval": STEPS_OF_A_MOVE, "validation.enable": False}
    return [_moving(ENTRIES.get(name, Entry(ONE_RANK)), n, texts, folder, every) for n, name in enumerate(MOVES, 1)]


def task_without_moves(texts: Path, folder: Path) -> Task:
    """The training of one process that the way through all layouts must equal."""
    return _moving(Entry(ONE_RANK), len(MOVES), texts, folder, {"validation.enable": False})


def _moving(entry: Entry, moves: int, texts: Path, folder: Path, host: dict[str, Any]) -> Task:
    host = host | {"checkpoint.last_save_model_only": False, "checkpoint.keep_latest_k": 0}
    return task_of(entry, texts, moves * STEPS_OF_A_MOVE, folder=str(folder), host_options=host)


def check(entry: Entry, ranks: list[RankRow], single: RankRow) -> Outcome:
    """How far the ranks' losses, gradient norms and validations are from those of one process, whose row is `single`.

    "deviation" is the largest relative difference; "failed" says what is out of bounds, also inside a record.
    """
    reason = reason_of(ranks) or reason_of([single])
    if reason is not None:
        return {"deviation": None, "failed": reason}
    found, expected = records_of(ranks), single["records"]
    training, validation = ([r for r in found if name in r] for name in (GRADIENT_NORM, VALIDATION_LOSS))
    training_of_single = [r for r in expected if GRADIENT_NORM in r]
    validation_of_single = [r for r in expected if VALIDATION_LOSS in r]
    if [r["step"] for r in training] != [r["step"] for r in training_of_single]:
        return {"deviation": None, "failed": f"steps must be those of {len(training_of_single)}, but are {training}"}
    losses, norms = (
        [_relative(a[name], b[name]) for a, b in zip(training, training_of_single, strict=True)]
        for name in (MEAN_LOSS, GRADIENT_NORM)
    )
    if validation:
        if [r["step"] for r in validation] != [r["step"] for r in validation_of_single]:
            return {"deviation": None, "failed": f"validations must be as many as one process', but are {validation}"}
        pairs = zip(validation, validation_of_single, strict=True)
        losses += [_relative(a[VALIDATION_LOSS], b[VALIDATION_LOSS]) for a, b in pairs]
    far = max(*losses, *norms)
    row: Outcome = {"deviation": far}
    failures = list(_failures(entry, training, training_of_single))
    if max(losses) > entry.most[0] or max(norms) > entry.most[1]:
        failures.append(f"losses are off by {max(losses):.1e}, gradient norms by {max(norms):.1e}")
    if entry.least is not None:
        steps = zip(losses, norms, strict=False)
        if far <= entry.least or any(max(step) == 0 for step in steps):
            failures.append(f"losses and gradient norms are off by {far:.1e} only: precision is not lower")
    if failures:
        row["failed"] = "; ".join(failures)
    return row


def _failures(entry: Entry, training: list[Record], single: list[Record]) -> Iterator[str]:
    """What records say that cannot be."""
    shared = entry.layout.data * entry.layout.cp == 1
    for record, expected in zip(training, single, strict=True):
        step, mean = record["step"], record[MEAN_LOSS]
        largest = record[LARGEST_LOSS]
        if record[TOKENS_SEEN] != expected[TOKENS_SEEN] or expected[TOKENS_SEEN] != ROWS * LENGTH * step:
            yield f"step {step}: the job must have seen {ROWS * LENGTH * step} tokens, not {record[TOKENS_SEEN]}"
        # Ranks that have tokens of their own have losses of their own.
        if not (math.isclose(largest, mean, rel_tol=1e-6) if shared else mean < largest < 1.5 * mean):
            yield f"step {step}: the largest loss of a rank is {largest}, the mean {mean}"
        if expected[GRADIENT_NORM] <= 0.5:
            yield f"step {step}: gradients must be clipped, but their norm is {expected[GRADIENT_NORM]}"


def records_of(ranks: list[RankRow]) -> list[Record]:
    """The records of a rank that has the loss: under a pipeline only those of the last stage do."""
    best = logged(ranks)
    return next(rank["records"] for rank in ranks if rank["losses_and_norms"] == best)


def _relative(found: float, expected: float) -> float:
    return abs(found - expected) / abs(expected)


def small_task(layout: Layout, low_precision: bool) -> Task:
    """The check of a layout on this machine, on random tokens.

    In float32 exchanges are counted; those of bfloat16 are the same in half the bytes.
    """
    job = TrainingJob(
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
    return Task(job, steps=4, count=not low_precision)


def write_texts(folder: Path) -> Path:
    """Six small text files."""
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(1, 7):
        (folder / f"{n}.txt").write_text("\n".join(f"{n} times {i} is {n * i}." for i in range(100)))
    return folder


class Matrix:
    """Runs entries by number of processes, and what they are compared with before them."""

    def __init__(self, out: Path, timeout: float):
        self.out, self.timeout, self.rows = out, timeout, list[MatrixRow]()
        self.texts = write_texts(out / "texts")

    def run(self, tasks: Sequence[Task]) -> Iterator[list[RankRow]]:
        with closing(run_tasks(tasks, self.timeout, self.out / "layouts.log")) as results:
            yield from results

    def run_entries(self, entries: dict[str, Entry]) -> None:
        singles: list[Entry] = []
        for entry in entries.values():
            singles += [entry.single] if entry.single not in singles else []
        found = [ranks[0] for ranks in self.run([task_of(single, self.texts) for single in singles])]
        groups: dict[tuple[int, str], dict[str, Entry]] = {}
        for name, entry in entries.items():
            # PyTorch's compiler fails for some graphs after those of another layout: a compiled entry has new ranks.
            groups.setdefault((entry.layout.gpus, name if entry.compiled else ""), {})[name] = entry
        for (processes, _), chosen in sorted(groups.items()):
            begin = time.perf_counter()
            results = self.run([task_of(entry, self.texts) for entry in chosen.values()])
            for (name, entry), ranks in zip(chosen.items(), results, strict=True):
                self._add(name, processes, begin, check(entry, ranks, found[singles.index(entry.single)]))
                begin = time.perf_counter()
        order = list(entries)
        self.rows.sort(key=lambda row: order.index(row["layout"]))

    def run_move(self) -> None:
        begin, folder = time.perf_counter(), self.out / "moved"
        shutil.rmtree(folder, ignore_errors=True)
        *shared, last = tasks_of_a_move(self.texts, folder)
        moved = list(self.run(shared))
        *last_moved, unbroken = self.run([last, task_without_moves(self.texts, self.out / "unbroken")])
        self._add(" -> ".join(MOVES), 2, begin, check_move([*moved, *last_moved], unbroken))

    def _add(self, name: str, processes: int, begin: float, found: Outcome) -> None:
        seconds = round(time.perf_counter() - begin, 1)
        row: MatrixRow = {"layout": name, "processes": processes, **found, "seconds": seconds}
        self.rows.append(row)
        result = f"FAILED: {row['failed']}" if "failed" in row else f"{row['deviation']:.1e}"
        print(f"{name:36} {processes} processes  {result}", flush=True)


def check_move(moves: list[list[RankRow]], unbroken: list[RankRow]) -> Outcome:
    """How far the steps of a checkpoint that has moved are from those of one process; `moves` are the ranks of each."""
    reason = next(filter(None, map(reason_of, [*moves, unbroken])), None)
    if reason is not None:
        return {"deviation": None, "failed": reason}
    steps = [step for ranks in moves for step in logged(ranks)]
    return check_against_single([{"losses_and_norms": steps}], logged(unbroken), TOLERANCE)


def main() -> None:
    entries = ENTRIES | LOW_PRECISION
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="layouts to run, by default all: " + "; ".join(entries))
    parser.add_argument("--out", type=Path, default=Path("outputs/layouts"))
    parser.add_argument("--timeout", type=float, default=600.0, help="end what takes longer, seconds (600)")
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in entries]
    if unknown:
        parser.error(f"no layout {unknown[0]!r}; there are: {'; '.join(entries)}")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "layouts.log").unlink(missing_ok=True)
    matrix = Matrix(options.out, options.timeout)
    matrix.run_entries({name: entries[name] for name in options.names or entries})
    if not options.names:
        matrix.run_move()
    write_json(matrix.rows, options.out / "layouts.json")
    equal = [row for row in matrix.rows if row["layout"] not in LOW_PRECISION and row["deviation"] is not None]
    draw_matrix(equal, TOLERANCE, STEPS, options.out / "layouts.png")
    print(options.out / "layouts.json", options.out / "layouts.png")
    sys.exit(any("failed" in row for row in matrix.rows))


if __name__ == "__main__":
    main()
