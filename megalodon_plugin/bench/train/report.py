"""The table and the picture of `megalodon bench train`."""

from pathlib import Path

from megalodon_plugin.files import new_figure, write_figure

from ..environment import device_of
from .results import TrainResults, TrainRow

HEADER = (
    f"{'size':>9} {'model':>10} {'rows x length':>14} {'tokens/s':>10} {'GiB':>6} {'MFU':>6} {'to Llama':>9} {'GiB':>6}"
)


def table(rows: list[TrainRow], header: bool = False, ratios: bool = False) -> str:
    """A line a row; with `ratios`, a header and Megalodon's tokens a second and memory over those of Llama."""
    lines = [HEADER] if header or ratios else []
    for row in rows:
        line = f"{row['size']:>9} {row['model']:>10} {row['batch']:>5} x {row['length']:>6}"
        if "failed" in row:
            lines.append(f"{line} {row['failed']}")
            continue
        memory, mfu = row.get("peak_gib"), row.get("mfu")
        line += f" {row['tokens_per_s']:>10,.0f} {_number(memory, '.1f'):>6} {_number(mfu, '.1%'):>6}"
        speed, size = ratio(rows, row) if ratios else (None, None)
        lines.append(f"{line} {_number(speed, '.3f'):>9} {_number(size, '.3f'):>6}".rstrip())
    return "\n".join(lines)


def ratio(rows: list[TrainRow], row: TrainRow) -> tuple[float | None, float | None]:
    """A Megalodon row's tokens a second and memory over those of the Llama row of its size and length."""
    place = (row["size"], row["length"], "llama")
    others = [r for r in rows if (r["size"], r["length"], r["model"]) == place and "failed" not in r]
    if row["model"] == "llama" or not others or "failed" in row:
        return None, None
    memory = row["peak_gib"] / others[0]["peak_gib"] if "peak_gib" in row else None
    return row["tokens_per_s"] / others[0]["tokens_per_s"], memory


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def draw(results: TrainResults, picture: Path) -> None:
    """Tokens a second and memory against the length, a colour for each size, dashed for Llama."""
    rows = [row for row in results["rows"] if "failed" not in row]
    figure = new_figure(12, 4.8)
    speed, memory = figure.subplots(1, 2)
    for i, size in enumerate(dict.fromkeys(row["size"] for row in rows)):
        for model, style in (("megalodon", "o-"), ("llama", "s--")):
            chosen = [row for row in rows if (row["size"], row["model"]) == (size, model)]
            lengths, label = [row["length"] for row in chosen], f"{size} {model}"
            speed.plot(lengths, [row["tokens_per_s"] for row in chosen], style, color=f"C{i}", label=label)
            with_memory = [row for row in chosen if "peak_gib" in row]
            if with_memory:
                sizes = [row["peak_gib"] for row in with_memory]
                memory.plot([row["length"] for row in with_memory], sizes, style, color=f"C{i}", label=label)
    for axes, title in ((speed, "tokens/s"), (memory, "peak memory, GiB")):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set(xlabel="tokens of a row", ylabel=title)
        axes.grid(alpha=0.3, which="both")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    how = "compiled" if results["compiled"] else "eager"
    figure.suptitle(f"A training step, {results['dtype']}, {how}, {device_of(results)}, torch {results['torch']}")
    figure.tight_layout()
    write_figure(figure, picture)
