"""`megalodon generate`: continue texts from a checkpoint, token by token."""

import argparse
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TextIO

import torch

from megalodon_plugin.model.inference.generate import continue_from
from megalodon_plugin.model.inference.prefill import Reading, read
from megalodon_plugin.model.inference.sampling import Sampling

from .text_output import RowText, show_in_order

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_model(known: argparse.Namespace) -> tuple[Any, Any]:
    """Model and tokenizer that the options name.

    Raises:
        ValueError: see `titan.load.load_checkpoint`; or the device does not exist.
    """
    from megalodon_plugin.titan.load_model import load_checkpoint

    device = known.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.split(":")[0] not in ("cpu", "cuda") or (device != "cpu" and not torch.cuda.is_available()):
        raise ValueError(f"`--device` must be cpu, or cuda where there is a GPU, but is {device!r}")
    dtype = known.dtype or ("float32" if device == "cpu" else "bfloat16")
    return load_checkpoint(known.checkpoint, device, DTYPES[dtype], known.tokenizer)


def run_generate(known: argparse.Namespace) -> None:
    """Run the command."""
    sampling = Sampling(temperature=known.temperature, top_k=known.top_k, top_p=known.top_p)
    if known.max_new_tokens < 0:
        raise ValueError(f"`--max-new-tokens` must not be negative, but is {known.max_new_tokens}")
    prompts = [*known.prompt, *(_file_content(path) for path in known.prompt_file)]
    if not prompts and known.load_state is None:
        raise ValueError("there must be a prompt: give `--prompt`, `--prompt-file` or `--load-state`")
    if not known.load_state and not all(prompts):
        raise ValueError("a prompt must not be empty, but one is")
    if known.save_state is not None and not known.save_state.absolute().parent.is_dir():
        raise ValueError(f"`--save-state` must lie in a folder that exists, but is {known.save_state}")
    model, tokenizer = load_model(known)
    after = Reading.load(known.load_state, model) if known.load_state else None
    if after is not None and not prompts:
        prompts = [""] * len(after.logits)
    rows = encode(tokenizer, prompts, after is None)
    reading = read_prompts(model, rows, after, known.prefill_tokens)
    if known.save_state is not None:
        reading.save(known.save_state, model)
    stops = {*known.stop_token, *([] if known.ignore_eos else [tokenizer.eos_id])} - {None}
    write_continuations(
        model,
        tokenizer,
        reading,
        prompts,
        rows,
        known.max_new_tokens,
        sampling,
        known.seed,
        stops,
        sys.stdout,
        known.compile,
    )


def generate_from_checkpoint(
    checkpoint: Path, prompt: str, max_new_tokens: int, temperature: float, seed: int, out: TextIO
) -> str:
    """Write the prompt and its continuation to `out` as it comes, and return the continuation.

    Raises:
        ValueError: see `titan.load.load_checkpoint` and `model.generate`.
    """
    from megalodon_plugin.titan.load_model import load_checkpoint

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_checkpoint(checkpoint, device)
    rows = encode(tokenizer, [prompt], True)
    reading = read(model, [row.to(device) for row in rows])
    sampling = Sampling(temperature=temperature)
    stops = {tokenizer.eos_id} - {None}
    return write_continuations(model, tokenizer, reading, [prompt], rows, max_new_tokens, sampling, seed, stops, out)[0]


def encode(tokenizer: Any, prompts: list[str], begins: bool) -> list[torch.Tensor]:
    """Token ids of each prompt, (L,) int64; the tokenizer's begin token comes first where a text begins.

    Raises:
        ValueError: a prompt that begins a text gives no token.
    """
    rows = [torch.tensor(tokenizer.encode(p, add_bos=begins, add_eos=False), dtype=torch.int64) for p in prompts]
    for prompt, row in zip(prompts, rows, strict=True):
        if begins and not len(row):
            raise ValueError(f"`prompt` must give at least one token, but {prompt!r} gives none")
    return rows


def read_prompts(model: Any, rows: list[torch.Tensor], after: Reading | None, piece_tokens: int | None) -> Reading:
    """`model.reading.read` with progress on stderr where prompts are long."""
    total = sum(map(len, rows))
    device = model.tok_embeddings.weight.device

    def tell(n_read: int) -> None:
        sys.stderr.write(f"\rreading the prompt: {n_read:,} of {total:,} tokens")
        sys.stderr.write("\n" if n_read == total else "")
        sys.stderr.flush()

    progress: Callable[[int], None] | None = tell if total > 50_000 else None
    return read(model, [row.to(device) for row in rows], after, piece_tokens, progress)


def write_continuations(
    model: Any,
    tokenizer: Any,
    reading: Reading,
    prompts: list[str],
    rows: list[torch.Tensor],
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    stops: Collection[int],
    out: TextIO,
    compile: bool = False,
) -> list[str]:
    """Write prompts and continuations to `out` as they come; return the continuations."""
    generator = torch.Generator(reading.logits.device).manual_seed(seed)
    n_tokens = min(tokenizer.get_vocab_size(), model.cfg.n_outputs)
    steps = continue_from(model, reading, max_new_tokens, sampling, generator, n_tokens, stops, compile)
    texts = [RowText(row.tolist(), tokenizer, stops) for row in rows]
    return show_in_order(prompts, texts, (step.tolist() for step in steps), out)


def _file_content(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"`--prompt-file` must be a file that can be read, but: {error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"`--prompt-file` must be UTF-8, but {path} is not: {error}") from error
