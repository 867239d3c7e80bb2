"""Generation: the streaming path gives what full forward passes give, reproducibly, and refuses what it cannot do."""

import re

import pytest
import torch

from megalodon_plugin.model import generate

from support.small_model import small_model

C = 8


def prompt_of(length, batch=2):
    return torch.randint(31, (batch, length), generator=torch.Generator().manual_seed(length))


def generated(model, prompt, count, **options):
    return torch.stack(list(generate(model, prompt, count, **options)), 1)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("length", [1, C - 1, C, 2 * C + 3])
def test_greedy_generation_is_the_likeliest_token_of_full_passes(length):
    model = small_model().double().eval()
    text = prompt_of(length)
    new = generated(model, text, C + 2, temperature=0)
    assert new.shape == (2, C + 2)
    assert new.dtype == torch.int64
    with torch.no_grad():
        for i in range(C + 2):
            want = model(text)[:, -1].argmax(-1)
            assert torch.equal(new[:, i], want)
            text = torch.cat([text, want.unsqueeze(1)], 1)
    assert len(new.unique()) > 2  # a model that repeats one token would pass for any state


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("prefill", [1, 3, C, C + 1, 100])
def test_the_length_of_the_pieces_that_the_prompt_is_read_in_does_not_matter(prefill, temperature):
    model, prompt = small_model().double().eval(), prompt_of(2 * C + 3)
    whole = generated(model, prompt, 9, temperature=temperature, generator=seeded(1))
    pieces = generated(model, prompt, 9, temperature=temperature, generator=seeded(1), prefill_tokens=prefill)
    assert torch.equal(whole, pieces)


def test_one_seed_gives_one_text_and_another_seed_another():
    model, prompt = small_model().double().eval(), prompt_of(5)
    first, again, other = (generated(model, prompt, 20, generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_without_a_generator_the_global_seed_decides():
    model, prompt = small_model().double().eval(), prompt_of(5)
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(generated(model, prompt, 20))
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])


def test_rows_are_texts_of_their_own():
    model, prompt = small_model().double().eval(), prompt_of(C + 1, batch=3)
    together = generated(model, prompt, 10, temperature=0)
    for b in range(3):
        assert torch.equal(together[b : b + 1], generated(model, prompt[b : b + 1], 10, temperature=0))
    assert len(together.unique(dim=0)) > 1


def test_sampling_follows_the_tempered_distribution():
    """Counts of 4,000 first tokens against softmax(logits / temperature): a chi-square statistic of 30 degrees of
    freedom exceeds 60 once in 1,000 times, and the seed is fixed."""
    model, prompt, temperature, rows = small_model().double().eval(), prompt_of(4, batch=1), 0.5, 4000
    with torch.no_grad():
        want = rows * (model(prompt)[0, -1] / temperature).softmax(-1)
    tokens = generated(model, prompt.expand(rows, -1), 1, temperature=temperature, generator=seeded(3))
    counts = torch.bincount(tokens.flatten(), minlength=31)
    assert ((counts - want).square() / want).sum() < 60


def test_a_very_low_temperature_is_greedy():
    model, prompt = small_model().double().eval(), prompt_of(5)
    cold = generated(model, prompt, 12, temperature=1e-6, generator=seeded(0))
    assert torch.equal(cold, generated(model, prompt, 12, temperature=0))


def test_it_yields_as_many_tokens_as_asked_for_one_at_a_time():
    model, prompt = small_model().double().eval(), prompt_of(3)
    assert list(generate(model, prompt, 0)) == []
    tokens = generate(model, prompt, 10**9, temperature=0)
    assert next(tokens).shape == (2,)  # the rest is never computed
    assert not next(tokens).requires_grad


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        (torch.zeros(2, 0, dtype=torch.int64), {}, "`prompt` must have shape (B, L) with L >= 1, but has (2, 0)"),
        (torch.zeros(3, dtype=torch.int64), {}, "`prompt` must have shape (B, L) with L >= 1, but has (3,)"),
        (prompt_of(3), {"temperature": -0.5}, "`temperature` must be finite and not be negative, but is -0.5"),
    ],
)
def test_errors(prompt, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        next(generate(small_model().double().eval(), prompt, 1, **options))


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(ValueError, match=re.escape("must be in eval mode to generate; call `model.eval()`")):
        next(generate(small_model().double().eval().train(), prompt_of(3), 1))
