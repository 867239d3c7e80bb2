"""The tables and the picture of `megalodon bench parallel`."""

from pathlib import Path
from typing import Any, Literal

from megalodon_plugin.files import new_figure, write_figure

from .results import CheckRow, MatrixRow, ParallelResults, ScenarioRow

HEADER = (
    f"{'':>9} {'size':>8} {'model':>9} {'layout':>21} {'GPUs':>4} {'rows x length':>14} {'tokens/s':>10} {'GiB':>6} "
    f"{'exchange':>8} {'of cp':>6} {'exposed':>7} {'effic.':>6} {'to FSDP':>7} {'deviation':>9}"
)


def table(rows: list[ScenarioRow], header: bool = True) -> str:
    """A line a row: shares of a step in which something was exchanged (chunk parallelism's own beside it), or nothing
    else happened; efficiencies.
    """
    lines = [HEADER] if header else []
    for row in rows:
        line = f"{row['scaling']:>9} {row['size']:>8} {row['model']:>9} {row['layout']:>21} {row['gpus']:>4} "
        line += f"{row['rows']:>5} x {row['length']:>6}"
        if "failed" in row:
            lines.append(f"{line} {row['failed']}")
            continue
        found = row.get("communication", {})
        of_cp = found.get("dimensions", {}).get("cp", {}).get("share")
        shares = (
            f"{_form(found.get('share'), '.1%'):>8} {_form(of_cp, '.1%'):>6} {_form(found.get('exposed'), '.1%'):>7}"
        )
        ratios = f"{_form(row.get('efficiency'), '.3f'):>6} {_form(row.get('to_fsdp'), '.3f'):>7}"
        line += f" {row['tokens_per_s']:>10,.0f} {_form(row.get('peak_gib'), '.1f'):>6} {shares} {ratios}"
        lines.append(f"{line} {_form(row.get('deviation'), '.1e'):>9}".rstrip())
    return "\n".join(lines)


def check_line(row: CheckRow) -> str:
    """What a check of a layout found."""
    about = f"    check {row['layout']:>21} {row['gpus']:>4} processes, {row['dtype']:>8}"
    if "failed" in row:
        return f"{about}  FAILED: {row['failed']}"
    found = f"{about}  deviation {row['deviation']:.1e}"
    if "exchanges" not in row:
        return found
    kinds = [kind for dimensions in row["exchanges"]["0"].values() for kind in dimensions.values()]
    messages, size = sum(kind[0] for kind in kinds), sum(kind[1] for kind in kinds)
    return f"{found}; rank 0: {messages:.0f} messages, {size:,.0f} bytes, as planned"


