"""`megalodon bench generate`: what reading and writing long texts cost, beside torchtitan's Llama.

Reading: a prompt of L tokens in pieces with a carried state; the host's Llama reads it in one forward pass without
logits, for it has no cache to read in pieces with. Writing: one token a step after the longest prompt.
"""

import argparse
import contextlib
import dataclasses
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megalodon_plugin.files import write_json
from megalodon_plugin.model import PRESETS, Megalodon
from megalodon_plugin.model.inference.decode import Decoder
from megalodon_plugin.model.inference.prefill import Reading, read
from megalodon_plugin.model.precision import lower_matrices

from .environment import device_name, environment
from .sizes import LLAMA_OF_PRESET, VOCABULARY, LlamaSize

Row = dict[str, Any]


@torch.no_grad()
def run_bench_generate(known: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        ValueError: a number is out of range, or no Llama of the size is known.
    """
    for name in ("lengths", "batches"):
        if min(getattr(known, name)) < 1:
            raise ValueError(f"`--{name}` must be positive, but are {getattr(known, name)}")
    if known.flavor not in PRESETS:
        raise ValueError(f"`--flavor` must be one of {', '.join(PRESETS)}, but is {known.flavor!r}")
    if known.against and known.flavor not in LLAMA_OF_PRESET:
        presets = ", ".join(LLAMA_OF_PRESET)
        raise ValueError(f"`--against llama` needs a flavor of {presets}, but `--flavor` is {known.flavor}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    results: dict[str, Any] = {
        **environment(device_name(device), known.commit),
        "dtype": "bfloat16" if device.type == "cuda" else "float32",
        "flavor": known.flavor,
        "rows": [],
    }
    rows: list[Row] = results["rows"]
    text = torch.randint(VOCABULARY, (max(known.lengths),), device=device)
    model = _megalodon(known.flavor, device)
    results["parameters"] = {"megalodon": _size(model)}
    read(model, [text[: 2 * model.cfg.chunk_size]])  # compiles kernels
    reading: Reading | None = None
    for length in sorted(known.lengths):
        for _ in range(_passes(length)):
            with _measured(device) as cost:
                reading = read(model, [text[:length]])
        rows.append(_row("megalodon", "read", 1, length, length, cost))
        _tell(rows[-1])
    assert reading is not None
    first = read(model, [text[:1]])
    for at, context in ((reading, max(known.lengths)), (first, 1)):
        for compiled in (False, True) if device.type == "cuda" else (False,):
            for batch in known.batches:
                rows.append(_decode(model, at, batch, context, known.steps, compiled))
                _tell(rows[-1])
    del model, reading, first
    if known.against:
        llama = _llama(LLAMA_OF_PRESET[known.flavor], max(known.lengths), device)
        results["parameters"]["llama"] = _size(llama)
        for length in sorted(known.lengths):
            rows.append(_read_llama(llama, text[:length], device))
            _tell(rows[-1])
    known.out.mkdir(parents=True, exist_ok=True)
    write_json(results, known.out / "generate.json")
    draw(results, known.out / "generate.png")
    print(known.out / "generate.json", known.out / "generate.png")


def _passes(length: int) -> int:
    """The first pass of a short text is mostly memory being asked for and algorithms being chosen: not counted."""
    return 1 if length > 200_000 else 2


def _megalodon(flavor: str, device: torch.device) -> Megalodon:
    with device:
        model = Megalodon(dataclasses.replace(PRESETS[flavor], vocab_size=VOCABULARY))
    model.init_weights()
    lower_matrices(model, torch.bfloat16 if device.type == "cuda" else torch.float32)
    return model.eval()


def _llama(size: LlamaSize, longest: int, device: torch.device) -> nn.Module:
    import megalodon_plugin.titan  # noqa: F401  chooses the device before torchtitan does

    # isort: split
    from torchtitan.models.llama3 import Transformer, TransformerModelArgs

    args = TransformerModelArgs(vocab_size=VOCABULARY, max_seq_len=longest, **dataclasses.asdict(size))
    with device:
        llama = Transformer(args)
        llama.init_weights()
    llama.output = None  # whole rows of logits would fill the memory before the attention does
    if device.type == "cuda":
        for parameter in llama.parameters():  # not .to(), which would drop the imaginary part of its RoPE table
            parameter.data = parameter.data.to(torch.bfloat16)
    return llama.eval()


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@contextlib.contextmanager
def _measured(device: torch.device) -> Iterator[dict[str, float]]:
    """Fills in seconds and, in MiB, the peak memory in all and beyond what was there before."""
    cost: dict[str, float] = {}
    before = 0.0
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
    start = time.perf_counter()
    yield cost
    if device.type == "cuda":
        torch.cuda.synchronize()
    cost["seconds"] = time.perf_counter() - start
    if device.type == "cuda":
        cost["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
        cost["extra_mib"] = cost["peak_mib"] - before
    else:  # of the process so far, so it can only grow
        cost["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def _row(model: str, what: str, batch: int, context: int, n_tokens: int, cost: dict[str, float]) -> Row:
    rate = n_tokens / cost["seconds"]
    return {"model": model, "what": what, "batch": batch, "context": context, "tokens_per_s": rate, **cost}


def _decode(model: Megalodon, reading: Reading, batch: int, context: int, steps: int, compiled: bool) -> Row:
    decoder = Decoder(model, reading.state.select([0] * batch), compile=compiled)
    token = reading.logits.argmax(-1).expand(batch)
    decoder.step(token)
    with _measured(token.device) as cost:
        for _ in range(steps):
            token = decoder.step(token).argmax(-1)
    return _row("megalodon", "decode, compiled" if compiled else "decode", batch, context, batch * steps, cost)


def _read_llama(llama: nn.Module, text: torch.Tensor, device: torch.device) -> Row:
    try:
        for _ in range(_passes(len(text))):
            with _measured(device) as cost:
                llama(text.unsqueeze(0))
    except torch.OutOfMemoryError:
        return {"model": "llama", "what": "read", "batch": 1, "context": len(text), "tokens_per_s": None}
    return _row("llama", "read", 1, len(text), len(text), cost)


def _tell(row: Row) -> None:
    if row["tokens_per_s"] is None:
        print(f"{row['model']:>10} {row['what']:>16} {row['context']:>9,} tokens: out of memory", flush=True)
        return
    print(
        f"{row['model']:>10} {row['what']:>16} batch {row['batch']:>3} context {row['context']:>9,}: "
        f"{row['tokens_per_s']:>12,.1f} tokens/s, {row['peak_mib']:>9,.0f} MiB",
        file=sys.stdout,
        flush=True,
    )


def draw(results: dict[str, Any], picture: Path) -> None:
    """Reading: tokens a second and memory against the length; decoding: tokens a second against the batch."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (speed, memory, decoding) = plt.subplots(1, 3, figsize=(15, 4.5))
    colors = {"megalodon": "tab:red", "llama": "tab:blue"}
    for model, color in colors.items():
        read_rows = [r for r in results["rows"] if (r["model"], r["what"]) == (model, "read") and r["tokens_per_s"]]
        if not read_rows:
            continue
        lengths = [row["context"] for row in read_rows]
        speed.plot(lengths, [row["tokens_per_s"] for row in read_rows], "o-", color=color, label=model)
        memory.plot(lengths, [row["peak_mib"] / 1024 for row in read_rows], "o-", color=color, label=model)
    kinds = {(row["context"], row["what"]) for row in results["rows"] if row["what"] != "read"}
    for context, what in sorted(kinds):
        chosen = [row for row in results["rows"] if (row["context"], row["what"]) == (context, what)]
        label = f"{what}, after {context:,} token{'s' if context > 1 else ''}"
        style, color = "o--" if context == 1 else "o-", "tab:green" if "compiled" in what else "tab:red"
        rates = [row["tokens_per_s"] for row in chosen]
        decoding.plot([row["batch"] for row in chosen], rates, style, color=color, label=label)
    for axes, title, x_label, y_label in (
        (speed, "Reading a prompt", "tokens of the prompt", "tokens/s"),
        (memory, "Peak memory while reading", "tokens of the prompt", "GiB"),
        (decoding, "Writing, one token a step", "rows side by side", "tokens/s of all rows"),
    ):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set(title=title, xlabel=x_label, ylabel=y_label)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(f"{results['flavor']}, {results['dtype']}, {results['device']}, torch {results['torch']}")
    figure.tight_layout()
    figure.savefig(picture, dpi=110)
    plt.close(figure)
