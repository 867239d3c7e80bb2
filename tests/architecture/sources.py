"""The repository's sources, and what each imports: read, not run."""

import ast
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OURS = "megalodon_plugin"
PACKAGE = ROOT / OURS
KERNELS = ROOT / "kernels"  # installed as megalodon_plugin.kernels
SOURCES = sorted([*PACKAGE.rglob("*.py"), *KERNELS.rglob("*.py")])
CUDA = sorted([*KERNELS.rglob("*.cu"), *KERNELS.rglob("*.cuh")])
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def label(path: Path) -> str:
    """How a message names a file."""
    return path.relative_to(ROOT).as_posix()


def inside_package(path: Path) -> Path:
    """Where a source lies when it is installed, relative to the package."""
    return path.relative_to(ROOT) if path.is_relative_to(KERNELS) else path.relative_to(PACKAGE)


def module_name(path: Path) -> str:
    return ".".join((OURS / inside_package(path)).with_suffix("").parts).removesuffix(".__init__")


def layer_of(module: str) -> str:
    """The folder of the package that a module lies in, or the module itself; "" for the package's own `__init__`."""
    return f"{module}.".split(".")[1]


def imported_names(source: str, package: str) -> set[str]:
    """Absolute names of what a source imports anywhere, in functions too; `from a import b` gives a.b."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = parents[: len(parents) - node.level + 1] if node.level else []
            names |= {".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            names |= {arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)}
    return names


def imports_of(path: Path) -> set[str]:
    installed = OURS / inside_package(path) if path in SOURCES else path.relative_to(ROOT)
    return imported_names(path.read_text(), ".".join(installed.parent.parts))


def is_in(name: str, module: str) -> bool:
    """Whether a name is the module's, or that of something in it."""
    return name == module or name.startswith(module + ".")


def module_graph() -> dict[str, set[str]]:
    """Module -> the modules of the package that it imports."""
    modules = {module_name(path): path for path in SOURCES}

    def module_of(name: str) -> str | None:
        while name and name not in modules:
            name = name.rpartition(".")[0]
        return name or None

    return {
        module: {found for name in imports_of(path) if (found := module_of(name)) and found != module}
        for module, path in modules.items()
    }


def among_children(graph: dict[str, set[str]], package: str) -> dict[str, set[str]]:
    """The graph of the modules and folders that lie in a package, each of them one node."""

    def child(module: str) -> str | None:
        rest = module.removeprefix(f"{package}.")
        return None if rest == module else rest.split(".")[0]

    found: dict[str, set[str]] = {}
    for module, imported in graph.items():
        if own := child(module):
            found.setdefault(own, set()).update(other for name in imported if (other := child(name)) and other != own)
    return found


def packages(graph: Iterable[str]) -> set[str]:
    return {module.rpartition(".")[0] for module in graph} - {""}
