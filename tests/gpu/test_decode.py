"""Reading and decoding on a GPU: the captured step, precision, and memory that does not grow with the text."""

import dataclasses

import pytest
import torch
from torch.utils import _pytree as pytree

from megalodon_plugin.model import PRESETS, Megalodon
from megalodon_plugin.model.inference.decode import Decoder
from megalodon_plugin.model.inference.generate import Decoding, continue_from
from megalodon_plugin.model.inference.prefill import prefill
from megalodon_plugin.model.inference.sampling import Sampling
from megalodon_plugin.model.precision import lower_matrices

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

VOCABULARY = 500
LENGTHS = (1, 255, 256, 700)


def model_of(dtype):
    with torch.device("cuda"):
        model = Megalodon(dataclasses.replace(PRESETS["debug"], vocab_size=VOCABULARY))
    torch.manual_seed(0)
    model.init_weights()
    return lower_matrices(model, dtype).eval()


def text_of(*shape):
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(1)).cuda()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_captured_step_is_the_step(dtype):
    model, rows = model_of(dtype), [text_of(length) for length in LENGTHS]
    prefilled, new = prefill(model, rows), text_of(len(LENGTHS), 300)
    captured = Decoder(model, prefilled.state.map(torch.clone))
    plain = Decoder(model, prefilled.state.map(torch.clone), graph=False)
    for token in new.unbind(1):  # each row crosses a chunk's edge at its own time
        assert torch.equal(captured.step(token), plain.step(token))
    for a, b in zip(pytree.tree_leaves(captured.state), pytree.tree_leaves(plain.state), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-4), (torch.bfloat16, 6e-2)])
def test_decoding_gives_the_logits_of_the_full_pass(dtype, tolerance):
    """bfloat16 keeps 8 bits: after 4 layers logits of about 1 are off by some hundredths either way."""
    model, text = model_of(dtype), text_of(2, 600)
    decoder = Decoder(model, prefill(model, text[:, :300]).state)
    steps = torch.stack([decoder.step(token).clone() for token in text[:, 300:].unbind(1)], 1)
    with torch.no_grad():
        want = model(text)[:, 300:]
    assert (steps - want).abs().max() < tolerance * want.abs().max()


def test_one_seed_gives_one_text():
    model = model_of(torch.bfloat16)
    prefilled = prefill(model, [text_of(length) for length in LENGTHS])
    texts = [
        torch.stack(
            list(
                continue_from(
                    model,
                    prefilled,
                    Decoding(50, Sampling(temperature=0.9, top_k=50, top_p=0.9)),
                    torch.Generator("cuda").manual_seed(seed),
                )
            )
        )
        for seed in (1, 1, 2)
    ]
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])


def test_memory_of_reading_does_not_grow_with_the_text():
    model, peaks = model_of(torch.bfloat16), []
    texts = [text_of(1, length) for length in (32768, 32768, 524288)]  # the first also compiles and chooses algorithms
    for text in texts:
        torch.cuda.reset_peak_memory_stats()
        prefill(model, text)
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[2] <= peaks[1] + 8 * 2**20  # indices of pieces beyond the first


def test_the_compiled_step_is_the_step_within_rounding():
    model, rows = model_of(torch.float32), [text_of(length) for length in LENGTHS]
    prefilled, new = prefill(model, rows), text_of(len(LENGTHS), 20)
    compiled = Decoder(model, prefilled.state.map(torch.clone), compile=True)
    plain = Decoder(model, prefilled.state.map(torch.clone))
    for token in new.unbind(1):
        want = plain.step(token)
        assert (compiled.step(token) - want).abs().max() < 1e-4 * want.abs().max()
