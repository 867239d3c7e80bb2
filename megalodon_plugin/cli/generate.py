"""`megalodon generate`: continue texts from a checkpoint, token by token."""

import argparse
import sys
from pathlib import Path

from .options import add_model_options, load_model


def add_generate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to those of the console."""
    generate = commands.add_parser(
        "generate",
        help="continue texts from a checkpoint",
        description="Continue texts from a checkpoint, in constant memory however long they are.",
    )
    add_model_options(generate)
    prompts = generate.add_argument_group("prompts")
    prompts.add_argument("--prompt", action="append", default=[], help="a text to continue; may be given several times")
    prompts.add_argument(
        "--prompt-file",
        action="append",
        default=[],
        type=Path,
        help="a UTF-8 text file to continue; may be given several times",
    )
    prompts.add_argument(
        "--prefill-tokens", type=int, help="read prompts in pieces of this many tokens (default 16384)"
    )
    prompts.add_argument(
        "--load-state", type=Path, help="continue from the state in this file; prompts are appended to its text"
    )
    prompts.add_argument("--save-state", type=Path, help="write the state after the prompts to this file")
    sampling = generate.add_argument_group("sampling")
    sampling.add_argument("--max-new-tokens", type=int, default=200, help="tokens to generate at most (default 200)")
    sampling.add_argument("--temperature", type=float, default=0.8, help="0 takes the most likely token (default 0.8)")
    sampling.add_argument("--top-k", type=int, help="draw from the k most likely tokens")
    sampling.add_argument(
        "--top-p", type=float, help="draw from the most likely tokens that together have this probability"
    )
    sampling.add_argument("--seed", type=int, default=0, help="seed of the random numbers (default 0)")
    sampling.add_argument(
        "--compile", action="store_true", help="compile the decoding step first, which pays for long texts"
    )
    sampling.add_argument(
        "--stop-token",
        type=int,
        action="append",
        default=[],
        help="also end a text at this token id; may be given several times",
    )
    sampling.add_argument("--ignore-eos", action="store_true", help="continue after the tokenizer's end token")
    generate.set_defaults(run=run_generate)


def run_generate(options: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        ValueError: an option is wrong, or the checkpoint; see `titan.load_model.load_checkpoint`.
    """
    from megalodon_plugin.model.inference.generate import Decoding
    from megalodon_plugin.model.inference.prefill import Prefilled
    from megalodon_plugin.model.inference.sampling import Sampling

    from .continuations import encode, end_tokens, prefill_prompts, tokens_of_both, write_continuations

    sampling = Sampling(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p)
    if options.max_new_tokens < 0:
        raise ValueError(f"`--max-new-tokens` must not be negative, but is {options.max_new_tokens}")
    prompts = [*options.prompt, *(_file_content(path) for path in options.prompt_file)]
    if not prompts and options.load_state is None:
        raise ValueError("there must be a prompt: give `--prompt`, `--prompt-file` or `--load-state`")
    if options.load_state is None and "" in prompts:
        number = prompts.index("") + 1
        raise ValueError(f"`--prompt` and `--prompt-file` must not be empty, but prompt {number} of {len(prompts)} is")
    if options.load_state is not None and not options.load_state.is_file():
        raise ValueError(f"`--load-state` must be a file that exists, but is {options.load_state}")
    if options.save_state is not None and not options.save_state.absolute().parent.is_dir():
        raise ValueError(f"`--save-state` must lie in a folder that exists, but is {options.save_state}")
    model, tokenizer = load_model(options)
    after = Prefilled.load(options.load_state, model) if options.load_state else None
    if after is not None and not prompts:
        prompts = [""] * len(after.logits)
    rows = encode(tokenizer, prompts, after is None)
    prefilled = prefill_prompts(model, rows, after, options.prefill_tokens)
    if options.save_state is not None:
        prefilled.save(options.save_state, model)
    stops = {*options.stop_token, *(() if options.ignore_eos else end_tokens(tokenizer))}
    n_tokens = tokens_of_both(model, tokenizer)
    decoding = Decoding(options.max_new_tokens, sampling, n_tokens, stops, options.compile)
    write_continuations(model, tokenizer, prefilled, rows, decoding, options.seed, sys.stdout)


def _file_content(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"`--prompt-file` must be a file that can be read, but: {error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"`--prompt-file` must be UTF-8, but {path} is not: {error}") from error
