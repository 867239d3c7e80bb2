"""The results of `megalodon bench ops` beside their floors: tables for the terminal, and a picture."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megalodon_plugin.files import new_figure, write_figure

from ..environment import device_of
from .results import PASSES, AccuracyRow, OpsResults, Pass, Shape, SpeedRow, elements, multiple, shape_of

COLORS = {"cuda": "tab:green", "compiled": "tab:orange", "torch": "tab:blue", "fft": "tab:purple"}
SWEEP_DIM = 4096
SWEEP_LENGTHS = tuple(256 * 4**i for i in range(7))
"""256 to 1,048,576."""
SWEEP_TOKENS = 32768


def sweep_shapes() -> list[Shape]:
    """(B, L, D) of the sweep over lengths: B * L = 32768 as long as a row is no longer than that."""
    return [(max(1, SWEEP_TOKENS // length), length, SWEEP_DIM) for length in SWEEP_LENGTHS]


def floor_ms(activations: int, shape: Shape, itemsize: int, copy_tb_s: float) -> float:
    """The time to move that many activations of shape (B, L, D) once, at the rate of a copy.

    A forward pass must move 2 (x, y), forward and backward 5 (x, y, and then x, dy, dx).
    """
    batch, length, dim = shape
    return activations * batch * length * dim * itemsize / (copy_tb_s * 1e12) * 1e3


def flatness(rows: Iterable[SpeedRow], op: str, which: Pass = "fwd") -> float | None:
    """How much longer the slowest length of the sweep takes an element than the fastest: max / min - 1."""
    each = [picoseconds(row, which) for row in sweep_rows(rows, op)]
    return max(each) / min(each) - 1 if len(each) > 1 else None


def picoseconds(row: SpeedRow, which: Pass) -> float:
    """Time of an element."""
    return (row["fwd_ms"] if which == "fwd" else row["fwd_bwd_ms"]) * 1e9 / elements(row)


def sweep_rows(rows: Iterable[SpeedRow], op: str) -> list[SpeedRow]:
    """The op's rows that lie on the sweep, by length."""
    shapes = set(sweep_shapes())
    chosen = [
        row
        for row in rows
        if (row["op"], row["impl"], row["dtype"]) == (op, "cuda", "bfloat16") and shape_of(row) in shapes
    ]
    return sorted(chosen, key=lambda row: row["L"])


def table(rows: Sequence[Mapping[str, Any]], columns: list[tuple[str, str, str]]) -> str:
    """Rows as text. A column is (heading, key, format); what a row lacks is shown as a dash."""
    cells = [[heading for heading, _, _ in columns]]
    for row in rows:
        cells.append(["-" if row.get(key) is None else format(row[key], spec) for _, key, spec in columns])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def speed_table(rows: list[SpeedRow]) -> str:
    """Times with their multiples of the floor, and memory."""
    with_multiples = [
        dict(row)
        | {
            "fwd_x": multiple(row, "fwd"),
            "fwd_bwd_x": multiple(row, "fwd_bwd"),
            "ps": picoseconds(row, "fwd"),
        }
        for row in rows
    ]
    return table(
        with_multiples,
        [
            ("op", "op", ""),
            ("impl", "impl", ""),
            ("B", "B", "d"),
            ("L", "L", "d"),
            ("D", "D", "d"),
            ("dtype", "dtype", ""),
            ("fwd ms", "fwd_ms", ".3f"),
            ("x floor", "fwd_x", ".2f"),
            ("fwd+bwd ms", "fwd_bwd_ms", ".3f"),
            ("x floor", "fwd_bwd_x", ".2f"),
            ("fwd ps/element", "ps", ".3f"),
            ("eager fwd", "eager_fwd_ms", ".3f"),
            ("extra MiB", "extra_mib", ".0f"),
            ("of an activation", "extra_share", ".3f"),
        ],
    )


