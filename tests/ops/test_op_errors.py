"""What the ops refuse, and that the message names the argument and the value."""

import re

import pytest
import torch

from megalodon_plugin.ops import NormState, cema, chunk_attention, timestep_norm
from megalodon_plugin.ops.cema import cema_definition
from megalodon_plugin.ops.chunk_attention import chunk_attention_definition
from megalodon_plugin.ops.timestep_norm import timestep_norm_definition

B, L, D, G, N, H, E, W, C = 2, 5, 6, 3, 4, 2, 4, 3, 4

# (an argument and its bad value, what the message holds)
ACTIVATION_CASES = [
    (torch.zeros(B, D), "`x` must have 3 dimensions, but has shape (2, 6)"),
    (torch.zeros(B, 0, D), "`x` must hold at least one timestep (dimension 1), but has shape (2, 0, 6)"),
    (torch.zeros(B, L, D, dtype=torch.float16), "`x` must not be float16: running statistics"),
    (torch.zeros(B, L, D, dtype=torch.float16), "use bfloat16"),
    (torch.zeros(B, L, D, dtype=torch.int64), "`x` must be bfloat16, float32 or float64, but is torch.int64"),
]


def refuses(message, function, *args, **kwargs):
    with pytest.raises(ValueError, match=re.escape(message)):
        function(*args, **kwargs)


def cema_arguments(**changes):
    arguments = {
        "x": torch.zeros(B, L, D),
        "alpha": torch.zeros(D, N, 1),
        "delta": torch.zeros(D, N, 1),
        "theta": torch.zeros(D, 1, 1),
        "gamma": torch.zeros(D, N, 2),
        "omega": torch.zeros(D, 1),
        "h0": torch.zeros(B, D, N, 2),
    }
    return {**arguments, **changes}


CEMA_CASES = [
    *[({"x": x}, message) for x, message in ACTIVATION_CASES],
    ({"x": torch.zeros(B, L, D + 1)}, "`alpha` must have shape (7, 4, 1), but has (6, 4, 1)"),
    ({"alpha": torch.zeros(D, N)}, "`alpha` must have shape (D, N, 1), but has (6, 4)"),
    ({"alpha": torch.zeros(D + 1, N, 1)}, "`alpha` must have shape (6, 4, 1), but has (7, 4, 1)"),
    ({"delta": torch.zeros(D, N + 1, 1)}, "`delta` must have shape (6, 4, 1), but has (6, 5, 1)"),
    ({"theta": torch.zeros(D, 1)}, "`theta` must have shape (6, 1, 1), but has (6, 1)"),
    ({"gamma": torch.zeros(D, N)}, "`gamma` must have shape (6, 4, 2), but has (6, 4)"),
    ({"omega": torch.zeros(D)}, "`omega` must have shape (6, 1), but has (6,)"),
    ({"h0": torch.zeros(B + 1, D, N, 2)}, "`h0` must have shape (2, 6, 4, 2), but has (3, 6, 4, 2)"),
    ({"h0": torch.zeros(B, D, N, dtype=torch.complex64)}, "`h0` must have shape (2, 6, 4, 2), but has (2, 6, 4)"),
    (
        {"h0": torch.zeros(B, D, N, 2, dtype=torch.float64)},
        "`h0` must have alpha's dtype torch.float32, but is torch.float64",
    ),
    ({"cema_input": "rotated"}, "`cema_input` must be one of ('released', 'paper'), but is 'rotated'"),
]


@pytest.mark.parametrize("op", [cema, cema_definition], ids=["op", "definition"])
@pytest.mark.parametrize(("changes", "message"), CEMA_CASES)
def test_cema(changes, message, op):
    refuses(message, op, **cema_arguments(**changes))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["alpha", "delta", "theta", "gamma", "omega", "h0"])
def test_cema_refuses_rounded_parameters(name, dtype):
    arguments = cema_arguments()
    arguments[name] = arguments[name].to(dtype)
    refuses(f"`{name}` must be float32 (float64 in a float64 model), but is {dtype}", cema, **arguments)


def norm_arguments(**changes):
    arguments = {"x": torch.zeros(B, L, D), "weight": torch.zeros(D), "bias": torch.zeros(D), "num_groups": G}
    return {**arguments, **changes}


def norm_state(**changes):
    fields = {"count": torch.zeros(B, dtype=torch.int64), "mean": torch.zeros(B, G), "var": torch.zeros(B, G)}
    return NormState(**{**fields, **changes})


