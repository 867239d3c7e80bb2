"""Find and load the golden vectors of the authors' released code, and compare with them.

The folder is the one that MEGALODON_GOLDEN names, else `../shared/golden` from the repository root. Without it the
tests that need it are skipped. Each case is NAME.json (what it is) and NAME.safetensors (its tensors); `f64.*` is the
truth, a complex value is a trailing (real, imaginary) pair. Tolerances are those of the folder's README.
"""

import json
import os
from pathlib import Path

import pytest
import torch

FOLDER = Path(os.environ.get("MEGALODON_GOLDEN") or Path(__file__).resolve().parents[3] / "shared" / "golden")
PRESENT = FOLDER.is_dir()
ABSENT = f"no golden vectors: {FOLDER} is not a folder (set MEGALODON_GOLDEN)"
requires_golden = pytest.mark.skipif(not PRESENT, reason=ABSENT)

# What a float64 implementation meets, and below which a tensor counts as zero and is compared absolutely.
F64_TOLERANCE = 1e-10
ZERO_SCALE = 1e-12


def case_names(kind):
    """Names of the cases of one kind, for `pytest.mark.parametrize`; one skipped case where the folder is absent."""
    if not PRESENT:
        return [pytest.param("absent", marks=pytest.mark.skip(reason=ABSENT))]
    names = sorted(path.stem for path in FOLDER.glob("*.json") if json.loads(path.read_text())["kind"] == kind)
    if not names:
        raise RuntimeError(f"{FOLDER} holds no case of kind {kind!r}")
    return names


def load(name):
    """(the case's json, {name: tensor}), the tensors cloned so that they are aligned for complex views."""
    from safetensors.torch import load_file

    info = json.loads((FOLDER / f"{name}.json").read_text())
    return info, {key: value.clone() for key, value in load_file(FOLDER / f"{name}.safetensors").items()}


def group(tensors, prefix):
    """The tensors whose name starts with `prefix`, under the rest of their name."""
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}


def as_complex(pairs):
    """(..., 2) real pairs -> (...) complex."""
    return torch.view_as_complex(pairs.clone(memory_format=torch.contiguous_format))


def as_pairs(value):
    """(...) complex -> (..., 2) real pairs."""
    return torch.view_as_real(value.resolve_conj())


def leaf(value, dtype):
    """A fresh leaf of `dtype` that collects a gradient."""
    return value.detach().to(dtype).clone().requires_grad_(True)


def relative_error(a, b):
    """max|a - b| / max|b|, or max|a - b| where b is zero but for rounding. NaN stays NaN, so that it never passes."""
    assert a is not None, "there is no value to compare"
    assert a.shape == b.shape, f"shapes differ: {tuple(a.shape)} and {tuple(b.shape)}"
    if b.numel() == 0:
        return 0.0
    a, b = a.detach().double(), b.detach().double()
    difference, scale = (a - b).abs().max().item(), b.abs().max().item()
    return difference if scale < ZERO_SCALE else difference / scale


def assert_close(got, want, tolerance, what):
    """Every tensor of `want` is in `got` within `tolerance`; the message names each one that is not."""
    missing = sorted(set(want) - set(got))
    assert not missing, f"{what}: no value for {missing}"
    errors = {name: relative_error(got[name], want[name]) for name in want}
    bad = {name: error for name, error in errors.items() if not error <= tolerance}
    assert not bad, f"{what}: above {tolerance:g}: " + ", ".join(f"{name} {error:.3g}" for name, error in bad.items())


def config_kwargs(config, **changes):
    """MegalodonConfig's arguments from the released names of a golden model's configuration."""
    names = {
        "vocab_size": "vocab_size",
        "dim": "model_dim",
        "n_layers": "num_layers",
        "n_heads": "num_heads",
        "z_dim": "z_dim",
        "value_dim": "value_dim",
        "ffn_dim": "ffn_hidden_dim",
        "cema_ndim": "cema_ndim",
        "chunk_size": "chunk_size",
        "norm_groups": "norm_num_groups",
        "norm_eps": "norm_eps",
        "norm_affine": "norm_affine",
        "swiglu": "swiglu",
        "rescale_ffn": "rescale_nffn",
        "scale_embedding": "scale_emb",
        "tie_embedding": "share_emb",
    }
    kwargs = {ours: config[theirs] for ours, theirs in names.items() if theirs in config}
    kwargs["rope_theta"] = config.get("rope_base") or 10000.0
    return {**kwargs, **changes}
