"""The evaluation behind `megalodon evaluate`: resumable, one pass over the text for each context length."""

import contextlib
import dataclasses
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megalodon_plugin.bench.environment import device_name, environment
from megalodon_plugin.bench.timing import peak_mib
from megalodon_plugin.data.files import TextFile
from megalodon_plugin.data.fingerprint import hash_of, tokenizer_probe
from megalodon_plugin.data.stream import TextStream
from megalodon_plugin.data.tokenizer import Tokenizer
from megalodon_plugin.files import read_tensors, write_tensors
from megalodon_plugin.model import Megalodon
from megalodon_plugin.model.inference.norm_window import PIECE_CHUNKS
from megalodon_plugin.model.inference.prefill import fingerprint
from megalodon_plugin.model.inference.scoring import Score, score_from, score_tensors, score_text

from .evaluate_report import ContextResult, EvaluationResults, result_of, write_report

SCORING = (
    "windows of `context` inputs; every token but the first is scored once at every context length; at position p of "
    "its window it has seen p + 1 tokens; begin and end tokens are scored and have no bytes"
)


@dataclass(frozen=True)
class EvaluateOptions:
    """What is evaluated, and how."""

    checkpoint: Path
    data: str
    """Files, a folder or a glob."""
    text_field: str
    context: list[int]
    """Context lengths in tokens."""
    max_tokens: int | None
    piece_tokens: int
    """Tokens of one call of the model."""
    windowed_norm: bool
    out: Path
    save_every: float
    """Seconds between saves of the progress."""
    restart: bool

    def validate(self) -> None:
        """Raise ValueError for what is out of range."""
        contexts = self.context
        if min(contexts) < 1 or len(set(contexts)) < len(contexts):
            raise ValueError(f"`--context` must be different positive numbers, but is {contexts}")
        if self.piece_tokens < 1:
            raise ValueError(f"`--piece-tokens` must be at least 1, but is {self.piece_tokens}")
        if self.max_tokens is not None and self.max_tokens <= max(contexts):
            raise ValueError(
                f"`--max-tokens` must be above the longest `--context` = {max(contexts)}, but is {self.max_tokens}"
            )


