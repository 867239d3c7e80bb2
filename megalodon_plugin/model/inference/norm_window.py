"""The authors' windowed statistics for long texts: TimestepNorm looks back over the last chunks only.

Their helpers read a text two chunks at a time and, from eight chunks on, go into each piece with statistics of the last
six chunks instead of those of the whole text. Hidden states and everything else are carried as ever.
"""

from collections import deque

import torch

from megalodon_plugin.ops import NormState
from megalodon_plugin.ops.timestep_norm import merge_norm_states

from ..state import MegalodonState

PIECE_CHUNKS = 2
FIRST_WINDOWED_CHUNKS = 8
WINDOW_PIECES = 3


class NormWindow:
    """Follows a text that is read in pieces of two chunks; all rows are at the same position.

    pieces: for each of the last pieces the statistics of every norm, the layers' first.
    """

    def __init__(self, chunk_size: int, pieces: list[list[NormState]] | None = None):
        self._chunk_size = chunk_size
        self.pieces: deque[list[NormState]] = deque(pieces or [], maxlen=WINDOW_PIECES)

    def advance(self, before: MegalodonState | None, after: MegalodonState) -> MegalodonState:
        """The state to read the next piece with, from those around the last one."""
        norms_before = [None] * (len(after.layers) + 1) if before is None else _norms(before)
        self.pieces.append([statistics_of_piece(b, a) for b, a in zip(norms_before, _norms(after), strict=True)])
        if int(after.position.min()) < FIRST_WINDOWED_CHUNKS * self._chunk_size:
            return after
        window = list(self.pieces[0])
        for piece in list(self.pieces)[1:]:
            window = [merge_norm_states(first, second) for first, second in zip(window, piece, strict=True)]
        dtype = after.norm.mean.dtype
        window = [NormState(norm.count, norm.mean.to(dtype), norm.var.to(dtype)) for norm in window]
        layers = tuple(layer._replace(norm=norm) for layer, norm in zip(after.layers, window[:-1], strict=True))
        return after._replace(layers=layers, norm=window[-1])


def statistics_of_piece(before: NormState | None, after: NormState) -> NormState:
    """Statistics of what lies between two states, in float64: the inverse of `merge_norm_states`.

    With n1, n2 the timesteps before and in the piece and shares s = n / (n1 + n2):
    mean2 = mean1 + (mean - mean1) / s2,  var2 = (var - s1 var1 - s1 s2 (mean2 - mean1)^2) / s2.
    """
    mean, var = after.mean.double(), after.var.double()
    if before is None:
        return NormState(after.count, mean, var)
    count = after.count - before.count
    share2 = (count.double() / after.count.clamp(min=1)).unsqueeze(-1)  # (B, 1)
    share1 = 1 - share2
    begun = (before.count > 0).unsqueeze(-1)
    mean1, var1 = (torch.where(begun, s.double(), 0) for s in (before.mean, before.var))
    d = (mean - mean1) / share2
    # Rounding may leave less than nothing where the features hardly vary.
    var2 = ((var - share1 * var1 - share1 * share2 * d * d) / share2).clamp(min=0)
    return NormState(count, mean1 + d, var2)


def _norms(state: MegalodonState) -> list[NormState]:
    return [*(layer.norm for layer in state.layers), state.norm]
