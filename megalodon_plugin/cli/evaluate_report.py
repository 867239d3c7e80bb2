"""The results of an evaluation: numbers as JSON and a picture."""

import math
from pathlib import Path
from typing import Any, TypedDict

from megalodon_plugin.bench.environment import Environment
from megalodon_plugin.files import new_figure, write_figure, write_json
from megalodon_plugin.model.inference.scoring import Score

# With a key that is a word of Python.
PositionLoss = TypedDict("PositionLoss", {"from": int, "to": int, "tokens": int, "loss": float})
"""Mean loss of `tokens` tokens that have seen "from" to "to" tokens of their window."""


class ContextResult(TypedDict):
    """What one context length came to."""

    context: int
    loss: float
    """Nats a token."""
    perplexity: float
    bits_per_byte: float
    tokens: int
    tokens_per_s: float
    peak_mib: float
    by_position: list[PositionLoss]


class EvaluationResults(Environment):
    """evaluation.json."""

    checkpoint: str
    data: str
    tokens: int
    bytes: int
    scoring: str
    """Which tokens are scored, and what they have seen."""
    piece_tokens: int
    windowed_norm: bool
    dtype: str
    config: dict[str, Any]
    """The model's."""
    contexts: list[ContextResult]


def result_of(score: Score, seconds: float, peak_mib: float, n_bytes: int) -> ContextResult:
    """The results at one context length; `n_bytes` is the size in UTF-8 of the text that was scored."""
    return {
        "context": score.context,
        "loss": score.loss,
        "perplexity": math.exp(score.loss),
        "bits_per_byte": math.fsum(score.sums) / math.log(2) / n_bytes,
        "tokens": score.n_read,
        "tokens_per_s": score.n_read / seconds,
        "peak_mib": peak_mib,
        "by_position": [
            {"from": 2**i, "to": min(2 ** (i + 1) - 1, score.context), "tokens": count, "loss": total / count}
            for i, (total, count) in enumerate(zip(score.sums, score.counts, strict=True))
            if count
        ],
    }


def write_report(folder: Path, report: EvaluationResults) -> None:
    """Write evaluation.json and evaluation.png."""
    write_json(report, folder / "evaluation.json")
    draw(report, folder / "evaluation.png")


def draw(report: EvaluationResults, picture: Path) -> None:
    """Left: loss against the position in the window, a curve a context length. Right: loss against the length."""
    from matplotlib import colormaps

    results = report["contexts"]
    figure = new_figure(13, 5)
    positions, lengths = figure.subplots(1, 2, width_ratios=[3, 2])
    colors = colormaps["viridis"]
    for i, result in enumerate(results):
        buckets = result["by_position"]
        centres = [math.sqrt(bucket["from"] * bucket["to"]) for bucket in buckets]
        color = colors(0.9 * i / max(1, len(results) - 1))
        losses = [bucket["loss"] for bucket in buckets]
        positions.plot(centres, losses, "o-", markersize=3, color=color, label=f"{result['context']:,}")
    shown = [bucket["loss"] for result in results for bucket in result["by_position"] if bucket["from"] >= 8]
    if shown:  # the first tokens of a window would flatten all the rest
        margin = 0.08 * (max(shown) - min(shown)) + 0.01
        positions.set_ylim(min(shown) - margin, max(shown) + margin)
    positions.set(title="by position", xlabel="tokens of context seen", ylabel="loss (nats a token)")
    positions.legend(title="context length")
    lengths.plot([r["context"] for r in results], [r["loss"] for r in results], "o-", color="tab:red")
    lengths.set(title="by context length", xlabel="context length", ylabel="loss (nats a token)")
    for axes in (positions, lengths):
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
    figure.suptitle(f"{report['checkpoint']} on {report['data']}: {report['tokens']:,} tokens")
    figure.tight_layout()
    write_figure(figure, picture, dpi=120)
