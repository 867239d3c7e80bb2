"""Loads a model from a checkpoint of any format, without a process group: for generation and evaluation."""

from pathlib import Path

import torch

from megalodon_plugin.checkpoint.checkpoint import read_checkpoint
from megalodon_plugin.data.tokenizer import Tokenizer
from megalodon_plugin.model import Megalodon
from megalodon_plugin.model.precision import lower_matrices

from .tokenizer import load_tokenizer


def load_checkpoint(
    checkpoint: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    tokenizer: str | None = None,
) -> tuple[Megalodon, Tokenizer]:
    """The model, in eval mode, and its tokenizer.

    Args:
        checkpoint: a `step-N` folder, a folder of safetensors, or one of the authors' release.
        device: where the model goes.
        dtype: float32 or bfloat16, of the matrices; CEMA, norms and attention's gamma and beta are float32.
        tokenizer: "byte", a tokenizer file or a folder, instead of the one that the checkpoint names.

    Raises:
        ValueError: the folder is missing, half-written, broken or of another configuration, a weight is not finite, no
            tokenizer is named, or the tokenizer has tokens that the model has not.
    """
    found = read_checkpoint(checkpoint)
    name = tokenizer or found.tokenizer
    if name is None:
        raise ValueError(f"`--tokenizer` must be given, for {checkpoint} neither names nor holds one")
    loaded = load_tokenizer(name)
    n_tokens, cfg = loaded.get_vocab_size(), found.config
    if n_tokens > cfg.vocab_size:
        raise ValueError(
            f"the tokenizer must have at most the model's `vocab_size` = {cfg.vocab_size} tokens, but {name!r} has "
            f"{n_tokens}: it belongs to another model"
        )
    with torch.device("meta"):
        model = Megalodon(cfg)
    model.to_empty(device=device)
    model.init_weights(buffer_device=torch.device(device))  # ties the weights; every value is overwritten
    model.load_state_dict(found.tensors)
    lower_matrices(model, dtype)
    return model.eval(), loaded
