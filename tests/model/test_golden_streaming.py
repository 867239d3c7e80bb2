"""Streaming against the authors' numbers: the pieces as they fed them, what is carried after the last one, and the same
tokens in pieces of other lengths that cross chunk edges."""

import pytest
import torch

from megalodon_plugin.checkpoint import from_authors
from megalodon_plugin.model import Megalodon, MegalodonConfig

from support.golden_cases import F64_TOLERANCE, assert_close, case_names, config_kwargs, group, load

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
PIECES = {
    "one_pass": lambda C: [10**6],
    "single_steps": lambda C: [1],
    "sevens": lambda C: [7],
    "chunk_less_one": lambda C: [C - 1],
    "chunks": lambda C: [C],
    "chunk_and_one": lambda C: [C + 1],
    "over_two_edges": lambda C: [5, 2 * C + 3, 1],
}


def released_model(info, tensors, dtype):
    cfg = MegalodonConfig(**config_kwargs(info["config"]))
    model = Megalodon(cfg)
    model.init_weights(buffer_device=None)
    model.load_state_dict(from_authors(group(tensors, "param."), cfg))
    return model.to(dtype).eval()


@torch.no_grad()
def feed(model, tokens, lengths):
    """Feed the tokens in pieces of these lengths, over and over until they end; (logits, state after each piece)."""
    logits, states, state, start = [], [], None, 0
    while start < tokens.shape[1]:
        length = lengths[len(states) % len(lengths)]
        piece, state = model(tokens[:, start : start + length], state=state, return_state=True)
        logits.append(piece)
        states.append(state)
        start += length
    return torch.cat(logits, dim=1), states


def carried(state, chunk_size):
    """The state under the names of the golden cache."""
    kept = state.position[0].item() % chunk_size
    cache = {}
    for i, layer in enumerate(state.layers):
        cache |= {f"{i}.norm_mean": layer.norm.mean, f"{i}.norm_var": layer.norm.var, f"{i}.hx": layer.h}
        cache |= {f"{i}.k": layer.k[:, :kept], f"{i}.v": layer.v[:, :kept]}
    return cache | {"final.norm_mean": state.norm.mean, "final.norm_var": state.norm.var}


def check(state, info, tensors, tolerance, what):
    counts = {key: value for key, value in group(tensors, "cache.").items() if key.endswith("count")}
    chunk_size = info["config"]["chunk_size"]
    for i, layer in enumerate(state.layers):
        assert torch.equal(layer.norm.count, counts[f"{i}.norm_count"])
        assert torch.equal(state.position % chunk_size, counts[f"{i}.attn_count"].expand(info["B"]))
    assert len(state.layers) == info["config"]["num_layers"]
    assert torch.equal(state.norm.count, counts["final.norm_count"])
    assert torch.equal(state.position, state.norm.count)
    assert_close(carried(state, chunk_size), group(tensors, "f64.cache."), tolerance, f"{what} state")


@DTYPES
@pytest.mark.parametrize("name", case_names("streaming"))
def test_pieces_as_fed(name, dtype):
    info, tensors = load(name)
    tolerance = F64_TOLERANCE if dtype == torch.float64 else 1e-5
    assert sum(info["pieces"]) == tensors["tokens"].shape[1]
    logits, states = feed(released_model(info, tensors, dtype), tensors["tokens"], info["pieces"])
    assert len(states) == len(info["pieces"])
    assert logits.dtype == dtype
    assert_close({"logits": logits}, {"logits": tensors["f64.logits"]}, tolerance, name)
    check(states[-1], info, tensors, tolerance, name)


@DTYPES
@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize("name", case_names("streaming"))
def test_any_piece_lengths(name, pieces, dtype):
    info, tensors = load(name)
    tolerance = F64_TOLERANCE if dtype == torch.float64 else 1e-5
    model = released_model(info, tensors, dtype)
    logits, states = feed(model, tensors["tokens"], PIECES[pieces](info["config"]["chunk_size"]))
    assert_close({"logits": logits}, {"logits": tensors["f64.logits"]}, tolerance, name)
    check(states[-1], info, tensors, tolerance, name)


@pytest.mark.parametrize("name", case_names("streaming"))
def test_a_state_is_not_changed_by_what_is_read_after_it(name):
    info, tensors = load(name)
    model = released_model(info, tensors, torch.float64)
    _, states = feed(model, tensors["tokens"], [5])
    copy = [value.clone() for value in torch.utils._pytree.tree_leaves(states[0])]
    with torch.no_grad():
        first, _ = model(tensors["tokens"][:, 5:27], state=states[0], return_state=True)
        again, _ = model(tensors["tokens"][:, 5:27], state=states[0], return_state=True)
    assert torch.equal(first, again)
    assert all(map(torch.equal, copy, torch.utils._pytree.tree_leaves(states[0])))
