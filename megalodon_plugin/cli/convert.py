"""`megalodon convert`: a checkpoint from one format into another, bit by bit."""

import argparse
import dataclasses
from pathlib import Path


def add_convert(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to those of the console."""
    convert = commands.add_parser(
        "convert",
        help="convert a checkpoint into another format",
        description="Convert between torchtitan's checkpoints (dcp), safetensors with a config.json, and the authors' "
        "released format with its model-parallel shards. Weights stay the same to the last bit.",
    )
    convert.add_argument("source", type=Path, help="the checkpoint's folder; its format is recognised")
    convert.add_argument("target", type=Path, help="the folder to write, which must not exist yet")
    convert.add_argument("--to", choices=("dcp", "safetensors", "authors"), required=True, help="format of the target")
    convert.add_argument(
        "--shards", type=int, default=1, help="model-parallel shards of the authors' format (default 1)"
    )
    convert.add_argument(
        "--max-shard-gb", type=float, default=5.0, help="largest size of a safetensors file, in GB (default 5)"
    )
    convert.add_argument("--dtype", choices=("float32", "bfloat16"), help="store the weight matrices in this dtype")
    convert.add_argument("--tokenizer", help="store this tokenizer instead of the one that the checkpoint names")
    convert.set_defaults(run=run_convert)


def run_convert(options: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        ValueError: see `checkpoint.checkpoint`.
    """
    from megalodon_plugin.checkpoint.checkpoint import check_target, lowered, read_checkpoint, size_of, write_checkpoint
    from megalodon_plugin.model.precision import DTYPES

    if not options.max_shard_gb > 0:
        raise ValueError(f"`--max-shard-gb` must be positive, but is {options.max_shard_gb}")
    check_target(options.target, options.to, options.shards)  # before a long read
    checkpoint = read_checkpoint(options.source)
    if options.tokenizer is not None:
        checkpoint = dataclasses.replace(checkpoint, tokenizer=options.tokenizer)
    if options.dtype is not None:
        checkpoint = lowered(checkpoint, DTYPES[options.dtype])
    write_checkpoint(options.target, checkpoint, options.to, options.shards, options.max_shard_gb * 1e9)
    n_parameters, n_bytes = size_of(checkpoint.tensors)
    print(
        f"{options.source} ({checkpoint.format}) -> {options.target} ({options.to}): {n_parameters:,} parameters, "
        f"{n_bytes:,} bytes"
    )
