"""What a Megalodon carries between pieces: saved and loaded, moved, selected, detached, checked, and differentiated."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils import _pytree as pytree

from megalodon_plugin.model import MegalodonState

from support.small_model import small_model

C = 8


def tokens_of(length, batch=2, seed=0):
    return torch.randint(31, (batch, length), generator=torch.Generator().manual_seed(seed))


def state_after(model, length, batch=2):
    with torch.no_grad():
        return model(tokens_of(length, batch), return_state=True)[1]


def assert_same(first, second):
    first, second = pytree.tree_leaves(first), pytree.tree_leaves(second)
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16_activations"])
@pytest.mark.parametrize("n_layers", [1, 11])
def test_what_is_saved_is_loaded_bit_for_bit(n_layers, autocast, tmp_path):
    """Eleven layers: their names sort otherwise than their numbers do."""
    model = small_model(n_layers=n_layers).eval()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        state = state_after(model, C + 3)
    path = tmp_path / "text.state"
    state.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["text.state"]
    loaded = MegalodonState.load(path)
    assert isinstance(loaded, MegalodonState)
    assert loaded.layers[0].k.dtype == (torch.bfloat16 if autocast else torch.float32)
    assert loaded.layers[0].h.dtype == loaded.norm.mean.dtype == torch.float32
    assert_same(loaded, state)


def test_a_loaded_state_goes_on_where_the_saved_one_was(tmp_path):
    model = small_model().double().eval()
    state = state_after(model, C + 3)
    state.save(str(tmp_path / "state"))
    with torch.no_grad():
        want = model(tokens_of(5), state=state, return_state=True)
        got = model(tokens_of(5), state=MegalodonState.load(str(tmp_path / "state")), return_state=True)
    assert_same(got, want)


def test_saving_again_replaces_the_file_and_saves_states_that_carry_a_graph(tmp_path):
    model, path = small_model().double(), tmp_path / "state"
    state_after(model, 3).save(path)
    _, state = model(tokens_of(C + 3), return_state=True)
    assert state.layers[0].h.requires_grad
    state.save(path)
    assert_same(MegalodonState.load(path), state.detach())
    assert len(list(tmp_path.iterdir())) == 1


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    model, path = small_model().double(), tmp_path / "state"
    state = state_after(model, 3)
    state.save(path)

    def fails(tensors, filename, metadata):
        filename.write_bytes(b"half")
        raise OSError("the disk is full")

    monkeypatch.setattr("safetensors.torch.save_file", fails)
    with pytest.raises(OSError, match="the disk is full"):
        state_after(model, 5).save(path)
    assert_same(MegalodonState.load(path), state)


@pytest.mark.parametrize("missing", ["position", "norm.mean", "layers.0.h", "layers.1.norm.count", "layers."])
def test_a_file_that_lacks_a_tensor_is_refused(missing, tmp_path):
    path = tmp_path / "state"
    state_after(small_model().double(), 3).save(path)
    save_file({name: t for name, t in load_file(path).items() if not name.startswith(missing)}, path)
    with pytest.raises(ValueError, match=re.escape(f"{path} does not hold the state of a Megalodon")):
        MegalodonState.load(path)


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "weights"
    save_file(small_model().double().state_dict(), path)
    with pytest.raises(ValueError, match=re.escape(f"{path} does not hold the state of a Megalodon")):
        MegalodonState.load(path)


def test_a_file_that_is_no_safetensors_file_is_refused(tmp_path):
    path = tmp_path / "text"
    path.write_text("Call me Ishmael.")
    with pytest.raises(ValueError, match=re.escape(f"{path} must be a whole safetensors file, but: ")):
        MegalodonState.load(path)


def test_shapes_do_not_depend_on_how_much_was_read():
    model = small_model()
    want = [(t.shape, t.dtype) for t in pytree.tree_leaves(model.empty_state(2))]
    for length in (1, C - 1, C, C + 1, 3 * C + 2):
        assert [(t.shape, t.dtype) for t in pytree.tree_leaves(state_after(model, length))] == want


@pytest.mark.parametrize("length", [1, C, 2 * C + 3])
def test_the_empty_state_is_the_start(length):
    model = small_model().double().eval()
    with torch.no_grad():
        want = model(tokens_of(length), return_state=True)
        got = model(tokens_of(length), state=model.empty_state(2), return_state=True)
    for a, b in zip(pytree.tree_leaves(got), pytree.tree_leaves(want), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rows", [[1, 1, 0], [2], [2, 0, 1], torch.tensor([0, 2, 2, 1])], ids=str)
def test_selected_rows_go_on_as_themselves(rows):
    model = small_model().double().eval()
    state, more = state_after(model, C + 3, batch=3), tokens_of(C + 2, batch=3, seed=1)
    with torch.no_grad():
        want, after = model(more, state=state, return_state=True)
        got, selected_after = model(more[rows], state=state.select(rows), return_state=True)
    torch.testing.assert_close(got, want[rows], rtol=1e-10, atol=1e-12)
    for a, b in zip(pytree.tree_leaves(selected_after), pytree.tree_leaves(after.select(rows)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_to_moves_every_tensor_and_keeps_dtypes():
    state = state_after(small_model(), 3)
    moved = state.to("meta")
    assert isinstance(moved, MegalodonState)
    for a, b in zip(pytree.tree_leaves(moved), pytree.tree_leaves(state), strict=True):
        assert (a.device.type, a.dtype, a.shape) == ("meta", b.dtype, b.shape)


def test_detach_cuts_the_graph():
    _, state = small_model().double()(tokens_of(C + 3), return_state=True)
    floating = [t for t in pytree.tree_leaves(state) if t.is_floating_point()]
    assert all(t.requires_grad for t in floating)
    assert not any(t.requires_grad for t in pytree.tree_leaves(state.detach()))
    assert_same(state.detach(), state)


@pytest.mark.parametrize("part", ["norm", "h", "k", "v", "final_norm"])
def test_every_part_of_the_state_carries_a_gradient_to_earlier_tokens(part):
    """All parts but one are detached; what reaches the embedding of the first piece's tokens came through that one."""
    model = small_model().double()
    early, late = torch.full((1, 3), 3), torch.full((1, 2), 7)
    _, state = model(early, return_state=True)
    cut = state.detach()
    if part == "final_norm":
        state = cut._replace(norm=state.norm)
    else:
        layers = (
            kept._replace(**{part: getattr(layer, part)}) for kept, layer in zip(cut.layers, state.layers, strict=True)
        )
        state = cut._replace(layers=tuple(layers))
    logits, _ = model(late, state=state, return_state=True)
    logits.square().sum().backward()
    assert model.tok_embeddings.weight.grad[3].abs().max() > 1e-9


