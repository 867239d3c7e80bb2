"""`megalodon bench generate`: what reading and writing long texts cost, beside torchtitan's Llama.

Reading: a prompt of L tokens in pieces with a carried state; the host's Llama reads it in one forward pass without
logits, for it has no cache to read in pieces with. Writing: one token a step after the longest prompt.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired, TypedDict

import torch
from torch import nn

from megalodon_plugin.files import new_figure, write_figure, write_json
from megalodon_plugin.model import PRESETS, Megalodon
from megalodon_plugin.model.inference.decode import Decoder
from megalodon_plugin.model.inference.prefill import Prefilled, prefill
from megalodon_plugin.model.precision import lower_matrices

from .environment import Environment, device_name, device_of, environment
from .sizes import LLAMA_OF_PRESET, VOCABULARY, LlamaSize
from .timing import MIB, peak_mib, synchronize


@dataclass(frozen=True)
class GenerateOptions:
    """What is read and written."""

    out: Path
    """Folder of the results."""
    flavor: str = "released_200M"
    """A preset."""
    lengths: Sequence[int] = (8192, 65536, 524288, 1048576)
    """Tokens of the prompts."""
    batches: Sequence[int] = (1, 8, 64)
    """Rows that decode side by side."""
    steps: int = 256
    """Tokens that each row decodes."""
    against: str | None = None
    """"llama": also the host's Llama of about as many parameters."""
    commit: str | None = None
    """In place of what git says."""

    def check(self) -> None:
        """Raise ValueError for what is out of range."""
        for name in ("lengths", "batches"):
            if min(getattr(self, name)) < 1:
                raise ValueError(f"`--{name}` must be positive, but are {getattr(self, name)}")
        if self.flavor not in PRESETS:
            raise ValueError(f"`--flavor` must be one of {', '.join(PRESETS)}, but is {self.flavor!r}")
        if self.against and self.flavor not in LLAMA_OF_PRESET:
            presets = ", ".join(LLAMA_OF_PRESET)
            raise ValueError(f"`--against llama` needs a flavor of {presets}, but `--flavor` is {self.flavor}")


class GenerateRow(TypedDict):
    """One measurement."""

    model: str
    """"megalodon" or "llama"."""
    what: str
    """"read", "decode" or "decode, compiled"."""
    batch: int
    context: int
    """Tokens of the prompt that is read, or that was read before."""
    tokens_per_s: float | None
    """Of all rows together; None if the memory was not enough."""
    seconds: NotRequired[float]
    peak_mib: NotRequired[float]
    """Peak memory: of the GPU in all, on a CPU of the process so far."""
    extra_mib: NotRequired[float]
    """Of a GPU, beyond what was in use before."""


class GenerateResults(Environment):
    """generate.json."""

    dtype: str
    flavor: str
    parameters: dict[str, int]
    """Of each model."""
    rows: list[GenerateRow]


@torch.no_grad()
def run_bench_generate(options: GenerateOptions) -> None:
    """Measure, and write generate.json and generate.png.

    Raises:
        ValueError: a number is out of range, or no Llama of the size is known.
    """
    options.check()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    results: GenerateResults = {
        **environment(device_name(device), options.commit),
        "dtype": "bfloat16" if device.type == "cuda" else "float32",
        "flavor": options.flavor,
        "parameters": {},
        "rows": [],
    }
    text = torch.randint(VOCABULARY, (max(options.lengths),), device=device)
    _measure_megalodon(options, text, results)
    if options.against:
        _measure_llama(options, text, results)
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(results, options.out / "generate.json")
    draw(results, options.out / "generate.png")
    print(options.out / "generate.json", options.out / "generate.png")


def _measure_megalodon(options: GenerateOptions, text: torch.Tensor, results: GenerateResults) -> None:
    device = text.device
    model = _megalodon(options.flavor, device)
    results["parameters"]["megalodon"] = _count_parameters(model)
    prefill(model, [text[: 2 * model.cfg.chunk_size]])  # compiles kernels
    longest: Prefilled | None = None
    for length in sorted(options.lengths):
        for _ in range(_passes(length)):
            with _measured(device) as cost:
                longest = prefill(model, [text[:length]])
        _add(results, _row("megalodon", "read", 1, length, length, cost))
    assert longest is not None
    first = prefill(model, [text[:1]])
    for prefilled, context in ((longest, max(options.lengths)), (first, 1)):
        for compiled in (False, True) if device.type == "cuda" else (False,):
            for batch in options.batches:
                _add(results, _decode(model, prefilled, batch, context, options.steps, compiled))