def _form(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def draw(results: ParallelResults, picture: Path) -> None:
    """Weak and strong scaling against the number of GPUs, a line for each kind of layout.

    Bars of efficiencies where one or two numbers of GPUs make no lines, and for simulated steps.
    """
    rows = [row for row in results["rows"] if "failed" not in row]
    present = [kind for kind in ("weak", "strong", "simulated") if any(row["scaling"] == kind for row in rows)]
    few = len({row["gpus"] for row in rows if row["scaling"] != "simulated"}) <= 2
    titles = {
        "weak": "weak scaling" + ("" if few else ": tokens/s a GPU over one GPU's"),
        "strong": "strong scaling" + ("" if few else ": tokens/s"),
        "simulated": "simulated: a rank's work measured, links as published",
    }
    columns = present or ["weak"]
    as_bars = [kind for kind in present if few or kind == "simulated"]
    bars = max((sum(row["scaling"] == kind for row in rows) for kind in as_bars), default=0)
    size = (6.5 * len(columns) + (2 * len(as_bars) if bars else 0), max(5.2, 1.5 + 0.34 * bars))
    figure = new_figure(*size)
    axes = figure.subplots(1, len(columns), squeeze=False)
    for kind, axis in zip(columns, axes[0], strict=True):
        axis.set_title(titles[kind], fontsize=10)
        chosen = [row for row in rows if row["scaling"] == kind]
        if kind in as_bars:
            _bars(axis, chosen, kind)
        else:
            _lines(axis, chosen, "efficiency" if kind == "weak" else "tokens_per_s")
    where = f"{results['device']}, torch {results['torch']}, {results['dtype']}"
    figure.suptitle(f"Layouts of several GPUs, {where}", fontsize=11)
    figure.tight_layout()
    write_figure(figure, picture)


def _lines(axis: Any, rows: list[ScenarioRow], number: Literal["efficiency", "tokens_per_s"]) -> None:
    """One line for each model, amount of work and set of dimensions; all begin at one GPU."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        work = f"{row['size']} {row['model']}, {row['length'] if number == 'tokens_per_s' else row['tokens_per_gpu']}"
        dimensions = " x ".join(part.split(" ")[0] for part in row["layout"].split(" x ")) if row["gpus"] > 1 else ""
        lines.setdefault(f"{work} {dimensions}".strip(), []).append((row["gpus"], row[number]))
    ones = {label: points[0] for label, points in lines.items() if points[0][0] == 1 and len(points) == 1}
    for label, points in lines.items():
        if label in ones:
            continue
        begin = next((one for start, one in ones.items() if label.startswith(start + " ")), None)
        found = sorted([*([begin] if begin else []), *points])
        axis.plot([x for x, _ in found], [y for _, y in found], "o-", label=label, markersize=4)
    if not lines.keys() - ones.keys():
        for label, (x, y) in ones.items():
            axis.plot([x], [y], "o", label=label)
    axis.set(xlabel="GPUs", xscale="log")
    ticks = sorted({row["gpus"] for row in rows})
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    if number == "tokens_per_s":
        axis.set_yscale("log")
    axis.grid(alpha=0.3)
    if lines:
        axis.legend(fontsize=7)


def _bars(axis: Any, rows: list[ScenarioRow], kind: str) -> None:
    """A bar of each layout's efficiency; of simulated ones with a pale part, which exchanges take away."""
    models = len({row["model"] for row in rows}) > 1
    labels = []
    for row in rows:
        what = f"{row['size']}{' ' + row['model'] if models else ''}"
        amount = f"{row['rows']} x {row['length']}" if kind == "strong" else f"{row['tokens_per_gpu']} a GPU"
        labels.append(f"{what}, {amount}: {row['layout']}")
    efficiencies = [row["efficiency"] for row in rows]
    if kind == "simulated":
        alone = [row["efficiency"] * row["seconds"] / row["work_seconds"] for row in rows]
        axis.barh(labels, alone, color="tab:blue", alpha=0.3, label="a rank's work alone")
    colours = ["tab:orange" if row["model"] == "llama" else "tab:blue" for row in rows]
    axis.barh(labels, efficiencies, color=colours, label="with what exchanges do not hide")
    for label, efficiency, row in zip(labels, efficiencies, rows, strict=True):
        axis.text(0.02, label, f"{row['tokens_per_s'] / row['gpus']:,.0f} tokens/s a GPU", va="center", color="white")
        axis.text(1.06, label, f"{efficiency:.2f}", va="center")
    axis.invert_yaxis()
    axis.set(xlabel="tokens/s a GPU over those of the fewest GPUs that hold the model", xlim=(0, 1.2))
    if kind == "simulated":
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.4, -0.1), ncols=2)


def draw_matrix(rows: list[MatrixRow], tolerance: float, steps: int, picture: Path) -> None:
    """A bar for each layout of the matrix: its deviation from one process."""
    figure = new_figure(8, 0.28 * len(rows) + 1.2, layout="constrained")
    axes = figure.subplots()
    axes.barh([row["layout"] for row in rows], [max(row["deviation"] or 0.0, 1e-9) for row in rows], color="tab:blue")
    axes.axvline(tolerance, color="tab:red", label="allowed")
    axes.set_xscale("log")
    axes.set_xlim(1e-9, 1e-3)
    axes.invert_yaxis()
    axes.set_xlabel(f"loss and gradient norm: largest relative difference\nfrom one process, {steps} steps, float32")
    axes.legend(loc="upper right")
    write_figure(figure, picture, dpi=120)
