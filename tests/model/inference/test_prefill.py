"""Prompts of different lengths, token-by-token decoding in place, and states in files."""

import re

import pytest
import torch
from torch.utils import _pytree as pytree

from megalodon_plugin.model import generate
from megalodon_plugin.model.inference.decode import Decoder
from megalodon_plugin.model.inference.generate import ENDED, Decoding, continue_from
from megalodon_plugin.model.inference.prefill import Prefilled, prefill
from megalodon_plugin.model.inference.sampling import Sampling
from megalodon_plugin.model.precision import float32_parameters, lower_matrices

from support.small_model import small_model

C = 8
LENGTHS = (1, C - 1, 2 * C + 3, C - 1, 3 * C)


def stirred_model(seed=5, **options):
    """In which everything that starts at 0 takes part."""
    model = small_model(seed, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return model.double().eval()


def rows_of(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(31, (length,), generator=generator) for length in lengths]


def assert_same(a, b, tolerance=1e-10):
    for x, y in zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("piece", [None, 1, 3, C, C + 1])
def test_prompts_of_different_lengths_are_read_as_if_alone(piece):
    model, rows = stirred_model(), rows_of()
    told = []
    prefilled = prefill(model, rows, piece_tokens=piece, progress=told.append)
    assert told[-1] == sum(LENGTHS)
    assert prefilled.state.position.tolist() == list(LENGTHS)
    for b, row in enumerate(rows):
        with torch.no_grad():
            logits, state = model(row.unsqueeze(0), return_state=True)
        assert_same(prefilled.logits[b], logits[0, -1])
        assert_same(prefilled.state.select([b]), state)


def test_rows_that_begin_at_different_positions_are_read_on_and_empty_ones_stay():
    model, first, then = stirred_model(), rows_of(), rows_of((5, 0, 2, 2 * C, 1))
    prefilled = prefill(model, then, after=prefill(model, first))
    whole = prefill(model, [torch.cat(pair) for pair in zip(first, then, strict=True)])
    assert_same((prefilled.state, prefilled.logits), (whole.state, whole.logits))


def test_steps_in_place_give_the_logits_of_the_full_pass_while_rows_cross_chunks_at_their_own_times():
    model, rows = stirred_model(), rows_of()
    prefilled, steps = prefill(model, rows), 2 * C + 1
    new = torch.randint(31, (len(rows), steps), generator=torch.Generator().manual_seed(2))
    decoder = Decoder(model, prefilled.state.map(torch.clone))
    logits = torch.stack([decoder.step(token) for token in new.unbind(1)], 1)
    for b, row in enumerate(rows):
        with torch.no_grad():
            whole, state = model(torch.cat([row, new[b]]).unsqueeze(0), return_state=True)
        assert_same(logits[b], whole[0, len(row) :])
        assert_same(decoder.state.select([b]), state)  # entries of older chunks are gone from the caches too


def test_a_step_writes_the_given_memory():
    model = stirred_model()
    state = prefill(model, rows_of()).state
    before = [t.data_ptr() for t in pytree.tree_leaves(state)]
    with torch.no_grad():
        model.step_(torch.tensor([1, 2, 3, 4, 5]), state)
    assert [t.data_ptr() for t in pytree.tree_leaves(state)] == before
    assert state.position.tolist() == [length + 1 for length in LENGTHS]


def test_generation_of_rows_of_different_lengths_is_that_of_each_row_alone():
    model, rows = stirred_model(), rows_of()
    together = torch.stack(list(generate(model, rows, 2 * C, temperature=0)), 1)
    for b, row in enumerate(rows):
        alone = torch.stack(list(generate(model, row.unsqueeze(0), 2 * C, temperature=0)), 1)
        assert torch.equal(together[b], alone[0])
    assert len(together.unique()) > 2


def test_a_prefilled_prompt_is_not_changed_by_what_is_generated_from_it():
    model = stirred_model()
    prefilled = prefill(model, rows_of())
    first, again = (
        torch.stack(list(continue_from(model, prefilled, Decoding(C + 2, Sampling(temperature=0))))) for _ in range(2)
    )
    assert torch.equal(first, again)


def test_stop_tokens_end_rows_one_by_one_and_then_all():
    model, rows = stirred_model(), rows_of()
    free = torch.stack(list(generate(model, rows, 12, temperature=0)), 1)
    stops = {int(free[0, 2]), int(free[1, 5])}
    stopped = torch.stack(list(generate(model, rows, 12, temperature=0, stop_tokens=stops)), 1)
    ends = []
    for b in range(len(rows)):
        hits = [i for i, token in enumerate(free[b].tolist()) if token in stops]
        end = hits[0] + 1 if hits else 12
        ends.append(end)
        length = stopped.shape[1]
        assert stopped[b, :end].tolist() == free[b, :end].tolist()
        assert stopped[b, end:].tolist() == [ENDED] * (length - min(end, length))
    assert len(set(ends)) > 1
    assert stopped.shape[1] == max(ends)


class TestSampling:
    LOGITS = torch.tensor([[0.1, 3.0, 2.0, -1.0, 2.5]]).log_softmax(-1)

    def counts(self, rows=6000, **options):
        draws = Sampling(**options).draw(self.LOGITS.expand(rows, -1), torch.Generator().manual_seed(0))
        return torch.bincount(draws, minlength=5) / rows

    def test_top_k_draws_from_the_k_likeliest_by_their_shares(self):
        want = torch.where(torch.tensor([0, 1, 1, 0, 1]).bool(), self.LOGITS[0].exp(), 0)
        torch.testing.assert_close(self.counts(top_k=3), want / want.sum(), rtol=0, atol=0.03)
        assert self.counts(top_k=3)[[0, 3]].sum() == 0
        torch.testing.assert_close(self.counts(top_k=99), self.LOGITS[0].exp(), rtol=0, atol=0.03)

    def test_top_p_draws_from_the_smallest_set_that_reaches_p(self):
        probabilities = self.LOGITS[0].exp()
        assert probabilities[1] < 0.6 < probabilities[[1, 4]].sum()
        assert self.counts(top_p=0.6)[[0, 2, 3]].sum() == 0
        assert self.counts(top_p=0.6)[4] > 0.2
        assert self.counts(top_p=1e-6)[1] == 1
        torch.testing.assert_close(self.counts(top_p=1.0), probabilities, rtol=0, atol=0.03)

    def test_top_p_counts_within_what_top_k_leaves(self):
        assert self.counts(top_k=2, top_p=0.6)[4] == 0  # the first of two has 0.62 of their probability

    def test_a_tiny_temperature_does_not_overflow(self):
        assert self.counts(temperature=1e-30)[1] == 1

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"top_k": 0}, "`top_k` must be at least 1, but is 0"),
            ({"top_p": 0.0}, "`top_p` must lie in (0, 1], but is 0.0"),
            ({"top_p": 1.5}, "`top_p` must lie in (0, 1], but is 1.5"),
            ({"temperature": float("nan")}, "`temperature` must be finite and not be negative, but is nan"),
        ],
    )
    def test_errors(self, options, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            Sampling(**options)


class TestFiles:
    def test_generation_goes_on_from_a_file_as_without_a_break(self, tmp_path):
        model, rows = stirred_model(), rows_of()
        prefilled = prefill(model, rows)
        prefilled.save(tmp_path / "state", model)
        loaded = Prefilled.load(tmp_path / "state", model)
        assert [path.name for path in tmp_path.iterdir()] == ["state"]
        texts = [
            torch.stack(list(continue_from(model, r, Decoding(20, Sampling(temperature=0)))))
            for r in (prefilled, loaded)
        ]
        assert torch.equal(*texts)

    def test_a_state_of_other_weights_or_another_configuration_is_refused(self, tmp_path):
        model = stirred_model()
        prefill(model, rows_of()).save(tmp_path / "state", model)
        with pytest.raises(ValueError, match="but was written by one with other weights"):
            Prefilled.load(tmp_path / "state", stirred_model(seed=6))
        with pytest.raises(ValueError, match=re.escape("must have shape (5, 16, 2, 4), but has (5, 8, 2, 4)")):
            Prefilled.load(tmp_path / "state", stirred_model(chunk_size=16))
        with pytest.raises(ValueError, match="other weights"):
            Prefilled.load(tmp_path / "state", stirred_model(rope_theta=500.0))

    def test_lower_matrices_leave_the_mark_as_it_is(self, tmp_path):
        model = stirred_model().float()
        prefill(model, rows_of()).save(tmp_path / "state", model)
        Prefilled.load(tmp_path / "state", lower_matrices(model, torch.bfloat16))

    def test_broken_files_are_refused(self, tmp_path):
        model = stirred_model()
        prefill(model, rows_of()).save(tmp_path / "state", model)
        content = (tmp_path / "state").read_bytes()
        (tmp_path / "half").write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match="half must be a whole safetensors file, but: "):
            Prefilled.load(tmp_path / "half", model)
        with pytest.raises(ValueError, match=r"must exist, but .*none does not"):
            Prefilled.load(tmp_path / "none", model)
        prefill(model, rows_of()).state.save(tmp_path / "bare")
        with pytest.raises(ValueError, match="must hold the logits after the text"):
            Prefilled.load(tmp_path / "bare", model)


