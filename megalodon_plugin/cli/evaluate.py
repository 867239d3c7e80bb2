"""`megalodon evaluate`: loss, perplexity and bits per byte of a text at several context lengths, and by position."""

import argparse
from pathlib import Path

from .options import add_model_options, load_model, options_of


def add_evaluate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to those of the console."""
    evaluate = commands.add_parser(
        "evaluate",
        help="measure the loss of a text by context length",
        description="Loss, perplexity and bits per byte of a text at several context lengths and by position, in "
        "constant memory. Writes evaluation.json and evaluation.png. Started again, it continues where it stopped.",
    )
    add_model_options(evaluate)
    evaluate.add_argument("--data", required=True, help="files .txt or .jsonl (.gz too), a folder, or a glob")
    evaluate.add_argument(
        "--text-field", default="text", help="field of a .jsonl line that holds the text (default text)"
    )
    evaluate.add_argument("--context", type=int, nargs="+", required=True, help="context lengths in tokens")
    evaluate.add_argument("--max-tokens", type=int, help="read at most this many tokens of the text")
    evaluate.add_argument("--piece-tokens", type=int, default=32768, help="tokens per forward pass (default 32768)")
    evaluate.add_argument(
        "--windowed-norm", action="store_true", help="compute TimestepNorm over the last 6 chunks, as the authors do"
    )
    evaluate.add_argument(
        "--out",
        type=Path,
        default=Path("outputs/evaluation"),
        help="folder for the results (default outputs/evaluation)",
    )
    evaluate.add_argument(
        "--save-every", type=float, default=60.0, help="seconds between saves of the progress (default 60)"
    )
    evaluate.add_argument("--restart", action="store_true", help="discard the progress of an unfinished evaluation")
    evaluate.set_defaults(run=run_evaluate)


def run_evaluate(options: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        ValueError: an option, the checkpoint or a file is wrong, the text is shorter than a context, a loss is not
            finite, or the progress is that of another evaluation.
    """
    from megalodon_plugin.data.files import find_text_files

    from .evaluation import EvaluateOptions, Evaluation

    chosen = options_of(EvaluateOptions, options)
    chosen.validate()
    files = find_text_files(chosen.data, "--data")
    model, tokenizer = load_model(options)
    Evaluation(chosen, files, model, tokenizer).run()
