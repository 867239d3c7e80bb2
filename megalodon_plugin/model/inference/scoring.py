"""Losses of a long text at a given context length, streamed."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from megalodon_plugin.ops import NormState

from ..model import Megalodon
from ..state import MegalodonState
from .norm_window import PIECE_CHUNKS, NormWindow

SLICE_TOKENS = 2048


@dataclass
class Score:
    """Sums of losses in nats so far, and the place in the text.

    sums, counts: by bucket; a token that has seen s tokens of its window, itself's input included, is in bucket
        floor(log2 s).
    n_read: tokens of the text that were predicted.
    position: timesteps of the window that were read; `state` is after them, if any.
    """

    context: int
    sums: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    n_read: int = 0
    position: int = 0
    state: MegalodonState | None = None
    window: NormWindow | None = None

    @property
    def loss(self) -> float:
        """Mean loss in nats a token."""
        return math.fsum(self.sums) / sum(self.counts)

    def add(self, losses: Tensor) -> None:
        """Add losses (rows, length) of the positions from `position` on."""
        length = losses.shape[1]
        for bucket in range((self.position + 1).bit_length() - 1, (self.position + length).bit_length()):
            first = max(2**bucket - 1 - self.position, 0)
            last = min(2 ** (bucket + 1) - 1 - self.position, length)
            while len(self.sums) <= bucket:
                self.sums.append(0.0)
                self.counts.append(0)
            chosen = losses[:, first:last]
            total = float(chosen.double().sum())
            if not math.isfinite(total):
                finite = torch.isfinite(chosen).all(0)  # (last - first,)
                position = self.position + first + int((~finite).nonzero()[0])
                raise ValueError(
                    f"losses must be finite, but one is not at context {self.context}, position {position} of a window"
                )
            self.sums[bucket] += total
            self.counts[bucket] += chosen.numel()


@torch.no_grad()
def token_losses(model: Megalodon, features: Tensor, targets: Tensor, slice_tokens: int = SLICE_TOKENS) -> Tensor:
    """-log softmax(logits)[target] in float32, (B, L), from features (B, L, D) and targets (B, L).

    Logits exist for a slice of the tokens at a time.
    """
    flat, wanted = features.flatten(0, 1), targets.flatten()
    parts = [
        F.cross_entropy(model.logits(x), t, reduction="none")
        for x, t in zip(flat.split(slice_tokens), wanted.split(slice_tokens), strict=True)
    ]
    return torch.cat(parts).view_as(targets)


@torch.no_grad()
def score_text(
    model: Megalodon,
    take: Callable[[int], Tensor],
    score: Score,
    piece_tokens: int,
    windowed_norm: bool = False,
) -> Iterator[Score]:
    """Read a text to its end and add to `score`, which is yielded after every piece.

    The text x_0, x_1, ... is cut into windows of `context` inputs: window w reads x[wc .. wc + c - 1] and predicts
    x[wc + 1 .. wc + c]. So at every context length each token but the first is predicted once. Windows no longer than
    a piece are read side by side, longer ones in pieces with a carried state.

    Args:
        model: in eval mode.
        take: gives the next tokens of the text, (n,) int64, fewer than asked for at its end. The first
            `score.n_read` tokens have been taken already.
        score: a new one, or one to continue.
        piece_tokens: inputs of one call.
        windowed_norm: see `norm_window`; pieces then are of two chunks.

    Raises:
        ValueError: a loss is not finite.
    """
    context, device = score.context, model.tok_embeddings.weight.device
    if windowed_norm:
        piece_tokens = PIECE_CHUNKS * model.cfg.chunk_size
        score.window = score.window or NormWindow(model.cfg.chunk_size)
    last = take(1).to(device)
    while True:
        side_by_side = max(1, piece_tokens // context)
        asked = side_by_side * context if context <= piece_tokens else min(piece_tokens, context - score.position)
        new = take(asked).to(device)
        if not len(new):
            return
        text = torch.cat([last, new])
        last = text[-1:]
        inputs, targets = text[:-1], text[1:]
        if context <= piece_tokens:
            whole = len(new) // context * context
            for part, length in ((slice(0, whole), context), (slice(whole, None), len(new) - whole)):
                if len(inputs[part]):  # whole windows as rows, then the text's rest as one
                    features = model.features(inputs[part].view(-1, length))
                    score.add(token_losses(model, features, targets[part].view(-1, length)))
        else:
            _read_piece(model, score, inputs, targets, windowed_norm)
        score.n_read += len(new)
        yield score


def _read_piece(model: Megalodon, score: Score, inputs: Tensor, targets: Tensor, windowed_norm: bool) -> None:
    features, after = model.stream(inputs.unsqueeze(0), score.state)
    score.add(token_losses(model, features, targets.unsqueeze(0)))
    if windowed_norm:
        assert score.window is not None
        after = score.window.advance(score.state, after)
    score.position += len(inputs)
    score.state = after
    if score.position == score.context:
        score.position, score.state = 0, None
        score.window = NormWindow(model.cfg.chunk_size) if windowed_norm else None


def score_tensors(score: Score) -> dict[str, Tensor]:
    """What must be kept to continue a score, as tensors; see `score_from`."""
    kept = {
        "sums": torch.tensor(score.sums, dtype=torch.float64),
        "counts": torch.tensor(score.counts, dtype=torch.int64),
        "place": torch.tensor([score.context, score.n_read, score.position]),
    }
    if score.state is not None:
        kept |= {f"state.{name}": value for name, value in score.state.named().items()}
    for i, piece in enumerate(score.window.pieces if score.window else []):
        for j, norm in enumerate(piece):
            kept |= {f"window.{i}.{j}.{name}": value for name, value in norm._asdict().items()}
    return kept


def score_from(tensors: dict[str, Tensor], chunk_size: int) -> Score:
    """The score of which `score_tensors` gave the tensors."""
    context, n_read, position = tensors["place"].tolist()
    score = Score(context, tensors["sums"].tolist(), tensors["counts"].tolist(), n_read, position)
    state = {name.removeprefix("state."): value for name, value in tensors.items() if name.startswith("state.")}
    if state:
        score.state = MegalodonState.from_named(state, "the progress")
    pieces: list[list[NormState]] = []
    while f"window.{len(pieces)}.0.count" in tensors:
        i = len(pieces)
        norms: list[NormState] = []
        while f"window.{i}.{len(norms)}.count" in tensors:
            norms.append(NormState(*(tensors[f"window.{i}.{len(norms)}.{name}"] for name in NormState._fields)))
        pieces.append(norms)
    if pieces:
        score.window = NormWindow(chunk_size, pieces)
    return score