class TestErrors:
    def test_prompts(self):
        model = stirred_model()
        with pytest.raises(ValueError, match=re.escape("tokens must lie in [0, `vocab_size` = 31), but are 3 to 31")):
            prefill(model, [torch.tensor([3, 31])])
        with pytest.raises(ValueError, match="must have shape"):
            prefill(model, rows_of((3, 0)))
        with pytest.raises(ValueError, match="there must be a prompt a row of the state, 5, but are 2"):
            prefill(model, rows_of((3, 4)), after=prefill(model, rows_of()))
        with pytest.raises(ValueError, match="`prefill_tokens` must be at least 1, but is 0"):
            prefill(model, rows_of(), piece_tokens=0)

    def test_nan_in_the_weights(self):
        model = stirred_model()
        with torch.no_grad():
            model.output.weight[3, 0] = float("nan")
        with pytest.raises(ValueError, match="must be finite, but are not: the weights may hold NaN"):
            next(generate(model, rows_of(), 3))


class TestPrecision:
    def test_only_matrices_are_lowered(self):
        model = lower_matrices(stirred_model().float(), torch.bfloat16)
        kept = float32_parameters(model)
        assert {p.dtype for p in kept} == {torch.float32}
        assert {p.dtype for p in model.parameters() if p not in kept} == {torch.bfloat16}
        assert model.layers["0"].attention.qk.gamma in kept

    def test_decoding_in_bfloat16_stays_with_the_full_pass(self):
        """Both round; what is compared is as far from the float64 truth as the full pass is, within a factor."""
        truth, low = stirred_model(), lower_matrices(stirred_model().float(), torch.bfloat16)
        text = torch.randint(31, (2, 3 * C), generator=torch.Generator().manual_seed(4))
        decoder = Decoder(low, prefill(low, text[:, :3]).state)
        steps = torch.stack([decoder.step(token) for token in text[:, 3:].unbind(1)], 1)
        with torch.no_grad():
            want, full = truth(text)[:, 3:], low(text)[:, 3:]
        assert steps.dtype == torch.float32
        assert (steps - want).abs().max() < 2 * (full - want).abs().max()

    def test_float16_is_refused(self):
        with pytest.raises(ValueError, match=r"`dtype` must be float32 or bfloat16, but is torch\.float16"):
            lower_matrices(stirred_model(), torch.float16)
