"""The package's layers, read from its imports: each imports only what stands below it, and there is no circle."""

import ast
import graphlib

import pytest

from architecture.sources import (
    CUDA,
    OURS,
    ROOT,
    SOURCES,
    among_children,
    imported_names,
    imports_of,
    is_in,
    label,
    layer_of,
    module_graph,
    module_name,
    packages,
)

LAYERS = (  # those of a row do not see each other
    {"cli"},
    {"bench"},
    {"planning"},
    {"titan"},
    {"parallel", "checkpoint"},
    {"model"},
    {"ops", "data"},
    {"files"},
    {""},  # the package's own __init__
    {"kernels"},
)
SEE_KERNELS = {"ops", "bench", "cli"}
SEE_TORCHTITAN = {"titan", "planning", "bench", "cli"}
# Parameters may be sharded by the host: initialisation knows the sharded tensor type, and nothing else of ranks.
SEE_DISTRIBUTED = {"megalodon_plugin.model.init": "torch.distributed.tensor"}


def may_import(layer: str) -> set[str]:
    (row,) = (number for number, layers in enumerate(LAYERS) if layer in layers)
    below = {layer}.union(*LAYERS[row + 1 :])
    return below if layer in SEE_KERNELS | {"kernels"} else below - {"kernels"}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Nodes of which each needs the one before it, the first being the last; empty if there is no circle."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_every_source_belongs_to_a_layer():
    assert {layer_of(module_name(path)) for path in SOURCES} == set().union(*LAYERS)
    assert CUDA


def test_a_layer_imports_only_what_stands_below_it():
    wrong = [
        f"{module} imports {imported}"
        for module, all_imported in module_graph().items()
        for imported in all_imported
        if layer_of(imported) not in may_import(layer_of(module))
    ]
    assert not wrong


def test_no_modules_import_each_other_in_a_circle():
    assert not circle(module_graph())


def test_no_folders_import_each_other_in_a_circle():
    graph = module_graph()
    assert not [found for package in packages(graph) if (found := circle(among_children(graph, package)))]


def test_the_host_is_imported_by_its_adapter_and_what_stands_above_alone():
    wrong = [
        label(path)
        for path in SOURCES
        if layer_of(module_name(path)) not in SEE_TORCHTITAN
        and any(is_in(name, "torchtitan") for name in imports_of(path))
    ]
    assert not wrong


def test_ops_and_model_never_see_a_rank():
    wrong = [
        f"{label(path)} imports {name}"
        for path in SOURCES
        if layer_of(module_name(path)) in ("ops", "model")
        for name in imports_of(path)
        if is_in(name, "torch.distributed") and not is_in(name, SEE_DISTRIBUTED.get(module_name(path), "nothing"))
    ]
    assert not wrong


def test_ops_never_see_a_module():
    wrong = [
        f"{label(path)} names {name}"
        for path in SOURCES
        if layer_of(module_name(path)) == "ops"
        for node in ast.walk(ast.parse(path.read_text()))
        if (name := getattr(node, "attr", getattr(node, "id", None))) in ("Module", "Parameter")
    ]
    assert not wrong


def test_the_oracle_imports_nothing_of_ours():
    oracle = [path for path in (ROOT / "tests" / "reference").rglob("*.py") if not path.name.startswith("test_")]
    assert oracle
    assert not [label(path) for path in oracle if any(is_in(name, OURS) for name in imports_of(path))]


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import torchtitan.train", "torchtitan.train"),
        ("def f():\n    from torchtitan import train", "torchtitan.train"),
        ("from ..titan import cpu", "megalodon_plugin.titan.cpu"),
        ("from .. import titan", "megalodon_plugin.titan"),
        ("from . import checks", "megalodon_plugin.ops.checks"),
        ("from .checks import compute_dtype", "megalodon_plugin.ops.checks.compute_dtype"),
        ("import importlib\nimportlib.import_module('torchtitan')", "torchtitan"),
    ],
)
def test_the_reader_of_imports_sees(source, name):
    assert imported_names(source, "megalodon_plugin.ops") - {"importlib"} == {name}


def test_circles_are_found():
    alone: dict[str, set[str]] = {"p": {"p.a.x"}, "p.a.x": {"p.b.y"}, "p.b.y": set(), "p.b.z": set()}
    assert not circle(alone) and not circle(among_children(alone, "p"))
    of_folders = alone | {"p.b.z": {"p.a.w"}, "p.a.w": set()}
    assert not circle(of_folders) and set(circle(among_children(of_folders, "p"))) == {"a", "b"}
    of_modules = alone | {"p.b.y": {"p.b.z"}, "p.b.z": {"p.a.x"}}
    assert set(circle(of_modules)) == {"p.a.x", "p.b.y", "p.b.z"}
    graph = module_graph()
    assert f"{OURS}.ops.checks" in graph[f"{OURS}.ops.cema.op"]
    assert {"cli", "titan", "kernels"} <= among_children(graph, OURS).keys()
