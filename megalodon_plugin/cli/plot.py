"""`megalodon plot`: the losses of a run as a picture and as JSON."""

import argparse
import json
from pathlib import Path

from megalodon_plugin.data.records import LOSSES, losses, read_records
from megalodon_plugin.files import new_figure, write_figure, write_json


def add_plot(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to those of the console."""
    plot = commands.add_parser("plot", help="draw the losses of a run")
    plot.add_argument("run_folder", metavar="run", type=Path, help="the job's dump folder")
    plot.set_defaults(run=lambda options: print(plot_run(options.run_folder)))


def plot_run(run: Path, levels: dict[str, float] | None = None) -> Path:
    """Draw `loss.png` in the run's folder, with the numbers in `loss.json` beside it.

    Args:
        run: the job's dump folder.
        levels: horizontal lines to compare with, label -> loss; by default those of an earlier picture.
    """
    records = read_records(run)
    numbers_file = run / "loss.json"
    if levels is None:
        levels = json.loads(numbers_file.read_text())["levels"] if numbers_file.is_file() else {}
    curves = {kind: losses(records, kind) for kind in LOSSES}
    figure = new_figure(8, 5)
    axes = figure.subplots()
    axes.plot(*curves["train"], color="tab:blue", linewidth=1.2, label="training")
    if curves["validation"][0]:
        axes.plot(*curves["validation"], color="tab:red", marker="o", markersize=4, label="validation")
    for label, value in levels.items():
        axes.axhline(value, color="0.6", linewidth=1, linestyle="--")
        axes.annotate(label, (1, value), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
    everything = [*curves["train"][1], *curves["validation"][1], *levels.values()]
    axes.set_ylim(min(everything) - 0.15, min(max(everything), 2.5 * sorted(everything)[len(everything) // 2]))
    axes.set(xlabel="step", ylabel="loss (nats a token)", title=f"{run.name}: loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    picture = run / "loss.png"
    write_figure(figure, picture, dpi=120)
    numbers = {kind: [{"step": s, "loss": v} for s, v in zip(*curve, strict=True)] for kind, curve in curves.items()}
    write_json(numbers | {"levels": levels}, numbers_file)
    return picture
