"""Continuing prompts by a checkpoint's model, and the text that appears while it decodes."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TextIO

import torch

from megalodon_plugin.data.tokenizer import Tokenizer
from megalodon_plugin.model import Megalodon
from megalodon_plugin.model.inference.generate import Decoding, continue_from
from megalodon_plugin.model.inference.prefill import Prefilled, prefill
from megalodon_plugin.model.inference.sampling import Sampling

from .text_output import RowText, show_in_order


class Prompt(NamedTuple):
    """A text to continue."""

    text: str
    tokens: torch.Tensor  # (L,) int64


def generate_from_checkpoint(
    checkpoint: Path, prompt: str, max_new_tokens: int, temperature: float, seed: int, out: TextIO
) -> str:
    """Write the prompt and its continuation to `out` as it comes, and return the continuation.

    Raises:
        ValueError: see `titan.load_model.load_checkpoint` and `model.inference.generate`.
    """
    from megalodon_plugin.titan.load_model import load_checkpoint

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_checkpoint(checkpoint, device)
    prompts = encode(tokenizer, [prompt], True)
    prefilled = prefill_prompts(model, prompts, None, None)
    sampling = Sampling(temperature=temperature)
    decoding = Decoding(max_new_tokens, sampling, tokens_of_both(model, tokenizer), end_tokens(tokenizer))
    return write_continuations(model, tokenizer, prefilled, prompts, decoding, seed, out)[0]


def tokens_of_both(model: Megalodon, tokenizer: Tokenizer) -> int:
    """Below it lie the tokens that the model gives and the tokenizer knows."""
    return min(tokenizer.get_vocab_size(), model.cfg.n_outputs)


def end_tokens(tokenizer: Tokenizer) -> set[int]:
    """The tokenizer's end token, where it has one."""
    return set() if tokenizer.eos_id is None else {tokenizer.eos_id}


def encode(tokenizer: Tokenizer, prompts: list[str], begins: bool) -> list[Prompt]:
    """Prompts with their token ids; the tokenizer's begin token comes first where a text begins.

    Raises:
        ValueError: a prompt that begins a text gives no token.
    """
    rows = [torch.tensor(tokenizer.encode(p, add_bos=begins, add_eos=False), dtype=torch.int64) for p in prompts]
    for prompt, row in zip(prompts, rows, strict=True):
        if begins and not len(row):
            raise ValueError(f"`prompt` must give at least one token, but {prompt!r} gives none")
    return [Prompt(text, row) for text, row in zip(prompts, rows, strict=True)]


def prefill_prompts(
    model: Megalodon, prompts: list[Prompt], after: Prefilled | None, piece_tokens: int | None
) -> Prefilled:
    """`model.inference.prefill.prefill` with progress on stderr where prompts are long."""
    rows = [prompt.tokens for prompt in prompts]
    total = sum(map(len, rows))
    device = model.tok_embeddings.weight.device

    def show_progress(n_read: int) -> None:
        sys.stderr.write(f"\rreading the prompt: {n_read:,} of {total:,} tokens")
        sys.stderr.write("\n" if n_read == total else "")
        sys.stderr.flush()

    progress: Callable[[int], None] | None = show_progress if total > 50_000 else None
    return prefill(model, [row.to(device) for row in rows], after, piece_tokens, progress)


def write_continuations(
    model: Megalodon,
    tokenizer: Tokenizer,
    prefilled: Prefilled,
    prompts: list[Prompt],
    decoding: Decoding,
    seed: int,
    out: TextIO,
) -> list[str]:
    """Write prompts and continuations to `out` as they come; return the continuations."""
    generator = torch.Generator(prefilled.logits.device).manual_seed(seed)
    steps = continue_from(model, prefilled, decoding, generator)
    texts = [RowText(prompt.tokens.tolist(), tokenizer, decoding.stop_tokens) for prompt in prompts]
    return show_in_order([prompt.text for prompt in prompts], texts, (step.tolist() for step in steps), out)
