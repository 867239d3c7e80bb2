"""The matrix of layouts: every dimension of torchtitan's mesh alone, in pairs and three at once, each trained for some
steps from one seed checkpoint by processes on gloo; their losses and gradient norms against one process's.

As a program (`make layouts`) it runs all of them and then a checkpoint that moves from layout to layout, prints a table
and writes layouts.json and layouts.png into its output folder. `tests/titan/test_layouts.py` runs some of them.
"""

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from support.tiny_job import losses_and_norms, read_records, train_well, write_job

STEPS, TOLERANCE = 5, 1e-4
Records = dict[int, tuple[float, float]]
"""step -> (loss, gradient norm)"""

ROWS, LENGTH, CHUNK = 4, 64, 16  # a step: whole chunks for up to four ranks


class Layout(NamedTuple):
    """What a run asks for: degrees by dimension, and other options of the host as TOML sections."""

    degrees: dict[str, int]
    options: dict[str, dict[str, Any]] = {}  # noqa: RUF012  read only

    @property
    def processes(self) -> int:
        product = 1
        for degree in self.degrees.values():
            product *= degree
        return product


DEGREES = {
    "replicate": "data_parallel_replicate_degree",
    "fsdp": "data_parallel_shard_degree",
    "cp": "context_parallel_degree",
    "tp": "tensor_parallel_degree",
    "pp": "pipeline_parallel_degree",
}
SCHEDULE = "pipeline_parallel_schedule"
SELECTIVE = {"activation_checkpoint": {"mode": "selective", "selective_ac_option": "op"}}
FULL = {"activation_checkpoint": {"mode": "full"}}
COMPILED = {"compile": {"enable": True}}
TIED = {"megalodon": {"tie_embedding": True, "scale_embedding": True}}
ACCUMULATED = {"training": {"local_batch_size": 1, "global_batch_size": ROWS}}

LAYOUTS: dict[str, Layout] = {
    **{name: Layout({name: 2}) for name in DEGREES},
    "cp 4": Layout({"cp": 4}),
    "pp, Interleaved1F1B": Layout({"pp": 2}, {"parallelism": {SCHEDULE: "Interleaved1F1B"}}),
    "pp, ZBVZeroBubble": Layout({"pp": 2}, {"parallelism": {SCHEDULE: "ZBVZeroBubble"}}),
    **{f"{a} x {b}": Layout({a: 2, b: 2}) for i, a in enumerate(DEGREES) for b in list(DEGREES)[i + 1 :]},
    "cp x tp x pp": Layout({"cp": 2, "tp": 2, "pp": 2}),
    "fsdp, compiled": Layout({"fsdp": 2}, COMPILED),
    "cp, compiled": Layout({"cp": 2}, COMPILED | SELECTIVE),
    "tp, compiled": Layout({"tp": 2}, COMPILED),
    "cp x tp, compiled": Layout({"cp": 2, "tp": 2}, COMPILED | SELECTIVE),
    "cp, selective recomputation": Layout({"cp": 2}, SELECTIVE),
    "cp x tp, full recomputation": Layout({"cp": 2, "tp": 2}, FULL),
    "cp, accumulated gradients": Layout({"cp": 2}, ACCUMULATED),
    "fsdp x tp, accumulated gradients": Layout({"fsdp": 2, "tp": 2}, ACCUMULATED),
    "fsdp, kept gathered": Layout({"fsdp": 2}, {"parallelism": {"fsdp_reshard_after_forward": "never"}}),
    "cp x pp, ZBVZeroBubble": Layout({"cp": 2, "pp": 2}, {"parallelism": {SCHEDULE: "ZBVZeroBubble"}}),
    "tp, whole logits": Layout({"tp": 2}, {"parallelism": {"disable_loss_parallel": True}}),
    "fsdp, tied": Layout({"fsdp": 2}, TIED),
    "tp, tied": Layout({"tp": 2}, TIED),
    "cp x tp, tied": Layout({"cp": 2, "tp": 2}, TIED),
}

FLOAT8 = {
    "model": {"converters": ["quantize.linear.float8"]},
    "quantize.linear.float8": {"emulate": True},
    "megalodon": {"z_dim": 32, "value_dim": 64, "ffn_dim": 64},  # parts of two ranks are multiples of 16
}
GATHERED_FLOAT8 = FLOAT8 | {
    "quantize.linear.float8": {
        "emulate": True,
        "enable_fsdp_float8_all_gather": True,
        "precompute_float8_dynamic_scale_for_fsdp": True,
    }
}
FLOAT8_LAYOUTS = {
    "fsdp, gathered in float8": Layout({"fsdp": 2}, GATHERED_FLOAT8),
    "cp x tp, float8": Layout({"cp": 2, "tp": 2}, FLOAT8),
}
"""Ranks scale their own activations and parts, so these are near one process in float8 and not equal to it."""

MOVES = ("fsdp", "tp", "cp", "pp", "one process")
STEPS_OF_A_MOVE = 2
"""A checkpoint's way through layouts, and how many steps it makes in each."""


def rows_of_a_rank(layout: Layout) -> int:
    return ROWS // (layout.degrees.get("fsdp", 1) * layout.degrees.get("replicate", 1))


def validation(layout: Layout, folder: Path) -> dict[str, Any]:
    """The host's section for a validation after the last step, on the texts of the job in `folder`."""
    texts = {"dataset": "local_text", "dataset_path": str(folder / "texts"), "seq_len": LENGTH}
    return {"enable": True, **texts, "local_batch_size": rows_of_a_rank(layout), "freq": STEPS, "steps": 2}


