"""Prefill: reading a prompt of any length in constant memory, and keeping what was read in a file."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megalodon_plugin.files import read_tensors, write_tensors

from ..model import Megalodon
from ..state import MegalodonState, check_state

# Tokens that one call reads, over all rows: enough to fill a GPU, far less memory than the weights of a large model.
PIECE_TOKENS = 16384


@dataclass(frozen=True)
class Prefilled:
    """A model after some text: its state, and the logits (B, vocabulary) of the token that comes next."""

    state: MegalodonState
    logits: Tensor

    def save(self, path: str | Path, model: Megalodon) -> None:
        """Write to a safetensors file, whole or not at all, with the mark of the model that it belongs to."""
        named = {**self.state.with_unused_zeroed().named(), "logits": self.logits}
        write_tensors(named, path, {"model": fingerprint(model)})

    @classmethod
    def load(cls, path: str | Path, model: Megalodon) -> "Prefilled":
        """Read what `save` wrote, onto the model's device.

        Raises:
            ValueError: the file is missing or broken, or holds the state of another model.
        """
        weight = model.tok_embeddings.weight
        tensors, metadata = read_tensors(path, weight.device)
        state = MegalodonState.from_named(tensors, str(path))
        if "logits" not in tensors:
            raise ValueError(f"{path} must hold the logits after the text, but does not")
        check_state(state, model.cfg, len(state.position))
        if metadata.get("model") != fingerprint(model):
            raise ValueError(f"{path} must hold a state of this model, but was written by one with other weights")
        return cls(state, tensors["logits"])


def fingerprint(model: Megalodon) -> str:
    """A mark that models of other configuration or weights do not share; the precision of the matrices does not matter.

    Made from the configuration and the parameters of every CEMA and of the final norm, which no training step leaves
    as they were and which stay float32.
    """
    mark = hashlib.blake2b(json.dumps(dataclasses.asdict(model.cfg)).encode(), digest_size=16)
    for name, parameter in model.named_parameters():
        if ".cema." in name or name.startswith("norm."):
            mark.update(parameter.detach().double().cpu().numpy().tobytes())
    return mark.hexdigest()


@torch.no_grad()
def prefill(
    model: Megalodon,
    prompts: Tensor | Sequence[Tensor],
    after: Prefilled | None = None,
    piece_tokens: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Prefilled:
    """Read one prompt a row, of any lengths, in pieces: memory depends on the piece and not on the prompts.

    Args:
        model: in eval mode.
        prompts: (B, L) int64, or B tensors (L_b,) int64 of different lengths. A row may be empty if `after` is given.
        after: the result of an earlier prefill, of as many rows.
        piece_tokens: length of the pieces of a row, by default as many chunks as make 16384 tokens over the rows.
        progress: called with the number of tokens that were read, over all rows, after every piece.

    Raises:
        ValueError: a prompt is empty or of another shape, holds a token outside the vocabulary, or rows do not match.
    """
    if isinstance(prompts, Tensor) and prompts.ndim != 2:
        raise ValueError(f"`prompt` must have shape (B, L) with L >= 1, but has {tuple(prompts.shape)}")
    rows = list(prompts)
    _check_prompts(model, rows, after, piece_tokens)
    lengths = [len(row) for row in rows]
    states: dict[int, MegalodonState] = {}  # by row, as far as it has been read
    logits: dict[int, Tensor] = {}
    if after is not None:
        states = {b: after.state.select([b]) for b in range(len(rows))}
        logits = {b: after.logits[b : b + 1] for b in range(len(rows))}
    start, n_read = 0, 0
    # Rows go side by side as far as the shortest of those that are left; those that have ended wait.
    for end in sorted(set(lengths) - {0}):
        active = [b for b, length in enumerate(lengths) if length > start]
        state = MegalodonState.joined([states[b] for b in active]) if states else None
        text = torch.stack([rows[b][start:end] for b in active])
        for piece in text.split(piece_tokens or _piece(model, len(active)), 1):
            features, state = model.stream(piece, state)
            n_read += piece.numel()
            if progress is not None:
                progress(n_read)
        assert state is not None
        last = model.logits(features[:, -1])
        for i, b in enumerate(active):
            states[b], logits[b] = state.select([i]) if len(active) > 1 else state, last[i : i + 1]
        start = end
    in_order = range(len(rows))
    return Prefilled(MegalodonState.joined([states[b] for b in in_order]), torch.cat([logits[b] for b in in_order]))


def _piece(model: Megalodon, rows: int) -> int:
    chunk = model.cfg.chunk_size
    return max(1, PIECE_TOKENS // (rows * chunk)) * chunk


def _check_prompts(model: Megalodon, rows: list[Tensor], after: Prefilled | None, piece_tokens: int | None) -> None:
    if model.training:
        raise ValueError("the model must be in eval mode to generate; call `model.eval()`")
    if piece_tokens is not None and piece_tokens < 1:
        raise ValueError(f"`prefill_tokens` must be at least 1, but is {piece_tokens}")
    shapes = [tuple(row.shape) for row in rows]
    if not rows or any(len(shape) != 1 or (shape[0] < 1 and after is None) for shape in shapes):
        shape = (len(rows), *shapes[0]) if len(set(shapes)) == 1 else shapes
        raise ValueError(f"`prompt` must have shape (B, L) with L >= 1, but has {shape}")
    if after is not None and len(after.state.position) != len(rows):
        raise ValueError(f"there must be a prompt a row of the state, {len(after.state.position)}, but are {len(rows)}")
    for row in rows:
        if not len(row):
            continue
        lowest, highest = int(row.min()), int(row.max())
        if lowest < 0 or highest >= model.cfg.vocab_size:
            raise ValueError(
                f"tokens must lie in [0, `vocab_size` = {model.cfg.vocab_size}), but are {lowest} to {highest}"
            )
