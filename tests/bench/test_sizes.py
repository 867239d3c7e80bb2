"""The models of benchmarks."""

import ast
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import megalodon_plugin.titan  # noqa: F401  chooses the device before torchtitan does

# isort: split
from torchtitan.models.llama3 import Transformer, TransformerModelArgs

from megalodon_plugin.bench import sizes
from megalodon_plugin.bench.sizes import LLAMA_OF_PRESET, SIZES, VOCABULARY
from megalodon_plugin.model import PRESETS, Megalodon


@pytest.mark.parametrize("name", SIZES)
def test_both_models_of_a_size_have_about_as_many_parameters(name: str) -> None:
    options = SIZES[name].options("megalodon")
    cfg = replace(PRESETS[options.pop("flavor")], vocab_size=VOCABULARY, **options)
    args = TransformerModelArgs(vocab_size=VOCABULARY, **SIZES[name].options("llama"))
    with torch.device("meta"):
        models = Megalodon(cfg), Transformer(args)
    megalodon, llama = (sum(p.numel() for p in model.parameters()) for model in models)
    assert megalodon == pytest.approx(llama, rel=0.1)


def test_a_preset_has_the_llama_of_its_full_depth() -> None:
    assert LLAMA_OF_PRESET["paper_7B"].n_layers == PRESETS["paper_7B"].n_layers


def test_the_names_cost_no_import_of_torch() -> None:
    nodes = ast.walk(ast.parse(Path(sizes.__file__).read_text()))
    imports = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    assert {getattr(node, "module", None) for node in imports} == {"dataclasses", "typing"}