def _measure_llama(options: GenerateOptions, text: torch.Tensor, results: GenerateResults) -> None:
    llama = _llama(LLAMA_OF_PRESET[options.flavor], len(text), text.device)
    results["parameters"]["llama"] = _count_parameters(llama)
    for length in sorted(options.lengths):
        _add(results, _read_llama(llama, text[:length], text.device))


def _passes(length: int) -> int:
    """How often a text is read; the last time counts. In the first, a short text mostly allocates memory."""
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


def _count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@dataclass
class _Cost:
    """Filled in when what is measured ends; MiB as in `GenerateRow`."""

    seconds: float = 0.0
    peak_mib: float = 0.0
    extra_mib: float | None = None


@contextlib.contextmanager
def _measured(device: torch.device) -> Iterator[_Cost]:
    """Time and memory of what runs inside."""
    cost, on_gpu = _Cost(), device.type == "cuda"
    synchronize(device)
    before = 0.0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device) / MIB
    start = time.perf_counter()
    yield cost
    synchronize(device)
    cost.seconds = time.perf_counter() - start
    cost.peak_mib = peak_mib(device)
    if on_gpu:
        cost.extra_mib = cost.peak_mib - before


def _row(model: str, what: str, batch: int, context: int, n_tokens: int, cost: _Cost) -> GenerateRow:
    row: GenerateRow = {
        "model": model,
        "what": what,
        "batch": batch,
        "context": context,
        "tokens_per_s": n_tokens / cost.seconds,
        "seconds": cost.seconds,
        "peak_mib": cost.peak_mib,
    }
    if cost.extra_mib is not None:
        row["extra_mib"] = cost.extra_mib
    return row


def _decode(
    model: Megalodon, prefilled: Prefilled, batch: int, context: int, steps: int, compiled: bool
) -> GenerateRow:
    decoder = Decoder(model, prefilled.state.select([0] * batch), compile=compiled)
    token = prefilled.logits.argmax(-1).expand(batch)
    decoder.step(token)
    with _measured(token.device) as cost:
        for _ in range(steps):
            token = decoder.step(token).argmax(-1)
    return _row("megalodon", "decode, compiled" if compiled else "decode", batch, context, batch * steps, cost)


def _read_llama(llama: nn.Module, text: torch.Tensor, device: torch.device) -> GenerateRow:
    try:
        for _ in range(_passes(len(text))):
            with _measured(device) as cost:
                llama(text.unsqueeze(0))
    except torch.OutOfMemoryError:
        return {"model": "llama", "what": "read", "batch": 1, "context": len(text), "tokens_per_s": None}
    return _row("llama", "read", 1, len(text), len(text), cost)


def _add(results: GenerateResults, row: GenerateRow) -> None:
    """Add the row and print it."""
    results["rows"].append(row)
    if row["tokens_per_s"] is None:
        print(f"{row['model']:>10} {row['what']:>16} {row['context']:>9,} tokens: out of memory", flush=True)
        return
    print(
        f"{row['model']:>10} {row['what']:>16} batch {row['batch']:>3} context {row['context']:>9,}: "
        f"{row['tokens_per_s']:>12,.1f} tokens/s, {row['peak_mib']:>9,.0f} MiB",
        flush=True,
    )


def draw(results: GenerateResults, picture: Path) -> None:
    """Reading: tokens a second and memory against the length; decoding: tokens a second against the batch."""
    figure = new_figure(15, 4.5)
    speed, memory, decoding = figure.subplots(1, 3)
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
    figure.suptitle(f"{results['flavor']}, {results['dtype']}, {device_of(results)}, torch {results['torch']}")
    figure.tight_layout()
    write_figure(figure, picture)
