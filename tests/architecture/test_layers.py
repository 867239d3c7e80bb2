"""The package's layers, read from its imports, each importing only what stands to its right, and what else holds for
every source: cli -> bench -> planning -> titan -> {parallel, checkpoint} -> model -> {ops -> kernels, data, files}.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "megalodon_plugin"
KERNELS = ROOT / "kernels"  # installed as megalodon_plugin.kernels
OURS = "megalodon_plugin"
SOURCES = sorted([*PACKAGE.rglob("*.py"), *KERNELS.rglob("*.py")])
CUDA = sorted([*KERNELS.rglob("*.cu"), *KERNELS.rglob("*.cuh")])
TESTS = sorted((ROOT / "tests").rglob("*.py"))
MAY_IMPORT = {
    "": set(),  # the package's own __init__
    "files": set(),
    "kernels": set(),
    "data": {"files"},
    "ops": {"kernels", "files"},
    "model": {"ops", "data", "files"},
    "parallel": {"model", "ops", "data", "files"},
    "checkpoint": {"model", "ops", "data", "files"},
    "titan": {"parallel", "checkpoint", "model", "ops", "data", "files"},
    "planning": {"titan", "parallel", "checkpoint", "model", "ops", "data", "files"},
    "bench": {"planning", "titan", "parallel", "checkpoint", "model", "ops", "kernels", "data", "files"},
    "cli": {"bench", "planning", "titan", "parallel", "checkpoint", "model", "ops", "kernels", "data", "files"},
}
IMPORTS_TORCHTITAN = {"titan", "planning", "bench", "cli"}
# Parameters may be sharded by the host: initialisation knows the sharded tensor type, and nothing else of ranks.
IMPORTS_DISTRIBUTED = {"model/init.py": {"torch.distributed.tensor"}}
MOST_LINES = 400
MACHINE_PATH = re.compile(r"""["'`\s(=](/(?:home|Users|work|mnt|root|opt|scratch|data)/\w)""")


def label(path):
    return path.relative_to(ROOT).as_posix()


def module_path(path):
    """Where a source lies when it is installed, relative to the package."""
    return path.relative_to(ROOT) if path.is_relative_to(KERNELS) else path.relative_to(PACKAGE)


def layer_of(path):
    parts = module_path(path).parts
    return parts[0] if len(parts) > 1 else "" if path.stem == "__init__" else path.stem


def imported_modules(source, package):
    """Absolute names of what a source imports anywhere, in functions too; `from a import b` gives a and a.b."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                kept = parents[: len(parents) - node.level + 1]
                base = ".".join([*kept, base] if base else kept)
            names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            names |= {arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)}
    return names


def imports_of(path):
    installed = OURS / module_path(path) if path in SOURCES else path.relative_to(ROOT)
    return imported_modules(path.read_text(), ".".join(installed.parent.parts))


def starts(name, prefix):
    return name == prefix or name.startswith(prefix + ".")


each_source = pytest.mark.parametrize("path", SOURCES, ids=label)


def test_the_package_is_found():
    assert {"ops", "model", "checkpoint", "titan", "cli", "kernels"} <= {layer_of(path) for path in SOURCES}
    assert CUDA


@each_source
def test_a_layer_imports_only_what_stands_to_its_right(path):
    layer = layer_of(path)
    assert layer in MAY_IMPORT, f"{layer} is no layer of the house"
    imported = {name.split(".")[1] for name in imports_of(path) if name.startswith(OURS + ".")}
    layers = imported & (MAY_IMPORT.keys() - {layer})
    assert layers <= MAY_IMPORT[layer], f"{label(path)} imports {sorted(layers - MAY_IMPORT[layer])}"


@each_source
def test_the_host_is_imported_by_its_adapter_and_the_commands_alone(path):
    if layer_of(path) not in IMPORTS_TORCHTITAN:
        assert not {name for name in imports_of(path) if starts(name, "torchtitan")}


@pytest.mark.parametrize("path", [path for path in SOURCES if layer_of(path) in ("ops", "model")], ids=label)
def test_ops_and_model_never_see_a_rank(path):
    allowed = IMPORTS_DISTRIBUTED.get(module_path(path).as_posix(), set())
    found = {name for name in imports_of(path) if starts(name, "torch.distributed")}
    assert not {name for name in found if not any(starts(name, prefix) for prefix in allowed)}


@pytest.mark.parametrize("path", [path for path in SOURCES if layer_of(path) == "ops"], ids=label)
def test_ops_never_see_a_module(path):
    names = {getattr(node, "attr", getattr(node, "id", None)) for node in ast.walk(ast.parse(path.read_text()))}
    assert not names & {"Module", "Parameter"}


@pytest.mark.parametrize("path", sorted((ROOT / "tests" / "reference").rglob("[!t]*.py")), ids=label)
def test_the_oracle_imports_nothing_of_ours(path):
    assert not {name for name in imports_of(path) if starts(name, OURS)}


@pytest.mark.parametrize("path", [path for path in SOURCES if layer_of(path) == "kernels"], ids=label)
def test_kernels_import_nothing_of_ours(path):
    names = {name for name in imports_of(path) if starts(name, OURS)}
    assert all(starts(name, f"{OURS}.kernels") for name in names)


@pytest.mark.parametrize("path", CUDA, ids=label)
def test_kernels_include_nothing_but_each_other(path):
    """No CUDA header: the compiler that users have comes without them."""
    included = re.findall(r"^\s*#\s*include\s*(\S+)", path.read_text(), re.MULTILINE)
    assert set(included) <= {f'"{header.relative_to(KERNELS)}"' for header in CUDA if header.suffix == ".cuh"}


@pytest.mark.parametrize("path", [*SOURCES, *TESTS, *CUDA], ids=label)
def test_no_file_is_too_long(path):
    assert len(path.read_text().splitlines()) <= MOST_LINES


@pytest.mark.parametrize("path", [*SOURCES, *TESTS, *CUDA, *sorted((ROOT / "train_configs").glob("*.toml"))], ids=label)
def test_no_path_of_a_machine(path):
    assert MACHINE_PATH.findall(path.read_text()) == []


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import torchtitan.train", "torchtitan.train"),
        ("def f():\n    from torchtitan import train", "torchtitan.train"),
        ("from ..titan import cpu", "megalodon_plugin.titan.cpu"),
        ("from .. import titan", "megalodon_plugin.titan"),
        ("from . import checks", "megalodon_plugin.ops.checks"),
        ("from .checks import compute_dtype", "megalodon_plugin.ops.checks"),
        ("import importlib\nimportlib.import_module('torchtitan')", "torchtitan"),
    ],
)
def test_the_reader_of_imports_sees(source, name):
    assert name in imported_modules(source, "megalodon_plugin.ops")


def test_the_pattern_for_paths_of_a_machine():
    root = "/"
    assert MACHINE_PATH.search(f'open("{root}home/someone/x")')
    assert not MACHINE_PATH.search("a/data/b and https://host/data/x, D/G, /dev/null, d mu/data")
