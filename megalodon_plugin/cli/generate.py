"""`megalodon generate`: continue a text from a checkpoint, token by token."""

from pathlib import Path
from typing import TextIO

import torch

from megalodon_plugin.model import generate


def generate_from_checkpoint(
    checkpoint: Path, prompt: str, max_new_tokens: int, temperature: float, seed: int, out: TextIO
) -> str:
    """Write the prompt and its continuation to `out` as it comes, and return the continuation.

    Raises:
        ValueError: see `titan.load.load_checkpoint` and `model.generate`.
    """
    from megalodon_plugin.titan.load import load_checkpoint

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_checkpoint(checkpoint, device)
    ids = tokenizer.encode(prompt, add_bos=True, add_eos=False)
    if not ids:
        raise ValueError(f"`prompt` must give at least one token, but {prompt!r} gives none")
    generator = torch.Generator(device).manual_seed(seed)
    new_ids: list[int] = []
    shown = ""
    out.write(prompt)
    for token in generate(model, torch.tensor([ids], device=device), max_new_tokens, temperature, generator):
        if int(token) == tokenizer.eos_id:
            break
        new_ids.append(int(token))
        text = tokenizer.decode(new_ids)
        # A character of several bytes is written once it is whole.
        if not text.endswith("\ufffd"):
            out.write(text[len(shown) :])
            out.flush()
            shown = text
    out.write("\n")
    return shown