class Evaluation:
    """One evaluation, and what of it is kept in `progress.safetensors` until it is complete."""

    def __init__(self, options: EvaluateOptions, files: list[TextFile], model: Megalodon, tokenizer: Tokenizer):
        self.options, self.files, self.model, self.tokenizer = options, files, model, tokenizer
        self.environment = environment(device_name(self._device))
        self.contexts = sorted(options.context)
        self.results: list[ContextResult] = []
        self.progress = options.out / "progress.safetensors"
        self.identity: dict[str, object] = {
            "model": fingerprint(model),
            "tokenizer": hash_of("tokenizer", *tokenizer_probe(tokenizer)).hex(),
            "device": self._device.type,
            "dtype": str(self._dtype),
            "files": [[file.name, file.size] for file in files],
            "context": self.contexts,
            "max_tokens": options.max_tokens,
            "piece_tokens": options.piece_tokens,
            "windowed_norm": options.windowed_norm,
            "text_field": options.text_field,
        }

    def run(self) -> None:
        """Score every context length that is left, write evaluation.json and evaluation.png."""
        score, seconds = self._load()
        n_tokens, n_bytes = self._count()
        self.options.out.mkdir(parents=True, exist_ok=True)
        self.model.features(torch.zeros(1, 2, dtype=torch.int64, device=self._device))  # compiles kernels
        for context in self.contexts[len(self.results) :]:
            score = score if score is not None else Score(context)
            if self._device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            seconds = self._score(score, seconds, n_tokens)
            result = result_of(score, seconds, peak_mib(self._device), n_bytes)
            self.results.append(result)
            print(
                f"context {context:>9,}: loss {result['loss']:.4f}, perplexity {result['perplexity']:.2f}, "
                f"{result['bits_per_byte']:.4f} bits a byte; {result['tokens_per_s']:,.0f} tokens/s, "
                f"{result['peak_mib']:,.0f} MiB",
                flush=True,
            )
            score, seconds = None, 0.0
            self._save({"none": torch.zeros(1)}, 0.0)
        write_report(self.options.out, self._report(n_tokens, n_bytes))
        self.progress.unlink()
        print(self.options.out / "evaluation.json", self.options.out / "evaluation.png")

    @property
    def _device(self) -> torch.device:
        return self.model.tok_embeddings.weight.device

    @property
    def _dtype(self) -> torch.dtype:
        return self.model.tok_embeddings.weight.dtype

    def _stream(self) -> TextStream:
        return TextStream(self.files, self.tokenizer, self.options.text_field, self.options.max_tokens)

    def _count(self) -> tuple[int, int]:
        """Tokens and bytes of the text: reading it through first costs little beside the model."""
        stream = self._stream()
        stream.skip(2**62)
        if stream.n_taken <= max(self.contexts):
            raise ValueError(
                f"the text must have more tokens than the longest `--context` = {max(self.contexts)}, but "
                f"{self.options.data} has {stream.n_taken}"
            )
        return stream.n_taken, stream.n_bytes

    def _score(self, score: Score, seconds: float, n_tokens: int) -> float:
        """Read the text at one context length; the seconds that it took, those of earlier starts included."""
        stream = self._stream()
        stream.skip(score.n_read)
        started = shown = saved = time.monotonic()
        begin = seconds
        # Of the end of a piece: Ctrl-C may come in the middle of one, when some of its losses are counted already.
        kept = score_tensors(score), seconds
        try:
            for _ in score_text(self.model, stream.take, score, self.options.piece_tokens, self.options.windowed_norm):
                now = time.monotonic()
                seconds = begin + now - started
                kept = score_tensors(score), seconds
                if now - shown > 2:
                    shown, memory = now, peak_mib(self._device)
                    sys.stderr.write(
                        f"\rcontext {score.context:,}: {score.n_read:,} of {n_tokens - 1:,} tokens, "
                        f"{score.n_read / seconds:,.0f} tokens/s, loss {score.loss:.4f}, {memory:,.0f} MiB  "
                    )
                    sys.stderr.flush()
                if now - saved > self.options.save_every:
                    saved = now
                    self._save(*kept)
        except KeyboardInterrupt:
            with contextlib.suppress(KeyboardInterrupt):
                self._save(*kept)
            raise
        if shown != started:
            sys.stderr.write("\n")
        return seconds

    def _save(self, kept: dict[str, Tensor], seconds: float) -> None:
        """Whole or not at all: what is there is replaced by one rename."""
        content = {"identity": self.identity, "results": self.results, "seconds": seconds}
        write_tensors(kept, self.progress, {"progress": json.dumps(content)})

    def _load(self) -> tuple[Score | None, float]:
        if self.options.restart or not self.progress.is_file():
            return None, 0.0
        tensors, metadata = read_tensors(self.progress, self._device)
        content = json.loads(metadata.get("progress", "{}"))
        found = content.get("identity", {})
        for name, value in json.loads(json.dumps(self.identity)).items():
            if found.get(name) != value:
                raise ValueError(
                    f"{self.progress} must be the progress of this evaluation, but its `{name}` is "
                    f"{found.get(name)!r} and not {value!r}; finish that one, choose another `--out`, or give "
                    "`--restart`"
                )
        self.results = content["results"]
        print(f"continuing from {self.progress}", file=sys.stderr)
        score = score_from(tensors, self.model.cfg.chunk_size) if "place" in tensors else None
        return score, content["seconds"]

    def _report(self, n_tokens: int, n_bytes: int) -> EvaluationResults:
        cfg = self.model.cfg
        return {
            **self.environment,
            "checkpoint": self.options.checkpoint.name,
            "data": Path(self.options.data).name,
            "tokens": n_tokens,
            "bytes": n_bytes,
            "scoring": SCORING,
            "piece_tokens": PIECE_CHUNKS * cfg.chunk_size if self.options.windowed_norm else self.options.piece_tokens,
            "windowed_norm": self.options.windowed_norm,
            "dtype": str(self._dtype),
            "config": dataclasses.asdict(cfg),
            "contexts": self.results,
        }