NORM_CASES = [
    *[({"x": x}, message) for x, message in ACTIVATION_CASES],
    ({"num_groups": 4}, "`num_groups` must divide the dimension 6 of x, but is 4"),
    ({"num_groups": 0}, "`num_groups` must divide the dimension 6 of x, but is 0"),
    ({"num_groups": -3}, "`num_groups` must divide the dimension 6 of x, but is -3"),
    ({"weight": torch.zeros(D + 1)}, "`weight` must have shape (6,), but has (7,)"),
    ({"bias": torch.zeros(1, D)}, "`bias` must have shape (6,), but has (1, 6)"),
    ({"weight": torch.zeros(D).bfloat16()}, "`weight` must be float32 (float64 in a float64 model), but is torch.bf"),
    ({"bias": torch.zeros(D).half()}, "`bias` must be float32 (float64 in a float64 model), but is torch.float16"),
    (
        {"state": norm_state(count=torch.zeros(B + 1, dtype=torch.int64))},
        "`state.count` must be int64 of shape (2,), but is torch.int64 of (3,)",
    ),
    (
        {"state": norm_state(count=torch.zeros(B))},
        "`state.count` must be int64 of shape (2,), but is torch.float32 of (2,)",
    ),
    ({"state": norm_state(mean=torch.zeros(B, D))}, "`state.mean` must have shape (2, 3), but has (2, 6)"),
    ({"state": norm_state(var=torch.zeros(G))}, "`state.var` must have shape (2, 3), but has (3,)"),
    (
        {"state": norm_state(mean=torch.zeros(B, G).bfloat16())},
        "`state.mean` must be float32 (float64 in a float64 model), but is torch.bfloat16",
    ),
    (
        {"state": norm_state(var=torch.zeros(B, G).half())},
        "`state.var` must be float32 (float64 in a float64 model), but is torch.float16",
    ),
    (
        {"padding_mask": torch.zeros(B, L + 1, dtype=torch.bool)},
        "`padding_mask` must be bool of shape (2, 5), but is torch.bool of (2, 6)",
    ),
    (
        {"padding_mask": torch.zeros(B, L)},
        "`padding_mask` must be bool of shape (2, 5), but is torch.float32 of (2, 5)",
    ),
]


@pytest.mark.parametrize("op", [timestep_norm, timestep_norm_definition], ids=["op", "definition"])
@pytest.mark.parametrize(("changes", "message"), NORM_CASES)
def test_timestep_norm(changes, message, op):
    refuses(message, op, **norm_arguments(**changes))


def attention_arguments(**changes):
    arguments = {"q": torch.zeros(B, L, H, E), "k": torch.zeros(B, L, H, E), "v": torch.zeros(B, L, H, W)}
    return {**arguments, "chunk_size": C, **changes}


ATTENTION_CASES = [
    ({"q": torch.zeros(B, L, E)}, "`q` must have 4 dimensions, but has shape (2, 5, 4)"),
    ({"q": torch.zeros(B, 0, H, E)}, "`q` must hold at least one timestep (dimension 1), but has shape (2, 0, 2, 4)"),
    ({"q": torch.zeros(B, L, H, E).half()}, "`q` must not be float16"),
    ({"q": torch.zeros(B, L, H, E).int()}, "`q` must be bfloat16, float32 or float64, but is torch.int32"),
    ({"k": torch.zeros(B, L, H, E + 1)}, "`k` must have q's shape (2, 5, 2, 4), but has (2, 5, 2, 5)"),
    ({"v": torch.zeros(B, L, W)}, "`v` must have q's shape (2, 5, 2) before its last dimension, but has (2, 5, 3)"),
    ({"v": torch.zeros(B, L, H + 1, W)}, "`v` must have q's shape (2, 5, 2) before its last dimension"),
    (
        {"v": torch.zeros(B, L, H, W).double()},
        "`q`, `k` and `v` must have one dtype, but have torch.float32, torch.float32 and torch.float64",
    ),
    (
        {"k": torch.zeros(B, L, H, E).half()},
        "`q`, `k` and `v` must have one dtype, but have torch.float32, torch.float16 and torch.float32",
    ),
    ({"chunk_size": 0}, "`chunk_size` must be at least 1, but is 0"),
    ({"chunk_size": -4}, "`chunk_size` must be at least 1, but is -4"),
]


@pytest.mark.parametrize("op", [chunk_attention, chunk_attention_definition], ids=["op", "definition"])
@pytest.mark.parametrize(("changes", "message"), ATTENTION_CASES)
def test_chunk_attention(changes, message, op):
    refuses(message, op, **attention_arguments(**changes))


def test_the_arguments_that_the_cases_start_from_are_accepted():
    """Otherwise a case could be refused for another reason than its own."""
    assert cema(**cema_arguments())[0].shape == (B, L, D)
    assert timestep_norm(**norm_arguments(state=norm_state()))[0].shape == (B, L, D)
    assert chunk_attention(**attention_arguments()).shape == (B, L, H, W)