def accuracy_table(rows: list[AccuracyRow]) -> str:
    """Each result's error in units of the error that cannot be avoided, a line for each case; "!" marks too large."""
    tables = []
    for op in dict.fromkeys(row["op"] for row in rows):
        chosen = [row for row in rows if row["op"] == op]
        quantities = list(dict.fromkeys(row["quantity"] for row in chosen))
        lines: dict[tuple[str, str, str], dict[str, Any]] = {}
        for row in chosen:
            key = (row["impl"], row["dtype"], row["case"])
            line = lines.setdefault(key, dict(row))
            line[row["quantity"]] = f"{row['ratio']:.2f}" + ("" if row["ok"] else "!")
        columns = [(name, name, "") for name in ("op", "impl", "dtype", "case")] + [("at most", "limit", ".1f")]
        tables.append(table(list(lines.values()), columns + [(name, name, "") for name in quantities]))
    return "\n\n".join(tables)


def draw(results: OpsResults, path: Path) -> None:
    """Multiples of the floor by shape and implementation, and time per element against length.

    Raises:
        ValueError: the report holds no row of an op.
    """
    rows = [row for row in results["rows"] if row["op"] != "layer"]
    if not rows:
        raise ValueError("`rows` must hold at least one row of an op, but there is none to draw")
    figure = new_figure(11, 10)
    bars, lines = figure.subplots(2, 1)
    _draw_multiples(bars, rows)
    _draw_sweep(lines, rows, results["copy_tb_s"])
    measured = f"commit {results['commit']}, {results['date'][:10]}"
    figure.suptitle(f"{device_of(results)}, torch {results['torch']}, {measured}")
    figure.tight_layout()
    write_figure(figure, path)


def _draw_multiples(axes: Any, rows: list[SpeedRow]) -> None:
    compared = {(row["op"], *shape_of(row), row["dtype"]) for row in rows if row["impl"] != "cuda"}
    groups = sorted(compared or {(row["op"], *shape_of(row), row["dtype"]) for row in rows})
    width = 0.19
    for i, group in enumerate(groups):
        here = [row for row in rows if (row["op"], *shape_of(row), row["dtype"]) == group]
        here.sort(key=lambda row: list(COLORS).index(row["impl"]))
        for j, row in enumerate(here):
            at = i + (j - (len(here) - 1) / 2) * width
            both = multiple(row, "fwd_bwd")
            if both:
                axes.bar(at, both, width * 0.9, color=COLORS[row["impl"]], alpha=0.35)
                axes.annotate(f"{both:.1f}", (at, both), ha="center", va="bottom", fontsize=7)
            axes.bar(at, multiple(row, "fwd") or 0, width * 0.45, color=COLORS[row["impl"]])
    for impl, color in COLORS.items():
        if any(row["impl"] == impl for row in rows):
            axes.bar(0, 0, color=color, label=impl)  # an entry of the legend
    axes.axhline(1, color="0.3", linewidth=1, linestyle="--", label="floor")
    labels = [f"{op}\n{batch} × {length} × {dim}\n{dtype}" for op, batch, length, dim, dtype in groups]
    axes.set_xticks(range(len(groups)), labels, fontsize=8)
    axes.set(
        yscale="log",
        ylabel="time / floor",
        title="Multiples of the floor: wide bars forward + backward, narrow forward",
    )
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def _draw_sweep(axes: Any, rows: list[SpeedRow], copy_tb_s: float) -> None:
    for op, color in (("cema", "tab:green"), ("timestep_norm", "tab:red")):
        swept = sweep_rows(rows, op)
        for which, style in zip(PASSES, ("-o", "--s"), strict=True):
            label = f"{op}, {'forward' if which == 'fwd' else 'forward + backward'}"
            times = [picoseconds(row, which) for row in swept]
            axes.plot([row["L"] for row in swept], times, style, color=color, markersize=4, label=label)
    for activations, style in ((2, "-"), (5, "--")):
        floor = activations * 2 / copy_tb_s  # bytes / (TB/s) = ps
        axes.axhline(floor, color="0.5", linewidth=1, linestyle=style, label=f"floor, {activations} activations")
    axes.set_xscale("log", base=2)
    axes.set_xlim(SWEEP_LENGTHS[0] / 2, SWEEP_LENGTHS[-1] * 2)
    axes.set_ylim(bottom=0)
    axes.set(xlabel="L", ylabel="ps an element", title=f"Time per element against length, bfloat16, D = {SWEEP_DIM}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
