"""Options of the commands that use a checkpoint. What runs them is imported when it runs, for it imports torch."""

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
Options = TypeVar("Options", bound="DataclassInstance")


def options_of(kind: type[Options], parsed: argparse.Namespace) -> Options:
    """The dataclass `kind` from the parsed options with its fields' names."""
    return kind(**{field.name: getattr(parsed, field.name) for field in dataclasses.fields(kind)})


def add_generate(commands: Any) -> None:
    """Add the command's options."""
    generate = commands.add_parser(
        "generate",
        help="continue texts from a checkpoint",
        description="Continue texts from a checkpoint, in constant memory however long they are.",
    )
    add_model_options(generate)
    prompts = generate.add_argument_group("prompts")
    prompts.add_argument("--prompt", action="append", default=[], help="a text to continue; may be given again")
    prompts.add_argument("--prompt-file", action="append", default=[], type=Path, help="a file of UTF-8 to continue")
    prompts.add_argument("--prefill-tokens", type=int, help="read prompts in pieces of this length (default 16384)")
    prompts.add_argument("--load-state", type=Path, help="go on from what --save-state wrote, prompts come after it")
    prompts.add_argument("--save-state", type=Path, help="write the state after the prompts")
    sampling = generate.add_argument_group("sampling")
    sampling.add_argument("--max-new-tokens", type=int, default=200)
    sampling.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default 0.8)")
    sampling.add_argument("--top-k", type=int, help="draw from the k likeliest tokens")
    sampling.add_argument("--top-p", type=float, help="draw from the likeliest tokens of this much probability")
    sampling.add_argument("--seed", type=int, default=0)
    sampling.add_argument("--compile", action="store_true", help="compile the step first; worth it for long texts")
    sampling.add_argument("--stop-token", type=int, action="append", default=[], help="an id that ends a text too")
    sampling.add_argument("--ignore-eos", action="store_true", help="go on after the tokenizer's end token")


def add_evaluate(commands: Any) -> None:
    """Add the command to those of the console."""
    evaluate = commands.add_parser(
        "evaluate",
        help="measure the loss of a text by context length",
        description="Loss, perplexity and bits per byte of a text at several context lengths and by position, in "
        "constant memory. Writes evaluation.json and evaluation.png. Started again after a kill it goes on.",
    )
    add_model_options(evaluate)
    evaluate.add_argument("--data", required=True, help="files .txt or .jsonl (.gz too), a folder, or a glob")
    evaluate.add_argument("--text-field", default="text", help="of .jsonl (text)")
    evaluate.add_argument("--context", type=int, nargs="+", required=True, help="context lengths in tokens")
    evaluate.add_argument("--max-tokens", type=int, help="read no more of the text")
    evaluate.add_argument("--piece-tokens", type=int, default=32768, help="tokens of one call (32768)")
    evaluate.add_argument(
        "--windowed-norm", action="store_true", help="TimestepNorm looks back over the last 6 chunks, as the authors'"
    )
    evaluate.add_argument("--out", type=Path, default=Path("outputs/evaluation"), help="folder for the results")
    evaluate.add_argument("--save-every", type=float, default=60.0, help="seconds between saves of the progress (60)")
    evaluate.add_argument("--restart", action="store_true", help="forget the progress of an unfinished evaluation")


def add_convert(commands: Any) -> None:
    """Add the command to those of the console."""
    convert = commands.add_parser(
        "convert",
        help="convert a checkpoint into another format",
        description="Convert between torchtitan's checkpoints (dcp), safetensors with a config.json, and the authors' "
        "released format with its model-parallel shards. Weights stay the same to the last bit.",
    )
    convert.add_argument("source", type=Path, help="a folder of any of the formats, which is found out")
    convert.add_argument("target", type=Path, help="the folder to write, which must not exist yet")
    convert.add_argument("--to", choices=("dcp", "safetensors", "authors"), required=True, help="format of the target")
    convert.add_argument("--shards", type=int, default=1, help="model-parallel shards of the authors' format")
    convert.add_argument("--max-shard-gb", type=float, default=5.0, help="size of a safetensors file (default 5)")
    convert.add_argument("--dtype", choices=("float32", "bfloat16"), help="change that of the matrices")
    convert.add_argument("--tokenizer", help="the tokenizer to go with the model instead of the one it names")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Options of every command that runs a checkpoint."""
    parser.add_argument(
        "checkpoint", type=Path, help="a step-N folder, a folder of safetensors, or of the authors' release"
    )
    parser.add_argument("--tokenizer", help='"byte", a tokenizer file or a folder; by default the checkpoint\'s')
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of the matrices (default bfloat16 on a GPU, else float32)"
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: the GPU if there is one)")
