"""`megalodon convert`: a checkpoint from one format into another, bit by bit."""

import argparse
import dataclasses


def run_convert(known: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        ValueError: see `checkpoint.folders`.
    """
    import torch

    from megalodon_plugin.checkpoint.checkpoint import check_target, read_checkpoint, size_of, write_checkpoint
    from megalodon_plugin.model.precision import matrix_names

    if not known.max_shard_gb > 0:
        raise ValueError(f"`--max-shard-gb` must be positive, but is {known.max_shard_gb}")
    if known.target.exists():
        raise ValueError(f"the target must not exist yet, but {known.target} does")
    checkpoint = read_checkpoint(known.source)
    check_target(known.target, checkpoint.config, known.to, known.shards)
    if known.tokenizer is not None:
        checkpoint = dataclasses.replace(checkpoint, tokenizer=known.tokenizer)
    if known.dtype is not None:
        lowered = matrix_names(checkpoint.config)
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[known.dtype]
        tensors = {n: t.to(dtype) if n in lowered else t for n, t in checkpoint.tensors.items()}
        if checkpoint.config.tie_embedding:
            tensors["output.weight"] = tensors["tok_embeddings.weight"]
        checkpoint = dataclasses.replace(checkpoint, tensors=tensors)
    write_checkpoint(known.target, checkpoint, known.to, known.shards, known.max_shard_gb * 1e9)
    n_parameters, n_bytes = size_of(checkpoint.tensors)
    print(
        f"{known.source} ({checkpoint.format}) -> {known.target} ({known.to}): {n_parameters:,} parameters, "
        f"{n_bytes:,} bytes"
    )
