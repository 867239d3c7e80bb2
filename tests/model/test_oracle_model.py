"""The model in float64 against the oracle on fresh random parameters and tokens: logits and every gradient by name."""

import pytest
import torch
import torch.nn.functional as F

from megalodon_plugin.checkpoint import to_authors
from megalodon_plugin.model import Megalodon, MegalodonConfig

import reference
from support.golden_cases import F64_TOLERANCE, assert_close
from support.small_model import SIZES

C = 8
VARIANTS = {
    "plain": {},
    "one_head_one_group": {"n_heads": 1, "norm_groups": 1},
    "swiglu_rescale": {"swiglu": True, "rescale_ffn": True},
    "tied_and_scaled_embedding": {"tie_embedding": True, "scale_embedding": True},
    "scaled_embedding": {"scale_embedding": True},
    "no_affine": {"norm_affine": False},
    "paper": {"cema_input": "paper", "rope_theta": 100000.0, "swiglu": True},
    "large_eps": {"norm_eps": 1e-2},
    "other_output_size": {"output_size": 11},
    "chunks_of_one": {"chunk_size": 1},
}


def random_model(seed=0, **changes):
    """A float64 model whose parameters are all random, the ones that start at zero too."""
    cfg = MegalodonConfig(**{**SIZES, **changes})
    model = Megalodon(cfg)
    model.init_weights(buffer_device=None)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return cfg, model.double()


def random_tokens(L, vocab_size, B=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (2, B, L), generator=generator).unbind(0)


def reference_model(model, cfg, tokens):
    """The oracle's logits and its parameters, leaves under the released names."""
    params = {
        name: value.detach().clone().requires_grad_(True)
        for name, value in to_authors(model.state_dict()).items()
        if value.is_floating_point()
    }
    released = {
        "num_layers": cfg.n_layers,
        "num_heads": cfg.n_heads,
        "chunk_size": cfg.chunk_size,
        "norm_num_groups": cfg.norm_groups,
        "norm_eps": cfg.norm_eps,
        "norm_affine": cfg.norm_affine,
        "rope_base": cfg.rope_theta,
        "swiglu": cfg.swiglu,
        "rescale_nffn": cfg.rescale_ffn,
        "scale_emb": cfg.scale_embedding,
        "share_emb": cfg.tie_embedding,
        "cema_input": cfg.cema_input,
    }
    return reference.model(tokens, params, released), params


def agree(model, cfg, logits, tokens, targets, what):
    """Same logits, and, for the mean loss, the same gradient of every parameter."""
    expected, params = reference_model(model, cfg, tokens)
    assert_close({"logits": logits}, {"logits": expected}, F64_TOLERANCE, what)
    for output in (logits, expected):
        F.cross_entropy(output.flatten(0, 1), targets.flatten()).backward()
    ours = {name: value.grad for name, value in model.named_parameters()}
    assert all(grad is not None for grad in ours.values())
    theirs = {name: value.grad for name, value in params.items() if value.grad is not None}
    assert len(theirs) == len(ours)
    assert_close(to_authors(ours), theirs, F64_TOLERANCE, f"{what} gradients")


@pytest.mark.parametrize("L", [1, 13, C - 1, C, C + 1, 2 * C + 5])
@pytest.mark.parametrize("variant", VARIANTS)
def test_model(variant, L):
    cfg, model = random_model(**VARIANTS[variant])
    tokens, targets = random_tokens(L, cfg.output_size or cfg.vocab_size)
    agree(model, cfg, model(tokens), tokens, targets, f"{variant} L {L}")


@pytest.mark.parametrize("variant", ["plain", "paper"])
def test_model_with_strided_tokens(variant):
    cfg, model = random_model(**VARIANTS[variant])
    tokens, targets = random_tokens(11, cfg.vocab_size)
    strided = tokens.T.contiguous().T
    assert not strided.is_contiguous()
    agree(model, cfg, model(strided), tokens, targets, variant)


@pytest.mark.parametrize("pieces", [[1, 18], [9, 10], [8, 11], [3, 2, 14], [1] * 19])
@pytest.mark.parametrize("variant", ["plain", "paper", "tied_and_scaled_embedding", "no_affine"])
def test_pieces_are_one_pass_with_gradients_through_the_state(variant, pieces):
    cfg, model = random_model(**VARIANTS[variant])
    tokens, targets = random_tokens(sum(pieces), cfg.vocab_size)
    logits, state = [], None
    for piece in tokens.split(pieces, dim=1):
        out, state = model(piece, state=state, return_state=True)
        logits.append(out)
    agree(model, cfg, torch.cat(logits, dim=1), tokens, targets, f"{variant} {pieces}")


def test_rows_at_different_places():
    """Rows of a state that have read 3 and 13 steps go on together, each as if it were alone."""
    cfg, model = random_model()
    tokens, _ = random_tokens(13 + 7, cfg.vocab_size, B=2)
    starts = [3, 13]
    with torch.no_grad():
        states = [model(tokens[b : b + 1, :n], return_state=True)[1] for b, n in enumerate(starts)]
        both = torch.utils._pytree.tree_map(lambda *rows: torch.cat(rows), *states)
        piece = torch.stack([tokens[b, n : n + 7] for b, n in enumerate(starts)])
        logits, state = model(piece, state=both, return_state=True)
    assert state.position.tolist() == [10, 20]
    for b, n in enumerate(starts):
        expected, _ = reference_model(model, cfg, tokens[b : b + 1, : n + 7])
        assert_close({"logits": logits[b : b + 1]}, {"logits": expected[:, n:]}, F64_TOLERANCE, f"row {b}")