def test_no_gradient_reaches_earlier_tokens_through_a_detached_state():
    model = small_model().double()
    early, late = torch.full((1, 3), 3), torch.full((1, 2), 7)
    _, state = model(early, return_state=True)
    logits, _ = model(late, state=state.detach(), return_state=True)
    logits.square().sum().backward()
    gradient = model.tok_embeddings.weight.grad
    assert torch.equal(gradient[3], torch.zeros_like(gradient[3]))
    assert gradient[7].abs().max() > 0


def test_decoding_under_inference_mode():
    model, text = small_model().double().eval(), tokens_of(2 * C + 1)
    with torch.inference_mode():
        want = model(text)
        logits, state = model(text[:, :3], return_state=True)
        steps = [logits]
        for token in text[:, 3:].split(1, 1):
            logits, state = model(token, state=state, return_state=True)
            steps.append(logits)
    torch.testing.assert_close(torch.cat(steps, 1), want, rtol=1e-10, atol=1e-12)


def with_layer(state, i, **fields):
    layers = list(state.layers)
    layers[i] = layers[i]._replace(**fields)
    return state._replace(layers=tuple(layers))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s._replace(layers=s.layers[:1]), "the state must have `n_layers` = 2 layers, but has 1"),
        (lambda s: s.select([0]), "`layers[0].h` must have shape (2, 12, 3, 2), but has (1, 12, 3, 2)"),
        (lambda s: s.select([0, 1, 1]), "`layers[0].h` must have shape (2, 12, 3, 2), but has (3, 12, 3, 2)"),
        (
            lambda s: with_layer(s, 1, h=torch.zeros(2, 12, 4, 2).double()),
            "`layers[1].h` must have shape (2, 12, 3, 2), but has (2, 12, 4, 2)",
        ),
        (
            lambda s: with_layer(s, 1, k=torch.zeros(2, 2 * C, 2, 4).double()),
            "`layers[1].k` must have shape (2, 8, 2, 4), but has (2, 16, 2, 4)",
        ),
        (
            lambda s: with_layer(s, 0, v=torch.zeros(2, C, 2, 9).double()),
            "`layers[0].v` must have shape (2, 8, 2, 10), but has (2, 8, 2, 9)",
        ),
        (lambda s: s._replace(position=s.position[:1]), "`position` must have shape (2,), but has (1,)"),
        (
            lambda s: with_layer(s, 0, norm=s.norm._replace(mean=torch.zeros(2, 4).double())),
            "`state.mean` must have shape (2, 3), but has (2, 4)",
        ),
    ],
)
def test_a_state_of_another_model_is_refused(change, message):
    model = small_model().double()
    state = state_after(model, 3)
    model(tokens_of(2), state=state, return_state=True)
    with pytest.raises(ValueError, match=re.escape(message)):
        model(tokens_of(2), state=change(state), return_state=True)
