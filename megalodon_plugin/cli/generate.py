"""`megalodon generate`: continue a text from a checkpoint, token by token."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import torch

from megalodon_plugin.model import generate

CONTEXT_TOKENS = 16


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
    tokens = generate(
        model,
        torch.tensor([ids], device=device),
        max_new_tokens,
        temperature,
        generator,
        n_tokens=min(tokenizer.get_vocab_size(), model.cfg.n_outputs),
    )
    out.write(prompt)
    continuation = ""
    for text in _texts((int(token) for token in tokens), ids, tokenizer):
        out.write(text)
        out.flush()
        continuation += text
    out.write("\n")
    return continuation


def _texts(new_tokens: Iterator[int], ids: list[int], tokenizer: Any) -> Iterator[str]:
    """Yield the text that each new token adds, up to the end mark; a character of several bytes once it is whole.

    A token's text may depend on the one before it (SentencePiece drops a leading space), so each is decoded behind the
    last few, not alone and not behind the whole text.
    """
    window = ids[-CONTEXT_TOKENS:]
    shown = tokenizer.decode(window)
    for token in new_tokens:
        if token == tokenizer.eos_id:
            return
        window.append(token)
        text = tokenizer.decode(window)
        if text.endswith("\ufffd"):
            continue
        yield text[len(shown) :]
        window = window[-CONTEXT_TOKENS:]
        shown = tokenizer.decode(window)
