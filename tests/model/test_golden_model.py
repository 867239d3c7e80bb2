"""The whole model against the authors' numbers: logits, loss, and the gradient of every parameter by name."""

import pytest
import torch
import torch.nn.functional as F

from megalodon_plugin.checkpoint import from_authors, to_authors
from megalodon_plugin.model import Megalodon, MegalodonConfig

from support.golden_cases import F64_TOLERANCE, assert_close, case_names, config_kwargs, group, load

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


def released_model(info, tensors, dtype):
    """Our model with a case's parameters, read through the checkpoint converter."""
    cfg = MegalodonConfig(**config_kwargs(info["config"]))
    model = Megalodon(cfg)
    model.init_weights(buffer_device=None)
    model.load_state_dict(from_authors(group(tensors, "param."), cfg))
    return model.to(dtype)


@DTYPES
@pytest.mark.parametrize("name", case_names("model"))
def test_model(name, dtype):
    info, tensors = load(name)
    exact = dtype == torch.float64
    tolerance, gradient_tolerance = (F64_TOLERANCE, F64_TOLERANCE) if exact else (1e-5, 1e-4)
    model = released_model(info, tensors, dtype)
    compared = 0
    for length in info["lengths"]:
        case = group(tensors, f"L{length['L']}.")
        what = f"{name} L {length['L']}"
        model.zero_grad(set_to_none=True)
        logits = model(case["tokens"])
        assert logits.dtype == dtype
        loss = F.cross_entropy(logits.flatten(0, 1), case["targets"].flatten())
        assert_close({"logits": logits}, {"logits": case["f64.logits"]}, tolerance, what)
        assert abs(loss.item() - case["f64.loss"].item()) <= tolerance, what

        loss.backward()
        gradients = to_authors({key: value.grad for key, value in model.named_parameters()})
        assert_close(gradients, group(case, "f64.grad."), gradient_tolerance, f"{what} gradients")
        stored = group(case, "grad.")  # the authors' float32 gradients, at their own rounding
        assert_close(gradients, stored, 1e-4, f"{what} float32 gradients")
        assert not stored or set(stored) >= {key for key in gradients if is_parameter(key, info)}, what
        compared += len(stored)
    assert compared, f"{name} compared no gradient"


def is_parameter(name, info):
    """Whether the authors' name belongs to a parameter of its own: no buffer, no second name of a tied weight."""
    if "prior_" in name or name == "rope.freqs":
        return False
    return not (info["config"]["share_emb"] and name == "output.output.weight")


@pytest.mark.parametrize("name", case_names("model"))
def test_evaluation_gives_the_same_logits(name):
    info, tensors = load(name)
    model = released_model(info, tensors, torch.float32).eval()
    case = group(tensors, f"L{info['lengths'][0]['L']}.")
    with torch.no_grad():
        logits = model(case["tokens"])
    assert logits.dtype == torch.float32
    assert_close({"logits": logits}, {"logits": case["f64.logits"]}, 1e-5, name)
