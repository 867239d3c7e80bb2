"""The authors' chunk-parallel runs against one process: the concatenated logits, the losses, the summed gradients; and
each rank's own gradient, which one copy of the model per slice with a carried state must give."""

import copy

import pytest
import torch
import torch.nn.functional as F

from megalodon_plugin.checkpoint import from_authors, to_authors
from megalodon_plugin.model import Megalodon, MegalodonConfig

from support.golden_cases import F64_TOLERANCE, assert_close, case_names, config_kwargs, group, load

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


def released_model(info, tensors, dtype):
    cfg = MegalodonConfig(**config_kwargs(info["config"]))
    model = Megalodon(cfg)
    model.init_weights(buffer_device=None)
    model.load_state_dict(from_authors(group(tensors, "param."), cfg))
    return model.to(dtype)


def named_gradients(model):
    return to_authors({name: value.grad for name, value in model.named_parameters()})


def check_outputs(logits, info, tensors, dtype, what):
    """Logits, the losses in the authors' order (rank, batch, time), and their mean, which is returned."""
    tolerance = F64_TOLERANCE if dtype == torch.float64 else 1e-5
    assert_close({"logits": logits}, {"logits": tensors["f64.logits"]}, tolerance, what)
    losses = F.cross_entropy(logits.transpose(1, 2), tensors["targets"], reduction="none")  # (B, L)
    by_rank = losses.unflatten(1, (info["ranks"], -1)).transpose(0, 1).flatten()
    assert_close({"losses": by_rank}, {"losses": tensors["losses_gathered"]}, 1e-5, what)
    loss = losses.mean()
    assert abs(loss.item() - tensors["f64.loss"].item()) <= tolerance, what
    return loss


@DTYPES
@pytest.mark.parametrize("name", case_names("chunk_parallel"))
def test_one_process(name, dtype):
    info, tensors = load(name)
    model = released_model(info, tensors, dtype)
    check_outputs(model(tensors["tokens"]), info, tensors, dtype, name).backward()
    expected = group(tensors, "grad.")
    assert len(expected) == len(list(model.parameters()))
    assert_close(named_gradients(model), expected, 1e-4, f"{name} gradients")


@DTYPES
@pytest.mark.parametrize("name", case_names("chunk_parallel"))
def test_one_copy_per_slice(name, dtype):
    info, tensors = load(name)
    whole = released_model(info, tensors, dtype)
    copies = [copy.deepcopy(whole) for _ in range(info["ranks"])]
    slices, state = [], None
    for model, tokens in zip(copies, tensors["tokens"].chunk(info["ranks"], dim=1), strict=True):
        logits, state = model(tokens, state=state, return_state=True)
        slices.append(logits)
    check_outputs(torch.cat(slices, dim=1), info, tensors, dtype, name).backward()
    for rank, model in enumerate(copies):
        expected = group(tensors, f"rank{rank}.grad.")
        assert expected
        assert_close(named_gradients(model), expected, 1e-4, f"{name} rank {rank} gradients")
