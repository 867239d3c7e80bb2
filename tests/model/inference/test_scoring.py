"""Losses by context length: windows, positions, pieces and interruptions."""

import math

import pytest
import torch
from torch.nn import functional as F

from megalodon_plugin.model.inference.norm_window import NormWindow, statistics_of_piece
from megalodon_plugin.model.inference.scoring import Score, score_from, score_tensors, score_text, token_losses
from megalodon_plugin.ops import NormState
from megalodon_plugin.ops.timestep_norm import merge_norm_states

from support.small_model import small_model

C = 8


class Text:
    def __init__(self, length, at=0):
        self.tokens = torch.randint(31, (length,), generator=torch.Generator().manual_seed(7))
        self.at = at

    def take(self, n):
        taken = self.tokens[self.at : self.at + n]
        self.at += len(taken)
        return taken


def scored(model, length, context, piece, **options):
    score = Score(context)
    for _ in score_text(model, Text(length).take, score, piece, **options):
        pass
    return score


def by_hand(model, length, context):
    """Loss of every prediction, and how many tokens it has seen, window by window from full passes."""
    tokens, losses, seen = Text(length).tokens, [], []
    for start in range(0, length - 1, context):
        inputs, targets = tokens[start : start + context][: length - 1 - start], tokens[start + 1 : start + context + 1]
        with torch.no_grad():
            logits = model(inputs.unsqueeze(0))[0]
        losses += F.cross_entropy(logits, targets, reduction="none").tolist()
        seen += range(1, len(targets) + 1)
    return losses, seen


@pytest.mark.parametrize("piece", [1, 7, C, 33, 1000])
@pytest.mark.parametrize("context", [1, 5, 2 * C, 57, 200])
def test_every_token_but_the_first_is_scored_once_with_what_its_window_shows(context, piece):
    model, length = small_model().double().eval(), 201
    score = scored(model, length, context, piece)
    losses, seen = by_hand(model, length, context)
    assert score.n_read == sum(score.counts) == length - 1
    for bucket, (total, count) in enumerate(zip(score.sums, score.counts, strict=True)):
        own = [loss for loss, s in zip(losses, seen, strict=True) if 2**bucket <= s < 2 ** (bucket + 1)]
        assert count == len(own)
        assert total == pytest.approx(math.fsum(own), rel=1e-9)
    assert score.loss == pytest.approx(math.fsum(losses) / len(losses), rel=1e-10)


def test_logits_exist_for_a_slice_at_a_time():
    model, length = small_model().double().eval(), 50
    features = model.features(Text(length).tokens.view(2, -1))
    targets = torch.randint(31, (2, 25))
    sizes = []
    model.output.register_forward_hook(lambda module, args, out: sizes.append(len(out)))
    sliced = token_losses(model, features, targets, slice_tokens=7)
    assert sizes == [7] * 7 + [1]
    torch.testing.assert_close(sliced, token_losses(model, features, targets), rtol=1e-12, atol=0)


@pytest.mark.parametrize("windowed_norm", [False, True])
def test_a_score_that_was_put_down_anywhere_goes_on_to_the_last_bit(windowed_norm):
    model, context, piece = small_model().double().eval(), 13 * C + 3, C
    length = 2 * context + 20
    whole = scored(model, length, context, piece, windowed_norm=windowed_norm)
    n_pieces = sum(1 for _ in score_text(model, Text(length).take, Score(context), piece, windowed_norm))
    assert n_pieces > 10
    for stop in range(1, n_pieces):
        score = Score(context)
        steps = score_text(model, Text(length).take, score, piece, windowed_norm)
        for _ in range(stop):
            next(steps)
        kept = {name: value.clone() for name, value in score_tensors(score).items()}
        resumed = score_from(kept, C)
        for _ in score_text(model, Text(length, at=resumed.n_read).take, resumed, piece, windowed_norm):
            pass
        assert (resumed.sums, resumed.counts) == (whole.sums, whole.counts)


def test_a_loss_that_is_not_finite_is_told_with_its_place():
    model = small_model().double().eval()
    with torch.no_grad():
        model.output.weight[3] = float("nan")
    with pytest.raises(ValueError, match="losses must be finite, but one is not at context 16, position 0 of a window"):
        scored(model, 40, 16, 4)


class TestWindowedNorm:
    def states(self, lengths, width=3):
        x = [
            torch.randn(2, length, width, generator=torch.Generator().manual_seed(length)).double()
            for length in lengths
        ]
        return [NormState(torch.full((2,), t.shape[1]), t.mean(1) + 5, t.var(1, unbiased=False)) for t in x]

    def test_the_statistics_of_a_piece_follow_from_those_around_it(self):
        first, second = self.states((48, 16))
        found = statistics_of_piece(first, merge_norm_states(first, second))
        torch.testing.assert_close(found, second, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(statistics_of_piece(None, second), second)

    def test_norms_look_back_over_three_pieces_from_eight_chunks_on(self):
        """An oracle that keeps what went into every norm and counts it anew."""
        model, inputs = small_model().double().eval(), {}
        norms = [*(layer.attention.timestep_norm for layer in model.layers.values()), model.norm]
        for i, norm in enumerate(norms):
            norm.register_forward_pre_hook(lambda module, args, i=i: inputs.setdefault(i, []).append(args[0]))
        window, state = NormWindow(C), None
        for n, piece in enumerate(Text(14 * C).tokens.unsqueeze(0).split(2 * C, 1), start=1):
            with torch.no_grad():
                _, after = model.stream(piece, state)
            state = window.advance(state, after)
            for i, norm in enumerate([*(layer.norm for layer in state.layers), state.norm]):
                seen = inputs[i][-3:] if n >= 4 else inputs[i]
                groups = torch.cat(seen, 1).unflatten(2, (3, -1))  # (1, L, G, D/G)
                assert norm.count.item() == groups.shape[1]
                torch.testing.assert_close(norm.mean, groups.mean((1, 3)), rtol=1e-10, atol=1e-10)
                torch.testing.assert_close(norm.var, groups.var((1, 3), unbiased=False), rtol=1e-9, atol=1e-10)
            torch.testing.assert_close([layer.h for layer in state.layers], [layer.h for layer in after.layers])

    def test_it_changes_long_windows_only(self):
        model = small_model().double().eval()
        plain, windowed = (scored(model, 20 * C, 20 * C - 1, 2 * C, windowed_norm=w) for w in (False, True))
        assert plain.sums[:6] == windowed.sums[:6]  # up to position 63 of 8 chunks
        assert plain.sums[7] != windowed.sums[7]
        short, windowed = (scored(model, 20 * C, 7 * C, 2 * C, windowed_norm=w) for w in (False, True))
        assert short.sums == windowed.sums


@pytest.mark.parametrize(("row", "column", "position"), [(0, 0, 40), (1, 2, 42), (0, 29, 69)])
def test_the_first_position_that_is_not_finite_is_told(row, column, position):
    losses = torch.ones(2, 30)
    losses[row, column:] = float("nan")
    with pytest.raises(ValueError, match=f"not at context 100, position {position} of a window"):
        Score(100, position=40).add(losses)