def sections(layout: Layout, steps: int, **more: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The job's TOML sections for a layout, for `write_job`."""
    rows = rows_of_a_rank(layout)
    found: dict[str, dict[str, Any]] = {
        "megalodon": {"n_layers": 4, "chunk_size": CHUNK},
        # A norm that every step exceeds, so that clipping is compared too.
        "training": {"steps": steps, "seq_len": LENGTH, "local_batch_size": rows, "max_norm": 0.5},
        "parallelism": {key: layout.degrees.get(name, 1) for name, key in DEGREES.items()},
    }
    for extra in (layout.options, more):
        for name, options in extra.items():
            found[name] = found.get(name, {}) | options
    return found


def run(folder: Path, layout: Layout, seed: Path | None = None, steps: int = STEPS, **more: dict[str, Any]) -> Records:
    """Train in `folder` (its checkpoints and records stay there) from a seed checkpoint, or as the folder stands."""
    config = write_job(folder, **sections(layout, steps, **more))
    start = ["--checkpoint.load_only", "--checkpoint.initial_load_path", str(seed)] if seed else []
    train_well(config, *start, processes=layout.processes)
    return losses_and_norms(read_records(folder / "run"))


def make_seed(folder: Path, layout: Layout) -> Path:
    """A seed checkpoint: stages of a pipeline would otherwise draw their own weights."""
    one = Layout({}, layout.options)
    train_well(write_job(folder, **sections(one, STEPS)), "--checkpoint.create_seed_checkpoint")
    return folder / "run" / "checkpoint" / "step-0"


def move(folder: Path) -> Records:
    """Train through MOVES, each from the checkpoint of the one before, in one folder."""
    records: Records = {}
    for number, name in enumerate(MOVES, 1):
        layout = LAYOUTS.get(name, Layout({}))
        records = run(folder, layout, steps=number * STEPS_OF_A_MOVE, checkpoint={"interval": STEPS_OF_A_MOVE})
    return records


def unbroken(folder: Path) -> Records:
    """The run of one process that `move` must equal."""
    return run(folder, Layout({}), steps=len(MOVES) * STEPS_OF_A_MOVE, checkpoint={"interval": 100})


def deviation(found: Records, expected: Records) -> float:
    """The largest relative difference of a loss or a gradient norm; infinite where steps are missing."""
    if found.keys() != expected.keys():
        return float("inf")
    pairs = [pair for step in expected for pair in zip(found[step], expected[step], strict=True)]
    return max(abs(a - b) / abs(b) for a, b in pairs)


def _key(layout: Layout) -> str:
    """Layouts of one model share the run of one process that they are compared with."""
    return json.dumps(layout.options.get("megalodon", {}), sort_keys=True)


def run_matrix(names: list[str], out: Path) -> list[dict[str, Any]]:
    """Rows of the table: name, processes, seconds, deviation."""
    expected: dict[str, tuple[Path, Records]] = {}
    rows = []
    for number, name in enumerate(names, 1):
        layout, key = LAYOUTS[name], _key(LAYOUTS[name])
        folder = out / "runs" / str(number)
        if key not in expected:
            seed = make_seed(out / "runs" / f"seed {len(expected)}", layout)
            model = {"megalodon": layout.options.get("megalodon", {})}
            expected[key] = (seed, run(out / "runs" / f"alone {len(expected)}", Layout({}, model), seed))
        begin = time.perf_counter()
        seed, alone = expected[key]
        found = deviation(run(folder, layout, seed), alone)
        seconds = time.perf_counter() - begin
        rows.append({"layout": name, "processes": layout.processes, "deviation": found, "seconds": round(seconds, 1)})
        _tell(f"{number}/{len(names)}", rows[-1])
    return rows


def _tell(place: str, row: dict[str, Any]) -> None:
    mark = "" if row["deviation"] <= TOLERANCE else "   ABOVE THE TOLERANCE"
    print(f"{place:>7}  {row['layout']:36} {row['processes']} processes  {row['deviation']:.1e}{mark}", flush=True)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """A bar for each layout."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 0.28 * len(rows) + 1.2), layout="constrained")
    axes.barh([row["layout"] for row in rows], [max(row["deviation"], 1e-9) for row in rows], color="tab:blue")
    axes.axvline(TOLERANCE, color="tab:red", label="allowed")
    axes.set_xscale("log")
    axes.set_xlim(1e-9, 1e-3)
    axes.invert_yaxis()
    axes.set_xlabel(f"loss and gradient norm: largest relative difference\nfrom one process, {STEPS} steps, float32")
    axes.legend(loc="upper right")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="layouts to run, by default all: " + "; ".join(LAYOUTS))
    parser.add_argument("--out", type=Path, default=Path("outputs/layouts"))
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in LAYOUTS]
    if unknown:
        parser.error(f"no layout {unknown[0]!r}; there are: {'; '.join(LAYOUTS)}")
    shutil.rmtree(options.out / "runs", ignore_errors=True)
    options.out.mkdir(parents=True, exist_ok=True)
    rows = run_matrix(options.names or list(LAYOUTS), options.out)
    if not options.names:
        begin = time.perf_counter()
        found = deviation(move(options.out / "runs" / "moved"), unbroken(options.out / "runs" / "unbroken"))
        seconds = round(time.perf_counter() - begin, 1)
        rows.append({"layout": " -> ".join(MOVES), "processes": 2, "deviation": found, "seconds": seconds})
        _tell("moved", rows[-1])
    (options.out / "layouts.json").write_text(json.dumps(rows, indent=1) + "\n")
    draw(rows, options.out / "layouts.png")
    print(f"{options.out / 'layouts.json'} and layouts.png")
    sys.exit(any(not row["deviation"] <= TOLERANCE for row in rows))


if __name__ == "__main__":
    main()
